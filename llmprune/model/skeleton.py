"""The model without its weights: parameters are on the meta device, and are loaded and freed part by part."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from llmprune.checkpoint.reader import WeightSource
from llmprune.common.messages import first_line, shown
from llmprune.model.classes import class_of
from llmprune.model.conversion import Group, dtypes_of, groups_of, tied_names
from llmprune.model.empty import build_empty


def _check_sizes(config: Any, source: WeightSource) -> None:
    """Raise `ValueError` if a config has larger sizes than the checkpoint, before the model is built."""
    most = max((tensor.elements for tensor in source.tensors.values()), default=0)
    for key, value in config.get_text_config().to_dict().items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if key in ("num_hidden_layers", "n_layer", "num_layers") and value > len(source.tensors):
            raise ValueError(
                f"config.json asks for {value} blocks, the checkpoint has {len(source.tensors)} tensors; "
                "it is damaged"
            )
        sized = key.endswith(("_size", "_dim", "_heads")) or key in ("n_embd", "n_inner", "n_head")
        if sized and value > max(most, 1 << 16):
            raise ValueError(
                f"config.json has {key} {value}, more than any tensor of the checkpoint holds; it is damaged"
            )


def _check_decoder(config: Any) -> None:
    """Raise `ValueError` for a model with an encoder before its decoder."""
    if getattr(config, "is_encoder_decoder", False):
        name = next(iter(getattr(config, "architectures", None) or ()), config.model_type)
        raise ValueError(
            f"{shown(name)} is an encoder with a decoder; supported are models that run from token to token, "
            "such as those of AutoModelForCausalLM"
        )


class Skeleton:
    """A causal language model without weights, which are loaded from a checkpoint part by part.

    Attributes:
        source: where its weights come from.
        dtype: of the weights when they are loaded.
        device: where they are loaded to.
        model: the transformers model.
        auto_class: name of the class of transformers that loads the checkpoint.
        blocks: name -> module of its repeated blocks.
        given_blocks: the name of their list, where the user has named it.
        group_of: parameter (or stored buffer) -> how it is made from the checkpoint.
        unused: names of tensors in the checkpoint that no parameter uses.
        shared: names of tensors that several blocks use. They stay dense: what one block makes of them would
            not fit the others.
        targets: the prunable matrices of each block, once `model.targets` has found them.

    Raises:
        ValueError: config and checkpoint do not match, are damaged, or of an architecture that is not
            supported.
    """

    def __init__(
        self,
        config: Any,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
        blocks: str | None = None,
    ) -> None:
        self.given_blocks = blocks
        self.source, self.dtype, self.device = source, dtype, device
        self.auto_class, _ = class_of(config, trust_remote_code)
        _check_sizes(config, source)
        _check_decoder(config)
        try:
            self.model = build_empty(config, dtype, trust_remote_code)
        except Exception as error:  # a wrong config may raise any type, depending on the model
            raise ValueError(
                f"transformers cannot build a model from config.json "
                f"({type(error).__name__}: {first_line(error, 300)}); is it damaged?"
            ) from error
        _check_decoder(self.model.config)
        self.model.eval()
        if hasattr(self.model, "set_experts_implementation"):
            # One product per expert, in which the tokens routed to it can be seen.
            self.model.set_experts_implementation("eager")
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        self._dtypes = dtypes_of(self.model, dtype)
        self.blocks = self._find_blocks()
        self.group_of = self._match_names()
        used = {name for group in self.group_of.values() for name in group.tensors}
        self.unused = sorted(set(source.tensors) - used)
        counts = Counter(name for tensors in self.block_tensors() for name in tensors)
        self.shared = frozenset(name for name, count in counts.items() if count > 1)
        self.targets: dict[str, list[Any]] = {}

    def _find_blocks(self) -> dict[str, nn.Module]:
        """The repeated blocks by name, of the list that the user has named or else the likeliest one."""
        lists = self._lists()
        name = self.given_blocks
        if name is None:
            if not lists:
                raise ValueError(
                    f"{type(self.model).__name__} has no list of blocks; this architecture is not supported"
                )
            name = next(iter(lists))
        elif name not in lists:
            raise ValueError(
                f"{type(self.model).__name__} has no list of blocks {shown(name)}; {self.other_lists(name)}"
            )
        return {f"{name}.{i}": block for i, block in enumerate(lists[name])}

    def _lists(self) -> dict[str, nn.ModuleList]:
        """The lists of modules that may be the blocks, the likeliest one first.

        Of the lists next to the input embeddings it is the heaviest.
        """
        lists = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        # Lists inside of a block, such as those of experts, are no candidates.
        outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
        embeddings = self.embeddings
        names = (n for n, m in self.model.named_modules() if embeddings is not None and m is embeddings)
        where = next(names, "").rpartition(".")[0]
        while where and not any(n.startswith(f"{where}.") for n in outer):
            where = where.rpartition(".")[0]

        def likeliest(name: str) -> tuple[bool, int, int]:
            # Those of an image part lie deeper than those of the language model.
            size = sum(p.numel() for p in outer[name].parameters())
            return bool(where) and not name.startswith(f"{where}."), name.count("."), -size

        return {name: outer[name] for name in sorted(outer, key=likeliest)}

    def other_lists(self, but: str = "") -> str:
        """What a user is told of the lists that `--blocks` may name; `but` is one that does not work."""
        lists = [(n, m) for n, m in self._lists().items() if n != but]
        listed = ", ".join(f"{n} ({len(m)} of {type(m[0]).__name__})" for n, m in lists)
        return f"--blocks may name {listed}" if listed else "this architecture is not supported"

    @property
    def list_name(self) -> str:
        """The name of the list of its blocks."""
        return next(iter(self.blocks)).rpartition(".")[0]

    @property
    def embeddings(self) -> nn.Module | None:
        """The input embeddings; None where the model does not tell."""
        try:
            found: nn.Module | None = self.model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        return found

    @property
    def width(self) -> int:
        """D, the width of the hidden states."""
        return self._size("hidden_size", 1)

    @property
    def vocabulary(self) -> int:
        """V, the number of different tokens."""
        return self._size("vocab_size", 0)

    def _size(self, key: str, axis: int) -> int:
        """A size from the config or, where that lacks it, from the shape of the embeddings."""
        found = getattr(self.model.config.get_text_config(), key, None)
        weight = getattr(self.embeddings, "weight", None)
        if found is not None:
            return int(found)
        if weight is None:
            raise ValueError(f"config.json of {type(self.model).__name__} has no {key}; is it damaged?")
        return int(weight.shape[axis])

    def _match_names(self) -> dict[str, Group]:
        """How every parameter, and every stored buffer, is made from the checkpoint.

        The checkpoint need not have a weight that is tied to another one.
        """
        groups = groups_of(self.model, self.source.tensors)
        found = {name: group for group in groups for name in group.parameters}
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        for name, other in tied_names(self.model).items():
            for one, two in ((name, other), (other, name)):
                if one not in found and two in found and found[two].converter is None:
                    found[one] = Group((one,), found[two].tensors)
        same: dict[int, str] = {}  # a parameter that several modules share is stored once
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            first = same.setdefault(id(parameter), name)
            if name not in found and first in found and found[first].converter is None:
                found[name] = Group((name,), found[first].tensors)
        missing = sorted(parameters - set(found))
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} weights of {type(self.model).__name__}, "
                f"the first is {missing[0]!r}; it is incomplete or of another architecture"
            )
        self._check_shapes(found)
        return found

    def _check_shapes(self, groups: Mapping[str, Group]) -> None:
        """Raise `ValueError` if a tensor of the checkpoint has another shape than its parameter."""
        for name, group in groups.items():
            if group.converter is not None:
                continue
            where = group.tensors[0]
            wanted = tuple(self.model.get_parameter_or_buffer(name).shape)
            have = self.source.tensors[where].shape
            if wanted != have:
                raise ValueError(
                    f"weight {where!r} has shape {have} where the config asks for {wanted}; "
                    "config and checkpoint do not match"
                )

    def remarks(self) -> tuple[str, ...]:
        """What the user should know of the checkpoint: that it has tensors which the model does not use."""
        if not self.unused:
            return ()
        of_block = re.compile(rf"(?:\w+\.)?{re.escape(self.list_name)}\.([0-9]+)\.")
        numbers = {int(found[1]) for found in map(of_block.match, self.unused) if found}
        beyond = sum(number >= len(self.blocks) for number in numbers)
        more = f"config.json asks for {len(self.blocks)} blocks and the checkpoint holds {beyond} more; "
        return (
            f"note: {more if beyond else ''}{len(self.unused)} tensors of the checkpoint belong to no part "
            f"of the model and pass unchanged, the first is {self.unused[0]!r}",
        )

    def parameters_of(self, module_name: str) -> list[str]:
        """Names of the parameters of a module and of the modules in it."""
        return [n for n in sorted(self.group_of) if n.startswith(f"{module_name}.")]

    def outside_blocks(self) -> list[str]:
        """Names of the parameters of the language model that are in no block: embeddings, last norm, head."""
        inside, beside = (tuple(f"{name}." for name in part) for part in (self.blocks, self.towers()))
        # Models take their first parameter's device for their own, even where text does not use it.
        first = next(name for name, _ in self.model.named_parameters())
        outside = [name for name in sorted(self.group_of) if not name.startswith(inside)]
        return [name for name in outside if name == first or not name.startswith(beside)]

    def towers(self) -> dict[str, nn.Module]:
        """The parts beside the language model, such as those for images and sound, by name.

        Text does not pass through them.
        """
        from transformers import PreTrainedModel

        found: dict[str, nn.Module] = {}
        first = next(iter(self.blocks))
        for name, module in self.model.named_modules():
            inside = any(name.startswith(f"{other}.") for other in found)
            beside = name and not inside and not first.startswith(f"{name}.")
            if beside and isinstance(module, PreTrainedModel):
                found[name] = module
        return found

    def tensors_of(self, names: Iterable[str]) -> list[str]:
        """The tensors of the checkpoint from which some parameters are made."""
        return list(dict.fromkeys(t for name in names for t in self.group_of[name].tensors))

    @property
    def elements(self) -> int:
        """How many weights the model has in the checkpoint; tied ones count once."""
        return sum(self.source.tensors[name].elements for name in self.tensors_of(self.group_of))

    def load(self, names: list[str]) -> None:
        """Load parameters, or stored buffers, from the checkpoint to the device, in the compute dtype."""
        for group in self._groups(names):
            self.fill(list(group.parameters), {name: self.source.load(name) for name in group.tensors})

    def _groups(self, names: Iterable[str]) -> list[Group]:
        return list(dict.fromkeys(self.group_of[name] for name in names))

    def fill(self, names: list[str], tensors: Mapping[str, torch.Tensor]) -> None:
        """As `load`, from tensors already read, by their names in the checkpoint.

        They are not copied if they have the right dtype and device and nothing is converted.
        """
        for group in self._groups(names):
            for name, tensor in group.make(self.model, tensors).items():
                owner, leaf = self.owner(name)
                buffer = owner._buffers.get(leaf)
                if buffer is not None:
                    # A buffer keeps its own dtype: the compute dtype might round it.
                    owner._buffers[leaf] = tensor.to(self.device, buffer.dtype)
                else:
                    loaded = tensor.to(self.device, self._dtypes[name])
                    owner._parameters[leaf] = nn.Parameter(loaded, requires_grad=False)

    def block_tensors(self) -> list[list[str]]:
        """For each block, the names of its tensors in the checkpoint."""
        return [self.tensors_of(self.parameters_of(b)) for b in self.blocks]

    def free(self, names: list[str]) -> None:
        """Free the memory of parameters, by putting them back on the meta device."""
        for name in names:
            owner, leaf = self.owner(name)
            loaded = owner._parameters.get(leaf)
            if loaded is not None:
                empty = torch.empty_like(loaded, device="meta")
                owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that has a parameter or buffer, and its name in that module."""
        parent, _, leaf = name.rpartition(".")
        return self.model.get_submodule(parent), leaf
