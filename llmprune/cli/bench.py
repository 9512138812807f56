"""The command `llmprune bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmprune.cli.frame import emit, flag, with_terminal
from llmprune.cli.options import REAL, WHOLE

NO_PLOT = "none"


def bench(
    path: Annotated[
        str,
        typer.Argument(help="A pruned folder, dense or packed, an alias or a hub id.", show_default=False),
    ],
    as_json: bool,
    quiet: bool,
    values: Annotated[
        str, typer.Option(help="Kept values of a dense folder, for packing: same, int8 or int4.")
    ] = "same",
    seconds: Annotated[
        float, typer.Option(help="For measuring speed; writing, loading and scoring come on top.", **REAL)
    ] = 60.0,
    products_only: Annotated[
        bool, flag("--products-only", "Measure products of matrices alone: no whole model, no copy on disk.")
    ] = False,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to score: builtin, wikitext2, c4, a file, or none; by default those of the record, "
            "else builtin. Repeatable."
        ),
    ] = None,
    eval_seqlen: Annotated[int | None, typer.Option(help="Tokens per evaluation window.", **WHOLE)] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Windows per text at most; by default as in the record, else 8.", **WHOLE),
    ] = None,
    plot: Annotated[
        str | None, typer.Option(help="PNG to draw, or none; by default NAME-bench.png in this folder.")
    ] = None,
    **options: Any,
) -> None:
    """Measure size, memory and speed on this machine, dense against packed, with the perplexity beside."""
    from llmprune import api
    from llmprune.terminal.bench import print_bench

    options |= {"eval_seqlen": eval_seqlen, "limit": limit, "perplexity": perplexity}
    options |= {"values": values, "seconds": seconds, "products_only": products_only}
    picture = None if plot == NO_PLOT else Path(plot) if plot else default_plot(path)
    try:
        console, found = with_terminal(
            as_json, quiet, lambda terminal: api.bench(path, plot=picture, reporter=terminal, **options)
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing of a benchmark is kept, run the same command again") from None
    print_bench(console, found)
    if as_json:
        emit(found)


def default_plot(path: str) -> Path:
    """The picture of a benchmark that names none: in the current folder.

    Raises:
        ValueError: that folder is the model's own.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() and folder.resolve() == Path.cwd().resolve():
        raise ValueError(
            f"the plot would stand in the model's own folder {folder.resolve()}; name another place with "
            f"--plot FILE, or --plot {NO_PLOT}"
        )
    name = folder.resolve().name if folder.is_dir() else path.rstrip("/").rpartition("/")[2]
    return Path(f"{name}-bench.png")
