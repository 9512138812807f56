"""Counting and checking large tensors, several times faster on a CPU than torch's own reductions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def zeros_of(tensor: Tensor) -> int:
    """How many elements are zero; minus zero counts."""
    if tensor.is_cpu and tensor.dtype in (torch.bfloat16, torch.float16):
        bits = tensor.contiguous().view(torch.uint16).numpy()
        return tensor.numel() - int(np.count_nonzero(bits << 1))  # the shift drops the sign bit
    if tensor.is_cpu and tensor.dtype == torch.float32:
        return tensor.numel() - int(np.count_nonzero(tensor.numpy()))
    return tensor.numel() - int(torch.count_nonzero(tensor))


def true_per_row(mask: Tensor) -> Tensor:
    """How many entries of each row of a bool matrix [R, C] are True, int64 [R]."""
    if mask.is_cpu:
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return mask.count_nonzero(dim=1)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or Inf."""
    # The sum is not finite if one element is not. It may also
    # overflow; only then are the elements checked one by one.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())
