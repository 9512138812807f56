"""Refuses checkpoints whose weights are quantised, by what their files and their stored types say of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmprune.checkpoint.bitmask import FORMATS
from llmprune.checkpoint.dequantised import METHODS
from llmprune.checkpoint.packed_entry import packing_entry
from llmprune.checkpoint.reader import TensorInfo
from llmprune.common.cards import entry, front_matter
from llmprune.common.messages import shown

_KEYS = ("quantization_config", "compression_config", "sparsity_config")
_DEEPEST = 4  # levels of a config that are searched: wrappers keep the language model's config inside theirs
_METHOD_KEYS = ("quant_method", "quant_algo", "format")
# Files of tools that do not write into config.json.
_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
_ORIGINAL = "prune the original checkpoint in bfloat16, float16 or float32"
# Where the original is, for methods of which that can be said.
_WHERE = {
    "fp8": "usually under the same name without FP8; DeepSeek V3 and R1 exist in float8 only",
    "mxfp4": "gpt-oss exists in mxfp4 only",
    "bitnet": "the one that was trained, usually under the same name with bf16",
    "bitsandbytes": "the one that was loaded with load_in_4bit or load_in_8bit",
    "gguf": "the folder with config.json and safetensors that the GGUF file was made from",
}
_ELSEWHERE = "usually under the same name without the method's"
# The last part of the names of packed weights, and who packs so. Some are stored as int32.
_PACKED = {
    "qweight": "gptq",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "fp8",
    "SCB": "bitsandbytes",
    "absmax": "bitsandbytes",
    "W_q": "hqq",
    "_data": "quanto",
}
_SMALL = re.compile(r"(F[468]|E8M0|[IU]8)(_|$)")


def dequantising(config: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """Rows and columns that share a scale in weights that are to be dequantised; None where that is not said.

    Raises:
        ValueError: a config says that they are quantised in a way that cannot be undone here.
    """
    for key, value in _found(config):
        method = _plain_method(_method(key, value))
        if _in_bitmasks(key, value):
            raise ValueError(
                f"{where} has {key} with {' or '.join(FORMATS)}, which is read without dequantize; leave "
                "--dequantize out"
            )
        if method not in METHODS:
            raise ValueError(
                f"dequantize works on {' and '.join(METHODS)}, and {where} has {key}: {method}; "
                f"{_remedy(method)}"
            )
        group = value.get("weight_block_size") if isinstance(value, dict) else None
        if isinstance(group, (list, tuple)) and len(group) == 2 and all(type(n) is int for n in group):
            return (group[0], group[1]) if min(group) > 0 else None
    return None


def in_bitmasks(config: Mapping[str, Any]) -> bool:
    """Whether a config says that weights are in a sparse format of compressed-tensors that is read here."""
    return any(_in_bitmasks(key, value) for key, value in _found(config))


def _in_bitmasks(key: str, value: Any) -> bool:
    found = value.get("sparsity_config") if isinstance(value, dict) else None
    found = value if key.endswith("sparsity_config") else found
    return isinstance(found, dict) and found.get("format") in FORMATS


def check_loaded(config: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` where a config says that the weights are in a format that transformers cannot load.

    Args:
        where: the checkpoint as the user named it.
    """
    if in_bitmasks(config):
        raise ValueError(
            f"{where} is in {' or '.join(FORMATS)} of compressed-tensors, which transformers does not load; "
            f"make it dense first: llmprune convert {where} --to dense --output DIR"
        )


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says of quantisation, also in the configs inside it."""
    kept = {key: value for key, value in config.items() if key not in _KEYS}
    return {k: without_quantisation(v) if isinstance(v, dict) else v for k, v in kept.items()}


def check_dense(config: Mapping[str, Any], where: str, folder: Path | None = None) -> None:
    """Raise `ValueError` where a config says that the weights are quantised or compressed.

    Args:
        config: the config as plain values; those inside it are searched too.
        where: what messages call the checkpoint.
        folder: where its model card is, which may name the original.
    """
    for key, value in _found(config):
        method = _method(key, value)
        if packing_entry({key: value}) is not None or _in_bitmasks(key, value):
            continue  # our own packed checkpoints, and what is unpacked as it is read
        if method is None:
            raise ValueError(
                f"{where} has {key}: {shown(value)}, which names no method; if its weights are quantised, "
                f"{_ORIGINAL}; if they are dense, remove {key} from config.json"
            )
        undone = (
            "; or add --dequantize (in Python dequantize=True)" if _plain_method(method) in METHODS else ""
        )
        raise ValueError(
            f"{where} is quantised or compressed ({key}: {method}); {_remedy(method, folder)}{undone}"
        )


def check_files(folder: Path, where: str) -> None:
    """Raise `ValueError` where a file of the folder belongs to quantised weights."""
    for name, method in _FILES.items():
        if (folder / name).is_file():
            raise ValueError(
                f"{where} is quantised (it has {name}, of {method}); {_remedy(method, folder)}; if its "
                f"weights are dense, remove {name}"
            )
    if not (folder / "config.json").is_file() and (found := sorted(folder.glob("*.gguf"))):
        raise ValueError(f"{where} holds {shown(found[0].name)}, a GGUF file; {_remedy('gguf', folder)}")


def check_stored(tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Raise `ValueError` where weights are stored in integers or 8-bit floats, whatever the config says."""
    for name, tensor in sorted(tensors.items()):
        if (method := _packing(name, tensor)) is not None:
            told = f", as {method} does" if method else ""
            raise ValueError(
                f"{where} is quantised: {shown(name)} is stored in {tensor.stored}{told}; {_remedy(method)}"
            )


def _packing(name: str, tensor: TensorInfo) -> str | None:
    """Who stores a weight so; empty where that is not known, None for weights that are not packed."""
    last = name.rpartition(".")[2]
    if last.endswith("_proj_blocks"):  # of experts; in another type after a dequantised model was saved
        return "mxfp4"
    if tensor.dtype is not None:
        return "fp8" if last == "weight_scale_inv" else None
    if last in _PACKED:
        return _PACKED[last]
    if tensor.stored.startswith("F8"):
        return "fp8"
    # Buffers such as GPT-2's causal mask may be 8-bit too, but none is called weight.
    return "" if last == "weight" and len(tensor.shape) > 1 and _SMALL.match(tensor.stored) else None


def _found(config: Mapping[str, Any], path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The entries on quantisation in a config and in the configs inside it, with their dotted keys."""
    for key in _KEYS:
        if config.get(key):
            yield path + key, config[key]
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and ("bits" in mlx or "group_size" in mlx):
        yield f"{path}quantization", {"quant_method": "mlx", **mlx}
    for key, value in config.items():
        if isinstance(value, dict) and key not in _KEYS and depth < _DEEPEST:
            yield from _found(value, f"{path}{key}.", depth + 1)


def _method(key: str, value: Any) -> str | None:
    """The method that an entry names, with its bits where it says so; None where it names none."""
    if isinstance(value, str):
        return _plain(value)
    if not isinstance(value, dict):
        return None
    names = [value[name] for name in _METHOD_KEYS if isinstance(value.get(name), str) and value[name]]
    bits = 4 if value.get("load_in_4bit") is True else 8 if value.get("load_in_8bit") is True else None
    if not names and bits is None:  # old entries on compression have no name
        return None if key.endswith("quantization_config") else "unknown"
    bits = bits or value.get("bits")
    told = f", {bits} bits" if isinstance(bits, int) and not isinstance(bits, bool) else ""
    return _plain(names[0] if names else "bitsandbytes") + told


def _plain(name: str) -> str:
    return name if re.fullmatch(r"[\w.+-]{1,40}", name, re.ASCII) else shown(name)


def _plain_method(method: str | None) -> str:
    """The name of a method without its bits."""
    return (method or "unnamed").partition(",")[0].lower().replace("_4bit", "").replace("_8bit", "")


def _remedy(method: str, folder: Path | None = None) -> str:
    """What to do instead: which checkpoint to prune, and where it is as far as that is known."""
    name = _plain_method(method)
    base = entry(front_matter(folder / "README.md"), "base_model", r"[\w.-]+/[\w.-]+") if folder else None
    hints = [f"its model card names {base}"] if base else []
    undone = "; or add --dequantize (in Python dequantize=True)" if name in METHODS else ""
    return f"{_ORIGINAL} ({'; '.join([*hints, _WHERE.get(name, _ELSEWHERE)])}){undone}"
