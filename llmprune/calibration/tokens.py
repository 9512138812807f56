"""Ready-made calibration tokens: a safetensors file with an int64 tensor `tokens` [N, T], used exactly as it is."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_tokens(path: Path) -> Tensor:
    """The tensor `tokens` of a file. Raises `ValueError` when it is missing, damaged or of another type."""
    if not path.is_file():
        raise ValueError(f"no such token file: {path}")
    try:
        with safe_open(path, framework="pt") as handle:
            names = list(handle.keys())
            tokens = handle.get_tensor("tokens") if "tokens" in names else None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not safetensors ({error})") from None
    if tokens is None:
        raise ValueError(f"{path} has no tensor 'tokens' (it has: {', '.join(names) or 'none'})")
    return check_tokens(tokens, str(path))


def check_tokens(tokens: Tensor, where: str) -> Tensor:
    """The tokens, if they are int64 [N, T] with at least one row of two tokens."""
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(
            f"calibration tokens must be int64 [N, T] with T >= 2, got {str(tokens.dtype)[6:]} {list(tokens.shape)} from {where}"
        )
    return tokens.contiguous()
