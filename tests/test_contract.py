"""The promises every algorithm makes, checked for every file of every room: a new file is found by itself."""

import dataclasses

import oracles
import pytest
import torch
from jobs import ALL, inputs, job, statistics

from llmprune import registry
from llmprune.contracts import Allocator, BlockStep, Job, Pruned, Pruner, ScorePruner, Step
from llmprune.patterns import NM, Unstructured
from llmprune.planning.allocation import balanced
from llmprune.run.matrix import check_promises

PATTERNS = [Unstructured("row"), Unstructured("matrix"), NM(2, 4), NM(1, 8)]
PRUNERS, REFINERS, UPDATES, ALLOCATORS = (registry.names(room) for room in registry.ROOMS)
EVERY = [(room, name) for room in registry.ROOMS for name in registry.names(room)]


def task(pattern, seed=0):
    return job(pattern, pattern.sparsity if isinstance(pattern, NM) else 0.6, rows=16, columns=64, seed=seed)


def fresh(pattern):
    """The same task with its random generator wound back."""
    return task(pattern)


@pytest.mark.parametrize(("room", "name"), EVERY)
def test_every_algorithm_is_one_documented_class_with_a_frozen_config(room, name):
    cls = registry.find(room, name)
    assert issubclass(
        cls,
        {"pruners": Pruner, "refiners": Step, "updates": (Step, BlockStep), "allocators": Allocator}[room],
    )
    assert cls.__doc__ and registry.describe(room, name)["summary"]
    config = cls.Config()
    assert dataclasses.is_dataclass(config) and type(config).__dataclass_params__.frozen
    with pytest.raises(TypeError):
        cls.Config(1)  # options are keyword-only


@pytest.mark.parametrize(("room", "name"), [e for e in EVERY if e != ("allocators", "uniform")])
def test_every_algorithm_has_an_oracle(room, name):
    if name != "random":  # noise has nothing to be checked against
        assert any(name.replace("-", "_") in known for known in dir(oracles)), (
            f"add an oracle for {name} to tests/oracles.py"
        )


@pytest.mark.parametrize("pattern", PATTERNS, ids=["row", "matrix", "2:4", "1:8"])
@pytest.mark.parametrize("name", PRUNERS)
def test_pruners_keep_the_promises(name, pattern):
    pruner, work = registry.build("pruners", name, {}), task(pattern)
    dense = work.weight.clone()
    pruned = pruner.prune(work)
    check_promises(work, pruned, pruner, None)
    assert torch.equal(work.weight, dense), "the dense weight is read-only"
    assert pruned.weight.dtype == pruned.score.dtype == torch.float32 and pruned.keep.dtype == torch.bool
    assert pruned.weight.shape == pruned.keep.shape == pruned.score.shape == dense.shape
    if isinstance(pruner, ScorePruner):
        assert torch.equal(pruned.weight[pruned.keep], dense[pruned.keep]), (
            "a score pruner leaves kept weights alone"
        )
    again = pruner.prune(fresh(pattern))
    assert torch.equal(again.keep, pruned.keep) and torch.equal(again.weight, pruned.weight)


@pytest.mark.parametrize("pattern", PATTERNS, ids=["row", "matrix", "2:4", "1:8"])
@pytest.mark.parametrize("name", REFINERS)
def test_refiners_keep_the_promises(name, pattern):
    step, work = registry.build("refiners", name, {}), task(pattern)
    start = registry.build("pruners", "wanda", {}).prune(work)
    before = Pruned(start.weight.clone(), start.keep.clone(), start.score.clone())
    refined = step.apply(work, start)
    check_promises(work, refined, step, start)
    assert step.changes == "mask"
    assert torch.equal(start.weight, before.weight) and torch.equal(start.keep, before.keep), (
        "the input is read-only"
    )
    kept = refined.keep
    assert torch.equal(refined.weight[kept], work.weight[kept])


@pytest.mark.parametrize("pattern", PATTERNS, ids=["row", "matrix", "2:4", "1:8"])
@pytest.mark.parametrize("start", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", [u for u in UPDATES if issubclass(registry.find("updates", u), Step)])
def test_updates_keep_the_promises(name, start, pattern):
    step, work = registry.build("updates", name, {}), task(pattern)
    start = registry.build("pruners", start, {}).prune(work)
    before = Pruned(start.weight.clone(), start.keep.clone(), start.score.clone())
    updated = step.apply(work, start)
    check_promises(work, updated, step, start)
    assert step.changes == "weights" and torch.equal(updated.keep, before.keep)
    assert torch.equal(start.weight, before.weight) and torch.equal(start.keep, before.keep), (
        "the input is read-only"
    )
    again = step.apply(work, start)
    assert torch.equal(again.weight, updated.weight)


@pytest.mark.parametrize(
    ("room", "name"),
    [e for e in EVERY if e[0] != "allocators" and not issubclass(registry.find(*e), BlockStep)],
)
def test_declared_needs_are_enough_and_exact(room, name):
    algorithm, work = registry.build(room, name, {}), task(PATTERNS[0])
    only = statistics(inputs(64), algorithm.needs)
    narrow = Job(work.name, work.weight, only, work.pattern, work.sparsity, work.generator)
    if room == "pruners":
        algorithm.prune(narrow)
    else:
        keep = work.pattern.select(work.weight.abs(), work.sparsity)
        algorithm.apply(narrow, Pruned(work.weight * keep, keep, work.weight.abs()))
    assert only.needs == algorithm.needs and algorithm.needs in ALL


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("name", ALLOCATORS)
def test_allocators_meet_the_target(name, sparsity):
    shapes, blocks = {"a": (10, 10), "b": (40, 50), "c": (5, 10)}, {"a": 0, "b": 0, "c": 1}
    allocator = registry.build("allocators", name, {})
    measures = {0: 0.2, 1: 0.7} if allocator.needs else {}
    if allocator.rows:
        measures = {0: {"a": [-9.0, -2.0], "b": [-5.0, 1.0]}, 1: {}}
    wishes = allocator.allocate(shapes, blocks, measures, sparsity)
    sizes = {n: r * c for n, (r, c) in shapes.items()}
    shares = balanced(wishes, sizes, sparsity)
    assert shares.keys() == shapes.keys() and all(0 <= s < 1 for s in shares.values())
    assert sum(shares[n] * sizes[n] for n in sizes) == pytest.approx(sparsity * sum(sizes.values()))


@pytest.mark.parametrize(("room", "name"), EVERY)
def test_unknown_options_are_answered_with_names(room, name):
    with pytest.raises(ValueError, match="unknown option"):
        registry.build(room, name, {"no_such_option": 1})


class Breaks(Step):
    """A step that breaks what it is told to."""

    def __init__(self, changes, change):
        super().__init__()
        self.changes, self.change = changes, change

    def apply(self, job, pruned):
        return self.change(pruned)


def test_a_broken_promise_is_caught_and_named():
    work = task(PATTERNS[0])
    good = registry.build("pruners", "wanda", {}).prune(work)
    moved = Pruned(good.weight.flip(1), good.keep.flip(1), good.score)
    cases = {
        "broke the pattern": ("mask", lambda p: Pruned(work.weight, torch.ones_like(p.keep), p.score)),
        "left weights where": ("mask", lambda p: Pruned(work.weight, p.keep, p.score)),
        "NaN or Inf": (
            "weights",
            lambda p: Pruned(p.weight.masked_fill(p.keep, float("nan")), p.keep, p.score),
        ),
        "changed the mask": ("weights", lambda p: moved),
    }
    for message, (changes, change) in cases.items():
        step = Breaks(changes, change)
        with pytest.raises(RuntimeError, match=f"Breaks on layer.*{message}"):
            check_promises(work, step.apply(work, good), step, good)
