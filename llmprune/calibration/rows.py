"""Token rows of one plain source for one model: checked first, then made or taken from the cache. N rows, T tokens."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune import __version__
from llmprune.calibration.cache import Cache, Made
from llmprune.calibration.chat import Chats
from llmprune.calibration.packing import pack
from llmprune.calibration.sampling import Sampler
from llmprune.calibration.tokens import read_tokens
from llmprune.text import sources as text
from llmprune.text.files import whole_characters
from llmprune.text.tokenisation import check_known

Plain = str | Iterable[str]


@dataclass(frozen=True)
class Maker:
    """Makes rows of token ids below `vocabulary`, at most `limit` to a row. `sampler` serves the source `self`."""

    tokenizer: Any
    limit: int | None
    vocabulary: int
    seed: int
    sampler: Sampler | None = None
    cache: Cache = field(default_factory=Cache)

    def check(self, source: Plain, samples: int, length: int) -> None:
        """Raise `ValueError` for what can be known to fail before any long work."""
        if self.limit and length > self.limit:
            raise ValueError(
                f"sequence length {length} is over the model's limit of {self.limit}; use --seqlen {self.limit} or less"
            )
        if source == "self":
            if self.sampler is None:
                raise ValueError(
                    "calibration source 'self' is sampled from a model, and none was given; name another source"
                )
            self.sampler.check(length)
        elif isinstance(source, str) and source.endswith(".safetensors"):
            _check_drawn(Path(source), samples, length)
        elif self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, so text cannot become tokens; add tokenizer files or give --calibration TOKENS.safetensors"
            )
        elif isinstance(source, str) and source != "builtin":
            text.check_calibration(source)

    def make(self, source: Plain, samples: int, length: int) -> Made:
        """Rows int64 [N, T] of a checked source, and what the record says of how they were made."""
        if not isinstance(source, str):
            name = "text in memory"
            made: Made = (
                pack(_strings(iter(source)), self.tokenizer, samples, length, self.seed, True, name),
                {},
            )
        elif source == "self":
            name, made = source, self._sampled(samples, length)
        elif source.endswith(".safetensors"):
            name, made = Path(source).name, (_drawn(Path(source), samples, self.seed), {})
        else:
            name = Path(source).name if text.is_file(source) else source
            key = (__version__, _identity(source), _fingerprint(self.tokenizer), samples, length, self.seed)
            made = self.cache.rows(key, (samples, length), lambda: self._text(source, name, samples, length))
        return self.checked(made[0], name), made[1]

    def checked(self, tokens: Tensor, source: str) -> Tensor:
        """The tokens, if the model knows them all and takes rows that long."""
        check_known(tokens, self.vocabulary, f"calibration tokens of {source}")
        length = tokens.shape[1]
        if self.limit and length > self.limit:
            raise ValueError(
                f"calibration tokens of {source} have sequence length {length}, over the model's limit of {self.limit}; use shorter rows"
            )
        return tokens

    def _sampled(self, samples: int, length: int) -> Made:
        assert self.sampler is not None
        sampler, details = (
            self.sampler,
            {"temperature": self.sampler.temperature, "top_p": self.sampler.top_p},
        )
        key = (__version__, "self", *sampler.key(), samples, length, self.seed)
        return self.cache.rows(
            key, (samples, length), lambda: (sampler.sample(samples, length, self.seed), details)
        )

    def _text(self, source: str, name: str, samples: int, length: int) -> Made:
        chats = Chats(self.tokenizer)
        if source == "builtin":
            documents: Iterator[text.Document] = _library(samples * length)
            finite = True
        else:
            read, finite = text.calibration_text(source, self.seed, chats)
            documents = read()
        tokens = pack(documents, self.tokenizer, samples, length, self.seed, finite, name)
        return tokens, {"chat": chats.layout} if chats.layout else {}


def _strings(documents: Iterator[Any]) -> Iterator[str]:
    for number, document in enumerate(documents, 1):
        if not isinstance(document, str):
            raise ValueError(f"calibration documents must be strings, got {type(document).__name__}")
        yield whole_characters(document, f"calibration document {number}")


def _library(tokens: int) -> Iterator[text.Document]:
    """Built-in documents: the calibration modules are enough for small runs (at 3 characters a token), longer rows draw on the others."""
    from llmprune.demo import text as library

    own = library.calibration_documents()
    enough = sum(map(len, own)) >= 6 * tokens
    return itertools.chain(own, () if enough else library.training_documents())


def _check_drawn(path: Path, samples: int, length: int) -> None:
    rows, have = read_tokens(path).shape
    if have != length:
        raise ValueError(
            f"{path.name} is used exactly as it is and has seqlen {have}, got seqlen {length}; use --seqlen {have}"
        )
    if rows < samples:
        raise ValueError(
            f"{path.name} holds {rows} rows and the mixture takes {samples} of it; lower its weight or --samples"
        )


def _drawn(path: Path, samples: int, seed: int) -> Tensor:
    """So many rows of a token file, drawn with the seed, in the order of the file."""
    tokens = read_tokens(path)
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:samples]
    return tokens[chosen.sort().values].contiguous()


def _identity(source: str) -> tuple[object, ...]:
    """What must be the same for cached tokens to be the tokens of this source."""
    if source == "builtin":
        return (source, sys.version)
    if text.is_file(source):
        path = text.file_path(source)
        return (
            (source, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
            if path.is_file()
            else (source,)
        )
    return (source,)


def _fingerprint(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256((described + (repr(template) if template else "")).encode()).hexdigest()
