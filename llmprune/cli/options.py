"""The options of the commands, in groups: each with its type, its default and its line of help.

An option is an `inspect.Parameter` as typer reads it from a function's signature. `commands` puts those of
the groups a command names into its signature.
"""

from __future__ import annotations

import inspect
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?)\s*([a-z]?)", re.ASCII | re.IGNORECASE)


def count(text: str) -> int:
    """A whole number such as 500k, 2M or 1.5B, with the suffix for thousands, millions or billions."""
    found = _COUNT.fullmatch(str(text).strip())
    factor = _SUFFIXES.get(found[2].lower()) if found else None
    number = Fraction(found[1].replace("_", "")) * factor if found and factor else None
    if number is None or number.denominator != 1:
        raise typer.BadParameter(f"{text!r} is no whole number such as 200000, 500k or 2M")
    return int(number)


def _number(kind: type[int] | type[float]) -> dict[str, Any]:
    """How typer reads a number; its own reader does not say what it received."""

    def read(text: str) -> int | float:
        try:
            return kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise typer.BadParameter(f"{wanted} is wanted, got {str(text)!r}") from None

    return {"parser": read, "metavar": f"<{kind.__name__}>"}


WHOLE, REAL = _number(int), _number(float)
_READERS: dict[Any, dict[str, Any]] = {int: WHOLE, float: REAL}


def _option(
    name: str,
    kind: Any,
    help: str,
    *,
    default: Any = None,
    flag: str | None = None,
    **more: Any,
) -> inspect.Parameter:
    """An option with a value. Without `flag`, typer derives it from the name: `--dry-run` for `dry_run`."""
    shown = typer.Option(*([flag] if flag else []), help=help, **(_READERS.get(kind, {}) | more))
    wanted = kind if default is not None else kind | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[wanted, shown]
    )


def _needed(name: str, kind: Any, help: str, **more: Any) -> inspect.Parameter:
    """An option that must be given."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, typer.Option(help=help, **more)]
    )


def _switch(name: str, help: str, *, flag: str | None = None) -> inspect.Parameter:
    """An option without a value, off by default. With its flag named, typer adds no `--no-...` to it."""
    return _option(name, bool, help, default=False, flag=flag or f"--{name.replace('_', '-')}")


_KEPT = (
    _switch("overwrite", "Replace the output of llmprune that is there, once the new one is complete."),
    _switch("resume", "Go on where an earlier run into this output folder stopped."),
    _switch("restart", "Throw away what an unfinished run left, and begin anew."),
)

WRITING = (_needed("output", Path, "Folder to write."), *_KEPT)

CALIBRATING = (
    _option(
        "calibration",
        str,
        "builtin, self, c4, wikitext2, fineweb-edu, ID:column, a .txt/.jsonl/.parquet/.safetensors file; "
        "c4=0.7+self=0.3 mixes.",
    ),
    _option("samples", int, "Calibration rows (128)."),
    _option("seqlen", int, "Tokens per row (min(2048, the model's limit))."),
    _option("chat_template", str, "How chats become text: auto, on (the tokenizer's template) or off."),
    _option("seed", int, "Seed of everything random (0)."),
)

_OFFLOAD = _option("offload", str, "Where block inputs are kept: auto, ram or disk.", default="auto")

_FORMAT = _option("format", str, "Of the weights that are saved: dense or packed.", default="dense")

PRUNING = (
    _option("recipe", str, "Recipe by name or YAML file; by default best where it fits, else dsnot."),
    _option("sparsity", float, "Share of weights to remove, in [0, 1)."),
    _option("pattern", str, "unstructured or N:M (2:4, 4:8, ...)."),
    _option("pruner", str, "Pruner; see llmprune methods."),
    _option("refiner", str, "Refiner, or none."),
    _option("update", str, "Update of the kept weights (several with commas), or none."),
    _option("allocator", str, "Allocator."),
    *CALIBRATING,
    _option(
        "output",
        Path,
        "Folder to write; by default named after model, recipe, what was exchanged in it, and sparsity.",
    ),
    *_KEPT,
    _OFFLOAD,
    _FORMAT,
    _option("values", str, "Kept values of a packed output: same, int8 or int4 (rounded, made up for)."),
    _option(
        "time_limit",
        float,
        "Minutes that recipe best may take, by estimate, to be the default (LLMPRUNE_TIME_LIMIT, else 60).",
    ),
    _switch("dry_run", "Print the plan with every matrix, then stop."),
    _option("masks", Path, "Start from these keep masks, in the place of the recipe's pruner."),
    _option("settings", list[str], "Any recipe field: dotted.key=value. Repeatable.", flag="--set"),
)

SWEEPING = (
    *CALIBRATING,
    _option("output", Path, "Folder to write; by default MODEL-sweep in this folder."),
    _switch("overwrite", "Replace the finished sweep that is there, each cell once the new one is complete."),
    _switch("resume", "Go on with the sweep that is there; failed cells are tried again."),
    _switch("restart", "Throw away the unfinished sweep that is there, and begin anew."),
    _OFFLOAD,
    _FORMAT,
    _switch("dry_run", "Print the cells with time and disk, then stop."),
)

_TEXT = (
    "To train on: builtin, c4, wikitext2, fineweb-edu, ID:column, a .txt/.jsonl/.parquet/.safetensors file; "
    "c4=0.7+notes.txt=0.3 mixes."
)
_TOKENS = "To train on, all epochs together: 200000, 500k, 2M."

TRAINING = (
    _option("recover", str, "Train what was pruned by this recipe of recovery, see llmprune recover."),
    _option("text", str, f"With --recover. {_TEXT}"),
    _option("tokens", int, f"With --recover. {_TOKENS}", parser=count, metavar="N"),
    _option("epochs", int, "With --recover. How often the text is read.", default=1),
)

RECOVERING = (
    _option("recipe", str, "Recipe of recovery by name or YAML file; see llmprune recipes (recover-best)."),
    _needed("text", str, _TEXT),
    _needed("tokens", int, _TOKENS, parser=count, metavar="N"),
    WRITING[0],
    _option("teacher", str, "The dense model, where a recipe needs it; by default the one of the record."),
    _option("masks", Path, "Keep masks of a pruned model that come in a file of their own."),
    _option("sparsity", float, "To end with, where the recipe prunes: of a dense start, or higher than its."),
    _option("pattern", str, "Likewise: unstructured or N:M."),
    _option("epochs", int, "How often the text is read.", default=1),
    _option("seqlen", int, "Tokens per sequence (min(2048, the model's limit))."),
    _option("seed", int, "Seed of everything random (0)."),
    _option("settings", list[str], "Any field of the recipe: dotted.key=value. Repeatable.", flag="--set"),
    *_KEPT,
    _FORMAT,
    _option(
        "score",
        bool,
        "Do not score dense model, start and result.",
        default=True,
        flag=" /--no-score",
        show_default=False,
    ),
    _option(
        "time_limit",
        float,
        "Minutes that training may take, by estimate: without --recipe one is taken that fits. (no limit)",
    ),
    _switch("dry_run", "Print the time and memory that it will need, by part, then stop."),
)

TEXTS = (
    _option("samples_text", int, "Texts that the models write for the report, 0 to 8 (2 where it is quick)."),
)

SCORING = (
    _option(
        "perplexity",
        list[str],
        "Text to measure perplexity on: builtin, wikitext2, c4 or a file. Repeatable.",
    ),
    _option("eval_seqlen", int, "Tokens per evaluation window."),
    _option("tasks", str, "lm-eval tasks, separated by commas."),
    _option("suite", str, "Evaluation suite by name (demo, quick, paper) or YAML file."),
    _option("include_tasks", Path, "Folder with lm-eval task files of your own."),
    _option("task_data", Path, "Folder with the files of rte_local and blimp_local."),
    _option("limit", int, "At most so many windows per text and documents per task."),
)

READING = (_switch("dequantize", "Read an fp8 or mxfp4 checkpoint as bfloat16."),)

COMPUTING = (
    _option("device", str, "auto, cpu, cuda or cuda:N.", default="auto"),
    _option("dtype", str, "Of forward passes: auto, float32, bfloat16, float16.", default="auto"),
)

ORIGIN = (
    _option("revision", str, "Hub revision of the model."),
    _switch("trust_remote_code", "Run Python code of the checkpoint or of task files."),
)

BLOCKS = (_option("blocks", str, "Name of the list of the model's blocks, where the wrong one is taken."),)

SAMPLING = (
    _option("max_new_tokens", int, "At most so many new tokens.", default=64),
    _option("temperature", float, "Of sampling; 0 takes the likeliest token each time.", default=0.0),
    _option("seed", int, "Seed of sampling.", default=0),
)

OUTPUT = (
    _switch("as_json", "The result as one JSON object on stdout, everything else on stderr.", flag="--json"),
    _switch("quiet", "Print errors only."),
)
