"""Parts of the pages that say what the code says, written into them by this script and compared by a test:

    .venv/bin/python docs/making/tables.py

Such a part stands between two comments, of which the first names it. Nothing there is written by hand, and no
part is there twice; `tests/test_docs_tables.py` fails where a page does not hold what the code gives.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import llmprune
from llmprune.cli import lists
from llmprune.common.shipped import read_yaml, shipped, shipped_names
from llmprune.literature import published
from llmprune.terminal.console import Screen
from llmprune.terminal.literature import models_of, print_models

DOCS = Path(__file__).resolve().parent.parent
PART = re.compile(r"(<!-- from the code: ([\w-]+) -->\n\n).*?(\n\n<!-- end -->)", re.S)
RESULTS = DOCS.parent / "eval" / "results"
FOLDED = 120  # columns of what is printed in folded lines


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def printed(draw: Callable[[Screen], Any], width: int | None) -> str:
    """A block with what is printed on a screen so wide; without a width lines are not folded."""
    screen = Screen(file=io.StringIO(), width=width or 1000)
    screen.folds = width is not None
    draw(screen)
    return f"```\n{screen.file.getvalue().strip()}\n```"


def suites() -> str:
    """What the shipped suites score; texts but `builtin` need network."""
    rows = []
    for name in sorted(shipped_names("eval", "suites"), key=("demo", "quick", "paper").index):
        suite = read_yaml(shipped("eval", "suites", f"{name}.yaml"))
        few = f", its first {suite['limit']} " if "limit" in suite else ""
        cells = [
            ", ".join(f"`{each}`" for each in suite[key]) + (few and few + unit)
            for key, unit in (("perplexity", "windows"), ("tasks", "documents"))
        ]
        rows.append((f"`{name}`", *cells, "no" if suite["perplexity"] == ["builtin"] else "yes"))
    return table(("suite", "perplexity", "tasks", "network"), rows)


def recoveries() -> str:
    """The shipped recipes of recovery, the default first."""
    found = {name: entry for name, entry in lists.recipes().items() if entry["kind"] == "recovery"}
    keys = ("masks", "trainable", "objective", "summary")
    names = sorted(found, key=lambda name: name != lists.DEFAULT)
    rows = [(f"`{name}`", *(found[name][key] for key in keys)) for name in names]
    return table(("recipe", "masks", "trained", "loss", "what it is"), rows)


def read_where() -> str:
    """By paper and kind of source, of which models figures were read."""
    figures = published.all_figures()
    rows = []
    for paper, via in dict.fromkeys((figure.source.paper, figure.source.via) for figure in figures):
        own = [figure for figure in figures if (figure.source.paper, figure.source.via) == (paper, via)]
        models = dict.fromkeys(published.name_of(figure.model) for figure in own)
        link = f"[{paper}]({own[0].source.url})" if via != "quote" else paper
        rows.append((link, ", ".join(models), via, str(len(own))))
    return table(("paper", "figures of", "read in", "figures"), rows)


def recovered(case: str, *aims: str) -> str:
    """What `eval/bench/recovery.py` measured, the best first.

    The first column is the start, or the aim where there are several beside the dense model.
    """
    by_start = len(set(aims) - {"dense"}) == 1
    listed = [json.loads(line) for line in (RESULTS / f"recovery-{case}.jsonl").read_text().splitlines()]
    by = {(row["aim"], row["start"], row["recipe"]): row for row in listed}
    dense = by["dense", "dense", "masked-finetuning"]["perplexity"]
    order = {"dense": 0, "best": 1, "wanda": 2}

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        last = row["start"] == "dense" and row["aim"] != "dense"  # pruned in training: beside no start
        return aims.index(row["aim"]), last, order[row["start"]], bool(row["recipe"]), row["perplexity"]

    rows = []
    for row in sorted((row for row in listed if row["aim"] in aims), key=place):
        aim, start, recipe = row["aim"], row["start"], row["recipe"]
        name = f"`{recipe}`" if recipe else "(itself)"
        if aim == "dense" and recipe:
            name += " with sparsity 0, the control"
        seconds = row.get("processor_seconds") or row.get("seconds")
        before = by.get((aim, start, ""), {}).get("perplexity")
        gap = f"{(before - row['perplexity']) / (before - dense):.0%}" if recipe and start == "best" else ""
        rows.append(
            (
                ("dense" if start == "dense" else f"`{start}`") if by_start else aim,
                name if recipe or by_start or start == "dense" else f"(`{start}` itself)",
                f"{row['perplexity']:.2f}",
                gap,
                f"{row['rate']:g}" if row.get("rate") else "",
                f"{row['best_step']} of {row['steps']}" if row.get("best_step") is not None else "",
                f"{seconds:.0f}" if seconds else "",
                f"{row['memory'] / 1e9:.2f} GB" if row.get("memory") else "",
            )
        )
    return table(
        (
            "start" if by_start else "aim",
            "recipe",
            "perplexity",
            "of the gap",
            "rate",
            "best step",
            "seconds",
            "memory",
        ),
        rows,
    )


def recipes_of_pruning() -> str:
    """The first table of `llmprune recipes` with its legend; the second is that of `recoveries`."""
    return (
        printed(lambda screen: lists.print_recipes(screen, lists.recipes()), FOLDED).partition(
            "\n\nrecipes of recover"
        )[0]
        + "\n```"
    )


PARTS: dict[str, Callable[[], str]] = {
    "methods": lambda: printed(lambda screen: lists.print_methods(screen, lists.methods()), FOLDED),
    "models": lambda: printed(lambda screen: lists.print_models(screen, lists.models()), None),
    "published": lambda: printed(lambda screen: print_models(screen, models_of(llmprune.published())), None),
    "read-where": read_where,
    "recipes": recipes_of_pruning,
    "recoveries": recoveries,
    "recovered-demo-80": lambda: recovered("demo", "dense", "80%"),
    "recovered-demo-2to4": lambda: recovered("demo", "2:4"),
    "recovered-english": lambda: recovered("english", "dense", "70%", "80%", "2:4"),
    "suites": suites,
}


def renewed(text: str) -> str:
    """A page with its parts as the code gives them."""
    return PART.sub(lambda found: found[1] + PARTS[found[2]]() + found[3], text)


if __name__ == "__main__":
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text()
        if renewed(before) != before:
            page.write_text(renewed(before))
            print(f"{page.name} is renewed")
