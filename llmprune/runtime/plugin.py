"""Packed folders in `from_pretrained` of transformers, as a quantisation method of the name `llmprune`.

Linear layers become packed ones, whose buffers have the names in the file, so the loader of transformers
fills them. What it would convert (experts that it merges into stacks) is taken from the files by ourselves.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.packed_entry import METHOD, VERSION
from llmprune.checkpoint.packed_tensor import PARTS, Layout, check, read_parts
from llmprune.checkpoint.reader import Checkpoint
from llmprune.common.messages import shown
from llmprune.kernels.layout import GROUP
from llmprune.model.conversion import Group, groups_of, renamed
from llmprune.model.skeleton import Skeleton
from llmprune.model.target import Target
from llmprune.model.targets import all_targets
from llmprune.runtime.layers import PackedLinear, together
from llmprune.runtime.standins import PackedStack, Rows, device_near, follow, move_stacks, starts_of


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The entry `quantization_config` of a packed folder; see `checkpoint.packed_entry.entry_of`.

    Args:
        dequantize: load ordinary layers with dense weights.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        version: int = VERSION,
        bits: int = 16,
        group: int = GROUP,
        matrices: Any = None,
        dequantize: bool = False,
        **more: Any,
    ) -> None:
        self.quant_method = quant_method
        self.version, self.bits, self.group = version, bits, group
        self.matrices = {} if matrices is None else matrices  # checked when the files are there
        self.dequantize = dequantize
        for name, value in more.items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The entry as config.json has it."""
        return {name: value for name, value in super().to_dict().items() if name != "dequantize"}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config given to `from_pretrained` changes of the folder's own."""
        return {"dequantize": self.dequantize}


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Prepares a model for the weights of a packed folder, and takes those that its loader cannot."""

    requires_calibration = False

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._own: list[Group] = []  # taken from the files by ourselves
        self._dropped: set[tuple[str, ...]] = set()  # source patterns of converters that must not see them
        self._owners: dict[str, tuple[nn.Module, str, torch.Size, torch.dtype]] = {}
        self._names: dict[str, str] = {}  # of their tensors in the files -> after renaming
        self._kept: dict[str, Tensor] = {}  # what they were made of, by the names that saving turns back
        self._source: Packed | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a model that is not packed yet."""
        if not self.pre_quantized:
            raise ValueError(
                "PackedConfig loads folders that are packed; llmprune convert PATH --to packed makes one"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        folder = _folder_of(checkpoint_files)
        checkpoint, config = Checkpoint(folder), self.quantization_config
        self._source = Packed(checkpoint, config.to_dict())
        layouts = self._source.layouts
        groups = groups_of(model, self._source.tensors)
        packed = [group for group in groups if any(name in layouts for name in group.tensors)]
        for group in packed:
            owner, leaf = _owner(model, group.parameters[0])
            _check_shape(getattr(owner, leaf), group, layouts)
            linear = isinstance(owner, (nn.Linear, Conv1D)) and leaf == "weight"
            if group.converter is None and linear and not config.dequantize:
                name = group.tensors[0]
                kept = checkpoint.tensors[name].shape[0]
                layer = PackedLinear(layouts[name], kept, owner.bias)
                model.set_submodule(group.parameters[0].removesuffix(".weight"), layer)
            else:
                self._own.append(group)
        self._dropped = {_patterns(group) for group in self._own if group.converter is not None}
        beside = [g for g in groups if g.converter is not None and _patterns(g) in self._dropped]
        self._own = list(dict.fromkeys([*self._own, *beside]))
        self._take_away(model, checkpoint)
        return model

    def _take_away(self, model: Any, checkpoint: Checkpoint) -> None:
        """Take the parameters that are ours from the model, and their tensors from its loader."""
        names = [name for group in self._own for name in group.tensors]
        parts = [part for name in names for part in _stored(name, self._layouts, checkpoint)]
        self._names = renamed(model, parts)
        both = {*self._names, *self._names.values()}
        patterns = {re.sub(r"\d+", r"\\d+", re.escape(name)) for name in both}
        unexpected = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        model._keys_to_ignore_on_load_unexpected = unexpected | {f"^{pattern}$" for pattern in patterns}
        for group in self._own:
            for name in group.parameters:
                owner, leaf = _owner(model, name)
                parameter = owner._parameters.pop(leaf)
                # transformers draws random weights for what it misses; this it may fill as it likes.
                owner.__dict__[leaf] = torch.empty(0, dtype=torch.float32, device="cpu")
                self._owners[name] = owner, leaf, parameter.shape, parameter.dtype

    @property
    def _layouts(self) -> dict[str, Layout]:
        assert self._source is not None
        return self._source.layouts

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Leave out the converters of what we take ourselves."""
        return [
            entry
            for entry in weight_conversions
            if tuple(getattr(entry, "source_patterns", ())) not in self._dropped
        ]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                module.check(name)
            together([layer for layer in module.children() if isinstance(layer, PackedLinear)])
        if self._own:
            self._fill(model)
        return model

    def _fill(self, model: Any) -> None:
        """Put stacks that unpack their matrices, or dense parameters, in place of what was taken away."""
        assert self._source is not None
        folder = self._source.source.folder
        mapped = _Mapped(folder, self._source.source)
        self._kept = {new: mapped.load(name) for name, new in self._names.items()}
        stacks = self._stacks(model, mapped) if not self.quantization_config.dequantize else {}
        for group in self._own:
            if all(name in stacks for name in group.parameters):
                for name in group.parameters:
                    owner, leaf, _, _ = self._owners[name]
                    owner.__dict__[leaf] = stacks[name]
                continue
            made = group.make(model, {name: self._source.load(name) for name in group.tensors})
            for name, tensor in made.items():
                owner, leaf, shape, dtype = self._owners[name]
                _check_same(name, tensor.shape, shape)
                del owner.__dict__[leaf]
                placed = tensor.to(device_near(model, name), dtype)
                owner._parameters[leaf] = nn.Parameter(placed, requires_grad=False)
        for name in stacks:
            owner = self._owners[name][0]
            move_stacks(owner, device_near(model, name))
            follow(owner)
        if stacks and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        if self.quantization_config.dequantize:
            self._kept = {}

    def _stacks(self, model: Any, mapped: _Mapped) -> dict[str, PackedStack]:
        """The stacked parameters all of whose matrices are packed."""
        rows: dict[str, dict[int, list[Rows]]] = {}
        turned: dict[str, bool] = {}
        for name, expert, way, piece in self._pieces(model, mapped):
            rows.setdefault(name, {}).setdefault(expert, []).append(piece)
            turned[name] = way
        stacks = {}
        for name, found in rows.items():
            _, _, shape, dtype = self._owners[name]
            height = shape[2] if turned[name] else shape[1]
            whole = all(sum(r.stop - r.start for r in found.get(e, ())) == height for e in range(shape[0]))
            if whole:
                stacks[name] = PackedStack(shape, dtype, [found[e] for e in range(shape[0])], turned[name])
        return stacks

    def _pieces(self, model: Any, mapped: _Mapped) -> Iterable[tuple[str, int, bool, Rows]]:
        """Parameter, number of the matrix, whether it lies as [C, R], and rows of a packed tensor."""
        parts: dict[str, dict[str, Tensor]] = {}
        starts: dict[str, Tensor] = {}
        for target in self._targets(model):
            layout = self._layouts.get(target.tensor)
            if layout is None:
                continue
            if target.tensor not in parts:
                parts[target.tensor] = read_parts(mapped.load, target.tensor, layout)
                check(parts[target.tensor], layout, target.tensor)
                starts[target.tensor] = starts_of(parts[target.tensor], layout)
            first = (target.index or 0) * target.shape[0]
            for piece in target.pieces:
                if (
                    piece.expert is not None
                    and piece.parameter in self._owners
                    and isinstance(piece.stored, slice)
                ):
                    found = Rows(
                        parts[target.tensor],
                        layout,
                        starts[target.tensor],
                        first + piece.stored.start,
                        first + piece.stored.stop,
                        piece.rows,
                    )
                    yield piece.parameter, piece.expert, piece.parameter in target.turned, found

    def _targets(self, model: Any) -> list[Target]:
        """Where the stored matrices are in the parameters of the model."""
        assert self._source is not None
        config = copy.deepcopy(model.config)
        config.__dict__.pop("quantization_config", None)
        return all_targets(Skeleton(config, self._source, torch.float32, torch.device("cpu")))

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What is saved: the tensors as they lie in the files."""
        return (dict(model.state_dict()) | self._kept if self._kept else None), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A packed model is saved as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights cannot be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The operator has a fake kernel."""
        return True


class _Mapped:
    """The tensors of a folder, mapped into memory instead of read."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self.checkpoint, self._folder = checkpoint, folder
        self._open: dict[str, Any] = {}

    def load(self, name: str) -> Tensor:
        file = self.checkpoint.file_of(name)
        if file not in self._open:
            self._open[file] = safe_open(self._folder / file, framework="pt")
        found: Tensor = self._open[file].get_tensor(name)
        return found


def _folder_of(files: list[str] | None) -> Path:
    if not files:
        raise ValueError("a packed checkpoint is loaded from its files; a state_dict is not enough")
    return Path(files[0]).parent


def _owner(model: Any, name: str) -> tuple[Any, str]:
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def _check_shape(parameter: Tensor, group: Group, layouts: Mapping[str, Layout]) -> None:
    """Raise `ValueError` where a packed tensor has another shape than the parameter that it becomes."""
    if group.converter is None:
        _check_same(group.tensors[0], layouts[group.tensors[0]].shape, parameter.shape)


def _check_same(name: str, have: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(have) != tuple(wanted):
        raise ValueError(
            f"weight {shown(name)} has shape {tuple(have)} where the config asks for {tuple(wanted)}; "
            "config and checkpoint do not match"
        )


def _patterns(group: Group) -> tuple[str, ...]:
    return tuple(getattr(group.converter, "source_patterns", ()))


def _stored(name: str, layouts: Mapping[str, Layout], checkpoint: Checkpoint) -> list[str]:
    """The names in the files of a tensor's parts."""
    parts = PARTS if name in layouts else ("",)
    return [name + part for part in parts if name + part in checkpoint.tensors]


def register() -> None:
    """Make transformers know packed folders; a second time changes nothing."""
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    # Only of the types in this tuple a `quantization_config` given by the user changes anything.
    types = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", None)
    if isinstance(types, tuple):
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, PackedConfig)
    register_quantization_config(METHOD)(PackedConfig)
    register_quantizer(METHOD)(PackedQuantizer)
