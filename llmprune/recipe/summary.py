"""Says in a few words what a recipe of recovery is put together from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Summary(NamedTuple):
    """What becomes of the masks, what is trained, and what the loss is."""

    masks: str
    trainable: str
    objective: str


def summary(recipe: Mapping[str, Any]) -> Summary:
    """The summary of a recipe, from its plain values: those of a file, or with every default filled in."""
    return Summary(_masks(recipe), _trainable(recipe), _objective(recipe["objective"]))


def _name(part: Any) -> str:
    """The name of a part, which stands alone or among its options."""
    return str(part if isinstance(part, str) else part["name"])


def _masks(recipe: Mapping[str, Any]) -> str:
    if not recipe.get("rule"):
        return "stay"
    schedule, rule = _name(recipe["schedule"]), _name(recipe["rule"])
    return f"{'move' if schedule == 'fixed' else schedule}, by {rule}"


def _trainable(recipe: Mapping[str, Any]) -> str:
    trained, others = _name(recipe["trainable"]), recipe.get("others", "none")
    if trained == "norms":
        words = str(others)
    else:
        words = trained + {"norms": " + norms", "all": " + all others"}.get(others, "")
    if recipe.get("scope") == "block":
        words += ", a block at a time"
    soup = recipe.get("soup") or {}
    copies, phases = soup.get("copies", 1), soup.get("phases", 1)
    if copies > 1:
        words += f", {copies} copies averaged"
    return words + (f", {phases} phases" if phases > 1 else "")


def _objective(objective: Any) -> str:
    terms = []
    for term in objective if isinstance(objective, (list, tuple)) else [objective]:
        weight = 1.0 if isinstance(term, str) else float(term.get("weight", 1.0))
        terms.append(_name(term) if weight == 1 else f"{weight:g} {_name(term)}")
    return " + ".join(terms)
