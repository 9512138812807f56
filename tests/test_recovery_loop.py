"""The loop of training with sparsity: losses, several processes, optimizers, what diverges."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import recovery_oracles as ro
import recovery_oracles_learned as learned
import recovery_oracles_objectives as losses
import torch
from recovery_oracles import SGD, AdamW, ASTAdamW
from recovery_tasks import (
    MeanSquare,
    N,
    Run,
    array,
    assert_left,
    gradient_of,
    left,
    matrices,
    method,
    moving,
    record,
    task,
    toy,
)
from torch import Tensor

from llmprune import registry
from llmprune.recipe import recovery as recipes
from llmprune.recovery import task as tasks
from llmprune.recovery.loop import Diverged, Loop
from llmprune.recovery.method import Method, RateSpec
from llmprune.recovery.optimizer import Optimizer, OptimizerSpec
from llmprune.recovery.parts import View
from llmprune.recovery.phases import Numbers
from llmprune.recovery.soup import Soup, part_pruned
from llmprune.recovery.task import Outputs, Task, Term

OBJECTIVES = registry.names("recovery.objectives")
TRAINABLES = [name for name in registry.names("recovery.trainables") if name != "rounded"]


def weighted(*names: str) -> tuple[Term, ...]:
    """Terms by name, with different weights."""
    return tuple(
        Term(registry.build("recovery.objectives", name, {}), 0.3 + number)
        for number, name in enumerate(names)
    )


# --- objectives


@pytest.mark.parametrize("rows", [1000, 2, 1])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_and_gradients_are_those_of_the_formulas(name, rows, monkeypatch):
    """However many tokens' logits are made at once."""
    monkeypatch.setattr(tasks, "_CHUNK", rows * 8)
    given = toy()
    options = {"tau": 2.0} if name == "kd" else {}
    objective = registry.build("recovery.objectives", name, options)
    y = given.wanted.flip(0) * 0.7
    student, tokens = y.clone().requires_grad_(), array(given.tokens)
    outputs, teacher = (
        Outputs(student, [student, 2 * student]),
        Outputs(given.wanted, [given.wanted, given.wanted]),
    )
    loss = objective.total(outputs, teacher, given.tokens) / objective.size(given.tokens, teacher)
    loss.backward()
    own, wanted = array(y), array(given.wanted)
    if name == "next-token":
        value, slope = losses.next_token(own, losses.next_labels(tokens))
    elif name == "kd":
        value, slope = losses.kd(own, wanted, 2.0)
    elif name == "block":  # the squared error, relative to the squared targets
        size, _ = losses.block_error(wanted, 0 * wanted)
        value, slope = (each / size for each in losses.block_error(own, wanted))
    else:
        assert name == "squarehead", f"add {name}"
        each = [losses.squarehead([a, 2 * a], [b, b]) for a, b in zip(own, wanted, strict=True)]
        value, slope = sum(v for v, _ in each) / N, np.stack([g[0] + 2 * g[1] for _, g in each]) / N
    assert float(loss.detach()) == pytest.approx(value, rel=1e-5)
    assert student.grad is not None
    np.testing.assert_allclose(array(student.grad), slope, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("names", [*[(name,) for name in OBJECTIVES], ("next-token", "kd", "squarehead")])
def test_any_cut_into_micro_batches_gives_the_same_gradients(names):
    """A term's mean is over all sequences of a step, however they are cut."""
    given, found = toy(), []
    for batch in (10, 3, 1):
        own = task(given, batch=batch, shared=True)  # so that gradients are not freed
        loop = Loop(own, method(terms=weighted(*names), batch=10))
        loss = loop._backward(loop.phase(0), False)
        gradient = loop.trained["a"].tensors["theta"].grad
        assert gradient is not None
        found.append((loss, gradient))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=2e-5, atol=1e-6)


def test_the_loss_of_several_terms_is_their_weighted_sum():
    given = toy()
    weights = {"next-token": 0.3, "kd": 1.3, "squarehead": 2.3}
    objective = [{"name": name, "weight": weight} for name, weight in weights.items()]
    recipe = recipes.load({"trainable": "kept", "objective": objective})
    run = record(task(given, batch=3), method(terms=weighted("next-token", "kd", "squarehead"), batch=7))
    args = (array(given.weights["a"]), array(given.keeps["a"]), gradient_of(given, recipe, run))
    rates = [RateSpec(rate=0.03, warm_up=0).at(t, 10) for t in range(10)]
    history = ro.masked_fine_tuning(*args, rates, lambda: AdamW((0.9, 0.95)))
    np.testing.assert_allclose(run.weights[-1]["a"], history[-1].weight, rtol=3e-5, atol=1e-5)


def test_the_held_out_loss_is_that_of_the_weights_as_they_are_saved():
    given, held = toy(), [1, 5, 6, 9]
    loop = Loop(task(given, held=held, batch=3), moving("split"))
    for _ in range(3):
        loop.advance()
    terms = weighted("next-token", "kd")
    weight = loop.trained["a"].tensors["theta"].detach() * loop.keeps["a"]
    y = array(given.inputs["a"][held] @ weight.T)
    wanted = 0.3 * losses.next_token(y, losses.next_labels(array(given.tokens[held])))[0]
    wanted += 1.3 * losses.kd(y, array(given.wanted[held]))[0]
    assert loop.error(terms) == pytest.approx(wanted, rel=1e-5)


# --- batches


@pytest.mark.parametrize(("size", "count"), [(4, 12), (5, 12), (12, 12), (16, 12), (30, 4)])
def test_a_step_has_as_many_sequences_as_asked_for(size, count):
    """Also where there are fewer: then some come more than once, each about as often."""
    given = dataclasses.replace(task(toy()), sequences=list(range(N - count, N)))
    run = record(given, method(steps=6, batch=size))
    for rows in run.rows:
        assert len(rows) == size
        times = [rows.count(row) for row in given.sequences]
        assert sum(times) == size and max(times) - min(times) <= 1
    assert len({tuple(rows) for rows in run.rows}) == 6, "every step has another order"


# --- processes


def together(given: Task, chosen: Method, count: int = 3) -> list[Loop]:
    """The same training on several processes, here threads, which share out the sequences."""
    barrier, given_in, loops = threading.Barrier(count), [()] * count, [None] * count
    failures: list[BaseException] = []

    def exchanged(rank: int, tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        given_in[rank] = tuple(tensor.clone() for tensor in tensors)
        barrier.wait(60)
        found = list(given_in)
        barrier.wait(60)
        return found

    def run(rank: int) -> None:
        def add(*tensors: Tensor) -> None:
            for parts in zip(tensors, *exchanged(rank, tensors), strict=True):
                parts[0].copy_(sum(parts[1:]))

        def agree(tensor: Tensor) -> None:
            tensor.copy_(exchanged(rank, (tensor,))[0][0])

        try:
            parts = {"add": add, "agree": agree, "mine": lambda rows: rows[rank::count]}
            own = dataclasses.replace(given, shared=True, **parts)
            loops[rank] = Loop(own, chosen)
            while not loops[rank].done:
                loops[rank].advance()
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return loops


def check_together(given: Task, chosen: Method) -> None:
    alone = Loop(given, chosen)
    while not alone.done:
        alone.advance()
    several = together(given, chosen)
    for other in several[1:]:
        assert_left(left(several[0]), left(other))
    assert torch.equal(several[0].keeps["a"], alone.keeps["a"])
    torch.testing.assert_close(several[0].merged("a"), alone.merged("a"), rtol=1e-4, atol=2e-5)
    for part, tensor in several[0].trained["a"].tensors.items():
        torch.testing.assert_close(tensor, alone.trained["a"].tensors[part], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", [8, 2])
@pytest.mark.parametrize("name", TRAINABLES)
def test_several_processes_train_as_one(name, batch):
    """With fewer sequences than processes, too: then some have nothing to do in a step."""
    given = dataclasses.replace(toy(), others={"gain": torch.ones(8)})
    chosen = dataclasses.replace(
        moving(name), terms=weighted("next-token", "squarehead"), batch=batch, clip=0.5
    )
    check_together(task(given, matrices=matrices(given, "2:4"), batch=2), chosen)


@pytest.mark.parametrize("name", registry.names("recovery.rules"))
def test_several_processes_move_the_same_masks(name):
    from test_recovery_parts import ruled

    check_together(task(toy(), batch=2), dataclasses.replace(ruled(name), batch=5))


@pytest.mark.parametrize("batch", [3, 12])
@pytest.mark.parametrize("name", registry.names("recovery.trainables"))
def test_tensors_that_move_as_soon_as_they_can_come_to_the_same_bytes(name, batch):
    """Where nothing needs all gradients at once, each is freed when it has moved its tensor."""
    from test_recovery_parts import tasks

    found = []
    for shared in (False, True):
        given = dataclasses.replace(tasks("2:4", name), batch=batch, shared=shared)
        loop = Loop(given, moving(name) if name != "rounded" else method(name))
        while not loop.done:
            loop.advance()
        found.append(left(loop))
    assert_left(*found)


def test_a_penalty_counts_once_however_many_processes_there_are():
    given, options = toy(), {"trainable": {"penalty": 0.5}, "schedule": {"moves": 9, "freeze": 0.0}}
    chosen = dataclasses.replace(method("patterns", "learned", options=options), batch=6)
    check_together(task(given, matrices=matrices(given, "2:4")), chosen)


# --- optimizers


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_that_of_the_formula(decay):
    check_optimizer(OptimizerSpec(betas=(0.8, 0.97), eps=1e-6, weight_decay=decay),
                    AdamW((0.8, 0.97), 1e-6, decay), pulls=False)  # fmt: skip


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_with_a_pull_is_that_of_ast(decay):
    check_optimizer(OptimizerSpec(weight_decay=decay), ASTAdamW((0.9, 0.95), 1e-8, decay), pulls=True)


def test_sgd_pulls_pruned_weights_by_their_gradient():
    check_optimizer(OptimizerSpec(name="sgd", betas=(0.9, 0.0)), SGD(0.9), pulls=True)


def check_optimizer(spec: OptimizerSpec, wanted: AdamW | SGD, pulls: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor, keep = torch.randn(4, 6, generator=generator), torch.rand(4, 6, generator=generator) > 0.5
    theta, own = array(tensor), Optimizer(spec, pulls)
    for step in range(12):
        gradient, rate, lam = (
            torch.randn(4, 6, generator=generator),
            0.1 / (1 + step),
            0.2 * (step % 3) * pulls,
        )
        own.step("x", tensor, gradient, rate, keep, lam)
        theta = wanted.step(theta, array(gradient), rate, lam * np.where(array(keep), 0.0, theta))
        np.testing.assert_allclose(array(tensor), theta, rtol=2e-5, atol=1e-6)


def test_moments_that_gradients_have_fed_survive_where_masks_freeze():
    """A weight that the last move brings back has had a gradient at every step: its moments are those of
    now.
    """
    given = toy()
    options = {"schedule": {"moves": 1, "freeze": 0.5}}
    chosen = method("dense", "magnitude", options=options, numbers=Numbers(gamma=1.0, rho=1.0))
    loop = Loop(task(given), chosen)
    for _ in range(5):
        loop.advance()
    before, old = loop._optimizer.state["a:theta"]["square"].clone(), loop.keeps["a"]
    loop._move(loop.phase(5))
    new, after = loop.keeps["a"], loop._optimizer.state["a:theta"]["square"]
    assert (new & ~old).any() and torch.equal(after, torch.where(new, before, 0.0))


# --- clipping, and what diverges


def test_gradients_are_clipped_over_the_entries_that_move():
    given = toy()
    for chosen in (
        method(clip=0.01, steps=3),
        method("kept", "grow-momentum", "exchange", 3, {"schedule": {"moves": 1}}, clip=0.01),
    ):
        seen: list[float] = []
        loop = Loop(task(given), chosen)
        step = loop._optimizer.step

        def watched(key, tensor, gradient, rate, keep, lam, step=step, seen=seen):
            seen.append(float((gradient if keep is None else gradient * keep).norm()))
            step(key, tensor, gradient, rate, keep, lam)

        loop._optimizer.step = watched  # type: ignore[method-assign]
        loop.advance()
        assert seen == [pytest.approx(0.01, rel=1e-3)]


def test_a_step_done_again_after_memory_ran_out_moves_nothing_twice():
    given, chosen = toy(), method("masked-lora", clip=1.0)
    whole, again = Loop(task(given), chosen), Loop(task(given), chosen)
    step, calls = again._optimizer.step, []

    def scarce(key, *arguments):
        calls.append(key)
        if len(calls) == 2:
            raise MemoryError
        step(key, *arguments)

    again._optimizer.step = scarce  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        again.advance()
    for loop in (whole, again):
        loop.advance()
    assert len(set(calls)) == 2 and len(calls) == 3 and again._optimizer.steps == whole._optimizer.steps
    first, second = (loop.trained["a"].tensors[calls[0].partition(":")[2]] for loop in (whole, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_anything_moves(where, value):
    class Bad(MeanSquare):
        def total(self, student: Outputs, teacher: Outputs | None, tokens: Tensor) -> Tensor:
            total = super().total(student, teacher, tokens)
            if where == "loss":
                return total * value
            assert student.logits is not None
            student.logits.register_hook(lambda gradient: gradient * value)
            return total

    loop = Loop(task(toy()), method(terms=(Term(Bad()),), clip=1.0))
    before = loop.merged("a").clone()
    with pytest.raises(Diverged, match=f"the {where}s? became .* at step 1 of 10"):
        loop.advance()
    assert torch.equal(loop.merged("a"), before) and loop.step == 0


# --- soups


def test_a_soup_is_the_average_of_its_copies():
    """Two phases of three copies, against the reference version."""
    given = toy()
    recipe = recipes.load("soup", {"rate.rate": 0.03})
    start = task(given, matrices=matrices(given, "unstructured", 0.75, dense=True))
    soup, runs = Soup(), []
    for phase in range(2):
        begun = part_pruned(soup.averaged(start), phase, 2)
        soup.begin(begun)
        for copy in range(3):
            chosen = dataclasses.replace(recipe.method(8), seed=3 * phase + copy)
            runs.append(record(soup.task(start), chosen))
            soup.add(runs[-1].loop)
    end = soup.averaged(start)
    rates = [recipe.rate.at(t, 8) for t in range(8)]

    def run(of: Run) -> tuple[ro.Gradient, list[float], Callable[[], AdamW]]:
        return gradient_of(given, recipe, of), rates, lambda: AdamW((0.9, 0.95))

    stages = [
        (s, [run(of) for of in runs[3 * i : 3 * i + 3]]) for i, s in enumerate(ro.soup_sparsities(0.75, 2))
    ]
    weight = array(given.weights["a"])
    history = ro.soups(weight, weight < 99, stages)
    np.testing.assert_array_equal(array(end.matrices["a"].keep), history[-1].keep)
    np.testing.assert_allclose(array(end.matrices["a"].weight), history[-1].theta, rtol=3e-5, atol=1e-5)
    assert len({tuple(map(tuple, of.rows)) for of in runs}) == 6


def test_a_soup_of_moving_masks_is_refused():
    start = task(toy())
    soup = Soup()
    soup.begin(start)
    run = record(start, moving("scores"))
    assert run.flips()
    with pytest.raises(ValueError, match="copies of a soup must keep their masks"):
        soup.add(run.loop)


def test_restricted_learning_is_not_offered_where_the_share_is_one():
    """Jackpots without a restriction: every pair that would flip does, as in the released code."""
    given = toy()
    run = record(task(given), method("scores", "learned", options={"schedule": {"moves": 99, "freeze": 0.0}}))
    for t in range(1, 11):
        score = run.of("a", "score")[t]
        if t < 10:
            assert np.array_equal(
                run.keeps[t]["a"], learned.restricted(score, run.keeps[t - 1]["a"], 0.5, 1.0)
            )


def test_views_are_what_rules_are_told(monkeypatch):
    """Gradients are those of the step before, and the generator is that of matrix and step."""
    views: list[View] = []
    rule = registry.find("recovery.rules", "grow-ee")

    class Seen(rule):  # type: ignore[misc, valid-type]
        def score(self, view: View) -> Tensor:
            views.append(view)
            return super().score(view)

    options = {"schedule": {"moves": 3, "freeze": 0.2, "decay": "constant", "apart": 1}}
    chosen = dataclasses.replace(method("kept", None, "exchange", options=options), rule=Seen(rule.Config()))
    given = toy()
    run = record(task(given), dataclasses.replace(chosen, terms=weighted("next-token")))
    moves = [t for t in range(10) if run.loop.phase(t).move]
    assert [view.phase.step for view in views] == moves == [4, 8]
    recipe = recipes.load({"trainable": "kept", "objective": {"name": "next-token", "weight": 0.3}})
    gradient = gradient_of(given, recipe, run)
    for view, t in zip(views, moves, strict=True):
        assert view.gradient is not None and view.active is not None
        np.testing.assert_allclose(
            array(view.gradient), gradient(run.weights[t - 1]["a"], t - 1), rtol=3e-5, atol=1e-6
        )
    np.testing.assert_array_equal(run.of("a", "theta")[3], run.of("a", "theta")[3])
    before = run.of("a", "theta")[3], run.weights[4]["a"]
    stay = run.keeps[3]["a"] & run.keeps[4]["a"]
    assert np.array_equal(before[0][stay], before[1][stay]), "the optimizer pauses where the gradient decides"


# --- memory that runs out in a move, and NaN


class Scarce(Exception):
    """Memory ran out."""


@pytest.mark.parametrize("name", ["grow-gradient", "grow-unfired", "grow-ee", "grow-momentum"])
@pytest.mark.parametrize("last", [False, True])
def test_a_move_done_again_after_memory_ran_out_moves_nothing_twice(name, last, monkeypatch):
    options = {"schedule": {"moves": 3, "freeze": 0.0 if last else 0.3, "decay": "constant", "apart": 2}}
    chosen = method("kept", name, "exchange", 8, options)
    given = toy(count=3)
    whole, again = Loop(task(given), chosen), Loop(task(given), chosen)
    while not whole.done:
        whole.advance()
    put, calls = again._put, []

    def scarce(key, *arguments):
        calls.append(key)
        if len(calls) % 4 == 2:  # the second matrix of a move, and once more later on
            raise Scarce
        put(key, *arguments)

    monkeypatch.setattr(again, "_put", scarce)
    failures = 0
    while not again.done or again._placed:
        try:
            again.advance()
        except Scarce:
            failures += 1
    assert failures and again.step == whole.step == 8 and again.flipped == whole.flipped
    assert_left(left(again), left(whole))


def test_a_weight_that_is_nan_diverges_where_masks_move():
    chosen = method("kept", "magnitude", options={"schedule": {"moves": 2}})
    loop = Loop(task(toy()), chosen)
    with torch.no_grad():
        loop.trained["a"].tensors["theta"][0, 0] = float("nan")
    with pytest.raises(Diverged, match="a weight became NaN by step 0 of 10"):
        while not loop.done:
            loop.advance()
