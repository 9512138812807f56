"""Whether text that is trained on holds text that is scored: then the score would be of what was learned by
heart.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

LENGTH = 32  # tokens that must agree in a row: longer than phrases, shorter than a paragraph
MOST = 0.02  # of the scored text may be found again: licences and tables of contents are
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def check_apart(trained: Tensor, scored: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` where rows [N, T] to train on hold more than `MOST` of a scored text [W, L]."""
    known = np.unique(_digests(trained))
    for name, windows in scored.items():
        share = float(np.isin(_digests(windows), known).mean()) if windows.shape[1] >= LENGTH else 0.0
        if share > MOST:
            raise ValueError(
                f"the text to train on holds {share:.0%} of the text {name!r} that is scored (stretches of "
                f"{LENGTH} tokens); train on other text, or score another with --perplexity"
            )


def _digests(rows: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A number for every stretch of `LENGTH` tokens of each row; equal ones for equal stretches."""
    tokens = rows.numpy().astype(np.uint64) + np.uint64(1)
    count = max(0, tokens.shape[1] - LENGTH + 1)
    found = np.zeros((len(tokens), count), dtype=np.uint64)
    for place in range(LENGTH if count else 0):
        found = found * _FACTOR + tokens[:, place : place + count]
    return found.ravel()
