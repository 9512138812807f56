"""Runs zero-shot tasks with lm-eval on a model in memory: loading and checking the tasks, then scoring."""

from __future__ import annotations

import contextlib
import logging
import math
import numbers
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune.common.messages import first_line, nearest
from llmprune.common.shipped import shipped
from llmprune.evaluation.taskfiles import all_known, check_tasks

METRICS = ("acc", "acc_norm", "exact_match", "f1")  # reported first, in this order; then lm-eval's others
BATCH = 16
FEWSHOT_SEED = 1234
_log = logging.getLogger(__name__)


def load_tasks(
    tasks: Sequence[str], include: Path | None, data: Path | None, trust_remote_code: bool = False
) -> Any:
    """Load tasks with their data, ready to be run on any number of models.

    Args:
        tasks: names of tasks, groups or tags.
        include: a folder with task files of the user's own.
        data: a folder with the data of llmprune's tasks that read local files.
        trust_remote_code: allow task files to run Python code.

    Returns:
        lm-eval's tasks, for `zero_shot`.

    Raises:
        ValueError: an unknown task; a folder that does not exist; data that cannot be loaded; a task file
            that would run Python and is not trusted; or a task that would give no score.
    """
    from lm_eval.tasks import TaskManager

    for option, folder in (("--include-tasks", include), ("--task-data", data)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{option} {folder} is not a folder")
    with _quiet(), _contained(trust_remote_code):
        folders = [shipped("eval", "tasks"), *([include] if include else [])]
        metadata = {"data": str(data)} if data else None
        # lm-eval's own thousands of tasks are indexed only if one of them is needed: that takes seconds.
        manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
        if not all_known(tasks, manager.task_index):
            manager = TaskManager(include_path=folders, metadata=metadata)
        for task in tasks:
            if task not in manager.all_tasks:
                raise nearest("task", task, _close(task, manager.all_tasks))
        if not trust_remote_code:
            _check_files(tasks, manager.task_index)
        loaded = _loaded(manager, tasks)
    for name, task in loaded["tasks"].items():
        _check_scores(name, task, trust_remote_code)
    return loaded


def _check_files(tasks: Sequence[str], index: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a task's file would run Python code."""
    import lm_eval.tasks
    from lm_eval.api import metrics, registry

    assert metrics  # importing it fills the registry
    trusted = [shipped("eval", "tasks"), Path(lm_eval.tasks.__file__).parent]
    check_tasks(tasks, index, trusted, registry.metric_registry.keys())


def _loaded(manager: Any, tasks: Sequence[str]) -> Any:
    """The tasks with their data. Raises `ValueError` where they cannot be loaded."""
    try:
        return manager.load(list(tasks))
    except Exception as error:  # the hub, dataset formats and task files may raise errors of any type
        line = f"{type(error).__name__}: {first_line(error)}"
        if type(error).__name__ == "SecurityError":
            raise ValueError(
                f"a template of {', '.join(tasks)} reaches into Python ({line}); use --trust-remote-code if "
                "you trust it"
            ) from error
        network = isinstance(error, (ConnectionError, TimeoutError))
        if isinstance(error, OSError) and error.errno is not None and not network:
            remedy = (
                "check its files, and that there is room where they are cached (HF_HOME names another folder)"
            )
        else:
            remedy = "without network, use --suite demo, or local task files with --include-tasks"
        raise ValueError(f"cannot load the data of {', '.join(tasks)} ({line}); {remedy}") from error


def _close(task: str, names: list[str]) -> list[str]:
    """The names a user may have meant; lm-eval has too many to show them all."""
    import difflib

    return difflib.get_close_matches(task, names, n=12, cutoff=0.3) or ["(see: lm-eval ls tasks)"]


def _check_scores(name: str, task: Any, trust_remote_code: bool) -> None:
    """Raise `ValueError` for a task that needs trust it does not have, or that surely gives no score."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY
    from lm_eval.api.task import ConfigurableTask

    if getattr(task, "UNSAFE_CODE", False) and not trust_remote_code:
        raise ValueError(
            f"task {name!r} runs code that the model writes (unsafe_code); use --trust-remote-code if you "
            "want that, or do without"
        )
    if not isinstance(task, ConfigurableTask) or callable(task.config.process_results):
        return  # the task computes its scores itself
    kind, wanted = task.OUTPUT_TYPE, task.aggregation()
    unknown = sorted({str(metric) for metric in wanted} - _given(task))
    # In a task of generated text, lm-eval fails on any metric it does not know; elsewhere it leaves it out.
    if len(unknown) == len(wanted) or (unknown and kind == "generate_until"):
        raise ValueError(
            f"task {name!r} would give no score: lm-eval does not compute "
            f"{', '.join(unknown) or 'a metric'} for output_type {kind}; put others into metric_list in its "
            f"file, such as {', '.join(DEFAULT_METRIC_REGISTRY[kind])}"
        )
    if odd := [metric for metric in wanted if not callable(wanted[metric])]:
        raise ValueError(
            f"task {name!r}: lm-eval does not know the aggregation of {odd[0]}; name another in its file, "
            "such as mean"
        )
    if unknown:
        _log.warning(
            "task %r: lm-eval does not compute %s for output_type %s", name, ", ".join(unknown), kind
        )


def _given(task: Any) -> set[str]:
    """The metrics lm-eval will compute for a task, found with invented answers to its first document."""
    known = {str(metric) for metric, function in task._metric_fn_list.items() if function is not None}
    known -= {"bypass"}
    if task.OUTPUT_TYPE == "generate_until":
        return known
    answers: list[Any] = [-1.0] if task.OUTPUT_TYPE == "loglikelihood_rolling" else [(-1.0, False)]
    doc = task.eval_docs[0]
    if task.OUTPUT_TYPE == "multiple_choice":
        answers *= len(task.doc_to_choice(doc)) * (1 + ("acc_mutual_info" in known))
    return set(task.process_results(doc, answers))


def zero_shot(
    model: Any,
    tokenizer: Any,
    loaded: Any,
    limit: int | None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Score a model on tasks.

    Args:
        loaded: the tasks, as `load_tasks` returned them.
        limit: at most so many documents per task; None for all.
        trust_remote_code: allow task files to run Python code.

    Returns:
        `{task: {metric: {"value", "stderr"}, "protocol": {...}}}`; a group has an entry beside its members.

    Raises:
        ValueError: a task fails, gives no score, or gives one that is not finite.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _quiet(), _contained(trust_remote_code), _one_process():
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, device=str(model.device))
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(FEWSHOT_SEED)  # so that dense and pruned model see the same examples
        options = {
            "log_samples": False,
            "bootstrap_iters": 1000,
            "confirm_run_unsafe_code": trust_remote_code,
        }
        try:
            results = lm_eval.evaluate(harness, loaded, limit=limit, **options)
        except (ValueError, RuntimeError, OSError, MemoryError):
            raise
        except Exception as error:  # templates and metrics may raise errors of any type
            raise ValueError(
                f"{', '.join(loaded['tasks'])}: lm-eval fails with {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
    assert results is not None
    scores = {task: _scores(results, task) for task in results["results"]}
    for task in loaded["tasks"]:
        if set(scores.get(task, {})) <= {"protocol"}:
            raise ValueError(
                f"task {task!r} gave no score; name metrics that lm-eval computes in the metric_list of its "
                "file"
            )
    return scores


def _scores(results: Any, task: str) -> dict[str, Any]:
    """Every number lm-eval gives for a task, by metric, or by `metric,filter` where a filter was applied."""
    found = results["results"][task]
    keys = [key.rpartition(",") for key in found if "," in key and "_stderr," not in key]
    keys.sort(key=lambda key: METRICS.index(key[0]) if key[0] in METRICS else len(METRICS))
    better = results.get("higher_is_better", {}).get(task, {})
    scores: dict[str, Any] = {}
    directions: dict[str, Any] = {}
    for metric, _, rule in keys:
        value = found[f"{metric},{rule}"]
        name = metric if rule == "none" else f"{metric},{rule}"
        if not isinstance(value, numbers.Real):
            continue
        if not math.isfinite(value):
            raise ValueError(
                f"task {task!r}: {name} is {value}, no finite number; the model is broken, its dtype "
                "overflows, or --limit is too low"
            )
        stderr = found.get(f"{metric}_stderr,{rule}")
        finite = isinstance(stderr, numbers.Real) and math.isfinite(stderr)
        scores[name] = {"value": _plain(value), "stderr": _plain(stderr) if finite else None}
        directions[name] = better.get(metric)
    samples = results.get("n-samples", {}).get(task, {})
    return scores | {
        "protocol": {
            "documents": samples.get("effective"),
            "shots": results.get("n-shot", {}).get(task, 0),
            "version": results.get("versions", {}).get(task),
            "higher_is_better": directions,
        }
    }


def _plain(value: Any) -> int | float:
    return value if type(value) in (int, float) else float(value)


@contextlib.contextmanager
def _contained(trust_remote_code: bool) -> Iterator[None]:
    """Render the templates of task files in jinja's sandbox: lm-eval's own environment can run any Python."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    own = utils.env
    if not trust_remote_code:
        utils.env = SandboxedEnvironment(
            loader=own.loader,
            undefined=own.undefined,
            keep_trailing_newline=own.keep_trailing_newline,
        )
        utils.env.filters.update(own.filters)
    try:
        yield
    finally:
        utils.env = own


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Keep lm-eval from estimating standard errors in forked processes.

    A process that runs threads and uses a GPU must not be forked: the copy can hang on a lock that another
    thread held. For the 1000 bootstrap samples used here the processes are no faster anyway.
    """
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        os.environ.pop("DISABLE_MULTIPROC")
        os.environ |= {"DISABLE_MULTIPROC": before} if before is not None else {}


class _OtherThreads:
    """A stream that drops what the thread that made it writes, and passes on what other threads write.

    lm-eval writes in that thread; our progress bars are drawn by another.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the log messages and progress bars of lm-eval and its libraries: the run draws its own."""
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "transformers", "datasets")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        out = contextlib.redirect_stdout(_OtherThreads(sys.stdout))
        err = contextlib.redirect_stderr(_OtherThreads(sys.stderr))
        with warnings.catch_warnings(), out, err:
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
