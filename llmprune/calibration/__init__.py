"""Calibration rows from any source, or a mixture of sources, as one frozen set of token rows, cached by what made it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.calibration.rows import Maker
from llmprune.calibration.sampling import Sampler
from llmprune.calibration.tokens import check_tokens, digest, read_tokens
from llmprune.contracts import CalibrationSet
from llmprune.text import mixture
from llmprune.text.tokenisation import default_length

SAMPLES = 128


def build(
    source: str | Tensor | Iterable[str],
    tokenizer: Any,
    *,
    samples: int | None,
    length: int | None,
    limit: int | None,
    vocabulary: int,
    seed: int,
    sampler: Sampler | None = None,
) -> CalibrationSet:
    """Calibration rows from a SOURCE of the interface, an iterable of strings, or an int64 tensor [N, T].

    Args:
        tokenizer: a transformers tokenizer; None is enough for ready-made tokens.
        samples, length: rows and tokens per row; None for 128 and min(2048, limit).
        limit: the model's longest sequence. vocabulary: the model's number of token ids.
        sampler: samples text from the model, for the source `self`.

    Raises:
        ValueError: with one line that names the way out.
    """
    maker = Maker(tokenizer, limit, vocabulary, seed, sampler)
    weights = mixture.parse(source) if isinstance(source, str) else None
    if weights:
        return _mixed(weights, maker, samples, length)
    if isinstance(source, Tensor) or (isinstance(source, str) and source.endswith(".safetensors")):
        name = "tokens in memory" if isinstance(source, Tensor) else Path(source).name
        tokens = check_tokens(source.cpu(), name) if isinstance(source, Tensor) else read_tokens(Path(source))
        for option, asked, have in (
            ("samples", samples, tokens.shape[0]),
            ("seqlen", length, tokens.shape[1]),
        ):
            if asked is not None and asked != have:
                raise ValueError(
                    f"{name} is used exactly as it is and has {option} {have}, got {option} {asked}; leave the option out"
                )
        return _set(maker.checked(tokens, name), name, seed)
    samples, length = SAMPLES if samples is None else samples, length or default_length(limit)
    maker.check(source, samples, length)
    tokens, details = maker.make(source, samples, length)
    return _set(tokens, _name(source), seed, details)


def _mixed(
    weights: dict[str, float], maker: Maker, samples: int | None, length: int | None
) -> CalibrationSet:
    """Rows of every part, in an order drawn with the seed. Token files set the length where it is not asked for."""
    ready = [read_tokens(Path(part)).shape[1] for part in weights if part.endswith(".safetensors")]
    length = length or (ready[0] if ready else default_length(maker.limit))
    shares = mixture.shares(weights, SAMPLES if samples is None else samples)
    names = {part: _name(part) for part in weights}
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"files of a mixture go by their names, which must differ, got {', '.join(names.values())}; rename one"
        )
    for part, share in shares.items():  # every part is looked at before the first one costs time
        maker.check(part, share, length)
    rows: list[Tensor] = []
    details: dict[str, Any] = {}
    for part, share in shares.items():
        tokens, made = maker.make(part, share, length)
        rows.append(tokens)
        details |= made
    details["parts"] = {names[part]: share for part, share in shares.items()}
    name = mixture.as_text({names[part]: weight for part, weight in weights.items()})
    return _set(mixture.interleave(rows, maker.seed), name, maker.seed, details)


def _name(source: str | Iterable[str]) -> str:
    """A source as it stands in the record: a file goes by its name, for no local path is written anywhere."""
    if not isinstance(source, str):
        return "text in memory"
    return Path(source).name if mixture.is_file(source) else source


def _set(tokens: Tensor, source: str, seed: int, details: dict[str, Any] | None = None) -> CalibrationSet:
    return CalibrationSet(tokens, source, seed, digest(tokens), details or {})
