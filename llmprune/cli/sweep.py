"""The command `llmprune sweep`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmprune.cli import frame


def sweep(
    model: Annotated[
        str, typer.Argument(help="demo, an alias, a hub id, or a local folder.", show_default=False)
    ],
    as_json: bool,
    quiet: bool,
    recipe: Annotated[
        str | None, typer.Option(help="Recipes by name or YAML file, separated by commas.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(help="Shares of weights to remove: 0.5,0.6,0.7; N:M patterns have their own."),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="unstructured or N:M, likewise: unstructured,2:4.")
    ] = None,
    pruner: Annotated[str | None, typer.Option(help="Pruners, likewise; see llmprune methods.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any recipe field: dotted.key=a,b, read as items of a YAML list. Repeatable."
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Weights to keep: all, best (of each sparsity and pattern) or none.")
    ] = "all",
    **options: Any,
) -> None:
    """Prune and score with a grid of recipes: one table, one plot, one record; resumable."""
    from llmprune import api
    from llmprune.recipe.loading import parse_choices
    from llmprune.terminal.sweep import print_plan, print_sweep

    grid: dict[str, Any] = {
        "recipe": _parts(recipe, "--recipe"),
        "sparsity": _numbers(sparsity),
        "pattern": _parts(pattern, "--pattern"),
        "pruner": _parts(pruner, "--pruner"),
        "settings": _together([parse_choices(text) for text in settings or ()]),
    }
    console, result = frame.with_terminal(
        as_json, quiet, lambda terminal: api.sweep(model, keep=keep, reporter=terminal, **grid, **options)
    )
    if isinstance(result, api.SweepDryRun):
        print_plan(console, result.rows(), result.lines())
    else:
        print_sweep(console, result.record, result.output)
    if as_json:
        planned = isinstance(result, api.SweepDryRun)
        frame.emit(result.summary() if planned else {"output": str(result.output), **result.record})
    if not isinstance(result, api.SweepDryRun) and result.failed:
        name, error = next(iter(result.failed.items()))
        more = f" (and {len(result.failed) - 1} more)" if len(result.failed) > 1 else ""
        raise ValueError(
            f"{len(result.failed)} of {len(result.cells)} cells failed: {name}{more}: {error}; "
            "--resume tries them again"
        )


def _parts(text: str | None, option: str) -> list[str] | None:
    if not text:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise typer.BadParameter(
            f"{option} takes values with commas between them, got {text!r}; one is empty"
        )
    return parts


def _numbers(text: str | None) -> list[float] | None:
    found = []
    for part in _parts(text, "--sparsity") or ():
        try:
            found.append(float(part))
        except ValueError:
            raise typer.BadParameter(
                f"--sparsity takes numbers with commas between them, got {part!r}"
            ) from None
    return found or None


def _together(pairs: list[tuple[str, list[Any]]]) -> dict[str, list[Any]]:
    """The values of each key; a key that is given twice has those of both."""
    found: dict[str, list[Any]] = {}
    for key, values in pairs:
        found[key] = [*found.get(key, []), *values]
    return found
