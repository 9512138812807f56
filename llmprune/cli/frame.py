"""What commands have in common: options from groups, errors in one line, output as tables or as JSON."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

import typer
from typer.models import ArgumentInfo

from llmprune.cli import ending
from llmprune.terminal.console import OutputClosed, Screen, draw_alone

# That of click, which newer versions of typer bring themselves.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
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

        flags = {name: flag for name, p in parameters.items() if (flag := _flag_of(p))}

        @functools.wraps(function)
        def call(**options: Any) -> None:
            ending.guarded(lambda: function(**options), debug, flags)

        call.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters.values()}
        del call.__wrapped__  # else typer would read the signature of the function instead
        app.command()(call)
        return call

    return register


def _flag_of(parameter: inspect.Parameter) -> str:
    """The option of a parameter, as typer names it; empty for an argument, which has no name of its own."""
    shown = next(m for m in parameter.annotation.__metadata__ if hasattr(m, "param_decls"))
    if isinstance(shown, ArgumentInfo):
        return ""
    named = [text for text in shown.param_decls or () if text.startswith("--")]
    return named[0] if named else f"--{parameter.name.replace('_', '-')}"


def wrong_usage(error: Any) -> None:
    """End after a command line that cannot be read: with one line on stderr, and exit code 2."""
    # Without arguments the help was printed already.
    if type(error).__name__ != "NoArgsIsHelpError":
        told = " ".join(error.format_message().split()).rstrip(".")
        command = error.ctx.command_path if error.ctx else "llmprune"
        print(f"llmprune: {told}; {command} -h lists the options", file=sys.stderr)
    raise SystemExit(2) from None


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
