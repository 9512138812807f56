"""Tokenises long texts in windows, to bound memory, yet yields exactly the tokens of the whole text.

Neighbouring windows overlap. The tokens of one window are used up to a cut in the overlap, and those of the
next window from there on. The cut must fulfil two conditions. Both windows have the same tokens over a long
stretch after it; and the text before it cannot influence the tokens after it. The latter holds where a new
word of the pre-tokeniser begins, since every word is tokenised separately; for BPE it holds between any two
tokens, since a sequence of BPE tokens is the right one if and only if each pair of neighbours in it is. Where
an overlap has no such place, the window grows, up to a limit; beyond it the text is refused. Tokens are never
guessed.
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

# All in characters.
PIECE = 1 << 17  # tokenised at once
OVERLAP = 1 << 13  # shared by two neighbouring windows
MARGIN = 1 << 10  # at the end of a window: their tokens may still change with the text that follows
STRETCH = 1 << 10  # after the cut: both windows must agree on their tokens
LONGEST = 1 << 20  # the longest stretch of text without a place to cut
WHOLE = 1 << 22  # the longest text for a tokenizer that can only take texts whole (one written in Python)

Ids = np.ndarray[Any, np.dtype[np.int64]]


class Pieces:
    """A text that arrives in pieces of any size and is read in pieces of another size.

    `ended` is true once all of it has been taken.
    """

    def __init__(self, pieces: Iterable[str]) -> None:
        self._coming = iter(pieces)
        self._held, self._at, self.ended = "", 0, False
        self._fill()

    def _fill(self) -> None:
        while self._at >= len(self._held) and not self.ended:
            piece = next(self._coming, None)
            self._held, self._at, self.ended = piece or "", 0, piece is None

    def take(self, size: int) -> str:
        """The next `size` characters; fewer only at the end of the text."""
        parts = []
        while size and not self.ended:
            part = self._held[self._at : self._at + size]
            parts.append(part)
            self._at, size = self._at + len(part), size - len(part)
            self._fill()
        return "".join(parts)


@dataclass(frozen=True)
class _Window:
    """A stretch of text and its tokens.

    Attributes:
        ids: the token ids.
        starts, ends: for each token, the offset of its first character, and of the character after its last.
        opens: for each token, whether a word of the pre-tokeniser begins with it.
    """

    text: str
    ids: Ids
    starts: Ids
    ends: Ids
    opens: np.ndarray[Any, np.dtype[np.bool_]]

    @functools.cached_property
    def clean(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """For each token, whether all earlier tokens end by its start and no later one begins before it."""
        reached = np.concatenate(([0], np.maximum.accumulate(self.ends)[:-1]))
        coming = np.minimum.accumulate(self.starts[::-1])[::-1]
        return (reached <= self.starts) & (self.starts <= coming)


@dataclass(frozen=True)
class _Reader:
    """How to tokenise a window with a fast tokenizer, and where its text may be cut.

    Attributes:
        read: tokenises a text without special tokens.
        anywhere: the text may be cut between any two tokens (BPE), not only where a word begins.
        spaces: an added token may absorb white space of any length before or after it.
    """

    read: Callable[[str], _Window]
    anywhere: bool
    spaces: bool


def first_tokens(stream: Iterable[Ids], wanted: int | None) -> Tensor | None:
    """The first ids of a stream as int64, at least `wanted` of them if it has so many.

    Args:
        stream: arrays of ids. It is read no further than needed.
        wanted: how many are needed; None for all.

    Returns:
        The ids, perhaps some more than wanted; None where the stream yields no array at all.
    """
    parts, count = [], 0
    for part in stream:
        parts.append(part.astype(np.int32))  # halves the memory while they are collected
        count += len(part)
        if wanted is not None and count >= wanted:
            break
    return torch.from_numpy(np.concatenate(parts, dtype=np.int64)) if parts else None


def check_made(tokens: Tensor, tokenizer: Any, name: str) -> None:
    """Raise `ValueError` where a tokenizer made no tokens of a text, or only special ones."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    if set(tokens[:4096].unique().tolist()) <= special and set(tokens.unique().tolist()) <= special:
        examples = ", ".join(map(str, tokens.unique().tolist()[:5]))
        made = f"only special tokens ({examples})" if len(tokens) else "no tokens"
        raise ValueError(
            f"the tokenizer makes {made} of {name}: it is damaged or belongs to another language; use the "
            "model's own"
        )


def check_known(tokens: Tensor, vocabulary: int, what: str) -> None:
    """Raise `ValueError` unless all ids are below `vocabulary`, the model's number of token ids."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{what} range from {low} to {high}, the model knows 0 to {vocabulary - 1}; use its own tokenizer"
        )


def encoded(tokenizer: Any, text: str | list[str], name: str, special: bool = True, **options: Any) -> Any:
    """What a tokenizer returns for one text or several.

    Args:
        name: what error messages call the text.
        special: whether special tokens are added, as by default.

    Raises:
        ValueError: the tokenizer fails. A damaged one may do so for some texts only.
    """
    try:
        # The option is only passed where it is needed: some tokenizers written in Python do not take it.
        return tokenizer(text, **options) if special else tokenizer(text, add_special_tokens=False, **options)
    except BaseException as error:  # tokenizers raise errors of many types, Rust panics among them
        if isinstance(error, MemoryError) or not is_failure(error):
            raise
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"the tokenizer fails on {name} ({cause}); its files are damaged, restore the originals"
        ) from error


def tokens_of(pieces: Iterable[str], tokenizer: Any, name: str, special: bool = True) -> Iterator[Ids]:
    """The ids of a text that arrives in pieces, the same as those of `tokenizer(text)` for the whole text.

    Args:
        pieces: the text.
        name: what error messages call the text.
        special: whether special tokens are added, as by default.

    Yields:
        Arrays of ids, as soon as they are certain.

    Raises:
        ValueError: a stretch of the text longer than `LONGEST` has no place to cut; or the text is longer
            than `WHOLE` and the tokenizer can only take texts whole.
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
                f"{name} is longer than {WHOLE:,} characters, and tokenizer {type(tokenizer).__name__} can "
                "only take a text whole; give a shorter text, or a tokenizer with a tokenizer.json"
            )
        yield ids_of(encoded(tokenizer, window, name, special)["input_ids"], name)
        return
    yield ids_of(around[0], name)
    yield from _followed(text, window, reader, name)
    yield ids_of(around[1], name)


def ids_of(made: Any, name: str) -> Ids:
    """The ids of one text as an array.

    Raises:
        ValueError: they are no whole numbers; a tokenizer without an unknown token may return None for an id.
    """
    try:
        return np.array(made, dtype=np.int64).reshape(len(made))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"the tokenizer gives no token ids for {name} ({first_line(error)}); its files are damaged"
        ) from None


def _followed(text: Pieces, first: str, reader: _Reader, name: str) -> Iterator[Ids]:
    """The ids of a text without special tokens; `first`, its first window, has been taken from it already."""
    window = reader.read(first)
    done = 0  # tokens at the start of the window that the window before has yielded
    before = 0  # characters of the text before the window
    while not text.ended:
        more = text.take(PIECE)
        following, cut, done_of_following = _joined(window, done, more, reader)
        if following is None:  # no place to cut: enlarge this window
            longer = reader.read(window.text + more)
            same = np.array_equal(window.ids[:done], longer.ids[:done]) and np.array_equal(
                window.starts[:done], longer.starts[:done]
            )
            if len(longer.text) > LONGEST or not same:
                raise ValueError(
                    f"{name}: the {len(longer.text):,} characters from character {before + 1:,} on hold no "
                    "place where the tokenizer surely splits, so the text cannot be tokenised in pieces; "
                    "break them up with spaces or line breaks, or leave them out"
                )
            window = longer
            continue
        yield window.ids[done:cut]
        before += len(window.text) + len(more) - len(following.text)
        window, done = following, done_of_following
    yield window.ids[done:]


def _joined(window: _Window, done: int, more: str, reader: _Reader) -> tuple[_Window | None, int, int]:
    """The next window, which overlaps this one, and the index in each of the token where the next takes over.

    The window is None where the overlap has no place to cut.
    """
    for overlap in (OVERLAP, 8 * OVERLAP):
        begins = window.starts[done] if done < len(window.ids) else 0
        if overlap + MARGIN > len(window.text) - begins:
            break
        shift = _beginning(window, len(window.text) - overlap)
        following = reader.read(window.text[shift:] + more)
        cut = _meeting(window, following, shift, reader)
        assert cut is None or cut[0] >= done
        if cut is not None:
            return following, *cut
    return None, 0, 0


def _beginning(window: _Window, at: int) -> int:
    """The offset from `at` on where the next window begins: at a word, else at a token, else at `at` itself.

    In text that repeats itself (such as a row of dashes) both windows then split it in the same places.
    """
    near = window.clean & (window.starts >= at) & (window.starts <= at + MARGIN)
    for wanted in (near & window.opens, near):
        if wanted.any():
            return int(window.starts[wanted.argmax()])
    return at


def _meeting(old: _Window, new: _Window, shift: int, reader: _Reader) -> tuple[int, int] | None:
    """The place to cut: the index in both windows of a token from which on those of the new one are right.

    None where there is none. `shift` is the offset in the old window's text at which the new window begins.
    """
    end = len(old.text) - MARGIN
    a = np.flatnonzero((old.starts >= shift) & (old.ends <= end))
    b = np.flatnonzero(new.ends + shift <= end)
    count = min(len(a), len(b))
    a, b = a[len(a) - count :], b[len(b) - count :]
    differ = (old.ids[a] != new.ids[b]) | (old.opens[a] != new.opens[b])
    differ |= (old.starts[a] != new.starts[b] + shift) | (old.ends[a] != new.ends[b] + shift)
    agreed = int(np.flatnonzero(differ)[-1]) + 1 if differ.any() else 0
    a, b = a[agreed:], b[agreed:]
    able = old.clean[a] & new.clean[b] & (old.starts[a] <= end - STRETCH)
    words = able & old.opens[a]
    for wanted in (words, able) if reader.anywhere else (words,):
        if wanted.any():
            i, j = int(a[wanted.argmax()]), int(b[wanted.argmax()])
            only_space = not old.text[old.starts[i] : end].strip()
            return None if reader.spaces and only_space else (i, j)
    return None


def _reader(tokenizer: Any, name: str) -> _Reader | None:
    """How to tokenise windows with a tokenizer; None for one that does not give the offsets of its tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        described = json.loads(backend.to_str()) if backend is not None else None
    except Exception:  # parts written in Python cannot be serialised, and may follow any rules
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
        opens = np.ones(len(words), dtype=np.bool_)
        opens[1:] = words[1:] != words[:-1]
        return _Window(text, np.array(found.ids, dtype=np.int64), places[:, 0], places[:, 1], opens)

    strips = any(token["lstrip"] or token["rstrip"] for token in added)
    return _Reader(read, anywhere=model.get("type") == "BPE", spaces=strips)


def _added(tokenizer: Any, text: str, name: str) -> tuple[list[int], list[int]] | None:
    """The special tokens a tokenizer puts before and after any text; None where they cannot be determined."""
    for sample in ("a", text.strip()[:256]):
        full, bare = (encoded(tokenizer, sample, name, special)["input_ids"] for special in (True, False))
        for at in range(len(full) - len(bare) + 1):
            if bare and full[at : at + len(bare)] == bare:
                return full[:at], full[at + len(bare) :]
    return None


SEQUENCE_LENGTH = 2048


def default_length(limit: int | None) -> int:
    """Tokens per row where the user sets none: 2048, or the model's longest sequence if that is shorter.

    Rows as long as recent models allow (131072 tokens) would need hundreds of GB.
    """
    return min(SEQUENCE_LENGTH, limit or SEQUENCE_LENGTH)
