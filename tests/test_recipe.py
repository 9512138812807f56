"""Recipes are data: every shipped one is built and run, and every key of one is checked."""

import pytest
import torch
import yaml

import llmprune
from llmprune.common.shipped import read_yaml, shipped, shipped_names
from llmprune.recipe import loading as recipes
from llmprune.recipe import types


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("name", shipped_names("recipes"))
def test_every_shipped_recipe_is_built_and_run(name, pattern, tiny_llama, calibration_tokens, tmp_path):
    options = {"pattern": pattern} if pattern else {"sparsity": 0.6}
    result = llmprune.prune(
        tiny_llama, recipe=name, calibration=calibration_tokens, output=tmp_path / "out", **options
    )
    record = result.record
    assert record["recipe"]["name"] == name
    assert record["totals"]["sparsity"] == pytest.approx(0.5 if pattern else 0.6, abs=0.02)
    counts = llmprune.inspect(tmp_path / "out")
    assert counts["zeros"] == record["totals"]["zeros"] and counts["record_agrees"] is True
    assert ("2:4" in counts["patterns"]) is bool(pattern)


@pytest.mark.parametrize("name", shipped_names("recipes"))
def test_a_recorded_recipe_reads_back_as_itself(name):
    built = recipes.load(name)
    assert recipes.from_dict(yaml.safe_load(yaml.safe_dump(built.as_dict()))) == built
    assert read_yaml(shipped("recipes", f"{name}.yaml"))["description"]


def test_the_published_choices_of_dsnot_paper():
    options = recipes.load("dsnot-paper").refiner
    assert options.targets == ("*.self_attn.*",)
    wanted = {"max_cycles": 50, "threshold": 0.1, "power": 1.0, "variance": "within", "verified": False}
    assert wanted.items() <= options.options.items()


def rows_of(result):
    return {m["name"]: m for m in result.record["matrices"]}


def test_rules_are_ordered_and_the_first_match_wins(tiny_llama, calibration_tokens, tmp_path):
    rules = [
        {"match": "*.layers.0.*", "skip": True},
        {"match": "*.down_proj", "sparsity": 0.25},
        {"match": "*.layers.*.mlp.*", "pattern": "1:4"},
    ]
    result = llmprune.prune(
        tiny_llama,
        recipe="wanda",
        sparsity=0.5,
        settings={"rules": rules},
        calibration=calibration_tokens,
        output=tmp_path / "out",
    )
    rows = rows_of(result)
    assert not any(".layers.0." in name for name in rows)
    down, up, query = (
        next(r for n, r in rows.items() if n.endswith(f"{k}_proj.weight")) for k in ("down", "up", "q")
    )
    assert down["sparsity"] == 0.25 and down["pattern"] == "unstructured"
    assert up["sparsity"] == 0.75 and up["pattern"] == "1:4"
    assert query["sparsity"] == 0.5
    dense, pruned = (llmprune.load(p).state_dict() for p in (tiny_llama, tmp_path / "out"))
    assert all(torch.equal(dense[n], pruned[n]) for n in dense if ".layers.0." in n)


@pytest.mark.parametrize("update", [None, "block-tune"])
@pytest.mark.parametrize("order", ["block", "group"])
def test_a_whole_block_may_stay_dense(order, update, make_llama, calibration_tokens, tmp_path):
    model, settings = (
        make_llama(layers=3),
        {"order": order, "rules": [{"match": "*.layers.1.*", "skip": True}]},
    )
    settings |= {"update.steps": 4} if update else {}
    record = llmprune.prune(
        model,
        recipe="sparsegpt",
        calibration=calibration_tokens,
        output=tmp_path / "out",
        update=update,
        settings=settings,
    ).record
    assert {m["name"].split(".")[2] for m in record["matrices"]} == {"0", "2"}
    dense, pruned = (llmprune.load(folder).state_dict() for folder in (model, tmp_path / "out"))
    assert all(torch.equal(dense[n], pruned[n]) for n in dense if ".layers.1." in n)


def test_overrides_reach_every_field():
    built = recipes.load(
        "dsnot",
        {
            "pruner": "sparsegpt",
            "pruner.damp": 0.1,
            "seed": 3,
            "calibration.samples": 5,
            "refiner.share": 0.5,
        },
    )
    assert built.pruner.options["damp"] == 0.1 and built.seed == 3 and built.calibration.samples == 5
    assert built.refiner.options["share"] == 0.5
    assert recipes.load("dsnot", {"refiner": "none"}).refiner is None
    with pytest.raises(ValueError, match="refiner needs a name"):
        recipes.load("wanda", {"refiner.max_cycles": 3})
    assert recipes.load("dsnot-paper", {"refiner": "dsnot"}).refiner.options["walk_on"] is True, (
        "the same name keeps its options"
    )


def test_a_pattern_implies_its_sparsity():
    assert recipes.load("wanda", {"pattern": "2:4"}).sparsity == 0.5
    assert recipes.load("wanda", {"pattern": "1:4"}).sparsity == 0.75
    assert recipes.load("wanda").sparsity == types.DEFAULT_SPARSITY


def test_one_seed_one_result(tiny_llama, tmp_path):
    outputs = []
    for number, seed in enumerate((0, 0, 1)):
        options = {"samples": 4, "seqlen": 32, "seed": seed, "output": tmp_path / str(number)}
        llmprune.prune(tiny_llama, recipe="dsnot", pruner="random", sparsity=0.5, **options)
        outputs.append((tmp_path / str(number) / "masks.safetensors").read_bytes())
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_rule_that_leaves_matrices_dense_is_recorded():
    built = recipes.load("wanda", {"rules": [{"match": "*.down_proj", "sparsity": 0.0}]})
    assert recipes.from_dict(built.as_dict()).rules[0].sparsity == 0.0


def test_a_pattern_on_the_command_line_overrides_the_sparsity_of_a_recipe_file(tmp_path):
    (tmp_path / "own.yaml").write_text("pruner: wanda\nsparsity: 0.6\n")
    assert recipes.load(str(tmp_path / "own.yaml")).sparsity == 0.6
    assert recipes.load(str(tmp_path / "own.yaml"), {"pattern": "2:4"}).sparsity == 0.5


def test_an_exchanged_pruner_compares_in_its_own_scope():
    for recipe, pruner, scope in (
        ("magnitude", "wanda", "row"),
        ("wanda", "sparsegpt", "matrix"),
        ("dsnot-paper", "wanda", "row"),
    ):
        assert recipes.load(recipe, {"pruner": pruner}).pattern_for(None).scope == scope


CASES = """
pruner: wanda
cases:
- {pattern: "*:*", set: {permute: true, order: group}, because: groups lose less}
- {sparsity: 0.75, set: {allocator.name: atp, allocator.trial: wanda}, because: blocks differ}
"""


def test_a_recipe_chooses_by_pattern_and_sparsity_and_says_why(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(CASES)

    def chosen(**overrides):
        recipe = recipes.load(str(file), overrides)
        return recipe.permute, recipe.order, recipe.allocator.name, recipe.chosen

    assert chosen() == (False, "block", "uniform", "")
    assert chosen(pattern="2:4") == (True, "group", "uniform", "groups lose less")
    assert chosen(sparsity=0.8) == (False, "block", "atp", "blocks differ")
    assert chosen(pattern="1:4") == (True, "group", "atp", "groups lose less; blocks differ")
    # What the user sets stands, and the case that would set it is left out whole.
    assert chosen(pattern="2:4", permute=False) == (False, "block", "uniform", "")
    assert recipes.load(str(file), {"sparsity": 0.8}).allocator.options["trial"] == "wanda"


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("{set: {permute: true}, when: 1}", "unknown case key 'when'"),
        ("{set: [permute]}", "set of a case"),
        ("{sparsity: high}", "sparsity must be in"),
        ("{because: 3}", "because of a case"),
        ("{set: {permut: true}}", "unknown recipe key 'permut'"),
        ("7", "case"),
    ],
)
def test_a_wrong_case_is_refused(tmp_path, case, told):
    (tmp_path / "mine.yaml").write_text(f"pruner: wanda\ncases: [{case}]\n")
    with pytest.raises(ValueError, match=told):
        recipes.load(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:30"])
def test_an_nm_pattern_is_a_text_and_no_number_in_base_60(text):
    assert recipes.parse_assignment(f"pattern={text}") == ("pattern", text)
    assert recipes.parse_choices(f"pattern={text},unstructured") == ("pattern", [text, "unstructured"])
    assert recipes.parse_assignment("seed=12") == ("seed", 12)
    assert recipes.parse_assignment("a=1.5e-3") == ("a", 0.0015)


@pytest.mark.parametrize("name", ["best", "best-mask"])
def test_the_best_recipes_share_sparsity_out_but_keep_a_pattern_that_was_asked_for(name):
    assert recipes.load(name, {"sparsity": 0.7}).allocator.name == "fisher"
    for more in ({}, {"permute": False}):
        assert recipes.load(name, {"pattern": "2:4", **more}).allocator.name == "uniform"
    assert recipes.load(name, {"pattern": "4:8", "allocator": "owl"}).allocator.name == "owl"
