"""The commands. Each passes its options to a function of the Python API and prints the result.

torch and transformers are imported only when a command runs, so that `--help` and wrong usage answer at once.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from llmprune.cli import bench, ending, frame, mask, sweep
from llmprune.cli.options import (
    BLOCKS,
    COMPUTING,
    ORIGIN,
    OUTPUT,
    PRUNING,
    READING,
    RECOVERING,
    SAMPLING,
    SCORING,
    SWEEPING,
    TEXTS,
    TRAINING,
    WRITING,
)
from llmprune.cli.producing import produce
from llmprune.terminal.console import OutputClosed, Screen, print_anywhere

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(mask.app)
_command = functools.partial(frame.command, app)


def _show_version(asked: bool) -> None:
    if asked:
        from llmprune.common.version import __version__

        frame.write(__version__)
        raise typer.Exit


@app.callback()
def _program(
    debug: Annotated[bool, frame.flag("--debug", "Show tracebacks.")] = False,
    version: Annotated[
        bool,
        frame.flag("--version", "Print the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Prune a pretrained language model after training, score it, and save it where others can load it.

    Start with: llmprune run demo --sparsity 0.7
    """
    frame.debug = debug


_Model = Annotated[
    str, typer.Argument(help="demo, an alias, a hub id, or a local folder.", show_default=False)
]
_Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Output folder of run or prune.", show_default=False)
]
_Repository = Annotated[
    str, typer.Argument(metavar="REPO", help="Hub repository, owner/name.", show_default=False)
]


@_command(PRUNING, SCORING, TEXTS, TRAINING, COMPUTING, ORIGIN, BLOCKS, READING, OUTPUT)
def run(model: _Model, **options: Any) -> None:
    """Prune, save, evaluate dense and pruned, write the report: the main job. With --recover also train."""
    from llmprune import api

    produce(api.run_model, model, **options)


_command(SWEEPING, SCORING, TEXTS, COMPUTING, ORIGIN, BLOCKS, READING, OUTPUT)(sweep.sweep)


@_command(PRUNING, COMPUTING, ORIGIN, BLOCKS, READING, OUTPUT)
def prune(model: _Model, **options: Any) -> None:
    """Prune and save, without evaluation."""
    from llmprune import api

    produce(api.prune, model, **options)


@_command(RECOVERING, SCORING, TEXTS, COMPUTING, ORIGIN, BLOCKS, OUTPUT)
def recover(path: _Model, **options: Any) -> None:
    """Train a pruned model with its sparsity kept or evolved, or prune one while it is trained."""
    from llmprune import api

    produce(api.recover, path, **options)


@_command(OUTPUT)
def compare(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="Output folders of run, prune, recover or sweep, or hub ids.",
            show_default=False,
        ),
    ],
    as_json: bool,
    quiet: bool,
    output: Annotated[Path, typer.Option(help="Folder to write page, tables and plots into.")] = Path(
        "comparison"
    ),
    no_overlap: Annotated[bool, frame.flag("--no-overlap", "Do not count how the masks overlap.")] = False,
    overwrite: Annotated[bool, frame.flag("--overwrite", "Replace the comparison that is there.")] = False,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the runs.")] = None,
) -> None:
    """Put several runs side by side: scores that may be ranked, sizes, what differs, how masks overlap."""
    from llmprune import api
    from llmprune.terminal import comparison

    found = api.compare(paths, output=output, overlap=not no_overlap, overwrite=overwrite, revision=revision)
    comparison.print_comparison(frame.console(as_json, quiet), found.record, output)
    if as_json:
        frame.emit(found.record)


@_command(SCORING, COMPUTING, ORIGIN, BLOCKS, READING, OUTPUT)
def eval(path: _Model, as_json: bool, quiet: bool, **options: Any) -> None:
    """Score any checkpoint: perplexity and zero-shot tasks."""
    from llmprune import api
    from llmprune.terminal import screen

    console, scores = frame.with_terminal(
        as_json, quiet, lambda terminal: api.evaluate(path, reporter=terminal, **options)
    )
    screen.print_scores(console, scores)
    if as_json:
        frame.emit(scores)


@_command(ORIGIN, BLOCKS, OUTPUT)
def inspect(
    path: _Model,
    as_json: bool,
    quiet: bool,
    strict: Annotated[
        bool, frame.flag("--strict", "Fail where the record disagrees with the weights, or there is none.")
    ] = False,
    **options: Any,
) -> None:
    """Recount zeros and patterns from disk, per matrix and overall."""
    from llmprune import api
    from llmprune.terminal import screen

    frame.quiet_libraries(quiet)
    counts = api.inspect(path, **options)
    screen.print_counts(frame.console(as_json, quiet), counts)
    if as_json:
        frame.emit(counts)
    if strict and counts["record_agrees"] is None:
        raise ValueError(f"llmprune.json of {path} is not there: no record to check against")
    if strict and not counts["record_agrees"]:
        raise ValueError(f"llmprune.json of {path} disagrees with its weights")


@_command(WRITING, ORIGIN, BLOCKS, OUTPUT)
def convert(
    path: _Model,
    as_json: bool,
    quiet: bool,
    to: Annotated[
        str,
        typer.Option(
            help="packed (sparse matrices take less room), dense, or sparse-bitmask (of compressed-tensors)."
        ),
    ],
    values: Annotated[str, typer.Option(help="Kept values: same, int8 or int4.")] = "same",
    **options: Any,
) -> None:
    """Write a checkpoint in another format: packed, dense or sparse-bitmask."""
    from llmprune import api
    from llmprune.terminal import screen

    console, converted = frame.with_terminal(
        as_json, quiet, lambda terminal: api.convert(path, to=to, values=values, reporter=terminal, **options)
    )
    screen.print_converted(console, converted)
    if as_json:
        frame.emit(converted)


@_command(SAMPLING, ORIGIN, OUTPUT)
def generate(
    path: _Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on with.", show_default=False)],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Try a dense or packed model: text as it comes, tokens per second, memory."""
    from llmprune import api
    from llmprune.terminal import screen

    frame.quiet_libraries(True)
    console = frame.console(as_json, quiet)
    pieces: list[str] = []

    def shown(piece: str) -> None:  # the prompt stands before its text, but not before an error
        console.piece(piece if pieces else prompt + piece)
        pieces.append(piece)

    generated = api.generate(path, prompt, stream=None if quiet else shown, **options)
    screen.print_generated(console, generated)
    if as_json:
        frame.emit(generated)


_command(ORIGIN, BLOCKS, OUTPUT)(bench.bench)


@_command(OUTPUT)
def push(
    folder: _Folder,
    repository: _Repository,
    as_json: bool,
    quiet: bool,
    public: Annotated[
        bool,
        frame.flag("--public", "Publish: a new repository is public, and one that is public may be written."),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write, made where it is not there.")] = None,
    trust_remote_code: Annotated[
        bool, frame.flag("--trust-remote-code", "Run Python code that comes with the folder.")
    ] = False,
) -> None:
    """Upload to the Hugging Face Hub with a model card; private unless asked."""
    from llmprune import api
    from llmprune.terminal import screen

    console, pushed = frame.with_terminal(
        as_json,
        quiet,
        lambda terminal: api.push(
            folder,
            repository,
            private=not public,
            revision=revision,
            trust_remote_code=trust_remote_code,
            reporter=terminal,
        ),
    )
    screen.print_pushed(console, pushed, public)
    if as_json:
        frame.emit(pushed)


@_command(OUTPUT)
def published(
    as_json: bool,
    quiet: bool,
    model: Annotated[
        str | None, typer.Argument(help="An alias or a hub id; without it, which models there are.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="perplexity, accuracy, a text (wikitext2) or a task (piqa).")
    ] = None,
) -> None:
    """List the figures that papers published of a model, with protocol and source."""
    from llmprune import api
    from llmprune.terminal import literature

    figures, console = api.published(model, metric=metric), frame.console(as_json, quiet)
    if model is None:
        models = literature.models_of(figures)
        literature.print_models(console, models)
        found: dict[str, Any] = {"models": models}
    else:
        literature.print_figures(console, figures)
        found = {"model": figures[0]["model"], "figures": figures}
    if as_json:
        frame.emit(found)


@_command(OUTPUT)
def methods(as_json: bool, quiet: bool) -> None:
    """List pruners, refiners, updates, allocators and the parts of recoveries: options, costs, effects."""
    from llmprune.cli import lists

    found = lists.methods()
    lists.print_methods(frame.console(as_json, quiet), found)
    if as_json:
        frame.emit(found)


@_command(OUTPUT)
def recipes(as_json: bool, quiet: bool) -> None:
    """List the shipped recipes: of pruning, with what they cost and give, and of recover."""
    from llmprune.cli import lists

    found = lists.recipes()
    lists.print_recipes(frame.console(as_json, quiet), found)
    if as_json:
        frame.emit(found)


@_command(OUTPUT)
def models(as_json: bool, quiet: bool) -> None:
    """List model names: the embedded demo, and aliases with hub id and class of transformers."""
    from llmprune.cli import lists

    found = lists.models()
    lists.print_models(frame.console(as_json, quiet), found)
    if as_json:
        frame.emit(found)


def main() -> None:
    """Run the command that `sys.argv` names.

    If the reader of stdout is gone (`llmprune ... | head`), it ends silently with exit code 141, like other
    programs.
    """
    print_anywhere()
    # rich prints the help texts on a console of its own.
    Console.on_broken_pipe = Screen.on_broken_pipe  # type: ignore[method-assign, assignment]
    try:
        raise SystemExit(app(prog_name="llmprune", standalone_mode=False))
    except frame.UsageError as error:
        frame.wrong_usage(error)
    except OutputClosed as closed:
        ending.reader_gone(closed)
        raise SystemExit(141) from None
