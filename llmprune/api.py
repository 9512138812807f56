"""The Python API; every command is a thin call of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune import advice, arguments, choice, processes, upload
from llmprune import device as devices
from llmprune import recipe as recipes
from llmprune.arguments import checked
from llmprune.calibration import mixture
from llmprune.checkpoint.contents import RECORD
from llmprune.checkpoint.reader import Checkpoint, read_record
from llmprune.checkpoint.replacement import MODEL, Inputs, check_output, input_files
from llmprune.data import shown
from llmprune.evaluation import audit
from llmprune.evaluation.scores import EvaluationSpec, evaluation_spec, score
from llmprune.hub import locate
from llmprune.machine.state import libraries
from llmprune.model.opening import Model, open_model
from llmprune.model.skeleton import Skeleton, read_config
from llmprune.model.targets import find_targets
from llmprune.pipeline import Options, Production, Reporter, Source, planned
from llmprune.plan import check_offload
from llmprune.recipe import Recipe
from llmprune.record import environment
from llmprune.result import DryRun, Result, plan_summary
from llmprune.telling import remark_to, telling
from llmprune.text import file_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DryRun", "Result", "evaluate", "inspect", "load", "plan_summary", "prune", "push", "run_model"]
AnyPath = str | os.PathLike[str]


@checked()
def prune(
    model: AnyPath | PreTrainedModel, *, recipe: AnyPath | Mapping[str, Any] | Recipe | None = None, sparsity: float | None = None,
    pattern: str | None = None, pruner: Any = None, refiner: Any = None, update: Any = None, allocator: Any = None,
    calibration: Source | AnyPath | Mapping[str, float] | None = None, samples: int | None = None, seqlen: int | None = None,
    seed: int | None = None, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", output: AnyPath | None = None,
    overwrite: bool = False, resume: bool = False, restart: bool = False, offload: str = "auto",
    settings: Mapping[str, Any] | None = None, tokenizer: Any = None, revision: str | None = None, trust_remote_code: bool = False,
    time_limit: float | None = None, dry_run: bool = False, evaluation: EvaluationSpec | None = None,
    reporter: Reporter | None = None, progress: bool | None = None,
) -> Any:  # fmt: skip
    """Prune a model and save it; with `evaluation`, score it dense first and pruned afterwards.

    Args:
        model: `demo`, an alias, a hub id, a folder, or a transformers model in memory.
        recipe: a recipe's name, a YAML file, or a mapping of recipe fields; None for `best` where its memory and time fit, else
            `dsnot`. The other options override its fields (`settings`: any, by dotted key).
        sparsity: share of weights removed, in [0, 1). pattern: `unstructured` or `N:M` (which implies its sparsity).
        pruner, refiner, update, allocator: a name, or a mapping `{"name": ..., option: value}`.
        calibration: any SOURCE, a mapping of sources to weights, an iterable of strings, or int64 tokens [N, T].
        samples, seqlen: rows and tokens per row.
        output: the folder to write; by default named after model, recipe and sparsity in the current directory.
        overwrite: replace the output of llmprune that is there, once the new one is complete; nothing else is replaced.
        resume: go on where an earlier run into this folder stopped. restart: throw away what it left.
        offload: where block inputs are kept: `ram`, `disk` (a file beside the output), or `auto` (RAM while the plan fits).
        time_limit: minutes the best recipe may take by estimate to be chosen; None for `LLMPRUNE_TIME_LIMIT`, else 60.
        dry_run: only plan.
        progress: draw plan and progress; None: in a notebook. reporter: told instead.

    Returns:
        `Result` (or `DryRun`).

    Raises:
        ValueError: bad input, in one line, before any long work.
    """
    source: Any = mixture.as_text(calibration) if isinstance(calibration, Mapping) else calibration
    check_offload(offload)
    overrides = _overrides(source, settings, **{
        "pattern": pattern, "sparsity": sparsity, "pruner": pruner, "refiner": refiner, "update": update, "allocator": allocator,
        "calibration.samples": samples, "calibration.sequence_length": seqlen, "seed": seed,
    })  # fmt: skip
    limit = _time_limit(time_limit)
    named: Any = choice.LIGHT if recipe is None else recipe
    chosen = recipes.load(named, overrides)  # checked before any long work
    team = processes.current()

    def reopen(what: Any) -> Model:
        known = None if what is model else opened.tokenizer
        return open_model(what, tokenizer=known or tokenizer, revision=revision if what is model else None, device=str(device),
                          dtype=str(dtype), trust_remote_code=trust_remote_code)  # fmt: skip

    with telling(reporter, progress, team) as told:
        opened = team.in_turn(lambda: reopen(model))
        if recipe is None:
            chosen = team.on_first(lambda: choice.choose(overrides, opened, source, limit, team.size))
            named = chosen.name
        target = Path(output).expanduser() if output is not None else default_output(opened, chosen, recipes.load(named))
        remarks = choice.inherited(overrides, chosen) if recipe is None else ()
        # A limit the user knows of: given, or the one under which the best recipe was chosen.
        known = limit * 60 if time_limit is not None or (recipe is None and chosen.name == choice.BEST) else None
        inputs = _inputs(opened, recipe, chosen, evaluation)
        options = Options(target, inputs, overwrite, resume, restart, offload, trust_remote_code, known or None, remarks)
        if dry_run:
            check_output(target, overwrite or resume, inputs)
            planned_recipe, _, _, plan = planned(opened, chosen, source, options, team, told, evaluation)
            return DryRun(plan, planned_recipe, target)
        production = Production(opened, options, team, told)
        try:
            record = production.make(chosen, source, evaluation, reopen)
        except BaseException as error:
            production.close(error)
            raise
        production.close(None)
        return Result(target, record)


def _inputs(model: Model, recipe: Any, chosen: Recipe, evaluation: EvaluationSpec | None) -> Inputs:
    """The files and folders that a run reads: its output may not take their place."""
    named: list[tuple[str, object]] = [(MODEL, model.folder)]
    if model.folder is not None:  # its files may be links to where they really are
        named += [(MODEL, path.resolve()) for path in sorted(model.folder.iterdir()) if path.is_symlink()]
    if isinstance(recipe, (str, os.PathLike)) and os.fspath(recipe).endswith((".yaml", ".yml")):
        named.append(("the recipe", recipe))
    parts = mixture.plain_sources(chosen.calibration.source)
    named += [("the calibration file", file_path(part)) for part in parts if mixture.is_file(part)]
    return input_files([*named, *(evaluation.inputs if evaluation else ())])


def _overrides(calibration: Any, settings: Mapping[str, Any] | None, **named: Any) -> dict[str, Any]:
    """The fields of the recipe that were given, by dotted key."""
    named["calibration.source"] = calibration if isinstance(calibration, (str, type(None))) else "in-memory"
    return {**{k: v for k, v in named.items() if v is not None}, **(settings or {})}


def _time_limit(given: float | None) -> float:
    text = os.environ.get("LLMPRUNE_TIME_LIMIT") if given is None else None
    try:
        limit = float(text) if text is not None else choice.TIME_LIMIT if given is None else float(given)
    except (TypeError, ValueError):
        limit = -1.0
    if isinstance(given, bool) or not limit >= 0:
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


@checked()
def run_model(
    model: AnyPath | PreTrainedModel, *, perplexity: AnyPath | Sequence[AnyPath] = (), tasks: str | Sequence[str] = (),
    suite: AnyPath | None = None, eval_seqlen: int | None = None, include_tasks: AnyPath | None = None, task_data: AnyPath | None = None,
    limit: int | None = None, **options: Any,
) -> Any:  # fmt: skip
    """`prune` with evaluation, dense and pruned: the main job. Without texts, tasks or suite, the model's default suite.

    Args:
        perplexity: a text's name or file, or several. tasks: names, in a list or separated by commas.
    """
    given: tuple[Any, ...] = (perplexity, tasks, suite, eval_seqlen, include_tasks, task_data, limit)
    spec = evaluation_spec(*given, trust_remote_code=options.get("trust_remote_code", False))
    return prune(model, evaluation=spec, **options)


@checked(path=arguments.any_model)
def evaluate(
    path: AnyPath | PreTrainedModel, *, perplexity: AnyPath | Sequence[AnyPath] = (), tasks: str | Sequence[str] = (),
    suite: AnyPath | None = None, eval_seqlen: int | None = None, include_tasks: AnyPath | None = None, task_data: AnyPath | None = None,
    limit: int | None = None, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", revision: str | None = None,
    tokenizer: Any = None, trust_remote_code: bool = False, reporter: Reporter | None = None, progress: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score any checkpoint: `{"model", "perplexity": {NAME: {"value", "protocol"}}, "tasks": {NAME: {METRIC: {"value", "stderr"}}}, ...}`.

    Without texts, tasks or suite, the model's default suite: `quick` for a hub model, else `demo`, which needs no network.
    A model in memory is scored too; its texts need a `tokenizer`.
    """
    given: tuple[Any, ...] = (perplexity, tasks, suite, eval_seqlen, include_tasks, task_data, limit)
    spec = evaluation_spec(*given, trust_remote_code=trust_remote_code)
    team = processes.current()
    with telling(reporter, progress, team) as told, devices.PrivateMemory() as memory:
        opened = team.in_turn(lambda: open_model(path, tokenizer=tokenizer, revision=revision, device=str(device), dtype=str(dtype),
                                                 trust_remote_code=trust_remote_code))  # fmt: skip
        prepared = team.in_turn(lambda: spec.prepare(opened))
        for remark in advice.on_texts(opened, calibrated=False, evaluation=spec):
            remark_to(told, remark)
        scores = score(opened, prepared, "scoring", told, team)
    return {
        "model": opened.label,
        "perplexity": scores.perplexity,
        "tasks": scores.tasks,
        "seconds": round(scores.seconds, 3),
        "peak_memory_bytes": devices.peak_memory(),
        "peak_private_memory_bytes": memory.peak,
        "environment": environment(opened.skeleton.device, opened.skeleton.dtype, team.size),
    }


@checked()
def inspect(path: AnyPath, *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Recount zeros and N:M groups from disk, per matrix and overall; says whether a record beside them agrees."""
    located = locate(os.fspath(path), revision, trust_remote_code)
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


@checked()
def push(
    folder: AnyPath, repository: str, *, private: bool = True, revision: str | None = None, token: str | None = None,
    trust_remote_code: bool = False, reporter: Reporter | None = None, progress: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Upload a finished folder to the hub with its model card, in one commit; a push that broke off goes on where it stopped.

    Args:
        repository: `owner/name`, made where it is not there. private: of a new repository; one that is there stays as it is.
        revision: a branch, made where it is not there; `main` by default. token: else that of `hf auth login` or `HF_TOKEN`.
        progress: draw progress; None: in a notebook. reporter: told instead.

    Returns:
        `repository`, `url`, `revision`, `commit`, `created`, `private`, `files [{name, bytes}]`, `bytes`, `removed`.

    Raises:
        ValueError: an unfinished folder, one whose recount disagrees with its record (nothing is uploaded), or what the hub refuses.
    """
    path = Path(folder).expanduser()
    token = upload.check_destination(repository, token)
    files, source = upload.belonging_files(path), Checkpoint(path)
    with telling(reporter, progress, processes.ALONE) as told:
        told.stage("recounting zeros", 1)
        counts = inspect(path.resolve(), trust_remote_code=trust_remote_code)  # a name such as "demo" is a folder here
        if not counts["record_agrees"]:
            raise ValueError(f"llmprune.json in {path} does not fit its weights, so nothing is uploaded; see llmprune inspect {path}")
        told.step()
        return upload.upload(
            path,
            repository,
            files,
            private=private,
            revision=revision,
            token=token,
            check=source.check,
            reporter=told,
        )


@checked()
def load(path: AnyPath, *, revision: str | None = None, trust_remote_code: bool = False, **options: Any) -> Any:
    """A transformers model from a finished folder, weights in their stored dtype; `options` go to `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    located = locate(os.fspath(path), revision, trust_remote_code)
    source = Checkpoint(located.folder)  # refuses what is damaged or not safetensors
    chosen = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": trust_remote_code, **options}
    with libraries():
        model = AutoModelForCausalLM.from_pretrained(located.folder, **chosen)
    source.check()
    return model
