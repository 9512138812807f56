"""Calibration text from any source, as one frozen set of token rows, cached by what made it."""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from llmprune import __version__, text
from llmprune.calibration.packing import pack
from llmprune.calibration.tokens import check_tokens, read_tokens
from llmprune.contracts import CalibrationSet

SAMPLES = 128
SEQUENCE_LENGTH = 2048


def default_length(limit: int | None) -> int:
    """Tokens per row unless asked: min(2048, the model's limit). Recent limits (131072) would ask for hundreds of GB."""
    return min(SEQUENCE_LENGTH, limit or SEQUENCE_LENGTH)


def build(
    source: str | Tensor | Iterable[str],
    tokenizer: Any,
    *,
    samples: int | None,
    length: int | None,
    limit: int | None,
    vocabulary: int,
    seed: int,
) -> CalibrationSet:
    """Calibration rows from a SOURCE of the interface, an iterable of strings, or an int64 tensor [N, T].

    Args:
        tokenizer: a transformers tokenizer; None is enough for ready-made tokens.
        samples, length: rows and tokens per row; None for 128 and min(2048, limit).
        limit: the model's longest sequence. vocabulary: the model's number of token ids.

    Raises:
        ValueError: with one line that names the way out.
    """
    if isinstance(source, Tensor) or (isinstance(source, str) and source.endswith(".safetensors")):
        name = "tokens in memory" if isinstance(source, Tensor) else Path(source).name
        tokens = check_tokens(source.cpu(), name) if isinstance(source, Tensor) else read_tokens(Path(source))
        for option, asked, have in (("samples", samples, tokens.shape[0]), ("seqlen", length, tokens.shape[1])):
            if asked is not None and asked != have:
                raise ValueError(f"{name} is used exactly as it is and has {option} {have}, got {option} {asked}; leave the option out")
        return _checked(tokens, name, seed, limit, vocabulary)
    samples, length = SAMPLES if samples is None else samples, length or default_length(limit)
    if limit and length > limit:
        raise ValueError(f"sequence length {length} is over the model's limit of {limit}; use --seqlen {limit} or less")
    if tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, so text cannot become tokens; add tokenizer files or give --calibration TOKENS.safetensors"
        )
    if isinstance(source, str):
        name = Path(source).name if text.is_file(source) else source
        documents, finite = _documents(source, seed, samples * length)
        key = (__version__, _identity(source), _fingerprint(tokenizer), samples, length, seed)
        tokens = _cached(key, lambda: pack(documents, tokenizer, samples, length, seed, finite, name))
    else:
        name = "text in memory"
        tokens = pack(_strings(iter(source)), tokenizer, samples, length, seed, True, name)
    return _checked(tokens, name, seed, limit, vocabulary)


def _strings(documents: Iterator[Any]) -> Iterator[str]:
    for document in documents:
        if not isinstance(document, str):
            raise ValueError(f"calibration documents must be strings, got {type(document).__name__}")
        yield document


def _documents(source: str, seed: int, tokens: int) -> tuple[Iterator[str], bool]:
    if source != "builtin":
        documents, finite = text.calibration_text(source, seed)
        return documents(), finite
    from llmprune.demo import text as library

    own = library.calibration_documents()
    # The calibration modules are enough for small runs (about 3 characters a token); longer rows draw on the rest of the library.
    enough = sum(map(len, own)) >= 6 * tokens
    return iter(own) if enough else itertools.chain(own, library.training_documents()), True


def _checked(tokens: Tensor, source: str, seed: int, limit: int | None, vocabulary: int) -> CalibrationSet:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"calibration tokens of {source} range from {low} to {high}, the model knows 0 to {vocabulary - 1}; use its own tokenizer"
        )
    if limit and tokens.shape[1] > limit:
        raise ValueError(
            f"calibration tokens of {source} have sequence length {tokens.shape[1]}, over the model's limit of {limit}; use shorter rows"
        )
    return CalibrationSet(tokens, source, seed, digest(tokens))


def digest(tokens: Tensor) -> str:
    """Fingerprint of token rows: their shape and values."""
    return "sha256:" + hashlib.sha256(repr(list(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()


def cache_folder() -> Path:
    """Where tokens of downloaded text are kept: `LLMPRUNE_CACHE`, or `llmprune` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmprune"
    return Path(os.environ.get("LLMPRUNE_CACHE", default))


def _identity(source: str) -> tuple[object, ...]:
    """What must be the same for cached tokens to be the tokens of this source."""
    if source == "builtin":
        return (source, sys.version)
    if text.is_file(source):
        path = text.file_path(source)
        return (source, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (source,)
    return (source,)


def _fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(described.encode()).hexdigest()


def _cached(key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
    """Tokens from the cache, or made and put there. The file's name is the hash of everything the tokens depend on."""
    path = cache_folder() / "calibration" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"
    if path.is_file():
        return read_tokens(path)
    tokens = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({"tokens": tokens}, temporary)
    os.replace(temporary, path)
    return tokens
