"""Which recipe runs when none is named, and what is said of it."""

import pytest

import llmprune
from llmprune.machine import device as devices
from llmprune.model.opening import open_model
from llmprune.planning import choice
from llmprune.recipe import loading as recipe


def choose(model, tokens, limit=60.0, **overrides):
    return choice.choose(overrides, open_model(model), tokens, limit, 1)


def test_best_where_it_fits(tiny_llama, calibration_tokens):
    chosen = choose(tiny_llama, calibration_tokens, sparsity=0.6)
    assert chosen.name == "best" and chosen.sparsity == 0.6
    assert chosen.chosen.startswith("best, which takes ") and "--time-limit 60" in chosen.chosen


def test_the_light_recipe_where_time_is_short(tiny_llama, calibration_tokens):
    chosen = choose(tiny_llama, calibration_tokens, limit=1e-9)
    assert chosen.name == "dsnot" and "since best would take" in chosen.chosen
    assert choose(tiny_llama, calibration_tokens, limit=0).chosen == "dsnot, since the time limit is 0"


def test_the_light_recipe_where_memory_is_short(tiny_llama, calibration_tokens, monkeypatch):
    monkeypatch.setattr(devices, "available_memory", lambda: 1000)
    chosen = choose(tiny_llama, calibration_tokens)
    assert chosen.name == "dsnot" and "GB, more than is free" in chosen.chosen


@pytest.mark.parametrize(
    "named",
    [
        {"pruner": "magnitude"},
        {"refiner": "none"},
        {"refiner.margin": 0.2},
        {"update": "obs"},
        {"order": "group"},
    ],
)
def test_naming_a_method_builds_on_the_light_recipe(tiny_llama, calibration_tokens, named):
    chosen = choose(tiny_llama, calibration_tokens, **named)
    assert chosen.name == "dsnot" and not chosen.chosen


def test_the_estimate_grows_with_the_work(tiny_llama, calibration_tokens):
    model = open_model(tiny_llama)
    light, heavy = (recipe.load("best", {"update.steps": steps}) for steps in (10, 100_000))
    few, many = (choice.seconds_of(r, model, 128, 64) for r in (light, heavy))
    assert 0 < few < many / 20


@pytest.mark.parametrize("limit", [-1, "soon", float("nan")])
def test_a_bad_time_limit_is_refused(tiny_llama, calibration_tokens, limit):
    with pytest.raises(ValueError, match="time limit must be a number of minutes from 0, got"):
        llmprune.prune(tiny_llama, calibration=calibration_tokens, time_limit=limit, dry_run=True)


def test_a_bad_environment_is_refused(tiny_llama, calibration_tokens, monkeypatch):
    monkeypatch.setenv("LLMPRUNE_TIME_LIMIT", "an hour")
    with pytest.raises(ValueError, match=r"time limit .* got 'an hour'"):
        llmprune.prune(tiny_llama, calibration=calibration_tokens, dry_run=True)


def test_the_choice_is_told_and_does_not_stand_in_the_way_of_resuming(
    tiny_llama, calibration_tokens, tmp_path
):
    options = {"calibration": calibration_tokens, "sparsity": 0.5, "output": tmp_path / "out"}
    record = llmprune.prune(tiny_llama, time_limit=0, **options).record
    assert (
        record["recipe"]["name"] == "dsnot"
        and record["recipe"]["chosen"] == "dsnot, since the time limit is 0"
    )
    again = llmprune.prune(tiny_llama, recipe="dsnot", resume=True, **options)
    assert again.record["matrices"] == record["matrices"]


def test_the_best_recipes_run(tiny_llama, calibration_tokens, tmp_path):
    quick = {"update.steps": 5, "update.batch": 2}
    for name, settings in (("best", quick), ("best-mask", {})):
        for amount in ({"sparsity": 0.6}, {"pattern": "2:4"}):
            output = tmp_path / f"{name}{len(amount)}{next(iter(amount))}"
            record = llmprune.prune(
                tiny_llama,
                recipe=name,
                calibration=calibration_tokens,
                settings=settings,
                output=output,
                **amount,
            ).record
            assert record["totals"]["sparsity"] == pytest.approx(amount.get("sparsity", 0.5), abs=0.001)
            assert llmprune.inspect(output)
