"""Estimates of time: every recipe has one, it grows with the work, and the plan tells it."""

import json

import pytest

import llmprune
from llmprune.common.shipped import shipped_names
from llmprune.evaluation.requests import requests_of
from llmprune.evaluation.zeroshot import load_tasks
from llmprune.machine import device as devices
from llmprune.model.opening import open_model
from llmprune.planning import estimate
from llmprune.recipe import loading as recipe


@pytest.fixture(autouse=True)
def one_machine(monkeypatch):
    """The same machine for every test, whatever else it does."""
    monkeypatch.setattr(estimate, "rates_of", lambda device, dtype: estimate.Rates(1e11, 1e11, 1e-9))
    monkeypatch.setattr(estimate, "_decomposition", lambda device, size: (size / 1000) ** 3)


def seconds(name, model, samples=128, **overrides):
    return estimate.seconds_of(recipe.load(name, overrides), model, samples, 64)


def test_every_recipe_has_an_estimate_and_more_work_takes_longer(tiny_llama):
    model = open_model(tiny_llama)
    for name in shipped_names("recipes"):
        assert 0 < seconds(name, model) < seconds(name, model, samples=12800), name
    assert seconds("wanda", model) < seconds("sparsegpt", model) < seconds("best", model)
    assert (
        seconds("wanda", model)
        < seconds("wanda", model, allocator="owl")
        < seconds("wanda", model, allocator="atp")
    )
    for step in ("dsnot", "swaps"):
        assert seconds("wanda", model) < seconds("wanda", model, refiner=step)
    for step in ("obs", "least-squares", "block-tune"):
        assert seconds("wanda", model) < seconds("wanda", model, update=step)


def test_what_was_measured_before_the_plan_is_not_counted_again(tiny_llama):
    model, owl = open_model(tiny_llama), recipe.load("wanda", {"allocator": "owl"})
    assert estimate.seconds_of(owl, model, 128, 64, allocated=True) == pytest.approx(seconds("wanda", model))


def test_scoring_counts_windows_head_and_requests(tiny_llama):
    skeleton = open_model(tiny_llama).skeleton
    one, ten = (estimate.scoring_seconds(skeleton, [(windows, 64)]) for windows in (1, 10))
    assert ten == pytest.approx(10 * one) and estimate.scoring_seconds(skeleton, []) == 0


def test_lm_eval_tells_how_many_requests_a_task_has(tiny_llama):
    tokenizer = open_model(tiny_llama).tokenizer
    loaded = load_tasks(["demo_continuation"], None, None)
    (many, tokens), (few, _) = (requests_of(loaded, tokenizer, limit)[0] for limit in (None, 5))
    assert (many, few) == (800, 20) and 10 < tokens < 400
    loaded["tasks"]["demo_continuation"].OUTPUT_TYPE = "generate_until"
    assert requests_of(loaded, tokenizer, None) is None


def test_plan_and_json_tell_the_estimates(typed, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--samples", 4, "--seqlen", 32, "--dry-run")
    code, out, _ = typed("prune", tiny_llama, *options)
    assert code == 0 and "of pruning, by estimate" in out and "of scoring" not in out
    summary = json.loads(typed("prune", tiny_llama, *options, "--json")[1])
    assert summary["pruning_seconds"] > 0 and summary["scoring_seconds"] is None
    code, out, _ = typed(
        "run", tiny_llama, *options, "--tasks", "demo_continuation", "--perplexity", "builtin"
    )
    assert "of scoring (dense and pruned), by estimate" in out and "come on top" not in out
    monkeypatch.setattr(estimate, "requests_of", lambda *_: None)
    out = typed("run", tiny_llama, *options, "--tasks", "demo_continuation")[1]
    assert "tasks come on top" in " ".join(out.split())
    summary = json.loads(typed("run", tiny_llama, *options, "--perplexity", "builtin", "--json")[1])
    assert summary["scoring_seconds"] > 0 and summary["tasks_counted"] is True


def test_the_machine_is_measured_once_and_soon(monkeypatch, tiny_llama):
    monkeypatch.undo()
    estimate.rates_of.cache_clear()
    calls = []
    real = devices.matmul_rate
    monkeypatch.setattr(devices, "matmul_rate", lambda *a: calls.append(a) or real(*a))
    for _ in range(2):
        plan = llmprune.prune(
            tiny_llama, calibration="builtin", samples=4, seqlen=32, dry_run=True, time_limit=0
        ).plan
        assert 0 < plan.pruning_seconds < 60
    assert len(calls) == 2
