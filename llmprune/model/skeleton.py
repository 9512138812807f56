"""An empty model: parameters on meta, real buffers, weights loaded by assignment and freed after use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmprune.checkpoint.reader import WeightSource, read_json
from llmprune.common.messages import shown
from llmprune.model.empty import build_empty

_COMPRESSED = ("quantization_config", "compression_config", "sparsity_config")


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder. Raises `ValueError` for one that is missing, unknown, or of a quantised checkpoint."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected a Hugging Face checkpoint folder")
    raw = read_json(folder / "config.json")
    check_dense(raw, str(folder))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types here; the first line says what is wrong
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ValueError(
            f"transformers cannot use the config of {folder} (model_type {shown(raw.get('model_type'))}): {line}"
        ) from error


def check_dense(config: dict[str, Any], where: str) -> None:
    """Raise `ValueError` for a quantised or compressed checkpoint."""
    for key in _COMPRESSED:
        if config.get(key):
            method = (
                config[key].get("quant_method", "unknown") if isinstance(config[key], dict) else config[key]
            )
            raise ValueError(
                f"{where} is quantised or compressed ({key}: {method}); prune the original checkpoint in float32, bfloat16 or float16"
            )


def _check_sizes(config: Any, source: WeightSource) -> None:
    """Raise `ValueError` for a config that asks for more than the checkpoint can hold, before anything of that size is made."""
    most = max((t.elements for t in source.tensors.values()), default=0)
    for key, value in config.get_text_config().to_dict().items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if key in ("num_hidden_layers", "n_layer", "num_layers") and value > len(source.tensors):
            raise ValueError(
                f"config.json asks for {value} blocks, the checkpoint has {len(source.tensors)} tensors; it is damaged"
            )
        sized = key.endswith(("_size", "_dim", "_heads")) or key in ("n_embd", "n_inner", "n_head")
        if sized and value > max(most, 1 << 16):
            raise ValueError(
                f"config.json has {key} {value}, more than any tensor of the checkpoint holds; it is damaged"
            )


class Skeleton:
    """A causal language model without weights, and the checkpoint to fill it from, part by part.

    Attributes:
        source: where its weights come from.
        blocks: name -> module of the repeated blocks, found by structure: the list of modules of one class with the most weights.
        stored: parameter name -> name in the checkpoint. unused: names in the checkpoint that no part of the model goes by.
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
        except Exception as error:  # a config may be wrong in as many ways as there are models
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise ValueError(
                f"transformers cannot build a model from config.json ({type(error).__name__}: {line}); is it damaged?"
            ) from error
        self.model.eval()
        for buffer_owner in self.model.modules():
            for name, buffer in buffer_owner._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    buffer_owner._buffers[name] = buffer.to(device)
        self.blocks = self._find_blocks()
        self._parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self.stored = self._match_names()
        self.unused = sorted(set(source.tensors) - set(self.stored.values()))

    def _find_blocks(self) -> dict[str, nn.Module]:
        lists = [
            (n, m)
            for n, m in self.model.named_modules()
            if isinstance(m, nn.ModuleList) and len({type(c) for c in m}) == 1
        ]
        if not lists:
            raise ValueError(
                f"{type(self.model).__name__} has no list of equal blocks; this architecture is not supported"
            )
        name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
        return {f"{name}.{i}": block for i, block in enumerate(blocks)}

    def _match_names(self) -> dict[str, str]:
        """Parameter name -> name in the checkpoint, which may leave out or add the base model's prefix, or a tied weight."""
        prefix = f"{self.model.base_model_prefix}."
        tied = getattr(self.model, "_tied_weights_keys", None) or {}
        stored, missing = {}, []
        for name in sorted(
            self._parameters | {n for n, b in self.model.named_buffers() if n in self.source.tensors}
        ):
            candidates = (name, name.removeprefix(prefix), prefix + name, self._tied_to(name, tied))
            found = next((c for c in candidates if c in self.source.tensors), None)
            if found is None:
                missing.append(name)
            else:
                stored[name] = found
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} weights of {type(self.model).__name__}, the first is {missing[0]!r}; "
                "it is incomplete or of another architecture"
            )
        for name, where in stored.items():
            wanted, have = (
                tuple(self.model.get_parameter_or_buffer(name).shape),
                self.source.tensors[where].shape,
            )
            if wanted != have:
                raise ValueError(
                    f"weight {where!r} has shape {have} where the config asks for {wanted}; config and checkpoint do not match"
                )
        return stored

    def remarks(self) -> tuple[str, ...]:
        """What the user should know of the checkpoint: that it holds tensors which no part of the model goes by."""
        if not self.unused:
            return ()
        prefix = next(iter(self.blocks)).rpartition(".")[0]
        block = re.compile(rf"(?:\w+\.)?{re.escape(prefix)}\.([0-9]+)\.")
        beyond = {
            int(found[1])
            for name in self.unused
            if (found := block.match(name)) and int(found[1]) >= len(self.blocks)
        }
        asked = (
            f"config.json asks for {len(self.blocks)} blocks and the checkpoint holds {len(beyond)} more; "
            if beyond
            else ""
        )
        told = f"{asked}{len(self.unused)} tensors of the checkpoint belong to no part of the model and pass unchanged"
        return (f"note: {told}, the first is {self.unused[0]!r}",)

    def _tied_to(self, name: str, tied: Any) -> str | None:
        if not getattr(self.model.config, "tie_word_embeddings", False) or name not in tied:
            return None
        return tied[name] if isinstance(tied, dict) else None

    def parameters_of(self, module_name: str) -> list[str]:
        """Names of the parameters below a module."""
        return [n for n in sorted(self.stored) if n.startswith(f"{module_name}.")]

    def outside_blocks(self) -> list[str]:
        """Names of the parameters in no block: embeddings, last norm, output head."""
        return [n for n in sorted(self.stored) if not n.startswith(tuple(f"{b}." for b in self.blocks))]

    def load(self, names: list[str]) -> None:
        """Fill parameters (or stored buffers) from the checkpoint, in the compute dtype, on the device."""
        for name in names:
            self.fill([name], {self.stored[name]: self.source.load(self.stored[name])})

    def fill(self, names: list[str], tensors: Mapping[str, torch.Tensor]) -> None:
        """The same from tensors already read, by their names in the checkpoint; they are not copied where they fit as they are."""
        for name in names:
            owner, leaf = self._owner(name)
            tensor, buffer = tensors[self.stored[name]], owner._buffers.get(leaf)
            if buffer is not None:
                owner._buffers[leaf] = tensor.to(self.device, buffer.dtype)  # never rounded
            else:
                owner._parameters[leaf] = nn.Parameter(
                    tensor.to(self.device, self.dtype), requires_grad=False
                )

    def block_tensors(self) -> list[list[str]]:
        """Per block, the names of its tensors in the checkpoint."""
        return [list(dict.fromkeys(self.stored[n] for n in self.parameters_of(b))) for b in self.blocks]

    def free(self, names: list[str]) -> None:
        """Give the memory of parameters back."""
        for name in names:
            owner, leaf = self._owner(name)
            full = owner._parameters.get(leaf)
            if full is not None:
                owner._parameters[leaf] = nn.Parameter(
                    torch.empty_like(full, device="meta"), requires_grad=False
                )

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        parent, _, leaf = name.rpartition(".")
        return self.model.get_submodule(parent), leaf
