"""The lists of recipes and methods."""

import importlib.util
import json
from pathlib import Path

import pytest

from llmprune import registry
from llmprune.cli import lists
from llmprune.common.shipped import read_yaml, shipped, shipped_names
from llmprune.recipe import recovery
from llmprune.recipe.summary import summary

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
    assert {"kind", "summary", "time", "memory_gb", "perplexity"} == set(listed["dsnot"])
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


def test_recipes_of_recover_say_what_moves_what_is_trained_and_on_which_loss(typed):
    listed = json.loads(typed("recipes", "--json")[1])
    for name, (masks, trainable, objective) in {
        "recover-best": ("stay", "kept + norms", "0.5 next-token + 0.5 kd"),
        "ast": ("move, by wanda", "dense + norms", "0.333 next-token + 0.667 kd"),
        "ebft": ("stay", "kept, a block at a time", "block"),
        "perp": ("stay", "norms", "next-token"),
        "soup": ("stay", "kept + norms, 3 copies averaged", "next-token"),
        "losa": ("cubic, by wanda", "masked-lora + norms", "next-token"),
        "spp": ("stay", "scaled", "next-token"),
    }.items():
        entry = listed[name]
        assert (entry["masks"], entry["trainable"], entry["objective"]) == (masks, trainable, objective)
    assert set(listed["rigl"]) == {"kind", "summary", "masks", "trainable", "objective"}
    table = typed("recipes")[1].partition("recipes of recover\n")[2].splitlines()
    assert table[0].split() == ["masks", "trained", "loss"] and table[1].startswith("recover-best ")
    assert len(table) == 1 + len(shipped_names("recipes", "recovery"))


@pytest.mark.parametrize("name", shipped_names("recipes", "recovery"))
def test_a_summary_says_the_same_of_a_file_and_of_the_whole_recipe(name):
    values = read_yaml(shipped("recipes", "recovery", f"{name}.yaml"))
    assert summary(values) == summary(recovery.load(name).as_dict())


def test_methods_line_up(typed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    out = typed("methods")[1]
    rows = [
        line for line in out.partition("refiners")[0].splitlines()[2:] if line and not line.startswith(" ")
    ]
    assert len({line.index(" GB") for line in rows}) <= 2 and any(
        line.startswith("sparsegpt-saliency  ") for line in rows
    )
