"""The Python API; every command is a thin call of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from llmprune import calibration as calibrations
from llmprune import device as devices
from llmprune import recipe as recipes
from llmprune import report, run, upload
from llmprune.checkpoint.reader import Checkpoint, check_finite, read_json
from llmprune.checkpoint.writer import CheckpointWriter, check_output, check_space
from llmprune.contracts import CalibrationSet
from llmprune.evaluation import audit
from llmprune.evaluation.scores import EvaluationSpec, evaluation_spec, score
from llmprune.hub import locate
from llmprune.model.opening import Model, open_model
from llmprune.model.skeleton import Skeleton, read_config
from llmprune.model.targets import find_targets
from llmprune.plan import Plan, make_plan
from llmprune.recipe import Recipe
from llmprune.record import add_scores, build_record, environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Source = str | Tensor | Iterable[str]


class Reporter(Protocol):
    """Told what happens; the terminal's is in `screen.py`."""

    def plan(self, model: Model, recipe: Recipe, plan: Plan, calibration: CalibrationSet, output: Path) -> None:
        """The plan, before the work."""

    def stage(self, title: str, steps: int) -> None:
        """A stage of so many steps begins."""

    def step(self) -> None:
        """One step of the stage is done."""


class Silent:
    """Reports nothing."""

    def plan(self, model: Model, recipe: Recipe, plan: Plan, calibration: CalibrationSet, output: Path) -> None:
        """Nothing."""

    def stage(self, title: str, steps: int) -> None:
        """Nothing."""

    def step(self) -> None:
        """Nothing."""


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
    model: str | os.PathLike[str] | PreTrainedModel, *, recipe: str = recipes.DEFAULT, sparsity: float | None = None,
    pattern: str | None = None, pruner: str | None = None, refiner: str | None = None, allocator: str | None = None,
    calibration: Source | None = None, samples: int | None = None, seqlen: int | None = None, seed: int | None = None,
    device: str = "auto", dtype: str = "auto", output: str | os.PathLike[str] | None = None, overwrite: bool = False,
    settings: Mapping[str, Any] | None = None, tokenizer: Any = None, revision: str | None = None, trust_remote_code: bool = False,
    dry_run: bool = False, evaluation: EvaluationSpec | None = None, reporter: Reporter | None = None,
) -> Any:  # fmt: skip
    """Prune a model and save it; with `evaluation`, score it dense first and pruned afterwards.

    Args:
        model: `demo`, an alias, a hub id, a folder, or a transformers model in memory.
        recipe: a recipe's name or YAML file; the other options override its fields (`settings`: any, by dotted key).
        sparsity: share of weights removed, in [0, 1). pattern: `unstructured` or `N:M` (which implies its sparsity).
        calibration: any SOURCE, an iterable of strings, or int64 tokens [N, T]. samples, seqlen: rows and tokens per row.
        output: the folder to write; by default named after model, recipe and sparsity in the current directory.
        overwrite: replace an output folder that is not empty, once the new one is complete.
        dry_run: only plan.

    Returns:
        `Result` (or `DryRun`).

    Raises:
        ValueError: bad input, in one line, before any long work.
    """
    reporter = reporter or Silent()
    if isinstance(calibration, os.PathLike):
        calibration = os.fspath(calibration)
    if calibration is not None and not isinstance(calibration, (str, Iterable)):
        raise ValueError(f"calibration must be a SOURCE, an iterable of strings or int64 tokens [N, T], got {type(calibration).__name__}")
    source = calibration if isinstance(calibration, (str, type(None))) else "in-memory"
    overrides = {
        "pattern": pattern, "sparsity": sparsity, "pruner": pruner, "refiner": refiner, "allocator": allocator,
        "calibration.source": source, "calibration.samples": samples, "calibration.sequence_length": seqlen, "seed": seed,
    }  # fmt: skip
    chosen = recipes.load(recipe, {**{k: v for k, v in overrides.items() if v is not None}, **(settings or {})})
    opened = open_model(model, tokenizer=tokenizer, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    target = Path(output) if output is not None else default_output(opened, chosen, recipes.load(recipe))
    finished = target.resolve()  # a name such as "demo" is a folder here, not a model
    if not dry_run:
        check_output(target, overwrite, opened.located.folder if opened.located else None)
    if evaluation is not None:
        evaluation = evaluation.prepare(opened)
    rows = build_calibration(opened, chosen, calibration)
    chosen = _resolved(chosen, rows)
    plan = make_plan(chosen, opened.skeleton, opened.source, *rows.tokens.shape)
    if not dry_run:
        check_space(target, plan.disk)
    reporter.plan(opened, chosen, plan, rows, target)
    if dry_run:
        return DryRun(plan, chosen, target)
    reporter.stage("checking weights", 1)
    check_finite(opened.source, list(opened.source.tensors))
    reporter.step()
    dense = score(opened, evaluation, "dense", reporter) if evaluation else None
    result = _prune(opened, chosen, plan, rows, target, overwrite, trust_remote_code, reporter)
    if evaluation is None or dense is None:
        return result
    pruned = open_model(finished, device=device, dtype=dtype, tokenizer=opened.tokenizer, trust_remote_code=trust_remote_code)
    try:
        record = add_scores(result.record, dense, score(pruned, evaluation, "pruned", reporter))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{result.output} is pruned and saved but not scored; score it with llmprune eval {result.output}"
        ) from None
    report.write(finished, record)
    return Result(result.output, record)


def build_calibration(model: Model, recipe: Recipe, given: Source | None) -> CalibrationSet:
    """The calibration rows of a run: what was given, else the recipe's source (`auto`: c4 for hub models, else built-in text)."""
    spec = recipe.calibration
    source: Source = given if given is not None and not isinstance(given, str) else spec.source
    if isinstance(source, str) and source == "auto":
        source = "c4" if model.remote else "builtin"
    vocabulary = model.skeleton.model.get_input_embeddings().weight.shape[0]
    return calibrations.build(
        source,
        model.tokenizer,
        samples=spec.samples,
        length=spec.sequence_length,
        limit=model.limit,
        vocabulary=vocabulary,
        seed=recipe.seed,
    )


def _resolved(recipe: Recipe, rows: CalibrationSet) -> Recipe:
    """The recipe with its calibration as it turned out: what the record stores."""
    import dataclasses

    n, t = rows.tokens.shape
    return dataclasses.replace(recipe, calibration=recipes.CalibrationSpec(source=rows.source, samples=n, sequence_length=t))


def default_output(model: Model, recipe: Recipe, own: Recipe) -> Path:
    """A folder named after model, recipe (and what was exchanged in it: `own` is the recipe's file) and sparsity."""
    amount = recipe.pattern.replace(":", "to") if ":" in recipe.pattern else f"{recipe.sparsity:g}"
    exchanged = [recipe.pruner.name] if recipe.pruner.name != own.pruner.name else []
    if (recipe.refiner and recipe.refiner.name) != (own.refiner and own.refiner.name):
        exchanged.append(recipe.refiner.name if recipe.refiner else "unrefined")
    return Path("-".join([model.label.rpartition("/")[2], recipe.name, *exchanged, amount]))


def _prune(
    model: Model, recipe: Recipe, plan: Plan, rows: CalibrationSet, output: Path, overwrite: bool, code: bool, reporter: Reporter
) -> Result:
    clock = run.Clock()
    devices.reset_peak_device_memory(model.skeleton.device)
    skeleton = model.skeleton
    writer = CheckpointWriter(output, len(skeleton.blocks) + 1, overwrite)
    try:
        reporter.stage("pruning blocks", len(skeleton.blocks))
        matrices = run.prune_blocks(recipe, plan, skeleton, model.source, rows, writer, clock, reporter.step)
        if model.located:
            writer.copy_companions(model.located.folder, code)
        else:
            _save_companions(model, writer.folder)
        writer.index()
        record = build_record(model, recipe, rows, matrices, clock.seconds, writer)
        report.write(writer.folder, record)
        writer.finish()
    except BaseException:
        writer.discard()
        raise
    return Result(output, record)


def _save_companions(model: Model, folder: Path) -> None:
    model.instance.config.save_pretrained(folder)
    if getattr(model.instance, "generation_config", None) is not None:
        model.instance.generation_config.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def run_model(
    model: str | os.PathLike[str] | PreTrainedModel, *, perplexity: Sequence[str] = (), tasks: Sequence[str] = (), suite: str | None = None,
    eval_seqlen: int | None = None, include_tasks: str | os.PathLike[str] | None = None, task_data: str | os.PathLike[str] | None = None,
    limit: int | None = None, **options: Any,
) -> Any:  # fmt: skip
    """`prune` with evaluation, dense and pruned: the main job. Without texts, tasks or suite, the model's default suite."""
    spec = evaluation_spec(perplexity, tasks, suite, eval_seqlen, include_tasks, task_data, limit)
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
    spec = evaluation_spec(perplexity, tasks, suite, eval_seqlen, include_tasks, task_data, limit)
    opened = open_model(path, revision=revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    scores = score(opened, spec.prepare(opened), "scoring", reporter or Silent())
    return {
        "model": opened.label,
        "perplexity": scores.perplexity,
        "tasks": scores.tasks,
        "seconds": round(scores.seconds, 3),
        "environment": environment(opened.skeleton.device, opened.skeleton.dtype),
    }


def inspect(path: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Recount zeros and N:M groups from disk, per matrix and overall; says whether a record beside them agrees."""
    located = locate(str(path), revision, trust_remote_code)
    source = Checkpoint(located.folder)
    skeleton = Skeleton(read_config(located.folder, trust_remote_code), source, torch.float32, torch.device("cpu"), trust_remote_code)
    targets = [t for name, block in skeleton.blocks.items() for t in find_targets(name, block)]
    stored = {skeleton.stored[t.weight_name]: t for t in targets}
    counts = audit.recount(source, frozenset(n for n, t in stored.items() if t.transposed), list(stored))
    weights, zeros = sum(c.shape[0] * c.shape[1] for c in counts), sum(c.zeros for c in counts)
    summary: dict[str, Any] = {
        "model": located.label,
        "matrices": [
            {"name": c.name, "shape": list(c.shape), "zeros": c.zeros, "sparsity": c.sparsity, "patterns": list(c.patterns)} for c in counts
        ],
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "patterns": sorted(set.intersection(*(set(c.patterns) for c in counts))),
        "bytes": sum(t.bytes for t in source.tensors.values()),
        "record_agrees": None,
    }
    if (located.folder / "llmprune.json").is_file():
        summary["record_agrees"] = _agrees(read_json(located.folder / "llmprune.json"), counts)
    return summary


def _agrees(record: dict[str, Any], counts: list[audit.Count]) -> bool:
    try:
        claimed = {m["name"]: m["sparsity"] for m in record["matrices"]}
        totals = record["totals"]["zeros"], record["totals"]["weights"]
    except (KeyError, TypeError):
        raise ValueError("llmprune.json is not a record of this program; remove it or restore the original") from None
    pruned = [c for c in counts if c.name in claimed]
    if len(pruned) < len(claimed) or totals != (sum(c.zeros for c in pruned), sum(c.shape[0] * c.shape[1] for c in pruned)):
        return False
    return all(abs(claimed.get(c.name, c.sparsity) - c.sparsity) < 0.5 / (c.shape[0] * c.shape[1]) for c in counts)


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
    files = upload.belonging_files(path)
    reporter.stage("recounting zeros", 1)
    counts = inspect(path.resolve(), trust_remote_code=trust_remote_code)  # a name such as "demo" is a folder here
    if not counts["record_agrees"]:
        raise ValueError(f"llmprune.json in {path} does not fit its weights, so nothing is uploaded; see llmprune inspect {path}")
    reporter.step()
    return upload.upload(path, repository, files, private=private, revision=revision, token=token, reporter=reporter)


def load(path: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False, **options: Any) -> Any:
    """A transformers model from a finished folder, weights in their stored dtype; `options` go to `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    located = locate(str(path), revision, trust_remote_code)
    Checkpoint(located.folder)  # refuses what is damaged or not safetensors
    chosen = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": trust_remote_code, **options}
    return AutoModelForCausalLM.from_pretrained(located.folder, **chosen)


def plan_summary(dry: DryRun) -> dict[str, Any]:
    """A dry run as plain values."""
    plan = dry.plan
    matrices = [
        {"name": m.name, "shape": list(m.shape), "pattern": str(m.pattern), "sparsity": m.sparsity, "set_by": m.reason}
        for m in plan.matrices.values()
    ]
    return {
        "output": str(dry.output), "recipe": dry.recipe.as_dict(), "matrices": matrices, "skipped": list(plan.skipped),
        "weights": plan.weights, "sparsity": plan.sparsity, "memory_bytes": plan.memory, "disk_bytes": plan.disk,
    }  # fmt: skip
