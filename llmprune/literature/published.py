"""Figures that papers published, with their sources: `eval/published/`, and which of them are of a model."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from llmprune.common.messages import alternatives, nearest, shown
from llmprune.common.shipped import shipped, shipped_names
from llmprune.hub.aliases import ALIASES
from llmprune.literature.figure import Figure
from llmprune.literature.reading import read_figures, refuse_twice

FOLDER = ("eval", "published")

_COPIES = {
    "decapoda-research/llama-7b-hf": "huggyllama/llama-7b",
    "baffo32/decapoda-research-llama-7b-hf": "huggyllama/llama-7b",
}  # hub ids, in small letters, under which the papers' code names the same weights


@functools.cache
def all_figures() -> tuple[Figure, ...]:
    """Every figure, paper by paper. Raises `ValueError` for a malformed file, or the same figure twice."""
    names = shipped_names(*FOLDER)
    found = [figure for name in names for figure in read_figures(shipped(*FOLDER, f"{name}.yaml"))]
    refuse_twice(found)
    return tuple(found)


def models() -> Mapping[str, tuple[Figure, ...]]:
    """The figures of each model that has some, by its hub id."""
    ids = dict.fromkeys(figure.model for figure in all_figures())
    return {model: tuple(f for f in all_figures() if f.model == model) for model in sorted(ids, key=_order)}


def published_for(model: str) -> tuple[Figure, ...]:
    """The published figures of a model; none where there are none.

    Args:
        model: what a record has as the source of its model (a hub id, or the name of a folder), or an alias.
            A name without owner stands for the model of that name; one with another owner does not, since a
            fine-tune often keeps the name.
    """
    asked = model.lower()
    asked = ALIASES[asked].repository.lower() if asked in ALIASES else _COPIES.get(asked, asked)
    return tuple(
        figure
        for figure in all_figures()
        if asked == figure.model.lower() or ("/" not in asked and asked == _bare(figure.model))
    )


def chosen(figures: tuple[Figure, ...], metric: str | None) -> tuple[Figure, ...]:
    """The figures of a metric: `perplexity`, `accuracy`, a text or a task; all of them for None.

    Raises `ValueError` where none of them is of that metric, with those there are.
    """
    if metric is None:
        return figures
    found = tuple(f for f in figures if metric == f.metric or metric in f.on)
    if not found:
        raise nearest("metric", metric, {name for f in figures for name in (f.metric, *f.on)})
    return found


def no_figures(model: str) -> ValueError:
    """The error for a model without published figures: the nearest and the available names."""
    names = [name_of(known) for known in models()]
    others = alternatives(model, {*names, *models()}, ", ".join(names))
    return ValueError(f"no published figures of {shown(model)}: {others}")


def name_of(model: str) -> str:
    """The short name by which `published_for` knows a hub id: its alias, else the id without its owner."""
    return next((name for name, alias in ALIASES.items() if alias.repository == model), _bare(model))


def _bare(model: str) -> str:
    return model.rpartition("/")[2].lower()


def _order(model: str) -> tuple[str, float]:
    """Families together, each from its smallest model to its largest."""
    found = re.fullmatch(r"(.*?)-?([\d.]+)([mb])(?:-hf)?", _bare(model))
    return (found[1], float(found[2]) * (1000 if found[3] == "b" else 1)) if found else (_bare(model), 0)
