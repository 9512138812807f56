"""Every method of training with sparsity, as its shipped recipe puts it together, against its reference
version: what is trained, masks and V of every step.

A move of the package before step t + 1 is one of the reference at the end of step t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import recovery_oracles as ro
import recovery_oracles_evolving as evolving
import recovery_oracles_learned as learned
import recovery_oracles_phases as phases
import recovery_oracles_schedules as schedules
import torch
from recovery_oracles import SGD, AdamW, ASTAdamW, Sparsity, Step
from recovery_tasks import (
    Run,
    Toy,
    array,
    gradient_of,
    gradients,
    matrices,
    mean_square,
    recipe_method,
    record,
    task,
    toy,
)

from llmprune.recipe import recovery as recipes
from llmprune.recipe.recovery import RecoveryRecipe

STEPS = 20
ADAM = partial(AdamW, (0.9, 0.95))
AST = partial(ASTAdamW, (0.9, 0.95))


@dataclass
class Ran:
    """A recipe's run on a toy, and what its reference is given."""

    given: Toy
    recipe: RecoveryRecipe
    run: Run
    pattern: str
    sparsity: float
    rates: list[float]

    @property
    def weight(self) -> np.ndarray:
        """The dense weight."""
        return array(self.given.weights["a"])

    @property
    def keep(self) -> np.ndarray:
        """The mask of the start."""
        return array(self.given.keeps["a"])

    @property
    def gradient(self) -> ro.Gradient:
        return gradient_of(self.given, self.recipe, self.run)

    @property
    def frozen(self) -> int:
        """The first step with the final mask: `freeze` of the steps have it."""
        return STEPS - round(self.recipe.schedule.options["freeze"] * STEPS)

    def until_frozen(self, value: Any) -> list[Any]:
        """A value for every step before masks are frozen, and 0 afterwards."""
        return [value if t < self.frozen else 0.0 for t in range(STEPS)]

    def moves(self) -> list[bool]:
        """Whether the mask moves at the end of a step: so often, evenly spread, the last when it freezes."""
        options = self.recipe.schedule.options
        first = round(options["start"] * STEPS)
        count = min(options["moves"], self.frozen - first + 1)
        at = {round(first + i * (self.frozen - first) / (count - 1)) for i in range(count)}
        return [t + 1 in at for t in range(STEPS)]

    def aim(self, sparsity: float) -> Sparsity:
        """What a mask of the pattern on its way has at a sparsity; the pattern itself at the end."""
        if self.pattern == "unstructured":
            return min(sparsity, self.sparsity)
        n, m = map(int, self.pattern.split(":"))
        kept = max(n, math.ceil(m * (1 - sparsity) - 1e-9))
        return (kept, m) if kept < m else 0.0

    @property
    def last(self) -> Sparsity:
        """Of the final mask."""
        return self.aim(1.0)

    def cubic(self) -> list[Sparsity]:
        """The sparsity of a mask chosen at the end of every step."""
        options = self.recipe.schedule.options
        first, end = Fraction(round(options["start"] * STEPS), STEPS), Fraction(self.frozen, STEPS)
        return [
            self.aim(schedules.cubic(Fraction(t + 1, STEPS), options["initial"], self.sparsity, first, end))
            for t in range(STEPS)
        ]


def trained(
    name: str | Mapping[str, Any],
    pattern: str,
    settings: Mapping[str, Any] | None = None,
    *,
    dense: bool = False,
    sparsity: float = 0.5,
    seed: int = 0,
    change: Callable[[Any], Any] = lambda method: method,
    given: Toy | None = None,
) -> Ran:
    """Train a toy with a recipe, at a rate that moves its weights, four sequences in micro-batches of
    three.
    """
    values = {"rate.rate": 0.03, "batch": 4, "clip": 0, **(settings or {})}
    recipe, method = recipe_method(name, STEPS, values)
    given = given or toy(seed)
    start = matrices(given, pattern, sparsity, dense)
    run = record(task(given, matrices=start, batch=3), change(method))
    rates = [recipe.rate.at(t, STEPS) for t in range(STEPS)]
    if pattern != "unstructured":
        sparsity = start["a"].sparsity
    return Ran(given, recipe, run, pattern, sparsity, rates)


def close(actual: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(actual, wanted, rtol=3e-5, atol=1e-5)


def same(ran: Ran, history: list[Step], beta: list[float] | None = None, part: str = "theta") -> None:
    """Masks, what is trained and V agree after every step; in the frozen part what is pruned is gone."""
    run, beta = ran.run, beta or [0.0] * STEPS
    for t, step in enumerate(history, 1):
        np.testing.assert_array_equal(run.keeps[t]["a"], step.keep, err_msg=f"mask of step {t}")
        gone = t >= ran.frozen and part == "theta"
        wanted = np.where(step.keep, step.theta, 0.0) if gone else step.theta
        found = run.tensors[t]["a"][part]
        close(found, wanted[step.keep] if found.ndim == 1 else wanted)  # kept weights alone, or all
        if part == "theta":
            fades = beta[t] if t < STEPS else 0.0
            close(run.weights[t]["a"], np.where(step.keep, step.theta, fades * step.theta))
        else:
            close(run.weights[t]["a"], step.weight)


def wanda(ran: Ran) -> ro.Gradient | Any:
    """Wanda's score of the toy, whose inputs never change."""
    norms = np.sqrt((array(ran.given.inputs["a"]) ** 2).mean(axis=(0, 1)))
    return lambda theta: np.abs(theta) * norms


# --- the mask stays


def fine_tuned(name: str, pattern: str) -> None:
    settings = {"rates": []} if name == "recover-best" else {}
    ran = trained(name, pattern, settings)
    make, rates = ADAM, ran.rates
    if name == "ebft":  # rates are relative to the size of the kept weights
        make = partial(AdamW, (0.9, 0.95), 1e-12)
        size = math.sqrt((ran.weight[ran.keep] ** 2).mean())
        rates = [rate * size for rate in rates]
    same(ran, ro.masked_fine_tuning(ran.weight, ran.keep, ran.gradient, rates, make))
    assert ran.run.flips() == 0


def norms(name: str, pattern: str) -> None:
    given = replace(toy(), others={"gain": 1 + torch.arange(8.0) / 8})
    ran = trained(name, pattern, change=mean_square, given=given)
    x, y = array(given.inputs["a"]), array(given.wanted)
    batches = [(x[rows].reshape(-1, 16), y[rows].reshape(-1, 8)) for rows in ran.run.rows]
    weight = ran.weight * ran.keep
    history = ro.norms(array(given.others["gain"]), None, weight, batches, ran.rates, ADAM)
    for t, step in enumerate(history, 1):
        close(ran.run.others[t]["gain"], step.theta[0])
        np.testing.assert_array_equal(ran.run.weights[t]["a"], weight)


def low_rank(name: str, pattern: str) -> None:
    ran = trained(name, pattern, {"trainable.rank": 3})
    first = ran.run.of("a", "a")[0]
    assert (ran.run.of("a", "b")[0] == 0).all() and np.abs(first).max() <= 1 / 4 < 2 * np.abs(first).max()
    history = ro.masked_lora(ran.weight, ran.keep, first, ran.gradient, ran.rates, ADAM, 32.0)
    for t, step in enumerate(history, 1):
        for part, wanted in zip("ab", step.theta, strict=True):
            close(ran.run.of("a", part)[t], wanted)
        close(ran.run.weights[t]["a"], step.weight)


def scaled(name: str, pattern: str) -> None:
    ran = trained(name, pattern, {"trainable.groups": 4})
    a, b = (ran.run.of("a", part)[0] for part in "ab")
    assert (a == 0).all() and b.shape == (4, 16)
    history = ro.spp(ran.weight * ran.keep, a, b, ran.gradient, ran.rates, ADAM, 2.0)
    for t, step in enumerate(history, 1):
        for part, wanted in zip("ab", step.theta, strict=True):
            close(ran.run.of("a", part)[t], wanted)
        close(ran.run.weights[t]["a"], step.weight)


# --- straight-through


def straight(name: str, pattern: str) -> None:
    """SR-STE and AST: moments are never zeroed, since every weight has a gradient at every step."""
    ran = trained(name, pattern, {"numbers.lam": 0.05, **({"schedule.moves": 7} if name == "ast" else {})})
    score = wanda(ran) if name == "ast" else np.abs
    lam = ran.until_frozen(0.05)
    if name == "ast":
        lam = [schedules.pull(t, rate, STEPS // 4) for t, rate in enumerate(lam)]
    keep = ro.top(score(ran.weight), ran.last)
    history = evolving.sr_ste(
        ran.weight,
        keep,
        ran.gradient,
        ran.rates,
        AST,
        ran.last,
        ran.moves(),
        lam,
        score,
        forget=False,
    )
    same(ran, history)
    assert ran.run.flips() >= 2


def fading(name: str, pattern: str) -> None:
    ran = trained(name, pattern)
    beta = [schedules.beta(t, 1 / ran.frozen) for t in range(STEPS)]
    keep = ro.top(np.abs(ran.weight), ran.last)
    args = (ran.weight, keep, ran.gradient, ran.rates, ADAM, ran.last, ran.moves(), beta)
    same(ran, evolving.mdgf(*args, forget=False), beta)
    assert ran.run.flips() >= 2


def ladder(name: str, pattern: str) -> None:
    ran = trained(name, pattern, dense=True, sparsity=0.75)
    end = Fraction(ran.frozen, STEPS)
    rungs = [ran.aim(0.25), ran.aim(0.5)]
    frames = [
        schedules.rung(Fraction(t, STEPS), rungs, end) if t < ran.frozen else ran.last for t in range(STEPS)
    ]
    keep = ro.top(np.abs(ran.weight), frames[0])
    args = (ran.weight, keep, ran.gradient, ran.rates, ADAM, [*frames[1:], ran.last], ran.moves())
    same(ran, evolving.sdgf(*args, forget=False))
    assert ran.run.flips() >= 2


def feedback(name: str, pattern: str) -> None:
    ran = trained(name, pattern, {"schedule.moves": 6}, dense=True)
    args = (ran.weight, ran.keep | True, ran.gradient, ran.rates, ADAM, ran.cubic(), ran.moves())
    same(ran, evolving.dpf(*args, forget=False))
    assert ran.run.flips() >= 2


def shrinking(name: str, pattern: str) -> None:
    ran = trained(name, pattern)
    keep = ro.top(np.abs(ran.weight), ran.last)
    history = phases.iss_p(
        ran.weight, keep, ran.gradient, ran.rates, ADAM, ran.last, 0.95, ran.frozen, forget=False
    )
    same(ran, history, ran.until_frozen(1.0))
    assert ran.run.flips() >= 2


# --- nothing remains of what is pruned


def steep(pattern: str) -> str:
    """A pattern to which there is more than one step from a dense start."""
    return "1:4" if pattern == "2:4" else pattern


def gradual(name: str, pattern: str) -> None:
    ran = trained(name, steep(pattern), {"schedule.moves": 6}, dense=True, sparsity=0.75)
    rising = ran.cubic()
    keep = ro.top(np.abs(ran.weight), ran.aim(0.3))
    same(ran, evolving.gmp(ran.weight, keep, ran.gradient, ran.rates, ADAM, rising, ran.moves()))
    assert ran.run.flips() >= 2


def powered(name: str, pattern: str) -> None:
    ran = trained(name, steep(pattern), {"schedule.moves": 6}, dense=True, sparsity=0.75)
    keep = ro.top(np.abs(ran.weight), ran.aim(0.3))
    history = phases.powerpropagation(
        ran.weight, keep, ran.gradient, ran.rates, ADAM, 2.0, ran.cubic(), ran.moves()
    )
    for t, step in enumerate(history, 1):
        np.testing.assert_array_equal(ran.run.keeps[t]["a"], step.keep)
        close(ran.run.of("a", "theta")[t], step.theta)
        close(ran.run.weights[t]["a"], step.weight)
    assert ran.run.flips() >= 2


def staged(name: str, pattern: str) -> None:
    ran = trained(name, pattern, dense=True, sparsity=0.75)
    score = wanda(ran)
    keep = ro.top(score(ran.weight), ran.aim(0.5))
    history = ro.four_numbers(
        ran.weight * keep,
        keep,
        ran.gradient,
        ran.rates,
        ADAM,
        sparsity=ran.last,
        moves=ran.moves(),
        score=score,
    )
    same(ran, history)
    assert ran.run.flips() >= 1 if pattern == "unstructured" else ran.run.flips() >= 0


def alternating(name: str, pattern: str) -> None:
    ran = trained(name, pattern)
    end = Fraction(ran.frozen, STEPS)
    dense = [schedules.acdc_dense(Fraction(t, STEPS), 0, end / 6, end * 5 / 6, end) for t in range(STEPS)]
    assert not dense[0] and sum(a != b for a, b in pairwise(dense)) == 6
    history = phases.acdc(ran.weight, ran.keep, ran.gradient, ran.rates, ADAM, ran.last, dense)
    same(ran, history)


def by_parts(name: str, pattern: str) -> None:
    ran = trained(name, pattern, given=toy(count=3))
    names = list(ran.given.weights)
    every = gradients(ran.given, ran.recipe, ran.run)

    def gradient(weights: list[np.ndarray], t: int) -> list[np.ndarray]:
        return list(every(dict(zip(names, weights, strict=True)), t).values())

    end = Fraction(ran.frozen, STEPS)
    dense = [schedules.gap_part(Fraction(t, STEPS), 3, 3, end) for t in range(STEPS)]
    assert dense[0] == 0 and dense[-1] is None
    keeps = [array(ran.given.keeps[name]) for name in names]
    weights = [array(ran.given.weights[name]) * keep for name, keep in zip(names, keeps, strict=True)]
    history = phases.gap(weights, keeps, gradient, ran.rates, ADAM, [ran.last] * 3, [0, 1, 2], dense)
    for t, step in enumerate(history, 1):
        for j, matrix in enumerate(names):
            np.testing.assert_array_equal(ran.run.keeps[t][matrix], step.keep[j])
            close(ran.run.of(matrix, "theta")[t], step.theta[j])
            close(ran.run.weights[t][matrix], step.weight[j])
    assert all(ran.run.flips(matrix) >= 1 for matrix in names)


def exchanged(name: str, pattern: str, grown: str = "zero") -> None:
    growth = {
        "rigl": "gradient",
        "set": "random",
        "itop": "unfired",
        "grow-momentum": "momentum",
        "dst-ee": "ee",
    }[name]
    settings: dict[str, Any] = {"schedule.moves": 5, "schedule.apart": 1, "trainable.grown": grown}
    if name == "dst-ee":
        settings |= {"rule.relative": False, "rule.explore": 0.01}
    ran = trained(name, pattern, settings)
    options = ran.recipe.schedule.options
    share = [
        options["share"]
        if options["decay"] == "constant"
        else schedules.drop_share(Fraction(t + 1, STEPS), options["share"], Fraction(ran.frozen, STEPS))
        for t in range(STEPS)
    ]
    uniform = [
        array(torch.rand((8, 16), generator=ran.run.loop._generator("a", t + 1))) for t in range(STEPS)
    ]
    history = evolving.drop_and_grow(
        ran.weight,
        ran.keep,
        ran.gradient,
        ran.rates,
        ADAM,
        ran.last,
        ran.moves(),
        share,
        growth,
        "set" if name == "set" else "magnitude",
        uniform,
        c=0.01,
        eps=1.0,
        origin=ran.weight if grown == "dense" else None,
        still=name in ("rigl", "dst-ee"),
        forget=name != "grow-momentum",  # there gradients reach every weight, and moments are those of now
    )
    same(ran, history)
    assert ran.run.flips() >= 2


# --- more than weights


def renewed(name: str, pattern: str) -> None:
    ran = trained(name, pattern, {"trainable.rank": 3}, dense=True, sparsity=0.75)
    moves, rising = ran.moves(), ran.cubic()
    wanted = [schedules.losa_sparsity(i, 5, ran.sparsity) for i in range(1, 6)]
    at = [t for t in range(STEPS) if moves[t]]
    assert at == [1, 4, 6, 9, 11]  # a fifth of the moving part each
    exact = [ran.aim(each) for each in wanted]
    rising = [exact[at.index(t)] if t in at else 0.0 for t in range(STEPS)]
    adapters = [ran.run.of("a", "a")[t] for t in (0, *(t + 1 for t in at))]
    history = phases.losa(
        ran.weight,
        ran.keep | True,
        adapters,
        ran.gradient,
        ran.rates,
        ADAM,
        16.0,
        rising,
        moves,
        wanda(ran),
    )
    for t, step in enumerate(history, 1):
        np.testing.assert_array_equal(ran.run.keeps[t]["a"], step.keep)
        for part, each in zip("ab", step.theta, strict=True):
            close(ran.run.of("a", part)[t], each)
        close(ran.run.weights[t]["a"], step.weight)
    assert ran.run.flips() >= 2


def split(name: str, pattern: str) -> None:
    for rule in ("magnitude", "curvature"):
        projected(name, pattern, rule)


def projected(name: str, pattern: str, rule: str) -> None:
    ran = trained(name, pattern, {"schedule.moves": 6, "trainable.penalty": 0.3, "rule": rule})
    keep, dense = ran.run.keeps[ran.frozen]["a"], ran.gradient

    def gradient(weight: np.ndarray, t: int) -> np.ndarray:
        return dense(weight, t) if t < ran.frozen else dense(weight * keep, t) * keep

    pull = ran.until_frozen(0.3)
    history = phases.elsa(
        ran.weight, ran.keep, gradient, ran.rates, ADAM, ran.last, ran.moves(), pull, rule == "curvature"
    )
    for t, step in enumerate(history, 1):
        np.testing.assert_array_equal(ran.run.keeps[t]["a"], step.keep)
        theta, z, u = step.theta
        frozen = t >= ran.frozen
        close(ran.run.of("a", "theta")[t], theta * step.keep if frozen else theta)
        if not frozen:
            close(ran.run.fixed[t]["a"]["z"], z)
            close(ran.run.fixed[t]["a"]["u"], u)
        close(ran.run.weights[t]["a"], theta * step.keep if frozen else theta)
    assert ran.run.flips() >= 2


# --- the mask is learned


def scored(name: str, pattern: str) -> None:
    ran = trained(name, pattern, {"rate.rate": 0.02})
    size = math.sqrt((ran.weight**2).mean())
    rates = [rate / size for rate in ran.rates]
    history = learned.jackpots(ran.weight, ran.keep, ran.gradient, rates, lambda: SGD(0.9), ran.last)
    same(ran, history, part="score")
    assert ran.run.flips() >= 2


def low_rank_scored(name: str, pattern: str) -> None:
    settings = {"trainable.rank": 2, "trainable.score_rank": 3}
    ran = trained(name, pattern, settings, dense=True)
    parts = ("u", "q", "a", "b", "rows", "columns")
    factors = [ran.run.of("a", part)[0] for part in parts]
    history = learned.pst(
        ran.weight,
        (*factors[:4], factors[4][:, 0], factors[5][0]),
        ran.keep | True,
        ran.gradient,
        ran.rates,
        ADAM,
        ran.cubic(),
        ran.moves(),
        [t < ran.frozen for t in range(STEPS)],
    )
    for t, step in enumerate(history, 1):
        np.testing.assert_array_equal(ran.run.keeps[t]["a"], step.keep)
        for part, wanted in zip(parts[: 6 if t <= ran.frozen else 2], step.theta, strict=False):
            close(ran.run.of("a", part)[t].reshape(wanted.shape), wanted)
        close(ran.run.weights[t]["a"], step.weight)
    assert ran.run.flips() >= 2


def patterned(name: str, pattern: str) -> None:
    settings = {"trainable.penalty": 0.01, "trainable.tau_last": 1.0, "rate.rate": 0.005}
    ran = trained(name, pattern, settings)
    trainable, (n, m) = ran.run.loop.trained["a"], map(int, pattern.split(":"))
    first = ran.run.of("a", "logits")[0]
    noise = []
    for t in range(STEPS):
        generator = torch.Generator().manual_seed((trainable._seed + t) % (1 << 62))
        uniform = array(torch.rand(first.shape, generator=generator))
        noise.append(-np.log(-np.log(uniform)))
    kappa = [schedules.linear(t / STEPS, 100, 500) for t in range(STEPS)]
    tau = [schedules.linear(t / STEPS, 4, 1) for t in range(STEPS)]
    history = learned.maskllm(
        ran.weight,
        first,
        ran.gradient,
        ran.rates,
        partial(AdamW, (0.9, 0.95), 1e-5),
        n,
        m,
        kappa,
        tau,
        noise,
        [schedules.linear(t / STEPS, 0.01, 0) for t in range(STEPS)],
    )
    for t, step in enumerate(history, 1):
        np.testing.assert_array_equal(ran.run.keeps[t]["a"], step.keep)
        close(ran.run.of("a", "logits")[t], step.theta)
        if t < STEPS:
            choice = learned.maskllm_choice(step.theta, noise[t], kappa[t], tau[t])
            np.testing.assert_allclose(
                ran.run.weights[t]["a"], learned.maskllm_soft(ran.weight, choice, n, m), atol=1e-4
            )
    np.testing.assert_array_equal(ran.run.weights[STEPS]["a"], ran.weight * history[-1].keep)
    assert ran.run.flips() >= 2


CHECKS: dict[str, Callable[[str, str], None]] = {
    "masked-finetuning": fine_tuned,
    "recover-best": fine_tuned,
    "squarehead": fine_tuned,
    "soup": fine_tuned,
    "ebft": fine_tuned,
    "perp": norms,
    "masklora": low_rank,
    "spp": scaled,
    "sr-ste": straight,
    "ast": straight,
    "mdgf": fading,
    "sdgf": ladder,
    "dpf": feedback,
    "iss-p": shrinking,
    "gmp": gradual,
    "powerprop": powered,
    "sparse-llama": staged,
    "acdc": alternating,
    "gap": by_parts,
    "rigl": exchanged,
    "set": exchanged,
    "itop": exchanged,
    "grow-momentum": exchanged,
    "dst-ee": exchanged,
    "losa": renewed,
    "elsa": split,
    "jackpots": scored,
    "pst": low_rank_scored,
    "maskllm": patterned,
}


def test_every_shipped_recipe_has_a_check():
    assert sorted(CHECKS) == recipes.names()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", [name for name in CHECKS if name != "maskllm"])
def test_a_recipe_does_what_its_reference_does(name, pattern):
    CHECKS[name](name, pattern)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_maskllm_does_what_its_reference_does(pattern):
    CHECKS["maskllm"]("maskllm", pattern)


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_grown_weights_may_start_as_those_of_the_dense_model(name):
    exchanged(name, "unstructured", grown="dense")


@pytest.mark.parametrize("exponent", [1.5, 3.0])
def test_any_power_does_what_its_reference_does(exponent):
    ran = trained(
        "powerprop", "unstructured", {"schedule.moves": 4, "trainable.exponent": exponent}, dense=True
    )
    keep = ro.top(np.abs(ran.weight), 0.3)
    history = phases.powerpropagation(
        ran.weight, keep, ran.gradient, ran.rates, ADAM, exponent, ran.cubic(), ran.moves()
    )
    for t, step in enumerate(history, 1):
        np.testing.assert_array_equal(ran.run.keeps[t]["a"], step.keep)
        close(ran.run.of("a", "theta")[t], step.theta)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    ("beta", "gamma", "lam", "rho"), [(0.3, 0.6, 0.1, 0.7), (0, 1, 0.1, 1), (1, 0.5, 0, 0.9)]
)
def test_any_four_numbers_are_the_step_of_the_formula(beta, gamma, lam, rho, optimizer):
    """With clipped gradients, which the pull comes after, and decay, which it does not see."""
    recipe = {
        "schedule": {"name": "fixed", "moves": 7, "freeze": 0.25},
        "rule": "magnitude",
        "trainable": "dense",
        "objective": ["next-token", "kd"],
        "numbers": {"beta": beta, "gamma": gamma, "lam": lam, "rho": rho},
        "optimizer": {"name": optimizer, "weight_decay": 0.1 if optimizer == "adamw" else 0},
    }
    ran = trained(recipe, "unstructured", {"clip": 0.2})
    adam = partial(ASTAdamW if lam else AdamW, (0.9, 0.95), 1e-8, 0.1)
    history = ro.four_numbers(
        ran.weight,
        ro.top(np.abs(ran.weight), ran.last),
        ran.gradient,
        ran.rates,
        adam if optimizer == "adamw" else lambda: SGD(0.9),
        beta=ran.until_frozen(beta),
        gamma=ran.until_frozen(gamma),
        pull=ran.until_frozen(lam),
        rho=ran.until_frozen(rho),
        sparsity=ran.last,
        moves=ran.moves(),
        forget=False,
        clip=0.2,
    )
    same(ran, history, ran.until_frozen(beta))
    assert optimizer == "sgd" or ran.run.flips() >= 2
