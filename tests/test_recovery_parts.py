"""The promises that every part of training with sparsity makes, for every file of every room: a new file is
found by itself.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from recovery_tasks import (
    C,
    N,
    R,
    Run,
    array,
    assert_left,
    left,
    matrices,
    method,
    moving,
    record,
    task,
    toy,
)

from llmprune import registry
from llmprune.contracts import Pattern
from llmprune.numerics.grids import GROUP, scales_of
from llmprune.patterns import NM, Unstructured
from llmprune.recovery.exchange import Exchange
from llmprune.recovery.loop import Loop
from llmprune.recovery.method import Method, RateSpec
from llmprune.recovery.parts import MaskRule, Matrix, Trainable, exact_sparsity
from llmprune.recovery.phases import Numbers, Phase, Schedule
from llmprune.recovery.task import Objective, Task

KINDS = dict(zip(registry.RECOVERY_ROOMS, (Schedule, MaskRule, Trainable, Objective), strict=True))
EVERY = [(room, name) for room in KINDS for name in registry.names(room)]
SCHEDULES, RULES, TRAINABLES, OBJECTIVES = (registry.names(room) for room in KINDS)
# Rows and columns of a matrix, the pattern of its mask and its sparsity.
SHAPES: dict[str, tuple[int, int, Pattern, float]] = {
    "row": (R, C, Unstructured("row"), 0.6),
    "matrix": (R, C, Unstructured("matrix"), 0.61),
    "2:4": (R, C, NM(2, 4), 0.5),
    "4:8": (R, C, NM(4, 8), 0.5),
    "1:8": (R, C, NM(1, 8), 0.875),
    "one row": (1, C, Unstructured("row"), 0.6),
    "odd": (R, 15, Unstructured("row"), 0.55),
    "odd matrix": (3, 7, Unstructured("matrix"), 0.55),
}
SHAPE = pytest.mark.parametrize("shape", SHAPES)


def tasks(shape: str = "row", trainable: str = "", dense: bool = False, seed: int = 0) -> Task:
    """A toy with matrices of one of the shapes, and a gain that is trained beside them."""
    rows, columns, pattern, sparsity = SHAPES[shape]
    given = dataclasses.replace(toy(seed, rows=rows, columns=columns), others={"gain": torch.ones(rows)})
    made = matrices(given, pattern, sparsity, dense)
    if trainable == "rounded":
        made = {name: _rounded(matrix) for name, matrix in made.items()}
    return task(given, matrices=made, batch=3)


def _rounded(matrix: Matrix) -> Matrix:
    return dataclasses.replace(matrix, scales=scales_of(matrix.weight, 4, GROUP), bits=4)


def fits(trainable: str, shape: str) -> bool:
    """Whether a trainable can train such a matrix, and move its mask: rounded weights never do."""
    return trainable != "rounded" and (trainable != "patterns" or isinstance(SHAPES[shape][2], NM))


def ruled(rule: str) -> Method:
    """A method in which a rule moves masks."""
    if issubclass(registry.find("recovery.rules", rule), Exchange):
        schedule = {"moves": 4, "freeze": 0.3, "share": 0.5, "decay": "constant", "apart": 1}
        return method("kept", rule, "exchange", options={"schedule": schedule})
    learner, options = "scores" if rule == "learned" else "dense", {"schedule": {"moves": 4, "freeze": 0.3}}
    return method(learner, rule, options=options, numbers=Numbers(gamma=1.0, rho=1.0))


def check_masks(run: Run, given: Task, first: int) -> None:
    """Count and pattern are exact from the first move on, and what is saved is zero where it is pruned."""
    matrix = given.matrices["a"]
    assert matrix.pattern is not None
    for keeps in run.keeps[first:]:
        matrix.pattern.check(torch.from_numpy(keeps["a"]), matrix.sparsity)
    assert run.loop.exact and (run.weights[-1]["a"][~run.keeps[-1]["a"]] == 0).all()


@pytest.mark.parametrize(("room", "name"), EVERY)
def test_every_part_is_one_documented_class_that_builds_with_its_defaults(room, name):
    cls = registry.find(room, name)
    assert issubclass(cls, KINDS[room]) and cls.__doc__ and registry.describe(room, name)["summary"]
    assert type(registry.build(room, name, {})) is cls
    config = cls.Config()
    assert dataclasses.is_dataclass(config) and type(config).__dataclass_params__.frozen


# --- trainables


@SHAPE
@pytest.mark.parametrize("dense", [False, True], ids=["pruned", "dense"])
@pytest.mark.parametrize("name", TRAINABLES)
def test_trainables_move_masks_exactly_and_end_as_they_computed(name, dense, shape):
    if not fits(name, shape):
        return
    given, chosen = tasks(shape, name, dense), moving(name)
    run = record(given, chosen)
    check_masks(run, given, first=1)
    for t in range(7, 10):  # the frozen part
        keep = run.keeps[t]["a"]
        assert np.array_equal(keep, run.keeps[7]["a"]) and (run.weights[t]["a"][~keep] == 0).all()
    loop = run.loop
    weight = loop.trained["a"].weight(loop.keeps["a"], loop.phase(loop.step - 1))
    assert torch.equal(weight, loop.merged("a")), "the merged weight is that of a forward pass"
    assert all(x.dtype == torch.float32 and x.requires_grad for x in loop.trained["a"].tensors.values())


@pytest.mark.parametrize("name", TRAINABLES)
def test_what_is_stored_in_bfloat16_is_trained_and_merged_in_float32(name):
    """The forward pass and the saved weight are rounded once each, from the same numbers."""
    given = tasks("2:4", name)
    matrix = given.matrices["a"]
    made = {"a": dataclasses.replace(matrix, weight=matrix.weight.bfloat16())}
    chosen = moving(name) if name != "rounded" else method(name)
    loop = Loop(dataclasses.replace(given, matrices=made), chosen)
    while not loop.done:
        loop.advance()
    weight = loop.trained["a"].weight(loop.keeps["a"], loop.phase(loop.step - 1))
    assert loop.merged("a").dtype == torch.float32
    assert torch.equal(weight.bfloat16(), loop.merged("a").bfloat16())


@SHAPE
@pytest.mark.parametrize("name", TRAINABLES)
def test_without_a_rate_and_with_a_fixed_mask_nothing_moves(name, shape):
    if name == "patterns" and not fits(name, shape):
        return
    given = tasks(shape, name)
    loop = Loop(given, method(name, rate=RateSpec(rate=1e-30, warm_up=0), steps=4))
    before, keep = loop.merged("a").clone(), loop.keeps["a"].clone()
    while not loop.done:
        loop.advance()
    assert torch.equal(loop.merged("a"), before) and torch.equal(loop.keeps["a"], keep)
    assert torch.equal(loop.others["gain"], given.others["gain"])
    if name != "rounded":
        torch.testing.assert_close(before, given.matrices["a"].weight * keep)


@pytest.mark.parametrize("name", TRAINABLES)
def test_trainables_learn(name):
    """With a fixed mask the loss falls; where only the mask is learned, that moves."""
    given = tasks("2:4", name)
    learns = registry.find("recovery.trainables", name).learned is not Trainable.learned
    run = record(given, moving(name) if learns else method(name, steps=10))
    moved = run.flips() >= 1 if learns and name != "low-rank-score" else run.losses[-1] < run.losses[0]
    assert moved


@pytest.mark.parametrize("name", [name for name in TRAINABLES if name != "rounded"])
def test_a_start_without_the_dense_model_is_trained_from_what_it_has(name):
    given = tasks("2:4")
    made = {"a": dataclasses.replace(given.matrices["a"], origin=None)}
    run = record(dataclasses.replace(given, matrices=made), moving(name))
    check_masks(run, given, first=1)


# --- going on


@pytest.mark.parametrize("name", TRAINABLES)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(name):
    def trained(seed: int) -> dict[str, object]:
        chosen = moving(name) if name != "rounded" else method(name)
        loop = Loop(tasks("2:4", name), dataclasses.replace(chosen, seed=seed))
        while not loop.done:
            loop.advance()
        return left(loop)

    assert_left(trained(3), trained(3))
    with pytest.raises(AssertionError):
        assert_left(trained(3), trained(4))


def stopped(given: Task, chosen: Method, at: list[int]) -> Loop:
    """A run that is stopped after some steps, and goes on from what it has saved each time."""
    loop = Loop(given, chosen)
    for stop in [*at, chosen.steps]:
        while loop.step < stop:
            loop.advance()
        tensors, values = loop.saved()
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        loop = Loop(given, chosen)
        loop.restore(tensors, values)
    return loop


def check_going_on(given: Task, chosen: Method) -> None:
    whole = Loop(given, chosen)
    while not whole.done:
        whole.advance()
    for at in ([1], [4], [3, 4, 5], [8], [9]):
        assert_left(left(stopped(given, chosen, at)), left(whole))


@pytest.mark.parametrize("name", TRAINABLES)
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(name):
    check_going_on(tasks("2:4", name), moving(name) if name != "rounded" else method(name))


@pytest.mark.parametrize("name", RULES)
def test_a_run_with_any_rule_goes_on_to_the_same_bytes(name):
    check_going_on(tasks("row"), ruled(name))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_with_any_schedule_goes_on_to_the_same_bytes(name):
    check_going_on(tasks("row"), method("dense", "magnitude", name))


# --- rules


@SHAPE
@pytest.mark.parametrize("name", RULES)
def test_rules_move_masks_exactly(name, shape):
    given, chosen = tasks(shape), ruled(name)
    run = record(given, chosen)
    first = next(t for t in range(10) if run.loop.phase(t).move)
    check_masks(run, given, first)
    assert run.flips() >= (1 if shape in ("1:8", "one row") else 2)


@pytest.mark.parametrize("name", RULES)
def test_scores_are_float32_and_the_generator_decides_what_is_random(name):
    seen = []

    class Seen(registry.find("recovery.rules", name)):  # type: ignore[misc]
        def score(self, view):
            seen.append(super().score(view))
            return seen[-1]

    chosen = dataclasses.replace(ruled(name), rule=Seen(registry.build("recovery.rules", name, {}).config))
    for _ in range(2):
        record(tasks("row"), chosen)
    half = len(seen) // 2
    for one, other in zip(seen[:half], seen[half:], strict=True):
        assert one.dtype == torch.float32 and one.shape == (R, C) and not one.isnan().any()
        assert torch.equal(one, other)


def test_exchange_drops_the_share_and_grows_as_many():
    given, chosen = tasks("row"), ruled("grow-random")
    run = record(given, chosen)
    for t in range(1, 8):
        if run.loop.phase(t).move and t > 2:  # the first move makes the start's mask sparser
            old, new = run.keeps[t - 1]["a"], run.keeps[t]["a"]
            gone = (old & ~new).sum(axis=1)
            assert (gone <= int(0.5 * old[0].sum())).all() and gone.any()
            assert (gone == (new & ~old).sum(axis=1)).all()


@SHAPE
def test_exchange_to_fewer_weights_keeps_the_largest(shape):
    """A start that is less sparse than the result: what is too much goes by size, not by its place."""
    rows, columns, pattern, sparsity = SHAPES[shape]
    given = toy(1, rows=rows, columns=columns)
    keep = torch.ones(rows, columns, dtype=torch.bool)
    keep[:, ::5] = False
    weight = given.weights["a"] * keep
    rule = registry.build("recovery.rules", "grow-random", {})
    view = view_of(weight, keep, (pattern, sparsity), share=0.0)
    new = pattern.select(rule.score(view), sparsity)
    best = pattern.select(torch.where(keep, weight.abs(), -1.0), sparsity)
    assert torch.equal(new & keep, best & keep)


def view_of(weight, keep, aim, share=0.3, **more):
    from llmprune.recovery.parts import View

    phase = Phase(step=7, move=True, share=share)
    return View(weight, keep, aim, phase, torch.Generator().manual_seed(0), **more)


def test_set_drops_from_both_signs_and_zero_is_positive():
    rule = registry.build("recovery.rules", "grow-random", {"drop": "set"})
    weight = torch.tensor([[0.1, -0.2, 0.3, -0.4, 0.0, 0.6], [1.0, 2.0, 3.0, 4.0, -5.0, 0.0]])
    keep = torch.ones(2, 6, dtype=torch.bool)
    survivors = rule.survivors(view_of(weight, keep, (Unstructured(), 0.5), share=0.5))
    assert (~survivors).nonzero().tolist() == [[0, 0], [0, 1], [0, 4], [1, 0], [1, 4], [1, 5]]
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 0.0]])
    survivors = rule.survivors(view_of(weight, keep[:1], (Unstructured(), 0.5), share=0.5))
    assert (~survivors).nonzero()[:, 1].tolist() == [0, 1, 5]  # there is no negative one


def test_exploration_counts_by_the_mean_gradient():
    """DST-EE with relative gradients has the order of |G| + c mean |G| ln(t) / (N + eps)."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(R, C, generator=generator) * 1e-4
    active = torch.randint(5, (R, C), generator=generator).float()
    rule = registry.build("recovery.rules", "grow-ee", {"explore": 0.5, "eps": 2.0})
    keep = torch.zeros(R, C, dtype=torch.bool)
    found = rule.growth(view_of(gradient, keep, None, gradient=gradient, active=active))
    wanted = gradient.abs() + 0.5 * gradient.abs().mean() * np.log(7) / (active + 2.0)
    torch.testing.assert_close(found * gradient.abs().mean(), wanted)


def test_a_rule_by_curvature_is_one_by_size_before_there_are_moments():
    weight = torch.tensor([[3.0, -1.0, 2.0, -4.0]])
    rule = registry.build("recovery.rules", "curvature", {})
    view = view_of(weight, weight > -9, (Unstructured(), 0.5))
    assert Unstructured().select(rule.score(view), 0.5).tolist() == [[True, False, False, True]]
    view = view_of(weight, weight > -9, (Unstructured(), 0.5), square=torch.tensor([[0.0, 9.0, 9.0, 0.0]]))
    assert Unstructured().select(rule.score(view), 0.5).tolist() == [[False, True, True, False]]


# --- masks of the start


@pytest.mark.parametrize("columns", [5, 7, 100, 999])
def test_the_sparsity_of_a_mask_prunes_as_many_weights_again(columns):
    for pruned in range(columns + 1):
        keep = torch.arange(columns).expand(3, -1) >= pruned
        pattern, sparsity = exact_sparsity(keep)
        assert pattern.scope == "row"
        pattern.check(keep, sparsity)
    keep = torch.rand(3, columns, generator=torch.Generator().manual_seed(0)) > 0.3
    keep[0] = True
    pattern, sparsity = exact_sparsity(keep)
    assert pattern.scope == "matrix"
    pattern.check(keep, sparsity)
    assert pattern.select(keep.float(), sparsity).equal(keep)


@pytest.mark.parametrize("pruned", range(1, 100))
def test_no_schedule_goes_below_the_sparsity_of_a_start_that_nothing_returns_to(pruned):
    """Not even by a weight: 29 / 100 * 100 is below 29."""
    keep = (torch.arange(100) >= pruned)[None]
    matrix = Matrix(keep.float(), keep, Unstructured(), 0.995, least=1 - int(keep.sum()) / 100)
    pattern, sparsity = matrix.aim(Phase(step=0, reach=0.0, initial=0.0))
    assert int((~pattern.select(keep.float(), sparsity)).sum()) == pruned


def test_rungs_of_n_m_keep_as_many_as_their_sparsity_asks_for():
    for (n, m), wanted in {(2, 4): [3, 2, 2], (1, 8): [6, 4, 1], (4, 8): [6, 4, 4]}.items():
        matrix = Matrix(torch.ones(1, 8), torch.ones(1, 8) > 0, NM(n, m), 1 - n / m)
        aims = [matrix.aim(Phase(step=0, reach=0.0, initial=rung)) for rung in (0.25, 0.5)]
        aims.append(matrix.aim(Phase(step=0)))
        assert [str(pattern) for pattern, _ in aims] == [f"{kept}:{m}" for kept in wanted]
    assert matrix.aim(Phase(step=0, reach=0.0, initial=0.05)) is None  # 7.6 of 8 are 8


@pytest.mark.parametrize("name", ["scores", "patterns"])
def test_learned_masks_of_a_dense_start_begin_with_the_largest_weights(name):
    given = toy()
    made = matrices(given, "2:4", dense=True)
    options = {
        "trainable": {"deviation": 1e-6, "prior": 100.0} if name == "patterns" else {},
        "schedule": {"moves": 99},
    }
    run = record(task(given, matrices=made), method(name, "learned", options=options))
    assert torch.equal(torch.from_numpy(run.keeps[0]["a"]), NM(2, 4).select(given.weights["a"].abs(), 0.5))


def test_the_prior_of_patterns_counts_every_weight_that_is_kept_too():
    import recovery_oracles_learned as learned

    given = toy()
    loop = Loop(task(given, matrices=matrices(given, "2:4")), method("patterns"))
    logits = array(loop.trained["a"].tensors["logits"])
    zero = np.zeros(logits.shape)
    prior = learned.maskllm_logits(array(given.keeps["a"]), zero, 2, 4)
    noise = (logits - prior) / 0.01
    assert abs(noise.mean()) < 0.2 and 0.8 < noise.std() < 1.2 and N > 0


def test_a_kept_weight_of_zero_is_compared_by_its_change():
    """Masks are what they are, not where the weight is not zero."""
    given = toy()
    given.weights["a"][:, 0], given.keeps["a"][:, 0] = 0.0, True
    for name in ("masked-lora", "scaled"):
        loop = Loop(task(given), method(name, steps=3))
        while not loop.done:
            loop.advance()
        compared = loop.trained["a"].compared(loop.keeps["a"])
        assert torch.equal(compared, loop.merged("a"))
    loop = Loop(task(given), method("masked-lora", steps=3))
    while not loop.done:
        loop.advance()
    assert (loop.trained["a"].compared(loop.keeps["a"])[:, 0] != 0).all()


def test_a_change_too_small_for_bfloat16_survives_a_move_of_masked_lora():
    given = toy()
    matrix = matrices(given)["a"]
    made = {"a": dataclasses.replace(matrix, weight=matrix.weight.bfloat16(), sparsity=0.5)}
    chosen = moving("masked-lora")
    run = record(task(given, matrices=made), dataclasses.replace(chosen, rate=RateSpec(rate=1e-5, warm_up=0)))
    start, end = run.weights[1]["a"], run.weights[-1]["a"]
    both = run.keeps[1]["a"] & run.keeps[-1]["a"]
    assert 0 < np.abs(end - start)[both].max() < 1e-3
    assert np.abs(run.fixed[7]["a"]["base"] - run.fixed[1]["a"]["base"])[both].max() > 0


def test_powers_have_the_gradient_of_the_formula_everywhere():
    for exponent in (1.5, 2.0, 3.0, 4.0):
        loop = Loop(task(toy()), method("power", options={"trainable": {"exponent": exponent}}))
        power = loop.trained["a"]
        theta = power.tensors["theta"] = torch.tensor([[0.0, -0.5, 2.0, -1e-20]], requires_grad=True)
        keep = torch.ones(1, 4, dtype=torch.bool)
        power.weight(keep, Phase(step=0)).sum().backward()
        wanted = exponent * theta.detach().abs() ** (exponent - 1)
        torch.testing.assert_close(theta.grad, wanted)


def test_every_pair_of_trainable_and_shape_was_met():
    """What the tests above leave out is what a trainable refuses."""
    for name, shape in itertools.product(TRAINABLES, SHAPES):
        if not fits(name, shape) and name != "rounded":
            with pytest.raises(ValueError, match="2:4"):
                Loop(tasks(shape), method(name))
            with pytest.raises(ValueError, match="2:4"):
                method(name).trainable().sizes((8, 16), SHAPES[shape][2])


def test_patterns_of_too_many_kinds_are_refused():
    with pytest.raises(ValueError, match=r"pattern 8:16 has 12870 patterns of a group, more than 128"):
        method("patterns").trainable().sizes((8, 16), NM(8, 16))


@pytest.mark.parametrize("name", TRAINABLES)
def test_trainables_know_how_many_numbers_they_train_and_hold(name):
    """What the plan counts memory by, before there is a matrix."""
    given, chosen = tasks("2:4", name), method(name)
    loop = Loop(given, chosen)
    trained, beside = chosen.trainable().sizes((R, C), NM(2, 4))
    if name == "kept":  # of a mask that never moves the kept weights alone
        trained //= 2
    assert sum(t.numel() for t in loop.trained["a"].tensors.values()) == trained + (
        8 if name == "rounded" else 0
    )
    held = {part: t for part, t in loop.trained["a"].fixed.items() if part not in ("base", "table", "scales")}
    assert sum(t.numel() for t in held.values()) == beside
