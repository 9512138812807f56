"""Zero-shot tasks through lm-eval's public API, with the model object in memory."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmprune.data import shipped
from llmprune.registry import nearest

METRICS = ("acc", "acc_norm", "exact_match", "f1")
BATCH = 16
FEWSHOT_SEED = 1234


def load_tasks(tasks: Sequence[str], include: Path | None, data: Path | None) -> Any:
    """lm-eval's tasks with their data, ready to be run on any number of models; loaded before any long work.

    lm-eval's own thousands of tasks are indexed only when one of them is asked for.

    Raises:
        ValueError: an unknown task, with the nearest names; a folder or the data of a task that cannot be had.
    """
    from lm_eval.tasks import TaskManager

    for option, folder in (("--include-tasks", include), ("--task-data", data)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{option} {folder} is not a folder")
    with _quiet():
        folders = [shipped("eval", "tasks"), *([include] if include else [])]
        metadata = {"data": str(data)} if data else None
        manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
        if any(task not in manager.all_tasks for task in tasks):
            manager = TaskManager(include_path=folders, metadata=metadata)
        for task in tasks:
            if task not in manager.all_tasks:
                raise nearest("task", task, _close(task, manager.all_tasks))
        try:
            return manager.load(list(tasks))
        except Exception as error:  # the hub, dataset formats and task files raise what they like
            line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ValueError(
                f"cannot load the data of {', '.join(tasks)} ({type(error).__name__}: {line}); "
                "without network, use --suite demo, or local task files with --include-tasks"
            ) from error


def _close(task: str, names: list[str]) -> list[str]:
    # lm-eval has thousands of names: show those that could have been meant.
    import difflib

    return difflib.get_close_matches(task, names, n=12, cutoff=0.3) or ["(see: lm-eval ls tasks)"]


def zero_shot(model: Any, tokenizer: Any, loaded: Any, limit: int | None) -> dict[str, dict[str, Any]]:
    """Scores by task: `{task: {metric: {"value", "stderr"}, "protocol": {...}}}`; a group is reported with its members."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, device=str(model.device))
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(FEWSHOT_SEED)  # the same examples for the dense and the pruned model
        results = lm_eval.evaluate(harness, loaded, limit=limit, log_samples=False, bootstrap_iters=1000)
    assert results is not None
    return {task: _scores(results, task) for task in results["results"]}


def _scores(results: Any, task: str) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for metric in METRICS:
        value = results["results"][task].get(f"{metric},none")
        if isinstance(value, (int, float)):
            stderr = results["results"][task].get(f"{metric}_stderr,none")
            scores[metric] = {"value": value, "stderr": stderr if isinstance(stderr, (int, float)) else None}
    samples = results.get("n-samples", {}).get(task, {})
    scores["protocol"] = {
        "documents": samples.get("effective"),
        "shots": results.get("n-shot", {}).get(task, 0),
        "version": results.get("versions", {}).get(task),
    }
    return scores


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval logs and draws bars of its own; ours tell the user where the run stands."""
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "transformers", "datasets")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
