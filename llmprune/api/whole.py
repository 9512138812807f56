"""A whole model at work, dense and packed, each in a process of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.api.contestant import Contestant
from llmprune.machine import device as devices
from llmprune.model.opening import Model
from llmprune.run.reporter import RunReporter
from llmprune.runtime.bench import CONTESTANTS, compared, medians

TOKENS = (1, 16, 256, 2048)
PROCESS = 1 << 30  # bytes that a process takes beside the weights of its model


class Whole:
    """The entry `whole`: both models at work, each in a process of its own."""

    def __init__(self, model: Model, forms: Mapping[str, Path], reporter: RunReporter) -> None:
        self._model, self._forms, self._reporter = model, forms, reporter
        most = max(TOKENS) if model.limit is None else model.limit
        self._tokens = [n for n in TOKENS if n <= most]

    def measured(self, seconds: float) -> dict[str, Any]:
        """The seconds of both for each number of tokens, in turn where memory holds both."""
        dense = sum(tensor.bytes for tensor in self._model.source.tensors.values())
        together = devices.available_memory() >= 2 * (dense + PROCESS)
        groups = [CONTESTANTS] if together else [(who,) for who in CONTESTANTS]
        taken: dict[str, dict[int, float]] = {}
        rounds: dict[str, dict[int, int]] = {}
        loaded: dict[str, dict[str, Any]] = {}
        self._reporter.stage("whole model", len(self._tokens) * len(groups))
        for group in groups:
            with contextlib.ExitStack() as stack:
                models = {who: self._started(who, stack) for who in group}
                self._race(models, seconds / len(groups), (taken, rounds, loaded))
        return {
            **loaded,
            "tokens": {
                str(n): {
                    **compared(taken["dense"][n], taken["packed"][n]),
                    **{f"{who}_tokens_per_second": n / taken[who][n] for who in CONTESTANTS},
                    "rounds": min(rounds[who][n] for who in CONTESTANTS),
                }
                for n in self._tokens
            },
            "in_turn": together,
            "left_out": [n for n in TOKENS if n not in self._tokens],
        }

    def _started(self, who: str, stack: contextlib.ExitStack) -> Contestant:
        trust = self._model.options.trust_remote_code
        started = Contestant(who, self._forms[who], self._model.limit, trust)
        stack.callback(started.close)
        return started

    def _race(self, models: Mapping[str, Contestant], seconds: float, into: tuple[Any, Any, Any]) -> None:
        taken, rounds, loaded = into
        for n in self._tokens:
            measure = functools.partial(_once, models, n)
            found, counted = medians(seconds / len(self._tokens), measure, tuple(models))
            for who, model in models.items():
                taken.setdefault(who, {})[n] = found[who][n]
                rounds.setdefault(who, {})[n] = counted
                if who not in loaded:  # decoding is the first: before long prompts
                    loaded[who] = {
                        "load_seconds": model.loaded["seconds"],
                        "peak_memory_bytes": model.peak_memory(),
                        "empty_process_bytes": model.loaded["before"],
                    }
            self._reporter.step()


def _once(models: Mapping[str, Contestant], tokens: int, who: str) -> dict[int, list[float]]:
    """What one of them takes for so many tokens."""
    return {tokens: [models[who].seconds(tokens)]}
