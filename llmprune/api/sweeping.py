"""The Python function `sweep`: a grid of recipes, pruned and scored; one record, one table, one plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.api import arguments
from llmprune.api.arguments import AnyPath, checked, choices
from llmprune.api.pruning import run_inputs
from llmprune.api.reporting import remark_to, reporting
from llmprune.api.sweep_result import SweepDryRun, SweepResult
from llmprune.checkpoint.bitmask import Bitmasked
from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.sweep_folder import SweepFolder
from llmprune.common.messages import shown
from llmprune.contracts import CalibrationSet
from llmprune.machine import device as devices
from llmprune.machine import processes
from llmprune.model.opening import Model, OpenOptions, open_model
from llmprune.planning.cells import KEEPS, Kept, plan_cells
from llmprune.planning.grid import Cell, Grid, cells_of
from llmprune.planning.plan import Resources, check_offload
from llmprune.run.preparation import Options, Source, build_calibration
from llmprune.run.reporter import RunReporter
from llmprune.run.sweep import Sweep, Work
from llmprune.text import mixture

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@checked(
    recipe=choices("recipe"),
    sparsity=choices("sparsity"),
    pattern=choices("pattern"),
    pruner=choices("pruner"),
)
def sweep(
    model: AnyPath | PreTrainedModel,
    *,
    recipe: Any = None,
    sparsity: float | Sequence[float] | None = None,
    pattern: str | Sequence[str] | None = None,
    pruner: Any = None,
    settings: Mapping[str, Any] | None = None,
    calibration: Source | AnyPath | Mapping[str, float] | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    chat_template: str | None = None,
    seed: int | None = None,
    perplexity: AnyPath | Sequence[AnyPath] = (),
    tasks: str | Sequence[str] = (),
    suite: AnyPath | None = None,
    eval_seqlen: int | None = None,
    include_tasks: AnyPath | None = None,
    task_data: AnyPath | None = None,
    limit: int | None = None,
    samples_text: int | None = None,
    output: AnyPath | None = None,
    keep: str = "all",
    overwrite: bool = False,
    resume: bool = False,
    restart: bool = False,
    offload: str = "auto",
    format: str = "dense",
    dry_run: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    tokenizer: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
    dequantize: bool = False,
    reporter: RunReporter | None = None,
    progress: bool | None = None,
) -> Any:
    """Prune and score a model with every recipe of a grid, as `run_model` does with one.

    The grid has a cell for every combination of `recipe`, `pruner`, `pattern`, `sparsity` and `settings`, of
    which each is one value or a list. An N:M pattern sets its own sparsity, so there is one cell with it
    whatever the sparsities. Masks and weights of a cell are those of `run_model` with the same options. The
    dense model is scored once, calibration rows are made once, and what cells need of the dense model is
    computed once where memory holds it.

    Args:
        model: as for `prune`.
        recipe: recipes as for `prune`; with a pruner None for `dsnot`, in which the pruner takes the place of
            its own.
        sparsity: shares of weights to remove, in [0, 1).
        pattern: `unstructured`, or `N:M` such as `2:4`.
        pruner: pruners by name or as mappings.
        settings: any recipe fields by dotted key: one value, or a list of values. A value that is itself a
            list stands in a list: `{"update.rates": [[0.01, 0.004]]}`.
        calibration: as for `prune`, the same for all cells; `settings` can vary `calibration.source`.
        samples: as for `prune`. seqlen, chat_template, seed: likewise.
        perplexity: as for `run_model`; the first text ranks the cells. tasks, suite, eval_seqlen,
            include_tasks, task_data, limit: likewise.
        samples_text: as for `run_model`: texts of the dense model, which writes them once, and of every cell.
        output: the folder to write; by default MODEL-sweep in the current directory.
        keep: whose weights are kept: of `all` cells, of the `best` (with the lowest perplexity on the first
            text, for every sparsity and pattern), or of `none`. Record and report are kept of every cell.
        overwrite: replace a finished sweep in that folder: each of its cells once the new one is complete.
        resume: go on with the sweep in that folder: finished cells are kept, failed ones are tried again. The
            grid may have got more cells.
        restart: throw away the unfinished sweep in that folder.
        offload: as for `prune`.
        format: of the weights of every cell: `dense` or `packed`, as for `prune`. How kept values are packed
            is a field of the recipe: `settings={"values": ["same", "int8", "int4"]}`.
        dry_run: plan the sweep, and write nothing.
        device: as for `prune`. dtype, tokenizer, revision, trust_remote_code, blocks, dequantize: likewise.
        reporter: as for `prune`. progress: likewise.

    Returns:
        A `SweepResult` with `output`, `record` (what `sweep.json` holds) and `cells`; cells that failed have
        an `error`. With `dry_run` a `SweepDryRun`.

    Raises:
        ValueError: bad input, a cell that is no recipe among it, before any work; one line says what was
            received and what to do.
    """
    check_offload(offload)
    arguments.check_format(format)
    if keep not in KEEPS:
        raise ValueError(f"keep must be one of {', '.join(KEEPS)}, got {shown(keep)}")
    source: Any = mixture.as_text(calibration) if isinstance(calibration, Mapping) else calibration
    common = {
        "calibration.samples": samples,
        "calibration.sequence_length": seqlen,
        "calibration.chat_template": chat_template,
        "seed": seed,
        "calibration.source": source if isinstance(source, (str, type(None))) else "in-memory",
    }
    if source is not None and "calibration.source" in (settings or {}):
        raise ValueError("calibration and settings calibration.source both name the source; give one of them")
    axes = {"sparsity": sparsity, "pattern": pattern, "pruner": pruner}
    fields = {**common, **axes}
    arguments.check_once({key: value for key, value in fields.items() if value is not None}, settings)
    grid = Grid(
        recipes=_listed(recipe),
        sparsities=_listed(sparsity),
        patterns=_listed(pattern),
        pruners=_listed(pruner),
        settings={key: _values(key, value) for key, value in (settings or {}).items()},
        common={key: value for key, value in common.items() if value is not None},
    )
    cells, left_out = cells_of(grid)
    evaluation = arguments.evaluation(
        perplexity, tasks, suite, eval_seqlen, include_tasks, task_data, limit, trust_remote_code
    )
    wish = arguments.texts(samples_text)
    compute = _compute_dtype(cells, str(dtype))
    team = processes.current()
    if not team.alone:
        raise ValueError(f"a sweep runs in one process, got {team.size}; start it without torchrun")

    def open_again(what: Any) -> Model:
        """Open the model of the sweep (None), or the folder of a cell, with the same options."""
        how = OpenOptions(
            tokenizer=tokenizer if what is None else opened.tokenizer or tokenizer,
            revision=revision if what is None else None,
            device=str(device),
            dtype=compute,
            trust_remote_code=trust_remote_code,
            blocks=blocks,
            dequantize=dequantize and what is None,
        )
        return open_model(model if what is None else what, how)

    with reporting(reporter, progress, team) as report:
        opened = open_again(None)
        _check_model(opened, cells, model)
        rows = _rows(opened, cells, source, report)
        prepared = evaluation.prepare(opened)
        if keep == "best" and not prepared.rows:
            raise ValueError(
                "keep best ranks by perplexity, and no text is scored; give one with --perplexity"
            )
        resources = Resources(offload, devices.available_memory())
        plan = plan_cells(cells, rows, opened, prepared, resources, Kept(keep, format == "packed"))
        target = Path(output).expanduser() if output else Path(f"{opened.label.rpartition('/')[2]}-sweep")
        inputs = dict.fromkeys(
            entry
            for named in grid.recipes or [None]
            for cell in cells
            for entry in run_inputs(opened, named, cell.recipe, prepared)
        )
        options = Options(
            target,
            list(inputs),
            offload=offload,
            packed=format == "packed",
            trust_remote_code=trust_remote_code,
            samples=wish,
        )
        work = Work(cells, rows, prepared, plan, grid.as_dict(), keep, options)
        folder = SweepFolder(
            target, overwrite=overwrite, resume=resume, restart=restart, inputs=options.inputs
        )
        run = Sweep(opened, work, folder, report, lambda text: remark_to(report, text))
        try:
            run.check()
            dry = SweepDryRun(target, plan, cells, [cell.name for cell in run.left], left_out, keep)
            if dry_run:
                return dry
            for line in dry.lines():
                report.note(line)
            run.run(open_again)
        except BaseException as error:
            run.close(error)
            raise
        run.close(None)
        return SweepResult(target, run.record)


def _listed(value: Any) -> list[Any]:
    """The values of a field of the grid, as `choices` gives them."""
    return [] if value is None else list(value)


def _values(key: str, value: Any) -> list[Any]:
    found = value if isinstance(value, list) else [value]
    if not found:
        raise ValueError(f"settings {shown(key)} has no value; give one, or leave it out")
    return found


def _compute_dtype(cells: Sequence[Cell], dtype: str) -> str:
    """The dtype of all forward passes: scores of different ones are not to be compared."""
    exact = [cell for cell in cells if cell.recipe.precision == "float32"]
    if exact and dtype not in ("auto", "float32"):
        raise ValueError(
            f"cell {exact[0].name} (precision: float32) computes in float32, got dtype {dtype}; leave the "
            "dtype out"
        )
    return "float32" if len(exact) == len(cells) else dtype


def _check_model(opened: Model, cells: Sequence[Cell], model: Any) -> None:
    if isinstance(opened.source, (Packed, Bitmasked)):
        raise ValueError(
            f"{model} is pruned and packed already; to prune it further, first make it dense: "
            f"llmprune convert {model} --to dense --output DIR"
        )
    exact = next((cell for cell in cells if cell.recipe.precision == "float32"), None)
    if exact is not None and opened.skeleton.dtype != torch.float32:
        raise ValueError(
            f"cell {exact.name} (precision: float32) computes in float32 and others in "
            f"{str(opened.skeleton.dtype).removeprefix('torch.')}, whose scores are not to be compared; give "
            "--dtype float32"
        )


def _rows(
    model: Model, cells: Sequence[Cell], source: Any, reporter: RunReporter
) -> dict[str, CalibrationSet]:
    """The calibration rows of every cell, by its name; made once for cells that have the same."""
    if source is not None and not isinstance(source, (str, torch.Tensor)) and isinstance(source, Iterable):
        source = list(source)  # an iterator gives its texts only once
    made: dict[str, CalibrationSet] = {}
    found = {}
    for cell in cells:
        key = repr((cell.recipe.calibration, cell.recipe.seed))
        if key not in made:
            given = None if isinstance(source, str) else source
            made[key] = build_calibration(model, cell.recipe, given, reporter)
        found[cell.name] = made[key]
    return found
