"""Zero-shot tasks through lm-eval's public API, with the model object in memory."""

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

METRICS = ("acc", "acc_norm", "exact_match", "f1")  # told first, in this order; then the others in lm-eval's
BATCH = 16
FEWSHOT_SEED = 1234
_log = logging.getLogger(__name__)


def load_tasks(
    tasks: Sequence[str], include: Path | None, data: Path | None, trust_remote_code: bool = False
) -> Any:
    """lm-eval's tasks with their data, ready to be run on any number of models; loaded before any long work.

    lm-eval's own thousands of tasks are indexed only when one of them is asked for.

    Raises:
        ValueError: an unknown task, with the nearest names; a folder or the data of a task that cannot be had; a task whose file would
            run Python and is not trusted, or that would give no score.
    """
    from lm_eval.tasks import TaskManager

    for option, folder in (("--include-tasks", include), ("--task-data", data)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{option} {folder} is not a folder")
    with _quiet(), _contained(trust_remote_code):
        folders = [shipped("eval", "tasks"), *([include] if include else [])]
        metadata = {"data": str(data)} if data else None
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
    import lm_eval.tasks
    from lm_eval.api import metrics, registry

    assert metrics  # filled by its import
    check_tasks(
        tasks,
        index,
        [shipped("eval", "tasks"), Path(lm_eval.tasks.__file__).parent],
        registry.metric_registry.keys(),
    )


def _loaded(manager: Any, tasks: Sequence[str]) -> Any:
    try:
        return manager.load(list(tasks))
    except Exception as error:  # the hub, dataset formats and task files raise what they like
        line = f"{type(error).__name__}: {first_line(error)}"
        if type(error).__name__ == "SecurityError":
            raise ValueError(
                f"a template of {', '.join(tasks)} reaches into Python ({line}); use --trust-remote-code if you trust it"
            ) from error
        remedy = "without network, use --suite demo, or local task files with --include-tasks"
        if (
            isinstance(error, OSError)
            and error.errno is not None
            and not isinstance(error, (ConnectionError, TimeoutError))
        ):
            remedy = (
                "check its files, and that there is room where they are cached (HF_HOME names another folder)"
            )
        raise ValueError(f"cannot load the data of {', '.join(tasks)} ({line}); {remedy}") from error


def _close(task: str, names: list[str]) -> list[str]:
    # lm-eval has thousands of names: show those that could have been meant.
    import difflib

    return difflib.get_close_matches(task, names, n=12, cutoff=0.3) or ["(see: lm-eval ls tasks)"]


def _check_scores(name: str, task: Any, trust_remote_code: bool) -> None:
    """Raise `ValueError` for a task that cannot be run, or of which it is known that it gives no score."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY
    from lm_eval.api.task import ConfigurableTask

    if getattr(task, "UNSAFE_CODE", False) and not trust_remote_code:
        raise ValueError(
            f"task {name!r} runs code that the model writes (unsafe_code); use --trust-remote-code if you want that, or do without"
        )
    if not isinstance(task, ConfigurableTask) or callable(task.config.process_results):
        return  # only it knows
    kind, wanted = task.OUTPUT_TYPE, task.aggregation()
    unknown = sorted({str(metric) for metric in wanted} - _given(task))
    if len(unknown) == len(wanted) or (
        unknown and kind == "generate_until"
    ):  # of generated text, an unknown metric ends the run
        raise ValueError(
            f"task {name!r} would give no score: lm-eval does not compute {', '.join(unknown) or 'a metric'} for output_type {kind}; put "
            f"others into metric_list in its file, such as {', '.join(DEFAULT_METRIC_REGISTRY[kind])}"
        )
    if odd := [metric for metric in wanted if not callable(wanted[metric])]:
        raise ValueError(
            f"task {name!r}: lm-eval does not know the aggregation of {odd[0]}; name another in its file, such as mean"
        )
    if unknown:
        _log.warning(
            "task %r: lm-eval does not compute %s for output_type %s", name, ", ".join(unknown), kind
        )


def _given(task: Any) -> set[str]:
    """The metrics lm-eval will compute for a task that leaves that to it."""
    known = {str(metric) for metric, function in task._metric_fn_list.items() if function is not None} - {
        "bypass"
    }
    if task.OUTPUT_TYPE == "generate_until":
        return known
    answers: list[Any] = [-1.0] if task.OUTPUT_TYPE == "loglikelihood_rolling" else [(-1.0, False)]
    doc = task.eval_docs[0]
    if task.OUTPUT_TYPE == "multiple_choice":
        answers *= len(task.doc_to_choice(doc)) * (1 + ("acc_mutual_info" in known))
    return set(task.process_results(doc, answers))


def zero_shot(
    model: Any, tokenizer: Any, loaded: Any, limit: int | None, trust_remote_code: bool = False
) -> dict[str, dict[str, Any]]:
    """Scores by task: `{task: {metric: {"value", "stderr"}, "protocol": {...}}}`; a group is reported with its members.

    Raises:
        ValueError: a task fails, or gives no score or one that is no finite number.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _quiet(), _contained(trust_remote_code), _one_process():
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, device=str(model.device))
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(FEWSHOT_SEED)  # the same examples for the dense and the pruned model
        options = {
            "log_samples": False,
            "bootstrap_iters": 1000,
            "confirm_run_unsafe_code": trust_remote_code,
        }
        try:
            results = lm_eval.evaluate(harness, loaded, limit=limit, **options)
        except (ValueError, RuntimeError, OSError, MemoryError):
            raise
        except Exception as error:  # templates and metrics raise what they like
            raise ValueError(
                f"{', '.join(loaded['tasks'])}: lm-eval fails with {type(error).__name__}: {first_line(error)}"
            ) from error
    assert results is not None
    scores = {task: _scores(results, task) for task in results["results"]}
    for task in loaded["tasks"]:
        if set(scores.get(task, {})) <= {"protocol"}:
            raise ValueError(
                f"task {task!r} gave no score; name metrics that lm-eval computes in the metric_list of its file"
            )
    return scores


def _scores(results: Any, task: str) -> dict[str, Any]:
    """Every number lm-eval gives for a task, by metric; of another filter than none, by `metric,filter`."""
    found = results["results"][task]
    keys = [key.rpartition(",") for key in found if "," in key and "_stderr," not in key]
    keys.sort(key=lambda key: METRICS.index(key[0]) if key[0] in METRICS else len(METRICS))
    better, scores, directions = results.get("higher_is_better", {}).get(task, {}), {}, {}
    for metric, _, rule in keys:
        value, name = found[f"{metric},{rule}"], metric if rule == "none" else f"{metric},{rule}"
        if not isinstance(value, numbers.Real):
            continue
        if not math.isfinite(value):
            raise ValueError(
                f"task {task!r}: {name} is {value}, no finite number; the model is broken, its dtype overflows, or --limit is too low"
            )
        stderr = found.get(f"{metric}_stderr,{rule}")
        told = isinstance(stderr, numbers.Real) and math.isfinite(stderr)
        scores[name] = {"value": _plain(value), "stderr": _plain(stderr) if told else None}
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
    """lm-eval renders the templates of task files with all of Python in reach; here they are rendered in jinja's sandbox."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    free = utils.env
    if not trust_remote_code:
        utils.env = SandboxedEnvironment(
            loader=free.loader, undefined=free.undefined, keep_trailing_newline=free.keep_trailing_newline
        )
        utils.env.filters.update(free.filters)
    try:
        yield
    finally:
        utils.env = free


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """lm-eval would estimate some errors in forked processes: no faster for 1000 samples, and such a process, which inherits how we
    answer to SIGTERM, may outlive its end and hang the run."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        os.environ.pop("DISABLE_MULTIPROC")
        os.environ |= {"DISABLE_MULTIPROC": before} if before is not None else {}


class _Others:
    """A stream without what the thread writes that made it; our bars are drawn by another."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs and draws bars of its own; ours tell the user where the run stands."""
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "transformers", "datasets")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        out, err = (
            contextlib.redirect_stdout(_Others(sys.stdout)),
            contextlib.redirect_stderr(_Others(sys.stderr)),
        )
        with warnings.catch_warnings(), out, err:
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
