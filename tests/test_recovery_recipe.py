"""Recipes of recovery: loaded, overridden, refused in one line, written down again; each of them trains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from outputs import one_line
from safetensors.torch import load_file

import llmprune
from llmprune import patterns, registry
from llmprune.checkpoint.contents import MASKS
from llmprune.checkpoint.masks import Masks
from llmprune.common.shipped import read_yaml, shipped
from llmprune.contracts import Pattern
from llmprune.recipe import recovery as recipes

NAMES = recipes.names()
PLAIN = {"trainable": "kept", "objective": "next-token"}
MOVING = {"schedule": {"name": "fixed", "moves": 5}, "rule": "magnitude", **PLAIN}
LENGTH, STEPS = 16, 6


def refused(values, said, settings=None):
    """The recipe is refused in one line that matches."""
    with pytest.raises(ValueError, match=said) as caught:
        recipes.load(values, settings)
    one_line(caught.value)


# --- loading


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_written_down_and_read_again(name):
    recipe = recipes.load(name)
    assert recipe.name == name and recipe.description.endswith(".")
    assert recipes.from_dict(recipe.as_dict()) == recipe
    assert recipes.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe
    assert recipes.load(recipe.as_dict()) == recipe
    given = read_yaml(shipped("recipes", "recovery", f"{name}.yaml"))
    assert "arXiv" in given["description"] or name in ("dpf", "masked-finetuning", "recover-best")
    method = recipe.method(100)
    assert method.steps == 100 and method.batch == recipe.batch and method.rate == recipe.rate
    assert recipe.method(100, 0.5).rate.rate == 0.5


def test_a_recipe_is_a_name_a_file_or_a_mapping(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "trainable: kept\nobjective: [next-token, {name: kd, tau: 2, weight: 1e-1}]\nrate: 1e-4\n"
    )
    for given in (str(file), file):
        recipe = recipes.load(given)
        assert (recipe.name, recipe.rate.rate) == ("mine", 1e-4)
        assert [(spec.name, weight) for spec, weight in recipe.objective] == [("next-token", 1), ("kd", 0.1)]
        assert recipe.objective[1][0].options == {"tau": 2} and recipe.teaches and not recipe.moves
    assert recipes.load(PLAIN).name == "custom" and recipes.load({**PLAIN, "name": "x"}).name == "x"
    assert recipes.load().name == recipes.DEFAULT
    values = dict(MOVING)
    recipes.load(values, {"schedule.moves": 7})
    assert values == MOVING, "what is given stays as it was"


def test_settings_replace_what_the_recipe_says():
    recipe = recipes.load("masked-finetuning", {"rate.warm_up": "5", "trainable.grown": "zero", "seed": 3})
    assert (recipe.rate.rate, recipe.rate.warm_up, recipe.seed) == (3e-4, 5.0, 3)
    recipe = recipes.load({**PLAIN, "rate": 1e-3}, {"rate.floor": 0.1})
    assert (recipe.rate.rate, recipe.rate.floor) == (1e-3, 0.1)
    recipe = recipes.load("gmp", {"schedule": "fixed", "rule": "none"})
    assert recipe.schedule.name == "fixed" and recipe.rule is None and not recipe.moves
    recipe = recipes.load("masked-finetuning", {"objective.name": "kd", "objective.tau": 3})
    assert recipe.objective[0][0].options == {"tau": 3}
    assert recipes.load("ast", {"objective": "kd"}).objective[0][0].name == "kd"


# --- refusals


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gmpp", r"unknown recipe of recovery 'gmpp': did you mean 'gmp'"),
        ("no/such.yaml", r"no such recipe file: no/such\.yaml"),
        (5, r"a recipe of recovery is a name, a file or a mapping, got 5"),
        ({}, r"needs trainable, for example 'trainable: kept'"),
        ({"trainable": "kept"}, r"needs objective, for example 'objective: next-token'"),
        ({**PLAIN, "objective": []}, r"needs objective"),
        ({**PLAIN, "trainabel": 1}, r"unknown key of a recovery recipe 'trainabel': did you mean 'tra"),
        ({**PLAIN, 1: 2}, r"unknown key of a recovery recipe 1"),
        ({**PLAIN, "trainable": "keep"}, r"unknown trainable 'keep': did you mean 'kept'"),
        ({**PLAIN, "trainable": ["kept"]}, r"trainable needs a name: one of dense, kept, .*got \['kept'\]"),
        ({**PLAIN, "trainable": {"name": "kept", "grow": 1}}, r"unknown option of trainable 'kept' 'grow'"),
        ({**PLAIN, "trainable": {"name": "masked-lora", "rank": "8"}}, r"'rank' of 'masked-lora' must be"),
        ({**PLAIN, "trainable": {"name": "masked-lora", "rank": True}}, r"'rank' .* must be int, got True"),
        ({**PLAIN, "trainable": {"name": "masked-lora", "rank": 0}}, r"rank must be at least 1, got 0"),
        ({**PLAIN, "trainable": {"name": "power", "exponent": math.nan}}, r"'exponent' .* finite, got nan"),
        ({**PLAIN, "trainable": {"name": "power", "exponent": 10**400}}, r"'exponent' .* must be finite"),
        ({**PLAIN, "objective": 5}, r"objective must be names or mappings with name and weight, got 5"),
        ({**PLAIN, "objective": {"weight": 2}}, r"objective needs a name: one of block, kd"),
        ({**PLAIN, "objective": {"name": "kd", "weight": 0}}, r"of an objective must be above 0, got 0"),
        ({**PLAIN, "objective": {"name": "kd", "weight": "all"}}, r"weight of an objective must be a finite"),
        ({**PLAIN, "rate": "fast"}, r"rate must be a mapping of its fields, got 'fast'"),
        ({**PLAIN, "rate": 0}, r"rate must be above 0 and at most 10, got 0"),
        ({**PLAIN, "rate": {"rate": 11}}, r"rate must be above 0 and at most 10, got 11"),
        ({**PLAIN, "rate": {"warm_up": math.inf}}, r"rate\.warm_up must be a finite number, got inf"),
        ({**PLAIN, "rate": {"warm_up": -1}}, r"warm_up must be at least 0, got -1"),
        ({**PLAIN, "rate": {"decay": "step"}}, r"decay must be one of cosine, linear, constant, got 'step'"),
        ({**PLAIN, "rate": {"decay": 1}}, r"rate\.decay must be str, got 1"),
        ({**PLAIN, "rate": {"relative": 1}}, r"rate\.relative must be bool, got 1"),
        ({**PLAIN, "rate": {"floor": 2}}, r"floor must be in \[0, 1\], got 2"),
        ({**PLAIN, "rate": {"lr": 1}}, r"unknown key of rate 'lr'"),
        ({**PLAIN, "optimizer": {"name": "adam"}}, r"optimizer must be one of adamw, sgd, got 'adam'"),
        ({**PLAIN, "optimizer": {"betas": 0.9}}, r"optimizer\.betas must be a list of numbers, got 0\.9"),
        ({**PLAIN, "optimizer": {"betas": [0.9]}}, r"optimizer\.betas must be two numbers in \[0, 1\)"),
        ({**PLAIN, "optimizer": {"betas": [0.9, math.nan]}}, r"betas must be a finite number, got nan"),
        ({**PLAIN, "optimizer": {"eps": 0}}, r"optimizer\.eps must be above 0, got 0"),
        ({**PLAIN, "optimizer": {"weight_decay": 1}}, r"optimizer\.weight_decay must be in \[0, 1\), got 1"),
        ({**PLAIN, "rates": 1e-3}, r"rates must be a list of numbers, got 0\.001"),
        ({**PLAIN, "rates": [1e-3, "x"]}, r"rates must be a finite number, got 'x'"),
        ({**PLAIN, "rates": [1e-3, 0]}, r"rates must be above 0 and at most 10, got \[0\.001, 0\.0\]"),
        ({**PLAIN, "others": "bias"}, r"others must be one of none, norms, all, got 'bias'"),
        ({**PLAIN, "scope": "layer"}, r"scope must be one of model, block, got 'layer'"),
        ({**PLAIN, "batch": 0}, r"batch must be a whole number from 1, got 0"),
        ({**PLAIN, "batch": 2.0}, r"batch must be a whole number from 1, got 2\.0"),
        ({**PLAIN, "batch": True}, r"batch must be a whole number from 1, got True"),
        ({**PLAIN, "seed": -1}, r"seed must be a whole number from 0, got -1"),
        ({**PLAIN, "seed": 2**64}, r"seed must be a whole number from 0, got 18446744073709551616"),
        ({**PLAIN, "held_out": 1}, r"held_out must be in \(0, 1\), got 1"),
        ({**PLAIN, "held_out": "half"}, r"held_out must be a finite number, got 'half'"),
        ({**PLAIN, "trial": 0}, r"trial must be in \(0, 1\), got 0"),
        ({**PLAIN, "clip": -1}, r"clip must be at least 0, got -1"),
        ({**PLAIN, "clip": math.nan}, r"clip must be a finite number, got nan"),
        ({**PLAIN, "clip": 10**400}, r"clip must be a finite number"),
        ({**PLAIN, "soup": 3}, r"soup must be a mapping of its fields, got 3"),
        ({**PLAIN, "soup": {"copies": 0}}, r"soup\.copies must be from 1 to 100, got 0"),
        ({**PLAIN, "soup": {"copies": 2.0}}, r"soup\.copies must be int, got 2\.0"),
        ({**PLAIN, "soup": {"phases": 10**9}}, r"soup\.phases must be from 1 to 100, got 1000000000"),
        ({**PLAIN, "name": 5}, r"name must be text, got 5"),
        ({**PLAIN, "description": ["x"]}, r"description must be text, got \['x'\]"),
        ({**PLAIN, "chosen": 1}, r"chosen must be text, got 1"),
        ({**MOVING, "numbers": 1}, r"numbers must be a mapping of its fields, got 1"),
        ({**MOVING, "numbers": {"beta": 2}}, r"numbers\.beta must be in \[0, 1\], got 2"),
        ({**MOVING, "numbers": {"lam": -1}}, r"numbers\.lam must be at least 0, got -1"),
        ({**MOVING, "numbers": {"lam": math.inf}}, r"numbers\.lam must be a finite number, got inf"),
        ({**MOVING, "numbers": {"beta_fall": "slow"}}, r"beta_fall must be none, linear or exponential"),
        ({**MOVING, "numbers": {"delta": 1}}, r"unknown key of numbers 'delta'"),
        ({**MOVING, "schedule": "cubical"}, r"unknown schedule 'cubical': did you mean 'cubic'"),
        ({**MOVING, "schedule": {"moves": 5}}, r"schedule needs a name: one of alternate"),
        ({**MOVING, "schedule": {"name": "fixed", "moves": -1}}, r"moves must be at least 0, got -1"),
        ({**MOVING, "schedule": {"name": "fixed", "moves": math.inf}}, r"'moves' .* must be int, got inf"),
        ({**MOVING, "schedule": {"name": "fixed", "moves": 3, "freeze": 1}}, r"shares with a sum below 1"),
        ({**MOVING, "schedule": {"name": "cubic", "start": 0.5, "freeze": 0.5}}, r"with a sum below 1"),
        ({**MOVING, "schedule": {"name": "cubic", "moves": 0}}, r"moves must be at least 1, got 0"),
        ({**MOVING, "schedule": {"name": "cubic", "initial": 1}}, r"initial must be in \[0, 1\), got 1"),
        ({**MOVING, "schedule": {"name": "ladder", "rungs": [0.5, 0.25]}}, r"rungs must be ascending"),
        ({**MOVING, "schedule": {"name": "ladder", "rungs": [0.5, math.nan]}}, r"'rungs' .* list of numbers"),
        ({**MOVING, "schedule": {"name": "alternate", "moves": 3}}, r"moves must be 1, since rounds decides"),
        ({**MOVING, "schedule": {"name": "alternate", "rounds": 0}}, r"rounds must be at least 1, got 0"),
        ({**MOVING, "schedule": {"name": "cycle", "moves": 0}}, r"moves must be 1, since parts and rounds"),
        ({**MOVING, "schedule": {"name": "cycle", "parts": 0}}, r"parts must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_in_one_line(given, said):
    refused(given, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rule": None}, r"schedule fixed moves masks, so the recipe needs a rule: magnitude"),
        ({"schedule": "fixed"}, r"rule magnitude has nothing to do where masks do not move; set sch"),
        ({"schedule": "exchange"}, r"schedule exchange is for a rule that lets weights grow, got rule mag"),
        ({"rule": "grow-random"}, r"rule grow-random exchanges weights, got schedule fixed; take schedule"),
        (
            {"schedule": "exchange", "rule": "grow-gradient", "trainable": "masked-lora"},
            r"rule grow-gradient needs weights that can grow, got trainable masked-lora; take kept",
        ),
        ({"rule": "curvature", "optimizer": {"name": "sgd"}}, r"needs the moments of adamw, got .*sgd"),
        ({"rule": "curvature", "trainable": "power"}, r"needs the moments of single weights, got .*power"),
        ({"schedule": "fixed", "rule": None, "numbers": {"gamma": 1}}, r"numbers are for pruned weights"),
        ({"trainable": "masked-lora", "numbers": {"gamma": 1}}, r"for trainable kept or dense, got mas"),
        (
            {"trainable": {"name": "dense", "grown": "dense"}, "numbers": {"gamma": 1, "rho": 1}},
            r"with numbers\.rho 1 a weight comes back with what is left of it, got trainable\.grown dense",
        ),
        ({"trainable": "scores"}, r"trainable scores learns its masks, got rule magnitude; take"),
        (
            {"trainable": "patterns", "rule": None, "schedule": "fixed"},
            r"trainable patterns learns its masks, got rule none; take rule learned",
        ),
        ({"rule": "learned"}, r"rule learned is for trainables that learn a score, got kept; take magnitude"),
        (
            {"trainable": "scores", "rule": "learned"},
            r"scores trains nothing while masks are frozen, got schedule\.freeze 0\.2; set it",
        ),
        ({"trainable": "norms"}, r"trainable norms trains nothing with others none; set others: norms"),
        ({"trainable": "rounded"}, r"trainable rounded is for tuning during a run; take kept"),
        ({"soup": {"copies": 2}}, r"copies and phases of a soup must keep their masks, and schedule"),
        ({"objective": "block"}, r"objective block is for scope block, and alone there, got scope model"),
        ({"scope": "block"}, r"objective block is for scope block, .*got scope block and \['next-token'\]"),
        ({"scope": "block", "objective": ["block", "kd"]}, r"objective block is for scope block, and alone"),
        ({"scope": "block", "objective": "block", "others": "norms"}, r"scope block trains matrices only"),
        ({"scope": "block", "objective": "block", "rule": "wanda"}, r"wanda needs the inputs of"),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together_are_refused(changes, said):
    refused({**MOVING, **changes}, said)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "ast",
            {"objective.tau": 2},
            r"objective has no keys of its own, got 'objective\.tau'.*set all of obj",
        ),
        ("recover-best", {"rates.0": 1}, r"rates has no keys of its own"),
        ("ast", {"seed.x": 1}, r"seed must be a whole number from 0, got \{'x': 1\}"),
        ("gmp", {"rule": "none"}, r"schedule cubic moves masks, so the recipe needs a rule"),
        ("gmp", {"schedule.move": 4}, r"unknown option of schedule 'cubic' 'move': did you mean 'moves'"),
        ("gmp", {"": 1}, r"unknown key of a recovery recipe ''"),
        ("gmp", {5: 1}, r"unknown key of a recovery recipe '5'"),
        ("gmp", {"rate.": 1}, r"unknown key of rate ''"),
    ],
)
def test_settings_are_refused_like_values(name, settings, said):
    refused(name, said, settings)


@pytest.mark.parametrize("key", sorted(recipes.load("ast").as_dict()))
def test_whatever_a_key_is_given_the_answer_is_a_recipe_or_one_line(key):
    values = recipes.load("ast").as_dict()
    odd = [True, -1, 2.5, math.nan, 10**400, "x", "nan", [], {}, [1], {"name": 1}, {1: 2}, object(), b"1", ()]
    for value in odd:
        try:
            recipes.load({**values, key: value})
        except ValueError as error:
            one_line(error)
        for inner in values[key] if isinstance(values[key], dict) else ():
            try:
                recipes.load("ast", {f"{key}.{inner}": value})
            except ValueError as error:
                one_line(error)


def test_every_part_is_in_a_shipped_recipe():
    """Each has a use; `rounded` is that of `block-tune`, `dense` that of several. `curvature` is ELSA's other
    projection, to be asked for.
    """
    used = {"recovery.trainables": {"rounded"}, "recovery.rules": {"curvature"}}
    for name in NAMES:
        recipe = recipes.load(name)
        for key in ("schedule", "rule", "trainable"):
            part = getattr(recipe, key)
            used.setdefault(f"recovery.{key}s", set()).add(part and part.name)
        used.setdefault("recovery.objectives", set()).update(spec.name for spec, _ in recipe.objective)
    for room in registry.RECOVERY_ROOMS:
        assert set(registry.names(room)) == used[room] - {None}, room


# --- training


@pytest.fixture(scope="module")
def starts(tiny_llama, tmp_path_factory):
    """A tiny model pruned by half, without a pattern and with 2:4."""
    folder = tmp_path_factory.mktemp("starts")
    for pattern in ("unstructured", "2:4"):
        output = folder / pattern.replace(":", "-")
        llmprune.prune(tiny_llama, recipe="magnitude", pattern=pattern, sparsity=0.5, output=output)
    return {"unstructured": folder / "unstructured", "2:4": folder / "2-4"}


def cases():
    """A start for every recipe in every run of the tests, the others with all cases."""
    for name in NAMES:
        recipe = recipes.load(name)
        found = ["pruned 2:4", "pruned unstructured"]
        if recipe.moves and recipe.schedule.name != "exchange":
            found = ["dense 2:4", "dense unstructured", *found]
        if recipe.trainable.name == "patterns":
            found = [case for case in found if case.endswith("2:4")]
        first = NAMES.index(name) % 2 if len(found) > 1 else 0
        for number, case in enumerate(found):
            marks = () if number == first else pytest.mark.exhaustive
            yield pytest.param(name, *case.split(), marks=marks, id=f"{name} {case}")


@pytest.mark.parametrize(("name", "kind", "pattern"), cases())
def test_a_shipped_recipe_trains_a_model_and_its_masks_are_exact(
    name, kind, pattern, tiny_llama, starts, tmp_path
):
    recipe = recipes.load(name)
    copies = recipe.soup.copies
    tokens = torch.randint(0, 2048, (16, LENGTH), generator=torch.Generator().manual_seed(2))
    options = {"pattern": pattern, "sparsity": 0.5} if kind == "dense" else {}
    result = llmprune.recover(
        tiny_llama if kind == "dense" else starts[pattern],
        text=tokens,
        tokens=2 * LENGTH * STEPS * copies,
        epochs=3,
        seqlen=LENGTH,
        output=tmp_path / "out",
        recipe=name,
        teacher=tiny_llama if kind == "pruned" else None,
        settings={"batch": 2},
        score=False,
        **options,
    )
    # The start has as many weights in every matrix, not in every row.
    check_output(result.output, patterns.parse(pattern, "row" if kind == "dense" else "matrix"))
    assert result.record["recovery"]["steps"] == STEPS * copies
    loss = result.record["recovery"].get("curve")
    assert loss is None or all(math.isfinite(row["loss"]) for row in loss)


def check_output(folder: Path, pattern: Pattern) -> None:
    """Every matrix has exactly the pattern, and is zero where its mask says so."""
    masks, weights = Masks(folder / MASKS), {}
    for file in folder.glob("*.safetensors"):
        if file.name != MASKS:
            weights |= load_file(file)
    assert len(masks.shapes) == 14
    for name in masks.shapes:
        keep = masks.load(name)
        pattern.check(keep, 0.5)
        assert (weights[name][~keep] == 0).all() and weights[name].isfinite().all()


def test_what_a_recipe_cannot_train_is_refused_before_any_work(tiny_llama, starts, tmp_path):
    tokens = torch.randint(0, 2048, (8, LENGTH), generator=torch.Generator().manual_seed(2))

    def tried(path, said, **options):
        with pytest.raises(ValueError, match=said) as caught:
            llmprune.recover(
                path,
                text=tokens,
                tokens=64,
                seqlen=LENGTH,
                output=tmp_path / "out",
                score=False,
                settings={"batch": 2},
                **options,
            )
        one_line(caught.value)

    tried(starts["unstructured"], r"patterns are learned for N:M masks", recipe="maskllm", teacher=tiny_llama)
    spp = {"trainable": {"name": "scaled", "groups": 5}, "objective": "next-token"}
    tried(starts["2:4"], r"rows are divisible by groups 5, got \[64, 64\]; set trainable.groups", recipe=spp)
    tried(tiny_llama, r"recipe rigl exchanges weights of a pruned model", recipe="rigl", sparsity=0.5)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "masked-finetuning",
            {"schedule": {"name": "fixed", "start": 0.1}},
            r"schedule\.start 0\.1 is of masks that move, and they",
        ),
        (
            "masked-finetuning",
            {"schedule": {"name": "fixed", "freeze": 0.5}},
            r"schedule\.freeze 0\.5 is of masks that move",
        ),
        (
            "masked-finetuning",
            {"trainable.grown": "dense"},
            r"grown dense is of weights that grow, and no mask",
        ),
        ("mdgf", {"numbers.ramp": 0.5}, r"numbers\.ramp 0\.5 lets lam rise, which is 0; set numbers\.lam"),
        ("gmp", {"numbers.beta_fall": "linear"}, r"numbers\.beta_fall linear lets beta fall, which is 0"),
        ("ebft", {"recompute": "on"}, r"recompute on is for scope model, got scope block; leave it out"),
    ],
)
def test_what_would_be_ignored_is_refused(name, settings, said):
    with pytest.raises(ValueError, match=said):
        recipes.load(name, settings)
