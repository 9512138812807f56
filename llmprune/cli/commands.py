"""The command line: flags become arguments of the Python API, nothing more. Heavy imports wait until a command runs."""

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
from llmprune.terminal.console import OutputClosed, Screen, draw_alone

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False


def _option(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, **more)


# Each group's parameters become options of the commands that name it.
def _pruning(
    recipe: Annotated[
        str | None, _option("Recipe by name or YAML file; by default best where it fits, else dsnot.")
    ] = None,
    sparsity: Annotated[float | None, _option("Share of weights to remove, in [0, 1).")] = None,
    pattern: Annotated[str | None, _option("unstructured or N:M (2:4, 4:8, ...).")] = None,
    pruner: Annotated[str | None, _option("Pruner; see llmprune methods.")] = None,
    refiner: Annotated[str | None, _option("Refiner, or none.")] = None,
    update: Annotated[
        str | None, _option("Update of the kept weights (several with commas), or none.")
    ] = None,
    allocator: Annotated[str | None, _option("Allocator.")] = None,
    calibration: Annotated[
        str | None,
        _option(
            "builtin, self, c4, wikitext2, fineweb-edu, ID:column, a .txt/.jsonl/.parquet/.safetensors file; c4=0.7+self=0.3 mixes."
        ),
    ] = None,
    samples: Annotated[int | None, _option("Calibration rows (128).")] = None,
    seqlen: Annotated[int | None, _option("Tokens per row (min(2048, the model's limit)).")] = None,
    seed: Annotated[int | None, _option("Seed of everything random (0).")] = None,
    output: Annotated[
        Path | None,
        _option(
            "Folder to write; by default named after model, recipe, what was exchanged in it, and sparsity."
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        _option("Replace the output of llmprune that is there, once the new one is complete.", "--overwrite"),
    ] = False,
    resume: Annotated[
        bool, _option("Go on where an earlier run into this output folder stopped.", "--resume")
    ] = False,
    restart: Annotated[
        bool, _option("Throw away what an unfinished run left, and begin anew.", "--restart")
    ] = False,
    offload: Annotated[str, _option("Where block inputs are kept: auto, ram or disk.")] = "auto",
    time_limit: Annotated[
        float | None,
        _option(
            "Minutes that recipe best may take, by estimate, to be the default (LLMPRUNE_TIME_LIMIT, else 60)."
        ),
    ] = None,
    dry_run: Annotated[bool, _option("Print the plan with every matrix, then stop.", "--dry-run")] = False,
    settings: Annotated[
        list[str] | None, _option("Any recipe field: dotted.key=value. Repeatable.", "--set")
    ] = None,
) -> None: ...


def _scoring(
    perplexity: Annotated[
        list[str] | None,
        _option("Text to measure perplexity on: builtin, wikitext2, c4 or a file. Repeatable."),
    ] = None,
    eval_seqlen: Annotated[int | None, _option("Tokens per evaluation window.")] = None,
    tasks: Annotated[str | None, _option("lm-eval tasks, separated by commas.")] = None,
    suite: Annotated[
        str | None, _option("Evaluation suite by name (demo, quick, paper) or YAML file.")
    ] = None,
    include_tasks: Annotated[Path | None, _option("Folder with lm-eval task files of your own.")] = None,
    task_data: Annotated[Path | None, _option("Folder with the files of rte_local and blimp_local.")] = None,
    limit: Annotated[int | None, _option("At most so many windows per text and documents per task.")] = None,
) -> None: ...


def _computing(
    device: Annotated[str, _option("auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, _option("Of forward passes: auto, float32, bfloat16, float16.")] = "auto",
) -> None: ...


def _origin(
    revision: Annotated[str | None, _option("Hub revision of the model.")] = None,
    trust_remote_code: Annotated[
        bool, _option("Run Python code of the checkpoint or of task files.", "--trust-remote-code")
    ] = False,
) -> None: ...


def _output(
    as_json: Annotated[
        bool, _option("The result as one JSON object on stdout, everything else on stderr.", "--json")
    ] = False,
    quiet: Annotated[bool, _option("Print errors only.", "--quiet")] = False,
) -> None: ...


def _command(*groups: Callable[..., None]) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Register a command whose options are its own parameters and those of the groups; errors become one line and an exit code."""

    def register(function: Callable[..., Any]) -> Callable[..., None]:
        options: dict[str, inspection.Parameter] = {}
        hints: dict[str, Any] = {}
        for source in (
            function,
            *groups,
        ):  # a group's declaration stands over the command's own mention of a parameter
            options |= inspection.signature(source).parameters
            hints |= get_type_hints(source, include_extras=True)
        parameters = [
            p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name])
            for p in options.values()
            if p.kind is not p.VAR_KEYWORD
        ]

        @functools.wraps(function)
        def call(**options: Any) -> None:
            ending.guarded(lambda: function(**options), _debug)

        call.__signature__ = inspection.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: hints[p.name] for p in parameters}
        del call.__wrapped__  # its own signature, not the function's
        app.command()(call)
        return call

    return register


def _show_version(asked: bool) -> None:
    if asked:
        from llmprune import __version__

        _write(__version__)
        raise typer.Exit


@app.callback()
def _program(
    debug: Annotated[bool, _option("Show tracebacks.", "--debug")] = False,
    version: Annotated[
        bool, _option("Print the version.", "--version", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Prune a pretrained language model after training, score it, and save it where others can load it.

    Start with: llmprune run demo --sparsity 0.7
    """
    global _debug
    _debug = debug


def _emit(value: Any) -> None:
    """The result on stdout."""
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
    """Run with progress on the console; the bars are closed whatever happens."""
    from llmprune.terminal.screen import Terminal

    _quiet_libraries(quiet)
    terminal = Terminal(_console(as_json, quiet))
    try:
        return terminal.console, work(terminal)
    finally:
        terminal.close()


def _quiet_libraries(quiet: bool) -> None:
    """Our own bars and lines say where the run stands."""
    import logging

    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    draw_alone(downloads=not quiet)
    if quiet:
        logging.getLogger("llmprune").setLevel(logging.ERROR)
        huggingface_hub.utils.logging.set_verbosity_error()


def _prune_command(
    evaluate: bool,
    model: str,
    as_json: bool,
    quiet: bool,
    settings: list[str] | None,
    tasks: str | None,
    **options: Any,
) -> None:
    from llmprune import api
    from llmprune.recipe.loading import parse_assignment
    from llmprune.terminal import screen

    options["settings"] = dict(parse_assignment(text) for text in settings or ())
    if evaluate:
        options |= {"tasks": _names(tasks), "perplexity": options["perplexity"] or ()}
    work = api.run_model if evaluate else api.prune
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
        if not isinstance(result, api.DryRun):
            error.kept, error.resumable = f"{result.output} is finished", False  # type: ignore[union-attr]
        raise


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


_Model = Annotated[
    str, typer.Argument(help="demo, an alias, a hub id, or a local folder.", show_default=False)
]


@_command(_pruning, _scoring, _computing, _origin, _output)
def run(model: _Model, **options: Any) -> None:
    """Prune, save, evaluate dense and pruned, write the report: the main job."""
    _prune_command(True, model, **options)


@_command(_pruning, _computing, _origin, _output)
def prune(model: _Model, **options: Any) -> None:
    """Prune and save, without evaluation."""
    _prune_command(False, model, tasks=None, **options)


@_command(_scoring, _computing, _origin, _output)
def eval(
    path: _Model, as_json: bool, quiet: bool, tasks: str | None, perplexity: list[str] | None, **options: Any
) -> None:
    """Score any checkpoint: perplexity and zero-shot tasks."""
    from llmprune import api
    from llmprune.terminal import screen

    console, scores = _with_terminal(
        as_json,
        quiet,
        lambda terminal: api.evaluate(
            path, tasks=_names(tasks), perplexity=perplexity or (), reporter=terminal, **options
        ),
    )
    screen.print_scores(console, scores)
    if as_json:
        _emit(scores)


@_command(_origin, _output)
def inspect(
    path: _Model,
    as_json: bool,
    quiet: bool,
    strict: Annotated[
        bool, _option("Fail where the record disagrees with the weights, or there is none.", "--strict")
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
    if strict and not counts["record_agrees"]:
        told = (
            "disagrees with its weights"
            if counts["record_agrees"] is False
            else "is not there: no record to check against"
        )
        raise ValueError(f"llmprune.json of {path} {told}")


@_command(_output)
def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Output folder of run or prune.", show_default=False)
    ],
    repository: Annotated[
        str, typer.Argument(metavar="REPO", help="Hub repository, owner/name.", show_default=False)
    ],
    as_json: bool,
    quiet: bool,
    public: Annotated[
        bool,
        _option("Publish: a new repository is public, and one that is public may be written.", "--public"),
    ] = False,
    revision: Annotated[str | None, _option("Branch to write, made where it is not there.")] = None,
    trust_remote_code: Annotated[
        bool, _option("Run Python code that comes with the folder.", "--trust-remote-code")
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


@_command(_output)
def methods(as_json: bool, quiet: bool) -> None:
    """List pruners, refiners, updates and allocators with their options, what they cost and what they give."""
    from llmprune.cli import lists

    found = lists.methods()
    lists.print_methods(_console(as_json, quiet), found)
    if as_json:
        _emit(found)


@_command(_output)
def recipes(as_json: bool, quiet: bool) -> None:
    """List the shipped recipes, what they cost and what they give."""
    from llmprune.cli import lists

    found = lists.recipes()
    lists.print_recipes(_console(as_json, quiet), found)
    if as_json:
        _emit(found)


@_command(_output)
def models(as_json: bool, quiet: bool) -> None:
    """List model names: the embedded demo and the aliases of hub ids."""
    from llmprune.hub.download import ALIASES

    found = {"demo": "embedded, needs no network"} | ALIASES
    _console(as_json, quiet).table("models", list(found.items()))
    if as_json:
        _emit(found)


def main() -> None:
    """The program. Where the reader of its output has gone, it ends as the system's own programs do: silently, with 141."""
    Console.on_broken_pipe = Screen.on_broken_pipe  # type: ignore[method-assign, assignment]  # the console of the help texts, too
    try:
        app()
    except OutputClosed as closed:
        ending.reader_gone(closed)
        raise SystemExit(141) from None
