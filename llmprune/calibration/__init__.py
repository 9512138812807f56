"""Makes the calibration rows of a run: token rows [N, T] from any source, or from a mixture of sources.

Rows that were made before from the same text, tokenizer and seed come from a cache on disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.calibration.chat import template_of
from llmprune.calibration.rows import Maker
from llmprune.calibration.sampling import Sampler
from llmprune.calibration.tokens import check_tokens, digest, read_tokens
from llmprune.contracts import CalibrationSet
from llmprune.text import mixture
from llmprune.text.sources import may_hold_chats
from llmprune.text.tokenisation import default_length

SAMPLES = 128


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """Which calibration rows are wanted, and what the model can take.

    Attributes:
        samples: rows; None for 128.
        length: tokens per row; None for 2048, or the model's limit if that is shorter.
        limit: the model's longest sequence in tokens; None where it names none.
        vocabulary: the model's number of token ids.
        seed: decides which rows are drawn from the text, and their order in a mixture.
        chat_template: how chats become text, see `chat`. With `on`, there must be chats.
    """

    samples: int | None = None
    length: int | None = None
    limit: int | None = None
    vocabulary: int
    seed: int = 0
    chat_template: str = "auto"


def build(
    source: str | Tensor | Iterable[str],
    tokenizer: Any,
    request: CalibrationRequest,
    sampler: Sampler | None = None,
) -> CalibrationSet:
    """Calibration rows from one source or a mixture.

    Args:
        source: a source or mixture by name or file, an iterable of strings, or an int64 tensor [N, T] of
            tokens.
        tokenizer: a transformers tokenizer; may be None for tokens that are ready-made.
        request: how many rows, how long, and for which model.
        sampler: samples text from the model, for the source `self`.

    Raises:
        ValueError: the source cannot be used for this model, or holds too little text.
    """
    mode = request.chat_template
    maker = Maker(tokenizer, request.limit, request.vocabulary, request.seed, sampler, mode)
    weights = mixture.parse(source) if isinstance(source, str) else None
    possible = any(isinstance(part, str) and may_hold_chats(part) for part in weights or (source,))
    _check_chats(request, possible, source)
    if tokenizer is not None:
        template_of(tokenizer, mode)  # refuses a template that is wanted and not there
    if weights:
        return _mixed(weights, maker, request)
    made = _plain(source, maker, request)
    _check_chats(request, "chat" in made.details, source)
    return made


def _check_chats(request: CalibrationRequest, chats: bool, source: str | Tensor | Iterable[str]) -> None:
    """Raise `ValueError` where the chat template is on and the source has no chats."""
    if request.chat_template == "on" and not chats:
        name = "text or tokens in memory"
        if isinstance(source, str):
            name = "source " + repr(" and ".join(map(mixture.public_name, mixture.plain_sources(source))))
        raise ValueError(
            f"calibration.chat_template is on, and {name} has no chats (lists of {{role, content}} in a "
            "column of a .jsonl or .parquet file or of a hub dataset); leave --chat-template out, or name a "
            "source that has"
        )


def _plain(source: str | Tensor | Iterable[str], maker: Maker, request: CalibrationRequest) -> CalibrationSet:
    """Rows of one source."""
    if isinstance(source, Tensor) or (isinstance(source, str) and source.endswith(".safetensors")):
        return _ready_made(source, maker, request)
    samples = SAMPLES if request.samples is None else request.samples
    length = request.length or default_length(request.limit)
    maker.check(source, samples, length)
    tokens, details = maker.make(source, samples, length)
    return _set(tokens, _name(source), request.seed, details)


def _ready_made(source: str | Tensor, maker: Maker, request: CalibrationRequest) -> CalibrationSet:
    """Tokens from memory or a token file, used exactly as they are."""
    if isinstance(source, Tensor):
        name = "tokens in memory"
        tokens = check_tokens(source.cpu(), name)
    else:
        name = Path(source).name
        tokens = read_tokens(Path(source))
    rows, length = tokens.shape
    for option, asked, have in (("samples", request.samples, rows), ("seqlen", request.length, length)):
        if asked is not None and asked != have:
            raise ValueError(
                f"{name} is used exactly as it is and has {option} {have}, got {option} {asked}; leave the "
                "option out"
            )
    return _set(maker.checked(tokens, name), name, request.seed)


def _mixed(weights: dict[str, float], maker: Maker, request: CalibrationRequest) -> CalibrationSet:
    """Rows of every part of a mixture, in a random order drawn with the seed."""
    # Rows of a token file cannot be cut, so without a requested length they decide it.
    ready = [read_tokens(Path(part)).shape[1] for part in weights if part.endswith(".safetensors")]
    length = request.length or (ready[0] if ready else default_length(maker.limit))
    shares = mixture.shares(weights, SAMPLES if request.samples is None else request.samples)
    names = {part: _name(part) for part in weights}
    if len(set(names.values())) < len(names):
        raise ValueError(
            "files of a mixture go by their names, which must differ, got "
            f"{', '.join(names.values())}; rename one"
        )
    for part, share in shares.items():  # check every part before time is spent on the first
        maker.check(part, share, length)
    details: dict[str, Any] = {}
    rows: dict[str, Tensor] = {}
    # Parts that may turn out to have no chats come first: sampling takes long.
    for part in sorted(shares, key=lambda part: not may_hold_chats(part)):
        if not may_hold_chats(part):
            _check_chats(request, "chat" in details, mixture.as_text(weights))
        rows[part], made = maker.make(part, shares[part], length)
        details |= made
    _check_chats(request, "chat" in details, mixture.as_text(weights))
    details["parts"] = {names[part]: share for part, share in shares.items()}
    name = mixture.as_text({names[part]: weight for part, weight in weights.items()})
    return _set(mixture.interleave([rows[part] for part in shares], maker.seed), name, maker.seed, details)


def _name(source: str | Iterable[str]) -> str:
    """What the record calls a source."""
    return mixture.public_name(source) if isinstance(source, str) else "text in memory"


def _set(tokens: Tensor, source: str, seed: int, details: dict[str, Any] | None = None) -> CalibrationSet:
    return CalibrationSet(tokens, source, seed, digest(tokens), details or {})
