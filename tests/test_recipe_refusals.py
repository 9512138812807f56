"""Recipes, settings and values out of range are refused in one line, before any work."""

from __future__ import annotations

import math

import pytest
import yaml
from outputs import one_line

import llmprune
from llmprune.recipe import loading as recipe
from llmprune.recipe.loading import load as load_recipe


@pytest.mark.parametrize("sparsity", [1.0, 1, -0.1, 1.5, 70, math.nan, math.inf, -math.inf, True])
def test_sparsity_outside_its_range_is_refused(refused, sparsity):
    refused(rf"sparsity must be in \[0, 1\).*got {sparsity!r}", sparsity=sparsity)


@pytest.mark.parametrize("sparsity", ["half", [0.5], {}])
def test_sparsity_of_another_type_is_refused(refused, sparsity):
    refused(r"sparsity must be in \[0, 1\)", sparsity=None, settings={"sparsity": sparsity})


def test_sparsity_may_not_contradict_the_pattern(refused):
    refused(r"sparsity 0\.6 contradicts pattern 2:4, which is 0\.5", pattern="2:4", sparsity=0.6)
    assert load_recipe("wanda", {"pattern": "2:4", "sparsity": 0.5}).sparsity == 0.5


def test_a_pattern_that_does_not_divide_the_columns_names_the_matrix(refused):
    refused(
        r"q_proj \(and \d+ more .*\) has in_features 64, not divisible by 5.*3:5.*skip: true",
        pattern="3:5",
        sparsity=None,
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibration": "builtin", "samples": 0}, r"samples must be a whole number from 1, got 0"),
        ({"calibration": "builtin", "samples": -3}, r"samples must be a whole number from 1, got -3"),
        ({"calibration": "builtin", "samples": 2.5}, r"samples must be a whole number from 1, got 2\.5"),
        ({"calibration": "builtin", "seqlen": 0}, r"sequence_length must be a whole number from 2, got 0"),
        ({"calibration": "builtin", "seqlen": 1}, r"sequence_length must be a whole number from 2, got 1"),
        (
            {"calibration": "builtin", "seqlen": 65},
            r"sequence length 65 is over the model's limit of 64; use --seqlen 64",
        ),
        ({"seed": -1}, r"seed must be a whole number from 0, got -1"),
        ({"seed": 2**70}, r"seed.*got 1180591620717411303424"),
        (
            {"settings": {"experts.tokens": "few"}},
            r"experts.tokens must be one of routed, all, got 'few'",
        ),
        ({"settings": {"experts.fewer": "none"}}, r"experts.fewer must be one of .*, got 'none'"),
        ({"settings": {"experts.least": -1}}, r"experts.least must be a whole number from 0, got -1"),
        ({"settings": {"experts.most": 1}}, r"experts.*most"),
        ({"settings": {"pruner.damp": "high"}, "pruner": "sparsegpt"}, r"option 'damp'.*got 'high'"),
        ({"settings": {"pruner.damp": -1.0}, "pruner": "sparsegpt"}, r"damp.*-1"),
        ({"settings": {"pruner.damp": math.nan}, "pruner": "sparsegpt"}, r"damp.*nan"),
        ({"settings": {"pruner.block": 0}, "pruner": "sparsegpt"}, r"block.*0"),
        ({"settings": {"refiner.max_cycles": -1}}, r"max_cycles.*-1"),
        ({"settings": {"refiner.variance": "between"}}, r"variance.*'between'"),
        ({"settings": {"refiner.targets": []}}, r"targets of 'dsnot'.*\[\]"),
        ({"settings": {"pruner.targets": ["*q*"]}}, r"only a refiner or an update takes targets; use rules"),
        ({"settings": {"pruner": None}}, r"needs a pruner"),
        ({"settings": {"pruner": 3}}, r"pruner.*3"),
        ({"settings": {"sparsity.deep": 1}}, r"cannot set 'sparsity\.deep'"),
        ({"settings": {"calibration": "c4"}}, r"'calibration' must be dict, got 'c4'"),
        ({"settings": {"description": 3}}, r"'description' must be str, got 3"),
        ({"recipe": "wanda", "settings": {"refiner.max_cycles": 3}}, r"refiner needs a name: one of dsnot"),
        ({"settings": {"rules": "all"}}, r"'rules' must be list, got 'all'"),
        ({"settings": {"rules": [{"skip": True}]}}, r"every rule needs 'match'"),
        ({"settings": {"rules": [{"match": 3}]}}, r"every rule needs 'match'"),
        ({"settings": {"rules": [{"match": "*", "sparsity": 1.2}]}}, r"sparsity must be in \[0, 1\).*1\.2"),
        ({"settings": {"rules": [{"match": "*", "pattern": "4:2"}]}}, r"4:2"),
        (
            {"settings": {"rules": [{"match": "*", "skip": True, "sparsity": 0.1}]}},
            r"rule '\*' both skips and sets",
        ),
        ({"settings": {"rules": [{"match": "*", "skip": True}]}}, r"skip every matrix"),
        (
            {"settings": {"rules": [{"match": "*.qproj", "skip": True}]}},
            r"rule '\*\.qproj'.*named like 'model\.layers\.0",
        ),
    ],
)
def test_values_out_of_range_are_refused(refused, options, said):
    refused(said, **options)


def test_a_setting_of_null_is_not_ignored():
    assert load_recipe("dsnot", {"refiner": "none"}).refiner is None
    assert recipe.load("dsnot", dict([recipe.parse_assignment("refiner=null")])).refiner is None


def test_null_in_the_settings_of_a_run_is_not_ignored(tiny_llama, calibration_tokens, work):
    dry = llmprune.prune(tiny_llama, calibration=calibration_tokens, settings={"refiner": None}, dry_run=True)
    assert dry.recipe.refiner is None


def test_a_rule_behind_another_that_matches_all_of_it_is_refused(refused):
    rules = [{"match": "*", "sparsity": 0.3}, {"match": "*.q_proj", "sparsity": 0.1}]
    refused(r"rule '\*\.q_proj' is the first match of no matrix", settings={"rules": rules})


@pytest.mark.parametrize("assignment", ["sparsity", "=0.5", " = 3", ""])
def test_a_setting_without_key_or_value_is_refused(assignment):
    with pytest.raises(ValueError, match=r"--set takes dotted\.key=value") as caught:
        recipe.parse_assignment(assignment)
    assert repr(assignment) in one_line(caught.value)


@pytest.mark.parametrize("value", ["[1", "{a: ", "!!python/object/apply:os.getcwd []"])
def test_a_setting_that_is_not_plain_yaml_is_refused(value):
    with pytest.raises(ValueError, match=r"--set pruner\.damp: the value .* is not valid YAML"):
        recipe.parse_assignment(f"pruner.damp={value}")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("pruner: [wanda\n", r"cannot read own\.yaml"),
        ("pruner: wanda\n\tsparsity: 0.5\n", r"cannot read own\.yaml"),
        ("- pruner\n- wanda\n", r"own\.yaml must hold a YAML mapping, got list"),
        ("", r"own\.yaml must hold a YAML mapping, got NoneType"),
        ("sparsity: 0.5\n", r"needs a pruner"),
        ("pruner: wanda\n3: 4\n", r"recipe key"),
        ("pruner: wanda\nname: [x]\nseed: one\n", r"seed must be a whole number from 0, got 'one'"),
        ("pruner: wanda\npattern: 24\n", r"'pattern' must be str, got 24"),
    ],
)
def test_a_recipe_file_that_makes_no_sense_is_refused(refused, work, written, said):
    (work / "own.yaml").write_text(written)
    refused(said, recipe="own.yaml")


def test_a_recipe_file_that_is_not_text_is_refused(refused, work):
    (work / "own.yaml").write_bytes(b"\xff\xfe\x00\x01")
    refused(r"cannot read own\.yaml", recipe="own.yaml")


def test_a_recipe_file_runs_no_code(refused, work):
    call = (
        yaml.dump({"pruner": "wanda"}) + "description: !!python/object/apply:os.system ['touch executed']\n"
    )
    (work / "own.yaml").write_text(call)
    refused(r"cannot read own\.yaml.*python/object", recipe="own.yaml")
    assert not (work / "executed").exists()


@pytest.mark.parametrize("pattern", ["２:４", "2:４", "²:4", " 2:4", "2:4\n", "2 :4"])
def test_a_pattern_is_written_in_plain_digits(refused, pattern):
    refused(r"pattern must be 'unstructured' or 'N:M'", pattern=pattern, sparsity=None)


def test_minus_zero_is_zero():
    assert str(load_recipe("wanda", {"sparsity": -0.0}).sparsity) == "0.0"


@pytest.mark.parametrize(
    "text", ["pruner: wanda\npruner: magnitude\n", "pruner: {name: alps, damp: 0.1, damp: 0.2}\n"]
)
def test_a_key_that_stands_twice_is_refused(refused, work, text):
    (work / "twice.yaml").write_text(text)
    refused(
        r"cannot read twice\.yaml: key '(pruner|damp)' stands twice \(line 1\); keep one", recipe="twice.yaml"
    )
