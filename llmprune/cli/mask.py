"""The commands on keep masks as files: `llmprune mask diff`, `apply` and `check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmprune.cli.frame import command, console, emit, flag, quiet_libraries, with_terminal
from llmprune.cli.options import BLOCKS, ORIGIN, OUTPUT, READING

app = typer.Typer(
    name="mask",
    help="Compare keep masks, put them onto a checkpoint, or see whether they still hold.",
    no_args_is_help=True,
)
_Masks = Annotated[
    str,
    typer.Argument(
        help="Output folder of llmprune, dense or packed, or a file of masks.", show_default=False
    ),
]
_Model = Annotated[
    str, typer.Argument(metavar="DIR", help="A checkpoint: folder, alias or hub id.", show_default=False)
]


@command(app, OUTPUT)
def diff(a: _Masks, b: _Masks, as_json: bool, quiet: bool) -> None:
    """Compare two sets of masks: what share of entries agrees, and how far the pruned sets overlap."""
    from llmprune import api
    from llmprune.terminal import masks

    found = api.mask_diff(a, b)
    masks.print_diff(console(as_json, quiet), found)
    if as_json:
        emit(found)


@command(app, ORIGIN, BLOCKS, READING, OUTPUT)
def apply(
    path: _Model,
    as_json: bool,
    quiet: bool,
    masks: Annotated[Path, typer.Option(help="File of masks, or an output folder.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    overwrite: Annotated[
        bool,
        flag("--overwrite", "Replace the output of llmprune that is there, once the new one is complete."),
    ] = False,
    resume: Annotated[
        bool, flag("--resume", "Go on where an earlier call into this folder stopped.")
    ] = False,
    restart: Annotated[
        bool, flag("--restart", "Throw away what an unfinished call left, and begin anew.")
    ] = False,
    **options: Any,
) -> None:
    """Put masks onto a checkpoint: pruned weights become zero, everything else stays byte for byte."""
    from llmprune import api
    from llmprune.terminal import screen

    options |= {"overwrite": overwrite, "resume": resume, "restart": restart}
    terminal, result = with_terminal(
        as_json,
        quiet,
        lambda terminal: api.mask_apply(path, masks, output, reporter=terminal, **options),
    )
    screen.print_result(terminal, result.record, result.output)
    if as_json:
        emit({"output": str(result.output), **result.record})


@command(app, ORIGIN, BLOCKS, OUTPUT)
def check(
    path: _Model,
    as_json: bool,
    quiet: bool,
    masks: Annotated[
        Path | None,
        typer.Option(help="File of masks, or a folder that holds some; by default the checkpoint's own."),
    ] = None,
    **options: Any,
) -> None:
    """Count the pruned weights that another program has filled; exit code 1 where there are any."""
    from llmprune import api
    from llmprune.terminal import masks as screens

    quiet_libraries(quiet)
    found = api.mask_check(path, masks, **options)
    screens.print_check(console(as_json, quiet), found)
    if as_json:
        emit(found)
    if found["filled"]:
        matrices = [bool(matrix["filled"]) for matrix in found["matrices"]]
        raise ValueError(
            f"{found['filled']:,} of {found['pruned']:,} pruned weights of {path} are filled, in "
            f"{sum(matrices)} of {len(matrices)} matrices; llmprune mask apply makes them zero again"
        )
