"""The cells of a sweep: which combinations there are, what they are called, and what is refused."""

import re

import pytest
import yaml

from llmprune.planning.grid import Grid, cells_of
from llmprune.recipe.loading import parse_choices


def names(**axes):
    return [cell.name for cell in cells_of(Grid(**axes))[0]]


def test_there_is_a_cell_for_every_combination():
    cells, left_out = cells_of(Grid(recipes=["wanda", "sparsegpt"], sparsities=[0.5, 0.6]))
    assert [c.name for c in cells] == ["wanda-0.5", "wanda-0.6", "sparsegpt-0.5", "sparsegpt-0.6"]
    assert [c.recipe.sparsity for c in cells] == [0.5, 0.6, 0.5, 0.6] and left_out == 0
    assert {(c.method, c.amount) for c in cells} == {
        (m, a) for m in ("wanda", "sparsegpt") for a in ("0.5", "0.6")
    }


def test_a_pattern_has_one_cell_whatever_the_sparsities():
    cells, left_out = cells_of(
        Grid(recipes=["wanda"], sparsities=[0.6, 0.7], patterns=["unstructured", "2:4"])
    )
    assert [c.name for c in cells] == ["wanda-0.6", "wanda-0.7", "wanda-2to4"] and left_out == 1
    assert cells[2].recipe.sparsity == 0.5 and cells[2].amount == "2:4"


def test_the_pattern_of_a_recipe_file_sets_its_sparsity_too(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"pruner": "wanda", "pattern": "1:4"}))
    cells, left_out = cells_of(Grid(recipes=[str(tmp_path / "own.yaml"), "wanda"], sparsities=[0.5, 0.6]))
    assert [c.name for c in cells] == ["own-1to4", "wanda-0.5", "wanda-0.6"] and left_out == 1
    assert Grid(recipes=[str(tmp_path / "own.yaml")]).as_dict()["recipe"] == ["own"]  # no local path


def test_pruners_without_a_recipe_take_the_place_of_that_of_dsnot():
    cells, _ = cells_of(Grid(pruners=["wanda", "ria"]))
    assert [c.name for c in cells] == ["wanda-0.5", "ria-0.5"]
    assert all(c.recipe.refiner.name == "dsnot" and "refiner dsnot comes from" in c.remarks[0] for c in cells)
    assert names(recipes=["best"], pruners=["wanda"]) == ["best-wanda-0.5"]


def test_a_setting_with_several_values_stands_in_the_name():
    settings = {"pruner.damp": [0.01, 0.1], "calibration.samples": [8]}
    assert names(recipes=["sparsegpt"], settings=settings) == [
        "sparsegpt-pruner.damp=0.01-0.5",
        "sparsegpt-pruner.damp=0.1-0.5",
    ]
    sources = {"calibration.source": ["/secret/folder/a.txt", "builtin"]}
    assert names(recipes=["wanda"], settings=sources)[0] == "wanda-calibration.source=a.txt-0.5"


def test_names_of_folders_are_plain_short_and_differ():
    settings = {"rules": [[{"match": "*.down_proj", "skip": True}], [{"match": "*.up_proj", "skip": True}]]}
    found = names(recipes=["wanda"], settings=settings)
    assert len(set(found)) == 2
    assert all(len(name) <= 80 and re.fullmatch(r"[A-Za-z0-9_=+-][A-Za-z0-9._=+-]*", name) for name in found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pruner.damp=0.01,0.1", [0.01, 0.1]),
        ("sums=exact", ["exact"]),
        ("update.rates=[0.01, 0.004]", [[0.01, 0.004]]),
        ("update.rates=[0.01, 0.004], [0.02]", [[0.01, 0.004], [0.02]]),
        ("pruner={name: alps, correction: 0.5},wanda", [{"name": "alps", "correction": 0.5}, "wanda"]),
    ],
)
def test_values_of_a_setting_are_the_items_of_a_list(text, found):
    assert parse_choices(text) == (text.partition("=")[0], found)


@pytest.mark.parametrize("text", ["pruner.damp", "pruner.damp=", "pruner.damp=[1", "=1", "a=1,,2"])
def test_values_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="--set"):
        parse_choices(text)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"sparsities": [0.5]}, "nothing to compare: name recipes with --recipe"),
        ({"recipes": ["wandaa"]}, "unknown recipe 'wandaa': did you mean 'wanda'"),
        ({"recipes": ["wanda"], "sparsities": [0.5, 1.5]}, r"sparsity must be in \[0, 1\)"),
        ({"recipes": ["wanda"], "patterns": ["2:4", "5:4"]}, "5:4"),
        ({"recipes": ["wanda"], "settings": {"pruner.dam": [1]}}, "dam"),
        (
            {"recipes": ["wanda", {"name": "wanda", "pruner": "ria"}]},
            "two cells would be called wanda at 0.5",
        ),
    ],
)
def test_what_is_no_recipe_is_refused(axes, said):
    with pytest.raises(ValueError, match=said):
        cells_of(Grid(**axes))
