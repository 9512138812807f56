"""The Python functions that prune: `prune`, and `run_model`, which also scores the model before and after."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.api import arguments, starting
from llmprune.api.arguments import AnyPath, checked
from llmprune.api.combined import Training, prune_and_recover
from llmprune.api.reporting import reporting
from llmprune.api.result import DryRun, Result
from llmprune.checkpoint.bitmask import Bitmasked
from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.replacement import MODEL, Inputs, check_output, check_ways, input_files
from llmprune.checkpoint.stored_masks import masks_at
from llmprune.evaluation.scores import EvaluationSpec
from llmprune.machine import processes
from llmprune.model.opening import Model, OpenOptions, open_model
from llmprune.planning import choice
from llmprune.planning.given import given
from llmprune.planning.plan import check_offload
from llmprune.recipe import loading as recipes
from llmprune.recipe.types import ROUNDING, Recipe
from llmprune.run.preparation import Options, Request, Source, planned
from llmprune.run.production import Production
from llmprune.run.reporter import RunReporter
from llmprune.text import mixture
from llmprune.text.files import file_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@checked()
def prune(
    model: AnyPath | PreTrainedModel,
    *,
    recipe: AnyPath | Mapping[str, Any] | Recipe | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    pruner: Any = None,
    refiner: Any = None,
    update: Any = None,
    allocator: Any = None,
    calibration: Source | AnyPath | Mapping[str, float] | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    chat_template: str | None = None,
    seed: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    output: AnyPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    restart: bool = False,
    offload: str = "auto",
    format: str = "dense",
    values: str | None = None,
    settings: Mapping[str, Any] | None = None,
    masks: AnyPath | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
    dequantize: bool = False,
    time_limit: float | None = None,
    dry_run: bool = False,
    evaluation: EvaluationSpec | None = None,
    samples_text: int | None = 0,
    reporter: RunReporter | None = None,
    progress: bool | None = None,
) -> Any:
    """Prune a model block by block and save the result as a folder.

    What decides the masks comes from a recipe; the parameters from `sparsity` to `seed` below, and
    `settings`, override fields of it. A parameter left at None keeps the recipe's value.

    Args:
        model: `demo`, an alias, a hub id, a folder, or a transformers model in memory (which is not changed).
        recipe: the name of a recipe, a YAML file, or a mapping of recipe fields. None for `best` where its
            memory fits this machine and its estimated time is below `time_limit`, else `dsnot`.
        sparsity: the share of weights to remove, in [0, 1); 0.5 unless the recipe says otherwise.
        pattern: `unstructured`, or `N:M` such as `2:4`, which implies its sparsity.
        pruner: the pruner by name, or as a mapping `{"name": ..., option: value}`.
        refiner: the refiner, given likewise; `none` for none.
        update: the update of the kept weights, given likewise, or several in a list; `none` for none.
        allocator: the allocator of sparsity to matrices, given likewise.
        calibration: a source by name or file (`builtin`, `self`, `c4`, `text.jsonl`, ...), a mixture
            `c4=0.7+self=0.3` or a mapping of sources to weights, an iterable of strings, or a tensor of
            tokens, int64 [N, T].
        samples: calibration rows; 128 unless the recipe says otherwise.
        seqlen: tokens per calibration row; by default 2048, or the model's limit if that is shorter.
        chat_template: how chats of the calibration data become text: `auto` (the tokenizer's chat template
            where it has one, else lines of `role: content`), `on` (with the template, which there must be),
            `off` (lines); `auto` unless the recipe says otherwise.
        seed: seed of everything random; 0 unless the recipe says otherwise.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:N` or a torch.device.
        dtype: of the forward passes: `auto`, `float32`, `bfloat16`, `float16` or a torch.dtype. `auto` is the
            checkpoint's own on a GPU; on a CPU bfloat16 if the checkpoint has it and the CPU multiplies it
            fast, else float32. The weights are saved in the dtype of the source.
        output: the folder to write; by default named after model, recipe and sparsity, in the current
            directory.
        overwrite: replace an output of llmprune in that folder, once the new one is complete. A folder with
            anything else in it is never replaced.
        resume: continue where an earlier run into this folder stopped.
        restart: throw away what an unfinished run left in this folder.
        offload: where block inputs are kept: `ram`, `disk` (in a file beside the output), or `auto` (in RAM
            where the plan fits into it).
        format: of the weights in that folder: `dense`, which every program loads, or `packed`, which is
            smaller and loads where llmprune is: of the pruned matrices the kept values and a bit per weight.
        values: with format `packed`: kept values as they are (`same`), or rounded to `int8` or `int4` with a
            scale for every 128 columns of a row. The rounding of a weight is made up for by the weights that
            are rounded after it, and updates of whole blocks go on with rounded weights.
        settings: any recipe fields by dotted key, such as `{"pruner.damp": 0.05}`.
        masks: a file of keep masks, or an output folder that holds one, to start from: they take the place of
            the recipe's pruner, and its refiner and updates follow as usual.
        tokenizer: a transformers tokenizer; needed for text with a model in memory, else the checkpoint's
            own.
        revision: branch, tag or commit of a model of the hub; None for its default branch.
        trust_remote_code: run Python code of the checkpoint or of task files.
        blocks: the list of the model's blocks by name, such as `model.layers`; None to find it.
        dequantize: read a quantised checkpoint (fp8 or mxfp4) as bfloat16, which is what is saved.
        time_limit: minutes that the recipe `best` may take, by estimate, to be chosen; 0 for never, None for
            `LLMPRUNE_TIME_LIMIT`, else 60.
        dry_run: plan the run, and write nothing.
        evaluation: what to score, dense and pruned; `run_model` makes it. None for nothing.
        samples_text: texts that the dense and the pruned model write for the report, as for `run_model`.
        reporter: an object with `plan`, `stage`, `step` and `note` that is told the plan and the progress.
        progress: draw plan and progress on stderr or in the notebook's cell; None: only in a notebook.

    Returns:
        A `Result` with `output` (the folder) and `record` (what `llmprune.json` holds); with `dry_run` a
        `DryRun` with `plan`, `recipe` and `output`.

    Raises:
        ValueError: bad input, before any long work; one line says what was received and what to do.
    """
    source: Any = mixture.as_text(calibration) if isinstance(calibration, Mapping) else calibration
    check_offload(offload)
    arguments.check_format(format)
    if values in ("int8", "int4") and format == "dense":
        raise ValueError(f"values {values} are for packed folders; add --format packed")
    wanted = {
        "pattern": pattern,
        "sparsity": sparsity,
        "pruner": pruner,
        "refiner": refiner,
        "update": update,
        "allocator": allocator,
        "calibration.samples": samples,
        "calibration.sequence_length": seqlen,
        "calibration.chat_template": chat_template,
        "seed": seed,
        "values": values,
        "calibration.source": source if isinstance(source, (str, type(None))) else "in-memory",
    }
    overrides = {key: value for key, value in wanted.items() if value is not None}
    arguments.check_once(overrides, settings)
    overrides |= dict(settings or {})
    asked = os.environ.get("LLMPRUNE_TIME_LIMIT") if time_limit is None else time_limit
    limit, texts = arguments.minutes(asked, choice.TIME_LIMIT), arguments.texts(samples_text)
    named: Any = choice.LIGHT if recipe is None else recipe
    start = None if masks is None else masks_at(Path(masks).expanduser())
    overrides |= {} if start is None else starting.overrides(named, overrides, start)
    chosen = recipes.load(named, overrides)  # checked before any long work
    starting.check_given(chosen, start)
    compute_dtype = _compute_dtype(chosen, str(dtype))
    team = processes.current()

    def open_again(what: Any) -> Model:
        """Open the model, or what became of it (a folder), with the same options."""
        known = None if what is model else opened.tokenizer
        how = OpenOptions(
            tokenizer=known or tokenizer,
            revision=revision if what is model else None,
            device=str(device),
            dtype=compute_dtype,
            trust_remote_code=trust_remote_code,
            blocks=blocks,
            dequantize=dequantize and what is model,
        )
        return open_model(what, how)

    with reporting(reporter, progress, team) as report:
        opened = team.in_turn(lambda: open_again(model))
        if isinstance(opened.source, (Packed, Bitmasked)):
            raise ValueError(
                f"{model} is pruned and packed already; to prune it further, first make it dense: "
                f"llmprune convert {model} --to dense --output DIR"
            )
        if recipe is None:
            chosen = team.on_first(lambda: choice.choose(overrides, opened, source, limit, team.size))
            named = chosen.name
        if start is not None:
            chosen = starting.without_allocator(chosen, overrides)
        begun = None if start is None else team.in_turn(lambda: given(start, chosen, opened))
        if output is None:
            target = default_output(opened, chosen, recipes.load(named))
        else:
            target = Path(output).expanduser()
        # The user knows of the limit: it was given, or is the reason why `best` was chosen.
        limited = time_limit is not None or (recipe is None and chosen.name == choice.BEST)
        remarks = choice.inherited(overrides, chosen) if recipe is None else ()
        if chosen.bits in (4, 8) and format == "dense":
            remarks = (
                *remarks,
                f"kept values are rounded to int{chosen.bits}, and a dense folder stores them no smaller; "
                "--format packed does",
            )
        options = Options(
            output=target,
            inputs=[*run_inputs(opened, recipe, chosen, evaluation), *input_files(starting.inputs(start))],
            overwrite=overwrite,
            resume=resume,
            restart=restart,
            offload=offload,
            packed=format == "packed",
            trust_remote_code=trust_remote_code,
            samples=texts,
            time_limit=(limit * 60 or None) if limited else None,
            remarks=remarks,
        )
        request = Request(chosen, source, evaluation, begun)
        if dry_run:
            check_ways(resume, restart)
            check_output(target, overwrite or resume, options.inputs)
            work, _ = planned(opened, request, options, team, report)
            return DryRun(work.plan, work.recipe, target)
        production = Production(opened, options, team, report)
        try:
            record = production.make(request, open_again)
        except BaseException as error:
            production.close(error)
            raise
        production.close(None)
        return Result(target, record)


def _compute_dtype(recipe: Recipe, dtype: str) -> str:
    """The dtype of forward passes: what was given, or float32 where the recipe wants that precision."""
    if recipe.precision != "float32":
        return dtype
    if dtype not in ("auto", "float32"):
        raise ValueError(
            f"recipe {recipe.name!r} (precision: float32) computes in float32, got dtype {dtype}; "
            "leave the dtype out"
        )
    return "float32"


def run_inputs(model: Model, recipe: Any, chosen: Recipe, evaluation: EvaluationSpec | None) -> Inputs:
    """The files and folders that a run reads, which its output must not replace."""
    named: list[tuple[str, object]] = [(MODEL, model.folder)]
    if model.folder is not None:  # links in the folder are followed: the files behind them are read, too
        named += [(MODEL, path.resolve()) for path in sorted(model.folder.iterdir()) if path.is_symlink()]
    if isinstance(recipe, (str, os.PathLike)) and os.fspath(recipe).endswith((".yaml", ".yml")):
        named.append(("the recipe", recipe))
    parts = mixture.plain_sources(chosen.calibration.source)
    named += [("the calibration file", file_path(part)) for part in parts if mixture.is_file(part)]
    return input_files([*named, *(evaluation.inputs if evaluation else ())])


def default_output(model: Model, recipe: Recipe, own: Recipe) -> Path:
    """The folder of a run that names none: MODEL-RECIPE-SPARSITY, with the methods exchanged in the recipe.

    Args:
        recipe: the recipe of the run.
        own: the same recipe as its file has it, without overrides.
    """
    amount = recipe.pattern.replace(":", "to") if ":" in recipe.pattern else f"{recipe.sparsity:g}"
    exchanged = [recipe.pruner.name] if recipe.pruner.name != own.pruner.name else []
    if (recipe.refiner and recipe.refiner.name) != (own.refiner and own.refiner.name):
        exchanged.append(recipe.refiner.name if recipe.refiner else "unrefined")
    updates, usual = ([u.name for u in chosen.update if u.name != ROUNDING] for chosen in (recipe, own))
    if updates != usual:
        exchanged += updates or ["unchanged"]
    bits = [f"int{recipe.bits}"] if recipe.bits else []
    return Path("-".join([model.label.rpartition("/")[2], recipe.name, *exchanged, amount, *bits]))


@checked()
def run_model(
    model: AnyPath | PreTrainedModel,
    *,
    perplexity: AnyPath | Sequence[AnyPath] = (),
    tasks: str | Sequence[str] = (),
    suite: AnyPath | None = None,
    eval_seqlen: int | None = None,
    include_tasks: AnyPath | None = None,
    task_data: AnyPath | None = None,
    limit: int | None = None,
    recover: AnyPath | Mapping[str, Any] | None = None,
    text: Source | AnyPath | None = None,
    tokens: int | None = None,
    epochs: int = 1,
    samples_text: int | None = None,
    **options: Any,
) -> Any:
    """Prune a model as `prune` does, and score it before and after: the main job.

    With `recover` the pruned model is trained, too; what was only pruned stays beside the output, in the
    folder OUTPUT-pruned.

    Without `perplexity`, `tasks` and `suite`, the model's default suite is used: `quick` for a model of the
    hub, else `demo`, which needs no network.

    Args:
        model: as for `prune`.
        perplexity: one text, or several: `builtin`, `wikitext2`, `c4`, a hub dataset `owner/name:column`, or
            a `.txt`, `.jsonl` or `.parquet` file.
        tasks: lm-eval tasks: a list of names, or one string with names separated by commas.
        suite: a suite of texts and tasks (`demo`, `quick`, `paper`) or a YAML file, added to the above.
        eval_seqlen: tokens per evaluation window; None for 2048, or the model's limit if that is shorter.
        include_tasks: a folder with lm-eval task files of your own.
        task_data: a folder with the files of the tasks `rte_local` and `blimp_local`.
        limit: at most so many windows per text and documents per task; None for all.
        recover: a recipe of recovery; see `llmprune.recover`, which takes `text`, `tokens` and `epochs` as
            this does.
        text: what to train on.
        tokens: to train on, all epochs together.
        epochs: how often the text is read.
        samples_text: how many texts both models write for the report, from built-in prompts, the likeliest
            token each time; at most 8, and 0 for none. None for 2, unless that takes more than 20 seconds
            and more than a tenth of the run. The record says in `samples` why there are none.
        options: all other parameters of `prune`.

    Returns:
        As `prune`; the record's `evaluation` holds the scores of the dense and of the pruned model.

    Raises:
        ValueError: bad input, before any long work; one line says what was received and what to do.
    """
    scoring: dict[str, Any] = {
        "perplexity": perplexity,
        "tasks": tasks,
        "suite": suite,
        "eval_seqlen": eval_seqlen,
        "include_tasks": include_tasks,
        "task_data": task_data,
        "limit": limit,
    }
    if recover is None:
        given = {"text": text is not None, "tokens": tokens is not None, "epochs": epochs != 1}
        for name in filter(given.get, given):
            raise ValueError(
                f"{name} is for training after pruning, and no recipe to train by was given; add --recover "
                f"NAME, or leave {name} out"
            )
        trust = options.get("trust_remote_code", False)
        spec = arguments.evaluation(**scoring, trust_remote_code=trust)
        return prune(model, evaluation=spec, samples_text=samples_text, **options)
    arguments.texts(samples_text)  # refused before anything is pruned
    # An iterator gives its texts only once, and they are looked at before the pruning, too.
    text = list(text) if isinstance(text, Iterator) else text
    training = Training(recover, text, tokens, epochs, samples_text)
    return prune_and_recover(model, training, scoring, options)
