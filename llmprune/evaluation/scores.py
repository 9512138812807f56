"""What to score (texts for perplexity, tasks for lm-eval), and scoring itself.

The dense and the pruned model of a run are scored by the same specification.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.common.messages import nearest
from llmprune.common.shipped import read_yaml, shipped, shipped_names
from llmprune.evaluation.perplexity import fingerprint, perplexity, protocol, windows
from llmprune.evaluation.zeroshot import load_tasks, zero_shot
from llmprune.machine.device import free_cached_memory
from llmprune.machine.processes import ALONE, Team
from llmprune.machine.state import libraries
from llmprune.model.opening import whole
from llmprune.text.files import file_path, is_file
from llmprune.text.mixture import public_name
from llmprune.text.sources import evaluation_text
from llmprune.text.tokenisation import default_length

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmprune.model.opening import Model


@dataclass(frozen=True)
class TaskFiles:
    """Where tasks come from besides lm-eval and llmprune, and whether they are trusted.

    Attributes:
        include: a folder with lm-eval task files of the user's own.
        data: a folder with the data of the tasks that read local files (`rte_local`, `blimp_local`).
        trust_remote_code: whether task files may run Python code.
    """

    include: Path | None = None
    data: Path | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class EvaluationSpec:
    """What to score and how. `prepare` reads the texts and checks the tasks before any long work.

    Attributes:
        perplexity: texts by name or file.
        tasks: names of lm-eval tasks.
        window: tokens per evaluation window; None for 2048, or the model's limit if that is shorter.
        limit: at most so many windows per text and documents per task; None for all.
        files: task files and their data.
        suite: the file of a suite of the user's own.
        rows: the windows of each text; filled by `prepare`.
        loaded: the tasks with their data; filled by `prepare`.
    """

    perplexity: tuple[str, ...]
    tasks: tuple[str, ...]
    window: int | None = None
    limit: int | None = None
    files: TaskFiles = TaskFiles()
    suite: Path | None = None
    rows: dict[str, Tensor] = field(default_factory=dict)
    loaded: Any = None

    @property
    def inputs(self) -> list[tuple[str, object]]:
        """The files and folders that scoring reads, each with its name in words."""
        texts = [("the perplexity text", file_path(text)) for text in self.perplexity if is_file(text)]
        folders = [("the tasks", self.files.include), ("the task data", self.files.data)]
        return [*texts, ("the suite", self.suite), *folders]

    def prepare(self, model: Model) -> EvaluationSpec:
        """The same with the windows of the model's tokens, and with the tasks loaded.

        Without texts and tasks, those of the model's default suite are taken: `quick` for a hub model, else
        `demo`.

        Raises:
            ValueError: the model has no tokenizer; a window is over its limit; a text cannot be read or is
                too short; a task is unknown, not trusted, or gives no score.
        """
        spec = self
        if self.rows or self.loaded is not None:  # prepared before, for this very model
            return self
        if not self.perplexity and not self.tasks:
            suite = read_suite("quick" if model.remote else "demo")
            spec = dataclasses.replace(
                self, perplexity=suite.perplexity, tasks=suite.tasks, limit=self.limit or suite.limit
            )
        if model.tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, so it cannot be scored on text; add tokenizer files, or use "
                "prune instead of run"
            )
        window = spec.window or default_length(model.limit)
        if model.limit and window > model.limit:
            raise ValueError(
                f"evaluation window {window} is over the model's limit of {model.limit}; use --eval-seqlen "
                f"{model.limit} or less"
            )
        return dataclasses.replace(spec, loaded=spec._load_tasks(), rows=spec._windows(model, window))

    def _load_tasks(self) -> Any:
        if not self.tasks:
            return None
        files = self.files
        with libraries():
            return load_tasks(self.tasks, files.include, files.data, files.trust_remote_code)

    def _windows(self, model: Model, length: int) -> dict[str, Tensor]:
        """The windows of each text, by the name the text has in the record."""
        names = [public_name(text) for text in self.perplexity]
        if len(set(names)) < len(names):
            raise ValueError(f"texts to score need different file names, got {', '.join(names)}; rename one")
        vocabulary = model.skeleton.model.get_input_embeddings().weight.shape[0]
        return {
            name: windows(evaluation_text(text), model.tokenizer, length, self.limit, vocabulary, text)
            for name, text in zip(names, self.perplexity, strict=True)
        }

    def key(self, dtype: torch.dtype) -> str:
        """The same for specifications that lead to the same scores of a model."""
        texts = [(name, list(rows.shape), fingerprint(rows)) for name, rows in self.rows.items()]
        include, data = str(self.files.include), str(self.files.data)
        described = repr((texts, self.tasks, include, data, self.limit, str(dtype)))
        return hashlib.sha256(described.encode()).hexdigest()


@dataclass(frozen=True)
class Scores:
    """The scores of one model.

    Attributes:
        perplexity: by text: `{"value", "protocol"}`.
        tasks: by task: `{METRIC: {"value", "stderr"}, "protocol": ...}`.
        seconds: how long scoring took.
    """

    perplexity: dict[str, dict[str, Any]]
    tasks: dict[str, dict[str, Any]]
    seconds: float


def evaluation_spec(
    perplexity: Sequence[str],
    tasks: Sequence[str],
    suite: str | None = None,
    window: int | None = None,
    limit: int | None = None,
    files: TaskFiles | None = None,
) -> EvaluationSpec:
    """What was asked for, together with the texts and tasks of a suite.

    Args:
        perplexity, tasks, window, limit, files: see `EvaluationSpec`.
        suite: a suite by name or YAML file.

    Raises:
        ValueError: a window or limit out of range, or an unknown suite.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if window is not None and window < 2:
        raise ValueError(f"evaluation window must be at least 2 tokens, got {window}")
    texts, names, own_suite = tuple(perplexity), tuple(tasks), None
    if suite is not None:
        more = read_suite(suite)
        texts, names, limit = (*texts, *more.perplexity), (*names, *more.tasks), limit or more.limit
        own_suite = Path(suite) if suite.endswith((".yaml", ".yml")) else None
    return EvaluationSpec(
        tuple(dict.fromkeys(texts)),
        tuple(dict.fromkeys(names)),
        window,
        limit,
        files or TaskFiles(),
        own_suite,
    )


@dataclass(frozen=True)
class Suite:
    """A named set of texts and tasks.

    Attributes:
        perplexity, tasks: as in `EvaluationSpec`.
        limit: at most so many windows per text and documents per task, where the user gives no limit.
    """

    perplexity: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None


def read_suite(name: str) -> Suite:
    """A suite by name or YAML file. Raises `ValueError` if malformed."""
    if name.endswith((".yaml", ".yml")):
        values = read_yaml(Path(name))
    elif name in shipped_names("eval", "suites"):
        values = read_yaml(shipped("eval", "suites", f"{name}.yaml"))
    else:
        raise nearest("suite", name, shipped_names("eval", "suites"))
    limit = values.get("limit")
    for key, value in values.items():
        if key not in ("description", "perplexity", "tasks", "limit"):
            raise nearest("suite key", key, ("description", "perplexity", "tasks", "limit"))
        names = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if key in ("perplexity", "tasks") and not names:
            raise ValueError(f"suite {name!r}: {key} must be a list of names, got {value!r}")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"suite {name!r}: limit must be an integer of at least 1, got {limit!r}")
    return Suite(tuple(values.get("perplexity", ())), tuple(values.get("tasks", ())), limit)


def score(model: Model, spec: EvaluationSpec, label: str, reporter: Any, team: Team = ALONE) -> Scores:
    """Score a model.

    Args:
        spec: what to score, as returned by `prepare`.
        label: what the stages are called, for example "scoring dense".
        reporter: is told the stages and their progress.
        team: the processes of this run. They share the windows of a text; only rank 0 runs the tasks.
    """
    started = time.monotonic()
    values = {}
    for name, rows in spec.rows.items():
        reporter.stage(f"{label}: perplexity on {name}", len(model.skeleton.blocks))
        value = perplexity(model.skeleton, rows, reporter.step, reporter.note, team)
        measured = protocol(name, rows, model.skeleton.dtype, spec.limit)
        values[name] = {"value": value, "protocol": measured}
    tasks: dict[str, dict[str, Any]] = {}
    if spec.tasks:
        reporter.stage(f"{label}: {', '.join(spec.tasks)}", 1)
        trust = spec.files.trust_remote_code

        def run_tasks() -> dict[str, dict[str, Any]]:
            return zero_shot(whole(model), model.tokenizer, spec.loaded, spec.limit, trust)

        with libraries():
            tasks = team.on_first(run_tasks)
        reporter.step()
    model.check()
    free_cached_memory(model.skeleton.device)
    return Scores(values, tasks, time.monotonic() - started)
