"""Makes the calibration rows of one plain source (no mixture) for one model. N rows, T tokens.

A source is checked before any long work; then its rows are made, or taken from the cache.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmprune.calibration.cache import Cache, Made
from llmprune.calibration.chat import Chats, template_of
from llmprune.calibration.packing import drawn_rows, pack
from llmprune.calibration.sampling import Sampler
from llmprune.calibration.tokens import read_tokens
from llmprune.common.version import __version__
from llmprune.text.files import Document, file_path, is_file, whole_characters
from llmprune.text.mixture import public_name
from llmprune.text.sources import calibration_text, check_calibration
from llmprune.text.tokenisation import check_known

Plain = str | Iterable[str]  # the name or file of a source, or texts in memory


@dataclass(frozen=True)
class Maker:
    """Makes calibration rows for one model.

    Attributes:
        tokenizer: a transformers tokenizer; None where only ready-made or sampled tokens are used.
        limit: the model's longest sequence in tokens; None where it names none.
        vocabulary: the model's number of token ids.
        seed: of everything that is drawn.
        sampler: samples text from the model, for the source `self`.
        chat_template: how chats become text, see `chat`.
    """

    tokenizer: Any
    limit: int | None
    vocabulary: int
    seed: int
    sampler: Sampler | None = None
    chat_template: str = "auto"
    cache: Cache = field(default_factory=Cache)

    def check(self, source: Plain, samples: int, length: int) -> None:
        """Raise `ValueError` for everything that can be known to fail before any long work."""
        check_length(length, self.limit)
        if source == "self":
            if self.sampler is None:
                raise ValueError(
                    "calibration source 'self' is sampled from a model, and none was given; name another "
                    "source"
                )
            self.sampler.check(length)
        elif isinstance(source, str) and source.endswith(".safetensors"):
            _check_drawn(Path(source), samples, length)
        elif self.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, so text cannot become tokens; add tokenizer files or give "
                "--calibration TOKENS.safetensors"
            )
        elif isinstance(source, str) and source != "builtin":
            check_calibration(source)

    def make(self, source: Plain, samples: int, length: int) -> Made:
        """Rows int64 [N, T] of a source that `check` accepted, and what the record says about them."""
        name = public_name(source) if isinstance(source, str) else "text in memory"
        if not isinstance(source, str):
            tokens = pack(_strings(iter(source)), self.tokenizer, samples, length, name, self.seed)
            made: Made = (tokens, {})
        elif source == "self":
            made = self._sampled(samples, length)
        elif source.endswith(".safetensors"):
            made = (drawn_rows(read_tokens(Path(source)), samples, self.seed), {})
        else:
            made_with = _fingerprint(self.tokenizer, template_of(self.tokenizer, self.chat_template))
            key = (__version__, _identity(source), made_with, samples, length, self.seed)
            made = self.cache.rows(key, (samples, length), lambda: self._text(source, name, samples, length))
        return self.checked(made[0], name), made[1]

    def checked(self, tokens: Tensor, source: str) -> Tensor:
        """The tokens. Raises `ValueError` for one outside the model's vocabulary, or rows over its limit."""
        check_known(tokens, self.vocabulary, f"calibration tokens of {source}")
        length = tokens.shape[1]
        if self.limit and length > self.limit:
            raise ValueError(
                f"calibration tokens of {source} have sequence length {length}, over the model's limit of "
                f"{self.limit}; use shorter rows"
            )
        return tokens

    def _sampled(self, samples: int, length: int) -> Made:
        sampler = self.sampler
        assert sampler is not None

        def sample() -> Made:
            tokens = sampler.sample(samples, length, self.seed)
            return tokens, {"temperature": sampler.temperature, "top_p": sampler.top_p}

        key = (__version__, "self", *sampler.key(), samples, length, self.seed)
        return self.cache.rows(key, (samples, length), sample)

    def _text(self, source: str, name: str, samples: int, length: int) -> Made:
        chats = Chats(self.tokenizer, self.chat_template)
        if source == "builtin":
            documents: Iterator[Document] = _library(samples * length)
            finite = True
        else:
            read, finite = calibration_text(source, self.seed, chats)
            documents = read()
        seed = self.seed if finite else None
        tokens = pack(documents, self.tokenizer, samples, length, name, seed)
        return tokens, {"chat": chats.layout} if chats.layout else {}


def check_length(length: int, limit: int | None) -> None:
    """Raise `ValueError` for sequences longer than the model was made for."""
    if limit and length > limit:
        raise ValueError(
            f"sequence length {length} is over the model's limit of {limit}; use --seqlen {limit} or less"
        )


def _strings(documents: Iterator[Any]) -> Iterator[str]:
    for number, document in enumerate(documents, 1):
        if not isinstance(document, str):
            raise ValueError(f"calibration documents must be strings, got {type(document).__name__}")
        yield whole_characters(document, f"calibration document {number}")


def _library(tokens: int) -> Iterator[Document]:
    """Documents of the source `builtin`, enough for so many tokens.

    The calibration documents come first; where they are too few, the demo model's training documents follow.
    """
    from llmprune.demo import text as library

    own = library.calibration_documents()
    enough = sum(map(len, own)) >= 6 * tokens  # a token is about 3 characters; twice that, to draw rows from
    return itertools.chain(own, () if enough else library.training_documents())


def _check_drawn(path: Path, samples: int, length: int) -> None:
    """Raise `ValueError` where a token file in a mixture has rows of another length, or too few."""
    rows, have = read_tokens(path).shape
    if have != length:
        raise ValueError(
            f"{path.name} is used exactly as it is and has seqlen {have}, got seqlen {length}; use --seqlen "
            f"{have}"
        )
    if rows < samples:
        raise ValueError(
            f"{path.name} holds {rows} rows and the mixture takes {samples} of it; lower its weight or "
            "--samples"
        )


def _identity(source: str) -> tuple[object, ...]:
    """What must be unchanged for cached rows to be still those of this source."""
    if source == "builtin":
        return (source, sys.version)  # its text is the standard library of this Python
    if is_file(source) and (path := file_path(source)).is_file():
        return (source, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
    return (source,)


def _fingerprint(tokenizer: Any, template: Any) -> str:
    """The same for tokenizers that make the same tokens of every text, and of every chat by the template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((described + (repr(template) if template else "")).encode()).hexdigest()
