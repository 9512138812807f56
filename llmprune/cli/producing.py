"""What the commands have in common that make an output folder: the work, its result, and how that is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmprune.cli import frame
from llmprune.terminal.console import OutputClosed


def produce(
    work: Callable[..., Any],
    model: str,
    as_json: bool,
    quiet: bool,
    settings: list[str] | None,
    **options: Any,
) -> None:
    """Run `prune`, `run_model` or `recover` and print what came of it."""
    from llmprune import api
    from llmprune.recipe.loading import parse_assignment
    from llmprune.terminal import screen

    options["settings"] = dict(parse_assignment(text) for text in settings or ())
    console, result = frame.with_terminal(
        as_json, quiet, lambda terminal: work(model, reporter=terminal, **options)
    )
    planned = isinstance(result, (api.DryRun, api.RecoveryDryRun))
    try:
        if planned:
            summary: Any = api.plan_summary(result)
            if isinstance(result, api.DryRun):
                screen.print_matrices(console, result.plan)
            else:
                console.table("Plan, nothing was written", result.rows())
        else:
            screen.print_result(console, result.record, result.output)
            summary = {"output": str(result.output), **result.record}
        if as_json:
            frame.emit(summary)
    except (KeyboardInterrupt, OutputClosed) as error:
        if not planned:  # the run itself is done, so the message must not offer --resume
            error.kept, error.resumable = f"{result.output} is finished", False  # type: ignore[union-attr]
        raise
