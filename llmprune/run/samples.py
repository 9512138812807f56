"""Texts that the dense and the pruned model write from the same prompts, for the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llmprune.common.messages import duration, first_line
from llmprune.machine import device as devices
from llmprune.machine.state import libraries
from llmprune.model.opening import Model, whole
from llmprune.record.figures import Record
from llmprune.run.reporter import RunReporter
from llmprune.runtime.generation import Sampling, generate
from llmprune.text.prompts import prompts

TOKENS = 40  # that a model writes for each prompt
DEFAULT = 2  # prompts, where nobody says how many
_ROOM = 1.2  # memory that a model at work takes, in sizes of its weights
_LOADED = 0.5e9  # bytes of weights that are loaded in a second, at the least
_LEAST, _SHARE = 20.0, 0.1  # seconds that nobody has to ask for; the share of a run that they may be, too
Writers = Mapping[str, Callable[[], Model]]


class Wish(NamedTuple):
    """How many texts are wanted.

    Attributes:
        number: of prompts; 0 for none.
        asked: whether the user named it: then they are written however long it takes.
    """

    number: int
    asked: bool

    @classmethod
    def of(cls, given: int | None) -> Wish:
        """What was given; None for the default."""
        return cls(DEFAULT, False) if given is None else cls(given, True)

    def met(self, record: Record) -> bool:
        """Whether a record has as many, or says why it has none."""
        found = record.get("samples")
        if not self.number:
            return True
        if found is None:
            return False
        return not self.asked if "skipped" in found else len(found["texts"]) == self.number


NONE = Wish(0, False)


class _TooMuch(Exception):
    """Why no texts are written, in words."""


def with_samples(
    record: Record, writers: Writers, wish: Wish, reporter: RunReporter, known: Record | None = None
) -> Record:
    """The record with the texts of every model, and with the seconds they took.

    A model that does not fit in memory or takes too long writes none: the record and the reporter say why.

    Args:
        record: of the finished run.
        writers: what opens each model, by its name in the record: `dense`, `start`, `pruned`.
        wish: how many texts.
        known: the texts of the dense model, as `samples_of` returned them, where it need not write.
    """
    started, spent = time.monotonic(), record["totals"]["seconds"]["total"]
    found = known
    if known is None or "texts" in known:
        found = samples_of(record["model"]["source"], writers, wish, reporter, known, spent)
    seconds, taken = record["totals"]["seconds"], round(time.monotonic() - started, 3)
    seconds = seconds | {"write texts": taken, "total": round(seconds["total"] + taken, 3)}
    totals = record["totals"] | {"seconds": seconds, "peak_memory_bytes": devices.peak_memory()}
    return record | {"samples": found, "totals": totals}


def dense_texts(record: Record, wish: Wish) -> Record | None:
    """Of the texts in a record those of the dense model; None where they are not the ones that are wanted."""
    found = record.get("samples", {})
    texts = [text for text in found.get("texts", ()) if "dense" in text][: wish.number]
    if not texts or found["tokens"] != TOKENS:
        return None
    if [text["prompt"] for text in texts] != list(prompts(record["model"]["source"], wish.number)):
        return None
    return {"tokens": TOKENS, "texts": [{key: text[key] for key in ("prompt", "dense")} for text in texts]}


def samples_of(
    source: str,
    writers: Writers,
    wish: Wish,
    reporter: RunReporter,
    known: Record | None = None,
    spent: float = 0.0,
) -> Record:
    """The entry `samples` of a record: the texts of every model, or why there are none.

    Args:
        source: the name of the model. writers, wish: as for `with_samples`.
        known: the entry of the dense model alone, which then writes none.
        spent: seconds of the run before.
    """
    limit = None if wish.asked or known else max(_LEAST, _SHARE * spent)
    reporter.stage("writing texts", len(writers))
    try:
        return _written(source, writers, (wish.number, limit), reporter, known)
    except _TooMuch as reason:
        reporter.note(f"no texts in the report: {reason}")
        return {"skipped": str(reason)}
    except Exception as error:  # code of the model's own; the run is finished and must not fail of this
        # The message may hold a path of this machine, which no file may.
        reporter.note(f"no texts in the report: {first_line(error)}")
        return {"skipped": f"generating them failed with {type(error).__name__}"}


def _written(
    source: str,
    writers: Writers,
    wanted: tuple[int, float | None],
    reporter: RunReporter,
    known: Record | None,
) -> Record:
    """The entry with so many texts of every model; `wanted`: their number, and the seconds allowed."""
    given = prompts(source, wanted[0])
    by_writer: dict[str, list[str]] = {}
    if known:
        by_writer["dense"] = [text["dense"] for text in known["texts"]]
    for name, opened in writers.items():
        limit = None if by_writer else wanted[1]  # what the first one takes tells what the others will
        by_writer[name] = _texts_of(opened(), given, limit, max(2, len(writers)))
        reporter.step()
    texts = [
        {"prompt": prompt, **{name: found[n] for name, found in by_writer.items()}}
        for n, prompt in enumerate(given)
    ]
    return {"tokens": TOKENS, "texts": texts}


def _texts_of(model: Model, given: tuple[str, ...], limit: float | None, writers: int) -> list[str]:
    """What one model writes after each prompt, without the prompt."""
    _check_size(model, limit, writers)
    counts = [_tokens(model, prompt) for prompt in given]
    with libraries():
        loaded = whole(model)
        if not (hasattr(loaded, "can_generate") and loaded.can_generate()):
            raise _TooMuch(f"{type(loaded).__name__} writes no text")
        if limit is not None:
            _check_speed(loaded, model.tokenizer, given[0], limit / writers / sum(counts))
        texts = [
            str(generate(loaded, model.tokenizer, prompt, Sampling(tokens=count), _unheard)["text"])
            for prompt, count in zip(given, counts, strict=True)
        ]
    del loaded
    devices.free_cached_memory(model.skeleton.device)
    return texts


def _unheard(piece: str) -> None:
    """Nobody reads along."""


def _check_size(model: Model, limit: float | None, writers: int) -> None:
    """Raise `_TooMuch` for a model that does not fit into memory, or takes too long to load."""
    size = model.skeleton.elements * model.skeleton.dtype.itemsize
    free = devices.free_memory(model.skeleton.device)
    if size * _ROOM > free:
        raise _TooMuch(
            f"the whole model takes {size * _ROOM / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are "
            "free"
        )
    if limit is not None and writers * size / _LOADED > limit:
        raise _TooMuch(_slow(writers * size / _LOADED))


def _check_speed(loaded: Any, tokenizer: Any, prompt: str, allowed: float) -> None:
    """Raise `_TooMuch` where a token takes longer than is allowed, by the last of three."""
    found = generate(loaded, tokenizer, prompt, Sampling(tokens=3), _unheard)
    rate = found["tokens_per_second"]
    if rate and 1 / rate > allowed:
        raise _TooMuch(f"a token takes {1 / rate:.2g} s, so that is too slow; --samples-text N writes them")


def _slow(seconds: float) -> str:
    return f"loading the models takes about {duration(seconds)}; --samples-text N writes them all the same"


def _tokens(model: Model, prompt: str) -> int:
    """How many tokens it may write: no more than the model is made for."""
    if model.tokenizer is None:
        raise _TooMuch("the model has no tokenizer")
    count = len(model.tokenizer(prompt)["input_ids"])
    room = TOKENS if model.limit is None else min(TOKENS, model.limit - count)
    if count == 0 or room < 1:
        raise _TooMuch(f"the model takes at most {model.limit} tokens")
    return room
