"""The lists of recipes and methods."""

import importlib.util
import json
from pathlib import Path

import pytest

from llmprune import registry
from llmprune.cli import lists
from llmprune.common.shipped import shipped_names

ROOT = Path(__file__).resolve().parent.parent


def test_every_recipe_has_its_figures(typed):
    known = lists.costs()
    assert set(known["recipes"]) == set(shipped_names("recipes"))
    for room in registry.ROOMS:
        assert set(known[room]) <= set(registry.names(room))
    for entries in (known["recipes"], *(known[room] for room in registry.ROOMS)):
        for name, figures in entries.items():
            assert figures["time"] > 0 and figures["memory"] > 1, name
            assert (
                set(figures["perplexity"]) == {0.5, 0.7}
                and figures["perplexity"][0.7] > known["about"]["dense"]
            ), name
    listed = json.loads(typed("recipes", "--json")[1])
    assert listed["best"]["perplexity"]["0.7"] == known["recipes"]["best"]["perplexity"][0.7]
    assert {"summary", "time", "memory_gb", "perplexity"} == set(listed["dsnot"])
    out = typed("recipes")[1]
    assert all(f"{known['recipes'][name]['perplexity'][0.5]:.2f}" in out for name in known["recipes"])
    assert known["about"]["legend"].strip() in out


def test_the_memory_of_the_list_is_what_the_plan_says():
    spec = importlib.util.spec_from_file_location("costs", ROOT / "eval" / "bench" / "costs.py")
    costs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(costs)
    known = lists.costs()
    for (room, name), recipe, overrides in costs.entries():
        assert known[room][name]["memory"] == pytest.approx(costs.memory(recipe, **overrides), rel=0.1), (
            room,
            name,
        )


def test_the_figures_travel_in_the_wheel():
    text = (ROOT / "pyproject.toml").read_text()
    assert '"eval/results" = "llmprune/_data/eval/results"' in text


def test_methods_line_up(typed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    out = typed("methods")[1]
    rows = [
        line for line in out.partition("refiners")[0].splitlines()[2:] if line and not line.startswith(" ")
    ]
    assert len({line.index(" GB") for line in rows}) <= 2 and any(
        line.startswith("sparsegpt-saliency  ") for line in rows
    )
