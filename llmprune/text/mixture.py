"""Mixtures of calibration sources, written `c4=0.7+self=0.3`: how they are parsed and shared out in rows."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.common.messages import shown
from llmprune.text import files

_PART = re.compile(r"(.+?)=([^=+]*)(?:\+|$)")  # a name may itself contain = and +
_EXAMPLE = "a mixture is written SOURCE=WEIGHT+SOURCE=WEIGHT, for example c4=0.7+self=0.3"


def parse(source: str) -> dict[str, float] | None:
    """The weight of each part of a mixture; None for a plain source. Raises `ValueError` if malformed."""
    ends_in_weight = re.search(r"=[^=+/\\]*$", source) and not is_file(source)
    if not (ends_in_weight or re.search(r"=[^=+/\\]*\+", source)) or os.path.exists(source):
        return None
    parts: list[tuple[str, str]] = []
    end = 0
    while found := _PART.match(source, end):
        parts.append((found[1].strip(), found[2].strip()))
        end = found.end()
    if end < len(source) or source.endswith("+"):
        raise ValueError(f"part {source[end:]!r} of mixture {source!r} has no weight; {_EXAMPLE}")
    weights: dict[str, float] = {}
    for name, weight in parts:
        if name in weights:
            raise ValueError(f"mixture {source!r} names {name!r} twice; add its weights up")
        weights[name] = _weight(name, weight)
    return weights


def _weight(name: str, given: Any) -> float:
    try:
        weight = float(given)
    except (ValueError, TypeError):
        weight = math.nan
    if isinstance(given, bool) or not (weight > 0 and math.isfinite(weight)):
        raise ValueError(
            f"the weight of calibration source {shown(name)} must be a number above 0, got {shown(given)}; "
            f"{_EXAMPLE}"
        )
    return weight


def as_text(weights: Mapping[Any, Any]) -> str:
    """A mapping `{source: weight}` written as a mixture. Raises `ValueError` for bad names or weights."""
    if not weights or not all(isinstance(name, str) and name for name in weights):
        raise ValueError(
            "a mapping of calibration sources needs names and weights, such as {c4: 0.7, self: 0.3}, got "
            f"{shown(weights)}"
        )
    return "+".join(f"{name}={_weight(name, weight):.12g}" for name, weight in weights.items())


def is_file(source: str) -> bool:
    """Whether a plain source is a file of text or tokens."""
    return files.is_file(source) or source.endswith(".safetensors")


def public_name(source: str) -> str:
    """What the record calls a source: a file goes by its name, since no local path is to be published."""
    return Path(source).name if is_file(source) else source


def plain_sources(source: str) -> list[str]:
    """The parts of a mixture, or the source itself."""
    return list(parse(source) or (source,))


def shares(weights: Mapping[str, float], samples: int) -> dict[str, int]:
    """How many of `samples` rows each part gives, by the largest-remainder method.

    Raises:
        ValueError: a part would get no row.
    """
    total = sum(Fraction(str(w)) for w in weights.values())
    exact = {name: Fraction(str(w)) * samples / total for name, w in weights.items()}
    rows = {name: int(quota) for name, quota in exact.items()}
    # The sort is stable: of equal remainders, the one named first in the mixture gets the row.
    by_remainder = sorted(exact, key=lambda name: rows[name] - exact[name])
    for name in by_remainder[: samples - sum(rows.values())]:
        rows[name] += 1
    for name, count in rows.items():
        if count == 0:
            raise ValueError(
                f"part {name!r} of the mixture gets none of {samples} rows; give it more weight or use more "
                "--samples"
            )
    return rows


def interleave(parts: list[Tensor], seed: int) -> Tensor:
    """The rows [n, T] of all parts together, in a random order drawn with the seed."""
    rows = torch.cat(parts)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))].contiguous()
