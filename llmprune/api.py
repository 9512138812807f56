"""The Python API; every command is a thin call of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune import choice, processes, upload
from llmprune import device as devices
from llmprune import recipe as recipes
from llmprune.calibration import mixture
from llmprune.checkpoint.contents import RECORD
from llmprune.checkpoint.reader import Checkpoint, read_record
from llmprune.checkpoint.replacement import check_output, input_files
from llmprune.data import shown
from llmprune.evaluation import audit
from llmprune.evaluation.scores import EvaluationSpec, evaluation_spec, score
from llmprune.hub import locate
from llmprune.machine.state import libraries
from llmprune.model.opening import Model, open_model
from llmprune.model.skeleton import Skeleton, read_config
from llmprune.model.targets import find_targets
from llmprune.pipeline import Options, Production, Reporter, Silent, Source, planned
from llmprune.plan import Plan
from llmprune.recipe import Recipe
from llmprune.record import environment
from llmprune.text import file_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Result:
    """A finished run: the output folder, and the record as in its `llmprune.json`."""

    output: Path
    record: dict[str, Any]


@dataclass(frozen=True)
class DryRun:
    """What a run would do."""

    plan: Plan
    recipe: Recipe
    output: Path


def prune(
    model: str | os.PathLike[str] | PreTrainedModel, *, recipe: str | None = None, sparsity: float | None = None,
    pattern: str | None = None, pruner: str | None = None, refiner: str | None = None, update: str | None = None,
    allocator: str | None = None,
    calibration: Source | None = None, samples: int | None = None, seqlen: int | None = None, seed: int | None = None,
    device: str = "auto", dtype: str = "auto", output: str | os.PathLike[str] | None = None, overwrite: bool = False,
    resume: bool = False, restart: bool = False, offload: str = "auto", settings: Mapping[str, Any] | None = None,
    tokenizer: Any = None, revision: str | None = None, trust_remote_code: bool = False,
    time_limit: float | None = None, dry_run: bool = False, evaluation: EvaluationSpec | None = None, reporter: Reporter | None = None,
) -> Any:  # fmt: skip
    """Prune a model and save it; with `evaluation`, score it dense first and pruned afterwards.

    Args:
        model: `demo`, an alias, a hub id, a folder, or a transformers model in memory.
        recipe: a recipe's name or YAML file; None for `best` where its memory and time fit, else `dsnot`. The
            other options override its fields (`settings`: any, by dotted key).
        sparsity: share of weights removed, in [0, 1). pattern: `unstructured` or `N:M` (which implies its sparsity).
        calibration: any SOURCE, a mapping of sources to weights, an iterable of strings, or int64 tokens [N, T].
        samples, seqlen: rows and tokens per row.
        output: the folder to write; by default named after model, recipe and sparsity in the current directory.
        overwrite: replace an output folder that is not empty, once the new one is complete.
        resume: go on where an earlier run into this folder stopped. restart: throw away what it left.
        offload: where block inputs are kept: `ram`, `disk` (a file beside the output), or `auto` (RAM while the plan fits).
        time_limit: minutes the best recipe may take by estimate to be chosen; None for `LLMPRUNE_TIME_LIMIT`, else 60.
        dry_run: only plan.

    Returns:
        `Result` (or `DryRun`).

    Raises:
        ValueError: bad input, in one line, before any long work.
    """
    if isinstance(calibration, os.PathLike):
        calibration = os.fspath(calibration)
    elif isinstance(calibration, Mapping):
        calibration = mixture.as_text(calibration)
    team = processes.current()
    reporter = (reporter if team.first else None) or Silent()
    overrides = _overrides(calibration, settings, **{
        "pattern": pattern, "sparsity": sparsity, "pruner": pruner, "refiner": refiner, "update": update, "allocator": allocator,
        "calibration.samples": samples, "calibration.sequence_length": seqlen, "seed": seed,
    })  # fmt: skip
    limit = _time_limit(time_limit)
    chosen = recipes.load(recipe or choice.LIGHT, overrides)  # checked before any long work

    def reopen(what: Any) -> Model:
        known = None if what is model else opened.tokenizer
        return open_model(what, tokenizer=known or tokenizer, revision=revision if what is model else None, device=device, dtype=dtype,
                          trust_remote_code=trust_remote_code)  # fmt: skip

    opened = team.in_turn(lambda: reopen(model))
    if recipe is None:
        chosen = team.on_first(lambda: choice.choose(overrides, opened, calibration, limit, team.size))
    own = recipes.load(recipe or chosen.name)
    target = Path(output) if output is not None else default_output(opened, chosen, own)
    inputs = _inputs(opened, recipe, chosen, evaluation)
    options = Options(target, inputs, overwrite, resume, restart, offload, trust_remote_code)
    if dry_run:
        check_output(target, overwrite or resume, inputs)
        planned_recipe, _, _, plan = planned(opened, chosen, calibration, options, team, reporter, evaluation)
        return DryRun(plan, planned_recipe, target)
    production = Production(opened, options, team, reporter)
    try:
        record = production.make(chosen, calibration, evaluation, reopen)
    except BaseException as error:
        production.close(error)
        raise
    production.close(None)
    return Result(target, record)


def _inputs(model: Model, recipe: str | None, chosen: Recipe, evaluation: EvaluationSpec | None) -> dict[str, Path]:
    """The files and folders that a run reads, by their name in words: its output may not take their place."""
    named: list[tuple[str, object]] = [("the model", model.folder)]
    if recipe is not None and recipe.endswith((".yaml", ".yml")):
        named.append(("the recipe", recipe))
    parts = mixture.plain_sources(chosen.calibration.source)
    named += [("the calibration file", file_path(part)) for part in parts if mixture.is_file(part)]
    return input_files([*named, *(evaluation.inputs if evaluation else ())])


def _overrides(calibration: Source | None, settings: Mapping[str, Any] | None, **named: Any) -> dict[str, Any]:
    """The fields of the recipe that were given, by dotted key."""
    if calibration is not None and not isinstance(calibration, (str, Iterable)):
        raise ValueError(f"calibration must be a SOURCE, an iterable of strings or int64 tokens [N, T], got {type(calibration).__name__}")
    named["calibration.source"] = calibration if isinstance(calibration, (str, type(None))) else "in-memory"
    return {**{k: v for k, v in named.items() if v is not None}, **(settings or {})}


def _time_limit(given: float | None) -> float:
    text = os.environ.get("LLMPRUNE_TIME_LIMIT") if given is None else None
    try:
        limit = float(text) if text is not None else choice.TIME_LIMIT if given is None else float(given)
    except (TypeError, ValueError):
        limit = -1.0
    if not limit >= 0:
        raise ValueError(f"the time limit must be a number of minutes from 0, got {shown(text if given is None else given)}")
    return limit


def default_output(model: Model, recipe: Recipe, own: Recipe) -> Path:
    """A folder named after model, recipe (and what was exchanged in it: `own` is the recipe's file) and sparsity."""
    amount = recipe.pattern.replace(":", "to") if ":" in recipe.pattern else f"{recipe.sparsity:g}"
    exchanged = [recipe.pruner.name] if recipe.pruner.name != own.pruner.name else []
    if (recipe.refiner and recipe.refiner.name) != (own.refiner and own.refiner.name):
        exchanged.append(recipe.refiner.name if recipe.refiner else "unrefined")
    if (updates := [u.name for u in recipe.update]) != [u.name for u in own.update]:
        exchanged += updates or ["unchanged"]
    return Path("-".join([model.label.rpartition("/")[2], recipe.name, *exchanged, amount]))


def run_model(
    model: str | os.PathLike[str] | PreTrainedModel, *, perplexity: Sequence[str] = (), tasks: Sequence[str] = (), suite: str | None = None,
    eval_seqlen: int | None = None, include_tasks: str | os.PathLike[str] | None = None, task_data: str | os.PathLike[str] | None = None,
    limit: int | None = None, **options: Any,
) -> Any:  # fmt: skip
    """`prune` with evaluation, dense and pruned: the main job. Without texts, tasks or suite, the model's default suite."""
    trusted = options.get("trust_remote_code", False)
    spec = evaluation_spec(perplexity, tasks, suite, eval_seqlen, include_tasks, task_data, limit, trusted)
    return prune(model, evaluation=spec, **options)


def evaluate(
    path: str | os.PathLike[str], *, perplexity: Sequence[str] = (), tasks: Sequence[str] = (), suite: str | None = None,
    eval_seqlen: int | None = None, include_tasks: str | os.PathLike[str] | None = None, task_data: str | os.PathLike[str] | None = None,
    limit: int | None = None, device: str = "auto", dtype: str = "auto", revision: str | None = None, trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score any checkpoint: `{"model", "perplexity": {NAME: {"value", "protocol"}}, "tasks": {NAME: {METRIC: {"value", "stderr"}}}, ...}`.

    Without texts, tasks or suite, the model's default suite: `quick` for a hub model, else `demo`, which needs no network.
    """
    spec = evaluation_spec(perplexity, tasks, suite, eval_seqlen, include_tasks, task_data, limit, trust_remote_code)
    team = processes.current()
    reporter = (reporter if team.first else None) or Silent()
    opened = team.in_turn(lambda: open_model(path, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code))
    with devices.PrivateMemory() as memory:
        scores = score(opened, team.in_turn(lambda: spec.prepare(opened)), "scoring", reporter, team)
    return {
        "model": opened.label,
        "perplexity": scores.perplexity,
        "tasks": scores.tasks,
        "seconds": round(scores.seconds, 3),
        "peak_memory_bytes": devices.peak_memory(),
        "peak_private_memory_bytes": memory.peak,
        "environment": environment(opened.skeleton.device, opened.skeleton.dtype, team.size),
    }


def inspect(path: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Recount zeros and N:M groups from disk, per matrix and overall; says whether a record beside them agrees."""
    located = locate(str(path), revision, trust_remote_code)
    source = Checkpoint(located.folder)
    skeleton = Skeleton(read_config(located.folder, trust_remote_code), source, torch.float32, torch.device("cpu"), trust_remote_code)
    targets = [t for name, block in skeleton.blocks.items() for t in find_targets(name, block)]
    stored = {skeleton.stored[t.weight_name]: t for t in targets}
    counts = audit.recount(source, frozenset(n for n, t in stored.items() if t.transposed), list(stored))
    source.check()
    weights, zeros = sum(c.shape[0] * c.shape[1] for c in counts), sum(c.zeros for c in counts)
    summary: dict[str, Any] = {
        "model": located.label,
        "matrices": [
            {"name": c.name, "shape": list(c.shape), "zeros": c.zeros, "sparsity": c.sparsity, "patterns": audit.patterns([c])}
            for c in counts
        ],
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "patterns": audit.patterns(counts),
        "bytes": sum(t.bytes for t in source.tensors.values()),
        "record_agrees": None,
    }
    if (located.folder / RECORD).is_file():
        summary["record_agrees"] = _agrees(read_record(located.folder), counts)
    return summary


def _agrees(record: dict[str, Any], counts: list[audit.Count]) -> bool:
    try:
        claimed = {m["name"]: m["sparsity"] for m in record["matrices"]}
        totals = record["totals"]["zeros"], record["totals"]["weights"]
        pruned = [c for c in counts if c.name in claimed]
        if len(pruned) < len(claimed) or totals != (sum(c.zeros for c in pruned), sum(c.shape[0] * c.shape[1] for c in pruned)):
            return False
        return all(abs(claimed.get(c.name, c.sparsity) - c.sparsity) < 0.5 / (c.shape[0] * c.shape[1]) for c in counts)
    except (LookupError, TypeError, AttributeError, OverflowError):
        raise ValueError("llmprune.json is not a record of this program; remove it or restore the original") from None


def push(
    folder: str | os.PathLike[str], repository: str, *, private: bool = True, revision: str | None = None, token: str | None = None,
    trust_remote_code: bool = False, reporter: Reporter | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Upload a finished folder to the hub with its model card, in one commit; a push that broke off goes on where it stopped.

    Args:
        repository: `owner/name`, made where it is not there. private: of a new repository; one that is there stays as it is.
        revision: a branch, made where it is not there; `main` by default. token: else that of `hf auth login` or `HF_TOKEN`.

    Returns:
        `repository`, `url`, `revision`, `commit`, `created`, `private`, `files [{name, bytes}]`, `bytes`, `removed`.

    Raises:
        ValueError: an unfinished folder, one whose recount disagrees with its record (nothing is uploaded), or what the hub refuses.
    """
    reporter, path = reporter or Silent(), Path(folder).expanduser()
    token = upload.check_destination(repository, token)
    files, source = upload.belonging_files(path), Checkpoint(path)
    reporter.stage("recounting zeros", 1)
    counts = inspect(path.resolve(), trust_remote_code=trust_remote_code)  # a name such as "demo" is a folder here
    if not counts["record_agrees"]:
        raise ValueError(f"llmprune.json in {path} does not fit its weights, so nothing is uploaded; see llmprune inspect {path}")
    reporter.step()
    return upload.upload(
        path,
        repository,
        files,
        private=private,
        revision=revision,
        token=token,
        check=source.check,
        reporter=reporter,
    )


def load(path: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False, **options: Any) -> Any:
    """A transformers model from a finished folder, weights in their stored dtype; `options` go to `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    located = locate(str(path), revision, trust_remote_code)
    source = Checkpoint(located.folder)  # refuses what is damaged or not safetensors
    chosen = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": trust_remote_code, **options}
    with libraries():
        model = AutoModelForCausalLM.from_pretrained(located.folder, **chosen)
    source.check()
    return model


def plan_summary(dry: DryRun) -> dict[str, Any]:
    """A dry run as plain values."""
    plan = dry.plan
    matrices = [
        {"name": m.name, "shape": list(m.shape), "pattern": str(m.pattern), "sparsity": m.sparsity, "set_by": m.reason}
        for m in plan.matrices.values()
    ]
    return {
        "output": str(dry.output), "recipe": dry.recipe.as_dict(), "matrices": matrices, "skipped": list(plan.skipped),
        "weights": plan.weights, "sparsity": plan.sparsity, "memory_bytes": plan.memory,
        "device_memory_bytes": plan.device_memory, "scoring_memory_bytes": plan.scoring,
        "device_scoring_memory_bytes": plan.device_scoring, "available_memory_bytes": plan.available, "offload": plan.offload,
        "disk_bytes": plan.disk,
    }  # fmt: skip
