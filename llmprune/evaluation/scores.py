"""What to score and the scores: texts for perplexity, tasks for lm-eval, the same for a dense and a pruned model."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.checkpoint.files import raw
from llmprune.common.messages import nearest
from llmprune.common.shipped import read_yaml, shipped, shipped_names
from llmprune.evaluation.perplexity import perplexity, protocol, windows
from llmprune.evaluation.zeroshot import load_tasks, zero_shot
from llmprune.machine.device import free_cached_memory
from llmprune.machine.processes import ALONE, Team
from llmprune.machine.state import libraries
from llmprune.model.opening import whole
from llmprune.text.sources import evaluation_text, file_path, is_file
from llmprune.text.tokenisation import default_length

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmprune.model.opening import Model


@dataclass(frozen=True)
class EvaluationSpec:
    """Texts and tasks to score, and how. `prepare` reads the texts and checks the tasks before any long work."""

    perplexity: tuple[str, ...]
    tasks: tuple[str, ...]
    window: int | None
    include_tasks: Path | None
    task_data: Path | None
    limit: int | None
    trust_remote_code: bool = False  # of task files
    rows: dict[str, Tensor] = field(default_factory=dict)
    loaded: Any = None
    suite: Path | None = None  # the file of a suite of the user's own

    @property
    def inputs(self) -> list[tuple[str, object]]:
        """The files and folders that scoring reads, by their name in words."""
        texts = [("the perplexity text", file_path(text)) for text in self.perplexity if is_file(text)]
        others = (
            ("the suite", self.suite),
            ("the tasks", self.include_tasks),
            ("the task data", self.task_data),
        )
        return [*texts, *others]

    def prepare(self, model: Model) -> EvaluationSpec:
        """The same with windows of the model's tokens.

        Raises:
            ValueError: no tokenizer, a window over the model's limit, a text that cannot be had or is too short, a task that is unknown,
                not trusted or gives no score.
        """
        spec = self
        if not self.perplexity and not self.tasks:
            suite = read_suite("quick" if model.remote else "demo")
            spec = dataclasses.replace(self, perplexity=suite[0], tasks=suite[1])
        if model.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, so it cannot be scored on text; add tokenizer files, or use prune instead of run"
            )
        window = spec.window or default_length(model.limit)
        if model.limit and window > model.limit:
            raise ValueError(
                f"evaluation window {window} is over the model's limit of {model.limit}; use --eval-seqlen {model.limit} or less"
            )
        with libraries():
            loaded = (
                load_tasks(spec.tasks, spec.include_tasks, spec.task_data, spec.trust_remote_code)
                if spec.tasks
                else None
            )
        names = [_name(t) for t in spec.perplexity]
        if len(set(names)) < len(names):
            raise ValueError(f"texts to score need different file names, got {', '.join(names)}; rename one")
        vocabulary = model.skeleton.model.get_input_embeddings().weight.shape[0]
        rows = {
            _name(t): windows(evaluation_text(t), model.tokenizer, window, spec.limit, vocabulary, t)
            for t in spec.perplexity
        }
        return dataclasses.replace(spec, rows=rows, loaded=loaded)

    def key(self, dtype: torch.dtype) -> str:
        """The same for specifications that lead to the same scores of a model."""
        texts = [
            (name, list(rows.shape), hashlib.sha256(raw(rows)).hexdigest())
            for name, rows in self.rows.items()
        ]
        described = repr(
            (texts, self.tasks, str(self.include_tasks), str(self.task_data), self.limit, str(dtype))
        )
        return hashlib.sha256(described.encode()).hexdigest()


@dataclass(frozen=True)
class Scores:
    """`perplexity`: name -> value and protocol; `tasks`: name -> metric -> value and stderr, and the protocol."""

    perplexity: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, Any]]
    seconds: float


def evaluation_spec(
    perplexity: Sequence[str],
    tasks: Sequence[str],
    suite: str | None,
    window: int | None,
    include_tasks: str | os.PathLike[str] | None,
    task_data: str | os.PathLike[str] | None,
    limit: int | None,
    *,
    trust_remote_code: bool = False,
) -> EvaluationSpec:
    """What was asked for, a suite's texts and tasks added. Raises `ValueError` on values out of range or an unknown suite."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if window is not None and window < 2:
        raise ValueError(f"evaluation window must be at least 2 tokens, got {window}")
    texts, names = tuple(perplexity), tuple(tasks)
    if suite is not None:
        more = read_suite(suite)
        texts, names = (*texts, *more[0]), (*names, *more[1])
    unique = tuple(dict.fromkeys(texts)), tuple(dict.fromkeys(names))
    own_suite = Path(suite) if suite and suite.endswith((".yaml", ".yml")) else None
    include, data = (Path(folder) if folder else None for folder in (include_tasks, task_data))
    return EvaluationSpec(*unique, window, include, data, limit, trust_remote_code, suite=own_suite)


def read_suite(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts and tasks of a suite, by name or YAML file."""
    if name.endswith((".yaml", ".yml")):
        values = read_yaml(Path(name))
    elif name in shipped_names("eval", "suites"):
        values = read_yaml(shipped("eval", "suites", f"{name}.yaml"))
    else:
        raise nearest("suite", name, shipped_names("eval", "suites"))
    for key, value in values.items():
        if key not in ("description", "perplexity", "tasks"):
            raise nearest("suite key", key, ("description", "perplexity", "tasks"))
        if key != "description" and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise ValueError(f"suite {name!r}: {key} must be a list of names, got {value!r}")
    return tuple(values.get("perplexity", ())), tuple(values.get("tasks", ()))


def _name(text: str) -> str:
    """A file goes by its name: no local path is written anywhere."""
    return Path(text).name if is_file(text) else text


def score(model: Model, spec: EvaluationSpec, label: str, reporter: Any, team: Team = ALONE) -> Scores:
    """Score a model as prepared. Processes share the windows of a text; tasks are rank 0's."""
    started = time.monotonic()
    values = {}
    for name, rows in spec.rows.items():
        reporter.stage(f"{label}: perplexity on {name}", len(model.skeleton.blocks))
        value = perplexity(model.skeleton, rows, reporter.step, reporter.note, team)
        values[name] = {"value": value, "protocol": protocol(name, rows, model.skeleton.dtype)}
    tasks: dict[str, dict[str, Any]] = {}
    if spec.tasks:
        reporter.stage(f"{label}: {', '.join(spec.tasks)}", 1)
        with libraries():
            tasks = team.on_first(
                lambda: zero_shot(
                    whole(model), model.tokenizer, spec.loaded, spec.limit, spec.trust_remote_code
                )
            )
        reporter.step()
    model.check()
    free_cached_memory(model.skeleton.device)
    return Scores(values, tasks, time.monotonic() - started)
