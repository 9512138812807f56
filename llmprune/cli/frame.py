"""What commands have in common: options from groups, errors in one line, output as tables or as JSON."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any, get_type_hints

import typer

from llmprune.cli import ending
from llmprune.terminal.console import OutputClosed, Screen, draw_alone

debug = False  # whether tracebacks are shown; set by the program's own option


def command(
    app: typer.Typer, *groups: tuple[inspect.Parameter, ...]
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Register a command of an app, whose options are its own parameters and those of the groups.

    An error in it becomes one line on stderr and an exit code.
    """

    def register(function: Callable[..., Any]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = inspect.signature(function).parameters.values()
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
            ending.guarded(lambda: function(**options), debug)

        call.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters.values()}
        del call.__wrapped__  # else typer would read the signature of the function instead
        app.command()(call)
        return call

    return register


def flag(name: str, help: str, **more: Any) -> Any:
    """An option without a value. With its flag named, typer adds no `--no-...` to it."""
    return typer.Option(name, help=help, **more)


def emit(value: Any) -> None:
    """Print the result as JSON on stdout; of several processes, only the first."""
    if not ending.follows():
        write(json.dumps(value))


def write(text: str) -> None:
    """Print on stdout. Raises `OutputClosed` where nobody reads it any more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise OutputClosed from None


def console(as_json: bool, quiet: bool) -> Screen:
    """What a command prints on: stdout, or stderr beside JSON; nothing with `quiet`."""
    return Screen(stderr=as_json, quiet=quiet or ending.follows())


def with_terminal(as_json: bool, quiet: bool, work: Callable[[Any], Any]) -> tuple[Screen, Any]:
    """The console, and the result of `work` called with a terminal that draws its progress there."""
    from llmprune.terminal.screen import Terminal

    quiet_libraries(quiet)
    terminal = Terminal(console(as_json, quiet))
    try:
        return terminal.console, work(terminal)
    finally:
        terminal.close()


def quiet_libraries(quiet: bool) -> None:
    """Silence the messages and bars of the libraries: the program prints its own progress."""
    import logging

    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    draw_alone(downloads=not quiet)
    if quiet:
        logging.getLogger("llmprune").setLevel(logging.ERROR)
        huggingface_hub.utils.logging.set_verbosity_error()
