"""The model without its weights: parameters are on the meta device, and are loaded and freed part by part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmprune.checkpoint.reader import WeightSource, read_json
from llmprune.common.messages import first_line, shown
from llmprune.model.empty import build_empty

_COMPRESSED = ("quantization_config", "compression_config", "sparsity_config")


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder.

    Raises:
        ValueError: it is missing, unknown to transformers, or of a quantised checkpoint.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
    raw = read_json(folder / "config.json")
    check_dense(raw, str(folder))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types here
        raise ValueError(
            f"transformers cannot use the config of {folder} "
            f"(model_type {shown(raw.get('model_type'))}): {first_line(error, 300)}"
        ) from error


def check_dense(config: dict[str, Any], where: str) -> None:
    """Raise `ValueError` for a quantised or compressed checkpoint."""
    for key in _COMPRESSED:
        value = config.get(key)
        if value:
            method = value.get("quant_method", "unknown") if isinstance(value, dict) else value
            raise ValueError(
                f"{where} is quantised or compressed ({key}: {method}); "
                "prune the original checkpoint in float32, bfloat16 or float16"
            )


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


class Skeleton:
    """A causal language model without weights, which are loaded from a checkpoint part by part.

    Attributes:
        source: where its weights come from.
        dtype: of the weights when they are loaded.
        device: where they are loaded to.
        model: the transformers model.
        blocks: name -> module of its repeated blocks. They are the list of modules of one class with the most
            weights.
        stored: parameter name -> name in the checkpoint.
        unused: names of tensors in the checkpoint that no parameter uses.

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
    ) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        _check_sizes(config, source)
        try:
            self.model = build_empty(config, dtype, trust_remote_code)
        except Exception as error:  # a wrong config may raise any type, depending on the model
            raise ValueError(
                f"transformers cannot build a model from config.json "
                f"({type(error).__name__}: {first_line(error, 300)}); is it damaged?"
            ) from error
        self.model.eval()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        self.blocks = self._find_blocks()
        self._parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self.stored = self._match_names()
        self.unused = sorted(set(source.tensors) - set(self.stored.values()))

    def _find_blocks(self) -> dict[str, nn.Module]:
        """The repeated blocks by name: the list of modules of one class that has the most weights."""
        module_lists = ((n, m) for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList))
        lists = [(name, modules) for name, modules in module_lists if len({type(m) for m in modules}) == 1]
        if not lists:
            raise ValueError(
                f"{type(self.model).__name__} has no list of equal blocks; this architecture is not supported"
            )
        name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
        return {f"{name}.{i}": block for i, block in enumerate(blocks)}

    def _match_names(self) -> dict[str, str]:
        """Parameter name -> name in the checkpoint.

        The checkpoint may have the base model's prefix where the model has not or the other way round, and
        need not have a weight that is tied to another one.
        """
        prefix = f"{self.model.base_model_prefix}."
        tied = getattr(self.model, "_tied_weights_keys", None) or {}
        buffers = {name for name, _ in self.model.named_buffers() if name in self.source.tensors}
        stored, missing = {}, []
        for name in sorted(self._parameters | buffers):
            candidates = (name, name.removeprefix(prefix), prefix + name, self._tied_to(name, tied))
            found = next((c for c in candidates if c in self.source.tensors), None)
            if found is None:
                missing.append(name)
            else:
                stored[name] = found
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} weights of {type(self.model).__name__}, "
                f"the first is {missing[0]!r}; it is incomplete or of another architecture"
            )
        self._check_shapes(stored)
        return stored

    def _check_shapes(self, stored: Mapping[str, str]) -> None:
        """Raise `ValueError` if a tensor of the checkpoint has another shape than its parameter."""
        for name, where in stored.items():
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
        prefix = next(iter(self.blocks)).rpartition(".")[0]
        of_block = re.compile(rf"(?:\w+\.)?{re.escape(prefix)}\.([0-9]+)\.")
        numbers = {int(found[1]) for found in map(of_block.match, self.unused) if found}
        beyond = sum(number >= len(self.blocks) for number in numbers)
        more = f"config.json asks for {len(self.blocks)} blocks and the checkpoint holds {beyond} more; "
        return (
            f"note: {more if beyond else ''}{len(self.unused)} tensors of the checkpoint belong to no part "
            f"of the model and pass unchanged, the first is {self.unused[0]!r}",
        )

    def _tied_to(self, name: str, tied: Any) -> str | None:
        """The parameter that shares its weight with this one; None if there is none."""
        if not getattr(self.model.config, "tie_word_embeddings", False) or name not in tied:
            return None
        return tied[name] if isinstance(tied, dict) else None

    def parameters_of(self, module_name: str) -> list[str]:
        """Names of the parameters of a module and of the modules in it."""
        return [n for n in sorted(self.stored) if n.startswith(f"{module_name}.")]

    def outside_blocks(self) -> list[str]:
        """Names of the parameters that are in no block: embeddings, last norm, output head."""
        in_blocks = tuple(f"{block}." for block in self.blocks)
        return [name for name in sorted(self.stored) if not name.startswith(in_blocks)]

    def load(self, names: list[str]) -> None:
        """Load parameters, or stored buffers, from the checkpoint to the device, in the compute dtype."""
        for name in names:
            self.fill([name], {self.stored[name]: self.source.load(self.stored[name])})

    def fill(self, names: list[str], tensors: Mapping[str, torch.Tensor]) -> None:
        """As `load`, from tensors already read, by their names in the checkpoint.

        They are not copied if they have the right dtype and device.
        """
        for name in names:
            owner, leaf = self._owner(name)
            tensor, buffer = tensors[self.stored[name]], owner._buffers.get(leaf)
            if buffer is not None:
                # A buffer keeps its own dtype: the compute dtype might round it.
                owner._buffers[leaf] = tensor.to(self.device, buffer.dtype)
            else:
                loaded = tensor.to(self.device, self.dtype)
                owner._parameters[leaf] = nn.Parameter(loaded, requires_grad=False)

    def block_tensors(self) -> list[list[str]]:
        """For each block, the names of its tensors in the checkpoint."""
        return [list(dict.fromkeys(self.stored[n] for n in self.parameters_of(b))) for b in self.blocks]

    def free(self, names: list[str]) -> None:
        """Free the memory of parameters, by putting them back on the meta device."""
        for name in names:
            owner, leaf = self._owner(name)
            loaded = owner._parameters.get(leaf)
            if loaded is not None:
                empty = torch.empty_like(loaded, device="meta")
                owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that has a parameter or buffer, and its name in that module."""
        parent, _, leaf = name.rpartition(".")
        return self.model.get_submodule(parent), leaf
