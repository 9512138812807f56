"""Ready-made calibration tokens: a safetensors file with an int64 tensor `tokens` [N, T], used exactly as it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from llmprune.checkpoint.files import WeightFile, raw


def read_tokens(path: Path) -> Tensor:
    """The tensor `tokens` of a file. Raises `ValueError` when it is missing, damaged or of another type."""
    if not path.is_file():
        raise ValueError(f"no such token file: {path}")
    file = WeightFile(path)
    if "tokens" not in file.entries:
        raise ValueError(
            f"{path} has no tensor 'tokens' (it has: {', '.join(sorted(file.entries))[:120] or 'none'})"
        )
    return check_tokens(file.load("tokens"), str(path))


def check_tokens(tokens: Tensor, where: str) -> Tensor:
    """The tokens, if they are int64 [N, T] with at least one row of two tokens."""
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(
            f"calibration tokens must be int64 [N, T] with T >= 2, got {str(tokens.dtype)[6:]} {list(tokens.shape)} from {where}"
        )
    return tokens.contiguous()


def digest(tokens: Tensor) -> str:
    """Fingerprint of token rows: their shape and values."""
    hashed = hashlib.sha256(repr(list(tokens.shape)).encode())
    hashed.update(raw(tokens))
    return "sha256:" + hashed.hexdigest()
