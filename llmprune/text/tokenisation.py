"""The tokens of a long text, exactly those of the whole text, though only a piece of it is read and tokenised at a time.

Neighbouring windows overlap. The text is cut where both windows see the same tokens for a long stretch, at a place where what stands
before cannot matter for what comes after: where a new word of the pre-tokeniser begins, which every model takes for itself; or, for BPE,
between any two tokens, since a sequence of BPE tokens is the right one if and only if every two neighbours in it are. Where no such place
is found the window grows, up to a limit; then the text is refused. Tokens are never guessed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmprune.common.messages import first_line, is_failure

PIECE = 1 << 17  # characters that are tokenised at once
OVERLAP = 1 << 13  # of two windows
MARGIN = 1 << 10  # characters at the end of a window whose tokens what follows may still change
STRETCH = 1 << 10  # characters whose tokens both windows must agree on, beyond the place of the cut
LONGEST = 1 << 20  # the longest stretch without a place to cut
WHOLE = 1 << 22  # the longest text for a tokenizer that cannot be followed (one written in Python)

Ids = np.ndarray[Any, np.dtype[np.int64]]


class Pieces:
    """A text that comes in pieces of any size, given out in others. `ended`: nothing is left."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._coming = iter(pieces)
        self._held, self._at, self.ended = "", 0, False
        self._fill()

    def _fill(self) -> None:
        while self._at >= len(self._held) and not self.ended:
            piece = next(self._coming, None)
            self._held, self._at, self.ended = piece or "", 0, piece is None

    def take(self, size: int) -> str:
        """The next so many characters, fewer only at the end."""
        parts = []
        while size and not self.ended:
            part = self._held[self._at : self._at + size]
            parts.append(part)
            self._at, size = self._at + len(part), size - len(part)
            self._fill()
        return "".join(parts)


@dataclass(frozen=True)
class _Window:
    """A stretch of text and its tokens: ids, the characters each begins and ends with, whether a word begins with it.

    `clean`: no token before it reaches beyond its first character, and none after it begins before that.
    """

    text: str
    ids: Ids
    starts: Ids
    ends: Ids
    opens: np.ndarray[Any, np.dtype[np.bool_]]

    @functools.cached_property
    def clean(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        reached = np.concatenate(([0], np.maximum.accumulate(self.ends)[:-1]))
        coming = np.minimum.accumulate(self.starts[::-1])[::-1]
        return (reached <= self.starts) & (self.starts <= coming)


@dataclass(frozen=True)
class _Reader:
    """What is known of a fast tokenizer: how to read a window with it, and where a text may be cut.

    `anywhere`: between any two tokens (BPE). `spaces`: an added token may swallow a run of white space of any length.
    """

    read: Callable[[str], _Window]
    anywhere: bool
    spaces: bool


def first_tokens(stream: Iterable[Ids], wanted: int | None) -> Tensor | None:
    """The ids of a stream, int64, until there are as many as wanted (None: all); None where the stream holds nothing at all."""
    parts, count = [], 0
    for part in stream:
        parts.append(part.astype(np.int32))  # half the memory while they are gathered
        count += len(part)
        if wanted is not None and count >= wanted:
            break
    return torch.from_numpy(np.concatenate(parts, dtype=np.int64)) if parts else None


def check_made(tokens: Tensor, tokenizer: Any, name: str) -> None:
    """Raise `ValueError` where a tokenizer made nothing of a text, or special tokens alone."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    if set(tokens[:4096].unique().tolist()) <= special and set(tokens.unique().tolist()) <= special:
        made = (
            "no tokens"
            if not len(tokens)
            else f"only special tokens ({', '.join(map(str, tokens.unique().tolist()[:5]))})"
        )
        raise ValueError(
            f"the tokenizer makes {made} of {name}: it is damaged or belongs to another language; use the model's own"
        )


def check_known(tokens: Tensor, vocabulary: int, what: str) -> None:
    """Raise `ValueError` where token ids are not those of a model with so many."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{what} range from {low} to {high}, the model knows 0 to {vocabulary - 1}; use its own tokenizer"
        )


def encoded(tokenizer: Any, text: str | list[str], name: str, special: bool = True, **options: Any) -> Any:
    """What a tokenizer makes of a text or texts. Raises `ValueError` where it fails, as a damaged one may on some text alone."""
    try:
        # Left out by default: not every tokenizer written in Python takes the option.
        return tokenizer(text, **options) if special else tokenizer(text, add_special_tokens=False, **options)
    except BaseException as error:  # of many types
        if isinstance(error, MemoryError) or not is_failure(error):
            raise
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"the tokenizer fails on {name} ({told}); its files are damaged, restore the originals"
        ) from error


def tokens_of(pieces: Iterable[str], tokenizer: Any, name: str, special: bool = True) -> Iterator[Ids]:
    """The ids of a text that comes in pieces, as they become certain: those of `tokenizer(text)` for the whole text.

    Args:
        name: of the text, for messages. special: whether the tokenizer adds its special tokens, as it does by default.

    Raises:
        ValueError: a stretch longer than `LONGEST` has no place to cut, or the text is longer than `WHOLE` and the tokenizer none that
            can be followed.
    """
    text = Pieces(pieces)
    window = text.take(PIECE)
    if text.ended:
        yield ids_of(encoded(tokenizer, window, name, special)["input_ids"], name)
        return
    reader, around = _reader(tokenizer, name), _added(tokenizer, window, name) if special else ([], [])
    if reader is None or around is None:
        window += text.take(WHOLE - len(window))
        if not text.ended:
            raise ValueError(
                f"{name} is longer than {WHOLE:,} characters, and tokenizer {type(tokenizer).__name__} can only take a text whole; give a "
                "shorter text, or a tokenizer with a tokenizer.json"
            )
        yield ids_of(encoded(tokenizer, window, name, special)["input_ids"], name)
        return
    yield ids_of(around[0], name)
    yield from _followed(text, window, reader, name)
    yield ids_of(around[1], name)


def ids_of(made: Any, name: str) -> Ids:
    """The ids of one text. Raises `ValueError` where a tokenizer gives something else, as one without a token for the unknown may."""
    try:
        return np.array(made, dtype=np.int64).reshape(len(made))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"the tokenizer gives no token ids for {name} ({first_line(error)}); its files are damaged"
        ) from None


def _followed(text: Pieces, first: str, reader: _Reader, name: str) -> Iterator[Ids]:
    """The ids of a text without special tokens, of which the first window is taken already."""
    window, given, before = (
        reader.read(first),
        0,
        0,
    )  # `given`: tokens of the window that are not to be given any more
    while not text.ended:
        more = text.take(PIECE)
        following, cut, given_of_following = _joined(window, given, more, reader)
        if following is None:  # a longer window, from the same place on
            longer = reader.read(window.text + more)
            same = np.array_equal(window.ids[:given], longer.ids[:given]) and np.array_equal(
                window.starts[:given], longer.starts[:given]
            )
            if len(longer.text) > LONGEST or not same:
                raise ValueError(
                    f"{name}: the {len(longer.text):,} characters from character {before + 1:,} on hold no place where the tokenizer "
                    "surely splits, so the text cannot be tokenised in pieces; break them up with spaces or line breaks, or leave them out"
                )
            window = longer
            continue
        yield window.ids[given:cut]
        before += len(window.text) + len(more) - len(following.text)
        window, given = following, given_of_following
    yield window.ids[given:]


def _joined(window: _Window, given: int, more: str, reader: _Reader) -> tuple[_Window | None, int, int]:
    """The window that follows, which overlaps this one, and the token of each with which the following one takes over; None: no place."""
    for overlap in (OVERLAP, 8 * OVERLAP):
        if overlap + MARGIN > len(window.text) - (window.starts[given] if given < len(window.ids) else 0):
            break
        shift = _beginning(window, len(window.text) - overlap)
        following = reader.read(window.text[shift:] + more)
        cut = _meeting(window, following, shift, reader)
        assert cut is None or cut[0] >= given
        if cut is not None:
            return following, *cut
    return None, 0, 0


def _beginning(window: _Window, at: int) -> int:
    """The first character from `at` on where a word begins, or else a token: what repeats itself is then in step from the start."""
    near = window.clean & (window.starts >= at) & (window.starts <= at + MARGIN)
    for wanted in (near & window.opens, near):
        if wanted.any():
            return int(window.starts[wanted.argmax()])
    return at


def _meeting(old: _Window, new: _Window, shift: int, reader: _Reader) -> tuple[int, int] | None:
    """The token in both windows from which on the second one is right for both. `shift`: where it begins in the first."""
    end = len(old.text) - MARGIN
    a = np.flatnonzero((old.starts >= shift) & (old.ends <= end))
    b = np.flatnonzero(new.ends + shift <= end)
    count = min(len(a), len(b))
    a, b = a[len(a) - count :], b[len(b) - count :]
    differ = (
        (old.ids[a] != new.ids[b])
        | (old.starts[a] != new.starts[b] + shift)
        | (old.ends[a] != new.ends[b] + shift)
    )
    differ |= old.opens[a] != new.opens[b]
    agreed = int(np.flatnonzero(differ)[-1]) + 1 if differ.any() else 0
    a, b = a[agreed:], b[agreed:]
    able = old.clean[a] & new.clean[b] & (old.starts[a] <= end - STRETCH)
    for wanted in (able & old.opens[a], able) if reader.anywhere else (able & old.opens[a],):
        if wanted.any():
            i, j = int(a[wanted.argmax()]), int(b[wanted.argmax()])
            return None if reader.spaces and not old.text[old.starts[i] : end].strip() else (i, j)
    return None


def _reader(tokenizer: Any, name: str) -> _Reader | None:
    """How to follow a tokenizer, None where it does not tell where its tokens stand."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        described = json.loads(backend.to_str()) if backend is not None else None
    except Exception:  # parts written in Python cannot be described, and follow rules of their own
        described = None
    if described is None:
        return None
    model, added = described["model"], described.get("added_tokens") or []
    if model.get("dropout") or max((len(token["content"]) for token in added), default=0) > MARGIN:
        return None

    def read(text: str) -> _Window:
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        found = encoded(tokenizer, text, name, special=False, **options).encodings[0]
        places = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
        words = np.array([-1 if word is None else word for word in found.word_ids], dtype=np.int64)
        opens = (
            np.concatenate(([True], words[1:] != words[:-1])) if len(words) else np.zeros(0, dtype=np.bool_)
        )
        return _Window(text, np.array(found.ids, dtype=np.int64), places[:, 0], places[:, 1], opens)

    return _Reader(
        read, model.get("type") == "BPE", any(token["lstrip"] or token["rstrip"] for token in added)
    )


def _added(tokenizer: Any, text: str, name: str) -> tuple[list[int], list[int]] | None:
    """The ids that the tokenizer puts before and behind any text by default, None where that cannot be told."""
    for sample in ("a", text.strip()[:256]):
        full, bare = (encoded(tokenizer, sample, name, special)["input_ids"] for special in (True, False))
        for at in range(len(full) - len(bare) + 1):
            if bare and full[at : at + len(bare)] == bare:
                return full[:at], full[at + len(bare) :]
    return None


SEQUENCE_LENGTH = 2048


def default_length(limit: int | None) -> int:
    """Tokens per row unless asked: min(2048, the model's limit). Recent limits (131072) would ask for hundreds of GB."""
    return min(SEQUENCE_LENGTH, limit or SEQUENCE_LENGTH)
