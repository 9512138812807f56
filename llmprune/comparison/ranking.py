"""Which figures may be ranked: those of one model and one protocol; and which of them is the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.comparison.differences import shortened
from llmprune.comparison.entries import Entry, Figure, figures

_SURE = 2.0  # standard errors of the difference that tell two scores apart


@dataclass(frozen=True)
class Group:
    """Figures of one text or task that may be ranked.

    Attributes:
        name: of text or task, and metric.
        letter: marks the group where there are several of that name; else empty.
        members: the figures by the names of their runs.
        protocol: how they were measured.
        model: of which dense model they are.
        best: of the runs that prune as many weights to a sparsity and pattern, where there are several, the
            one with the best figure, or those with the same; empty where nobody says what is better.
        level: the runs whose figures are within the error of the best one's at their sparsity and pattern.
    """

    name: str
    letter: str
    members: Mapping[str, Figure]
    protocol: Mapping[str, Any]
    model: str
    best: frozenset[str]
    level: frozenset[str]


def groups_of(entries: Sequence[Entry]) -> list[Group]:
    """The groups of all figures, in the order in which the runs have them."""
    found: dict[str, dict[tuple[str, str], dict[str, Figure]]] = {}
    labels: dict[tuple[str, str], str] = {}
    # A run that prunes fewer matrices to a sparsity has an easier task than one that prunes all of them.
    amounts = {
        entry.name: f"{entry.pattern} {entry.pruned:.2f} of {entry.record['totals']['weights']}"
        for entry in entries
    }
    for entry in entries:
        for figure in figures(entry.record):
            key = (entry.identity, json.dumps(figure.protocol, sort_keys=True))
            labels[key] = entry.model
            found.setdefault(figure.name, {}).setdefault(key, {})[entry.name] = figure
    return [
        _group(name, _letter(number) if len(by) > 1 else "", members, (labels[key], amounts))
        for name, by in found.items()
        for number, (key, members) in enumerate(by.items())
    ]


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else str(number + 1)


def _group(name: str, letter: str, members: Mapping[str, Figure], of: tuple[str, Mapping[str, str]]) -> Group:
    """`of`: the model, and by run how much is pruned, for only runs that prune as much are ranked."""
    first, (model, amounts) = next(iter(members.values())), of
    best, level = set(), set()
    for amount in dict.fromkeys(amounts[run] for run in members):
        alike = [run for run in members if amounts[run] == amount]
        if len(alike) < 2 or first.higher is None:
            continue
        pick = max if first.higher else min
        top = pick(alike, key=lambda run: members[run].value)
        equal = {run for run in alike if members[run].value == members[top].value}
        best |= equal
        level |= {run for run in alike if run not in equal and _level(members[run], members[top])}
    return Group(name, letter, members, first.protocol, model, frozenset(best), frozenset(level))


def _level(one: Figure, best: Figure) -> bool:
    """Whether two figures are too near to tell apart; those without an error never are."""
    if one.stderr is None or best.stderr is None:
        return False
    return abs(one.value - best.value) <= _SURE * math.hypot(one.stderr, best.stderr)


def differing(groups: Sequence[Group]) -> list[str]:
    """In words, why figures of one name are not ranked together; a line for each name with several groups."""
    lines = []
    for name in dict.fromkeys(group.name for group in groups if group.letter):
        alike = [group for group in groups if group.name == name]
        told = "; ".join(f"[{group.letter}] {_words(group, alike)}" for group in alike)
        lines.append(f"{name} is not ranked over all runs: {told}")
    return lines


def _words(group: Group, alike: Sequence[Group]) -> str:
    """What a group has that differs from the others: keys of the protocol, and the model."""
    keys = sorted({key for other in alike for key in other.protocol})
    told = [
        f"{key} {_plain(group.protocol.get(key))}"
        for key in keys
        if len({json.dumps(other.protocol.get(key), sort_keys=True) for other in alike}) > 1
    ]
    models = {other.model for other in alike}
    if len(models) > 1:
        told.insert(0, f"model {group.model}")
    elif not told:
        told = [f"{group.model} with other weights"]
    return f"{', '.join(told)} ({', '.join(group.members)})"


def _plain(value: Any) -> str:
    return "not given" if value is None else shortened(str(value))
