"""The table of a comparison: its cells as text, for the terminal, Markdown, CSV and the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

from llmprune.common import markdown as markdowns
from llmprune.common.messages import duration, size_text
from llmprune.comparison.comparing import Comparison

LEGEND = "* the best at its sparsity and pattern of those that may be ranked, ~ within its error"
PARTLY = "Runs that prune fewer of the matrices are not ranked with those that prune all of them"


class Score(NamedTuple):
    """A score in the table.

    Attributes:
        name: of the figure.
        value, dense, stderr: as in the comparison; None where there is none.
        rank: `*` for the best, `~` for one within its error.
        letter: of its group, where there are several of that name.
    """

    name: str
    value: float | None
    dense: float | None
    stderr: float | None
    rank: str = ""
    letter: str = ""

    @property
    def mark(self) -> str:
        """Rank and letter, as they stand beside the value."""
        return " ".join(filter(None, (self.rank, f"[{self.letter}]" if self.letter else "")))

    @property
    def number(self) -> str:
        """The value alone; empty without one."""
        digits = 2 if self.name.startswith("perplexity") else 3
        return "" if self.value is None else f"{self.value:,.{digits}f}"

    @property
    def error(self) -> str:
        """Its standard error; empty without one."""
        return "" if self.stderr is None else f"± {self.stderr:.3f}"

    @property
    def text(self) -> str:
        """The value with its error and mark."""
        return " ".join(filter(None, (self.number, self.error, self.mark)))


def title(comparison: Comparison) -> str:
    """How many runs of which models."""
    runs = comparison["runs"]
    models = ", ".join(dict.fromkeys(run["model"] for run in runs))
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''} of {models}"


def figure_names(comparison: Comparison) -> list[str]:
    """The names of all figures."""
    return list(dict.fromkeys(group["name"] for group in comparison["scores"]))


def scores_of(comparison: Comparison, run: str) -> Iterator[Score]:
    """The scores of a run, one for every figure that any run has."""
    for name in figure_names(comparison):
        groups = [g for g in comparison["scores"] if g["name"] == name]
        group = next((g for g in groups if run in g["members"]), None)
        if group is None:
            yield Score(name, None, None, None)
            continue
        rank = "*" if run in group["best"] else "~" if run in group["level"] else ""
        member = group["members"][run]
        yield Score(name, member["value"], member["dense"], member["stderr"], rank, group["letter"])


def dense_scores(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """A row for the dense model of every group, where its scores are known: its name and the cells."""
    rows = []
    for model in dict.fromkeys(group["model"] for group in comparison["scores"]):
        cells = []
        for name in figure_names(comparison):
            known = [
                (member["dense"], group["letter"])
                for group in comparison["scores"]
                if group["name"] == name and group["model"] == model
                for member in group["members"].values()
                if member["dense"] is not None
            ]
            shown = dict.fromkeys(
                Score(name, value, None, None, letter=letter).text for value, letter in known
            )
            cells.append(", ".join(shown))
        rows.append((model, cells))
    return rows


def amount(run: dict[str, Any]) -> str:
    """How much of a run's matrices is pruned: its pattern where there is one, and the share."""
    share = f"{run['sparsity']:.2%}"
    return share if run["pattern"] == "unstructured" else f"{run['pattern']} ({share})"


def size(run: dict[str, Any]) -> tuple[str, str]:
    """The bytes of a run's weights as they are, and what they would be packed, if less."""
    written, packed = run["bytes"]["written"], run["bytes"]["packed"]
    return size_text(written), "" if packed >= written else f"{size_text(packed)} packed"


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The table: its head and its rows, the dense models first."""
    speeds = measured(comparison)
    blank = [""] * (2 + speeds)
    rows = [[model, "dense", "", *own, *blank] for model, own in dense_scores(comparison)]
    rows += [
        [
            run["name"],
            run["method"],
            amount(run),
            *(score.text for score in scores_of(comparison, run["name"])),
            ", ".join(filter(None, size(run))),
            *([speed(run)] if speeds else []),
            duration(run["seconds"]),
        ]
        for run in comparison["runs"]
    ]
    return head(comparison), rows


def head(comparison: Comparison) -> list[str]:
    """The head of the table, here and on the page."""
    speeds = ["speed"] if measured(comparison) else []
    return ["run", "method", "sparsity", *figure_names(comparison), "weights", *speeds, "time"]


def measured(comparison: Comparison) -> bool:
    """Whether the speed of any run is known: else the table has no column for it."""
    return any(run["faster_by"] is not None for run in comparison["runs"])


def speed(run: dict[str, Any]) -> str:
    """How fast a run's packed products are; empty where that was not measured."""
    return "" if run["faster_by"] is None else f"{run['faster_by']:.2f} x"


def markdown(comparison: Comparison) -> str:
    """The table in Markdown, with what is not ranked below it."""
    top, rows = cells(comparison)
    return "\n\n".join([markdowns.table(top, rows), *map(markdowns.escaped, notes(comparison))]) + "\n"


def notes(comparison: Comparison) -> list[str]:
    """What must be said below the table: the marks, what is not ranked together, that nothing was scored."""
    found = [LEGEND] if any(group["best"] for group in comparison["scores"]) else []
    sizes = {(run["model"], run["weights"]) for run in comparison["runs"]}
    if len(sizes) > len({model for model, _ in sizes}):
        found.append(PARTLY)
    scored = [] if comparison["scores"] else ["None of these runs was scored: llmprune eval measures them"]
    return [*found, *comparison["unranked"], *scored, *comparison["missing"]]


def as_csv(comparison: Comparison) -> str:
    """One line per run, numbers in full; the letter of a figure's group in a column of its own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns(comparison))
    writer.writerows(plain_rows(comparison))
    return out.getvalue()


_PLAIN = ("name", "model", "method", "pattern", "sparsity", "format", "faster_by", "seconds")


def columns(comparison: Comparison) -> list[str]:
    """The columns of `plain_rows`."""
    of = [
        f"{name}{part}" for name in figure_names(comparison) for part in ("", " dense", " stderr", " group")
    ]
    return [*_PLAIN, "bytes written", "bytes packed", *of]


def plain_rows(comparison: Comparison) -> list[list[Any]]:
    """One row per run, numbers as they are."""
    return [
        [
            *(run[key] for key in _PLAIN),
            run["bytes"]["written"],
            run["bytes"]["packed"],
            *(
                value
                for s in scores_of(comparison, run["name"])
                for value in (s.value, s.dense, s.stderr, s.letter)
            ),
        ]
        for run in comparison["runs"]
    ]


class Curves(NamedTuple):
    """What can be drawn of a group of figures: `points` by method, each x, value, error, and run."""

    title: str
    points: dict[str, list[tuple[float, float, float, str]]]


ACROSS = {"sparsity": "sparsity", "bytes": "bytes per parameter, packed"}


def curves(comparison: Comparison, across: str) -> list[Curves]:
    """The curves of all groups of figures whose runs lie apart.

    Args:
        comparison: what `compared` returns.
        across: a key of `ACROSS`: what x is.
    """
    runs = {run["name"]: run for run in comparison["runs"]}
    found = [(_curves(group, runs, across), group) for group in comparison["scores"]]
    return [_with_dense(curves, group) for curves, group in found if _apart(curves)]


def _with_dense(curves: Curves, group: dict[str, Any]) -> Curves:
    """With a level line at the dense model's score, where that is known."""
    values = [member["dense"] for member in group["members"].values() if member["dense"] is not None]
    if not values:
        return curves
    places = [point[0] for own in curves.points.values() for point in own]
    line = [(place, values[0], 0.0, "dense") for place in (min(places), max(places))]
    return Curves(curves.title, {**curves.points, "dense": line})


def _curves(group: dict[str, Any], runs: dict[str, Any], across: str) -> Curves:
    points: dict[str, list[tuple[float, float, float, str]]] = {}
    for name, member in group["members"].items():
        run = runs[name]
        x = run["sparsity"] if across == "sparsity" else run["bytes"]["packed"] / run["parameters"]
        label = run["method"] if run["pattern"] == "unstructured" else f"{run['method']}, {run['pattern']}"
        points.setdefault(label, []).append((x, member["value"], member["stderr"] or 0.0, name))
    title = group["name"] + (f" [{group['letter']}]" if group["letter"] else "")
    return Curves(title, {label: sorted(own) for label, own in points.items()})


def _apart(curves: Curves) -> bool:
    """Whether points differ in x by more than rounding."""
    return len({round(point[0], 2) for own in curves.points.values() for point in own}) > 1
