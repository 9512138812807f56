"""Ready-made calibration tokens: a safetensors file with an int64 tensor `tokens` [N, T], used as it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from llmprune.checkpoint.files import WeightFile, raw


def read_tokens(path: Path) -> Tensor:
    """The tensor `tokens` of a file. Raises `ValueError` if it is missing, damaged or of a wrong type."""
    if not path.is_file():
        raise ValueError(f"no such token file: {path}")
    file = WeightFile(path)
    if "tokens" not in file.entries:
        raise ValueError(
            f"{path} has no tensor 'tokens' (it has: {', '.join(sorted(file.entries))[:120] or 'none'})"
        )
    return check_tokens(file.load("tokens"), str(path))


def check_tokens(tokens: Tensor, where: str) -> Tensor:
    """The tokens, contiguous. Raises `ValueError` unless they are int64 [N, T] with N >= 1 and T >= 2.

    `where` names them in the message.
    """
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(
            f"calibration tokens must be int64 [N, T] with T >= 2, got {str(tokens.dtype)[6:]} "
            f"{list(tokens.shape)} from {where}"
        )
    return tokens.contiguous()


def digest(tokens: Tensor) -> str:
    """A fingerprint (SHA-256) of the shape and values of token rows."""
    hashed = hashlib.sha256(repr(list(tokens.shape)).encode())
    hashed.update(raw(tokens))
    return "sha256:" + hashed.hexdigest()
