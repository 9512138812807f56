"""The commands. Each passes its options to a function of the Python API and prints the result.

torch and transformers are imported only when a command runs, so that `--help` and wrong usage answer at once.
"""

from __future__ import annotations

import functools
import inspect as inspection
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from llmprune.cli import ending
from llmprune.cli.options import COMPUTING, ORIGIN, OUTPUT, PRUNING, READING, SCORING, WRITING
from llmprune.terminal.console import OutputClosed, Screen, draw_alone

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False


def _command(
    *groups: tuple[inspection.Parameter, ...],
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Register a command whose options are its own parameters and those of the groups.

    An error in it becomes one line on stderr and an exit code.
    """

    def register(function: Callable[..., Any]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = inspection.signature(function).parameters.values()
        parameters = {
            p.name: p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name])
            for p in own
            if p.kind is not p.VAR_KEYWORD
        }
        # A command may name an option of a group to use it itself; the group still says what the option is.
        for group in groups:
            parameters |= {p.name: p for p in group}

        @functools.wraps(function)
        def call(**options: Any) -> None:
            ending.guarded(lambda: function(**options), _debug)

        call.__signature__ = inspection.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters.values()}
        del call.__wrapped__  # else typer would read the signature of the function instead
        app.command()(call)
        return call

    return register


def _flag(name: str, help: str, **more: Any) -> Any:
    """An option without a value. With its flag named, typer adds no `--no-...` to it."""
    return typer.Option(name, help=help, **more)


def _show_version(asked: bool) -> None:
    if asked:
        from llmprune.common.version import __version__

        _write(__version__)
        raise typer.Exit


@app.callback()
def _program(
    debug: Annotated[bool, _flag("--debug", "Show tracebacks.")] = False,
    version: Annotated[
        bool,
        _flag("--version", "Print the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Prune a pretrained language model after training, score it, and save it where others can load it.

    Start with: llmprune run demo --sparsity 0.7
    """
    global _debug
    _debug = debug


def _emit(value: Any) -> None:
    """Print the result as JSON on stdout; of several processes, only the first."""
    if not ending.follows():
        _write(json.dumps(value))


def _write(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise OutputClosed from None


def _console(as_json: bool, quiet: bool) -> Screen:
    return Screen(stderr=as_json, quiet=quiet or ending.follows())


def _with_terminal(as_json: bool, quiet: bool, work: Callable[[Any], Any]) -> tuple[Screen, Any]:
    """The console, and the result of `work` called with a terminal that draws its progress there."""
    from llmprune.terminal.screen import Terminal

    _quiet_libraries(quiet)
    terminal = Terminal(_console(as_json, quiet))
    try:
        return terminal.console, work(terminal)
    finally:
        terminal.close()


def _quiet_libraries(quiet: bool) -> None:
    """Silence the messages and bars of the libraries: the program prints its own progress."""
    import logging

    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    draw_alone(downloads=not quiet)
    if quiet:
        logging.getLogger("llmprune").setLevel(logging.ERROR)
        huggingface_hub.utils.logging.set_verbosity_error()


def _prune_command(
    work: Callable[..., Any],
    model: str,
    as_json: bool,
    quiet: bool,
    settings: list[str] | None,
    **options: Any,
) -> None:
    """Run `prune` or `run_model` and print what came of it."""
    from llmprune import api
    from llmprune.recipe.loading import parse_assignment
    from llmprune.terminal import screen

    options["settings"] = dict(parse_assignment(text) for text in settings or ())
    console, result = _with_terminal(
        as_json, quiet, lambda terminal: work(model, reporter=terminal, **options)
    )
    try:
        if isinstance(result, api.DryRun):
            screen.print_matrices(console, result.plan)
            summary: Any = api.plan_summary(result)
        else:
            screen.print_result(console, result.record, result.output)
            summary = {"output": str(result.output), **result.record}
        if as_json:
            _emit(summary)
    except (KeyboardInterrupt, OutputClosed) as error:
        if not isinstance(
            result, api.DryRun
        ):  # the run itself is done, so the message must not offer --resume
            error.kept, error.resumable = f"{result.output} is finished", False  # type: ignore[union-attr]
        raise


_Model = Annotated[
    str, typer.Argument(help="demo, an alias, a hub id, or a local folder.", show_default=False)
]
_Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Output folder of run or prune.", show_default=False)
]
_Repository = Annotated[
    str, typer.Argument(metavar="REPO", help="Hub repository, owner/name.", show_default=False)
]


@_command(PRUNING, SCORING, COMPUTING, ORIGIN, READING, OUTPUT)
def run(model: _Model, **options: Any) -> None:
    """Prune, save, evaluate dense and pruned, write the report: the main job."""
    from llmprune import api

    _prune_command(api.run_model, model, **options)


@_command(PRUNING, COMPUTING, ORIGIN, READING, OUTPUT)
def prune(model: _Model, **options: Any) -> None:
    """Prune and save, without evaluation."""
    from llmprune import api

    _prune_command(api.prune, model, **options)


@_command(SCORING, COMPUTING, ORIGIN, READING, OUTPUT)
def eval(path: _Model, as_json: bool, quiet: bool, **options: Any) -> None:
    """Score any checkpoint: perplexity and zero-shot tasks."""
    from llmprune import api
    from llmprune.terminal import screen

    console, scores = _with_terminal(
        as_json, quiet, lambda terminal: api.evaluate(path, reporter=terminal, **options)
    )
    screen.print_scores(console, scores)
    if as_json:
        _emit(scores)


@_command(ORIGIN, OUTPUT)
def inspect(
    path: _Model,
    as_json: bool,
    quiet: bool,
    strict: Annotated[
        bool, _flag("--strict", "Fail where the record disagrees with the weights, or there is none.")
    ] = False,
    **options: Any,
) -> None:
    """Recount zeros and patterns from disk, per matrix and overall."""
    from llmprune import api
    from llmprune.terminal import screen

    _quiet_libraries(quiet)
    counts = api.inspect(path, **options)
    screen.print_counts(_console(as_json, quiet), counts)
    if as_json:
        _emit(counts)
    if strict and counts["record_agrees"] is None:
        raise ValueError(f"llmprune.json of {path} is not there: no record to check against")
    if strict and not counts["record_agrees"]:
        raise ValueError(f"llmprune.json of {path} disagrees with its weights")


@_command(WRITING, ORIGIN, OUTPUT)
def convert(
    path: _Model,
    as_json: bool,
    quiet: bool,
    to: Annotated[str, typer.Option(help="packed (sparse matrices take less room) or dense.")],
    values: Annotated[str, typer.Option(help="Kept values: same, int8 or int4.")] = "same",
    **options: Any,
) -> None:
    """Write a checkpoint in another format: packed or dense."""
    from llmprune import api
    from llmprune.terminal import screen

    console, converted = _with_terminal(
        as_json, quiet, lambda terminal: api.convert(path, to=to, values=values, reporter=terminal, **options)
    )
    screen.print_converted(console, converted)
    if as_json:
        _emit(converted)


@_command(OUTPUT)
def push(
    folder: _Folder,
    repository: _Repository,
    as_json: bool,
    quiet: bool,
    public: Annotated[
        bool,
        _flag("--public", "Publish: a new repository is public, and one that is public may be written."),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write, made where it is not there.")] = None,
    trust_remote_code: Annotated[
        bool, _flag("--trust-remote-code", "Run Python code that comes with the folder.")
    ] = False,
) -> None:
    """Upload to the Hugging Face Hub with a model card; private unless asked."""
    from llmprune import api
    from llmprune.terminal import screen

    console, pushed = _with_terminal(
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
        _emit(pushed)


@_command(OUTPUT)
def methods(as_json: bool, quiet: bool) -> None:
    """List pruners, refiners, updates and allocators: their options, what they cost and what they give."""
    from llmprune.cli import lists

    found = lists.methods()
    lists.print_methods(_console(as_json, quiet), found)
    if as_json:
        _emit(found)


@_command(OUTPUT)
def recipes(as_json: bool, quiet: bool) -> None:
    """List the shipped recipes, what they cost and what they give."""
    from llmprune.cli import lists

    found = lists.recipes()
    lists.print_recipes(_console(as_json, quiet), found)
    if as_json:
        _emit(found)


@_command(OUTPUT)
def models(as_json: bool, quiet: bool) -> None:
    """List model names: the embedded demo, and aliases with hub id and class of transformers."""
    from llmprune.cli import lists

    found = lists.models()
    lists.print_models(_console(as_json, quiet), found)
    if as_json:
        _emit(found)


def main() -> None:
    """Run the command that `sys.argv` names.

    If the reader of stdout is gone (`llmprune ... | head`), it ends silently with exit code 141, like other
    programs.
    """
    # rich prints the help texts on a console of its own.
    Console.on_broken_pipe = Screen.on_broken_pipe  # type: ignore[method-assign, assignment]
    try:
        app()
    except OutputClosed as closed:
        ending.reader_gone(closed)
        raise SystemExit(141) from None
