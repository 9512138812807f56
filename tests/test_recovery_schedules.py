"""What schedules, numbers and learning rates say at every step, for every schedule."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import recovery_oracles_schedules as oracles

from llmprune import registry
from llmprune.recovery.exchange import Exchange
from llmprune.recovery.method import RateSpec
from llmprune.recovery.phases import FIXED, Numbers, Phase, Schedule

SCHEDULES = registry.names("recovery.schedules")
STEPS = [1, 2, 3, 5, 7, 20, 100, 999]
FREEZES = [0.0, 0.1, 0.22, 0.3, 0.5, 0.7, 0.95]
NUMBERS = Numbers(beta=0.5, gamma=1.0, lam=0.1, rho=0.9)
DECIDED = ("alternate", "cycle")  # their own options decide when masks move


def build(name: str, **options: object) -> Schedule:
    moves = {} if name in DECIDED or "moves" in options else {"moves": 5}
    return registry.build("recovery.schedules", name, {**moves, **options})


def phases(schedule: Schedule, steps: int, numbers: Numbers = NUMBERS) -> list[Phase]:
    """The phase of every step, and of the end."""
    return [schedule.at(step, steps, numbers) for step in range(steps + 1)]


@pytest.mark.parametrize("freeze", FREEZES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_pure_and_the_last_move_begins_the_frozen_part(name, freeze):
    for steps in STEPS:
        schedule, frozen = build(name, freeze=freeze), steps - round(freeze * steps)
        found = phases(schedule, steps)
        assert found == phases(build(name, freeze=freeze), steps)[::-1][::-1]
        assert [schedule.at(step, steps, NUMBERS) for step in reversed(range(steps + 1))] == found[::-1]
        moves = [phase.step for phase in found if phase.move]
        if name != "exchange" or frozen > 0:  # which has nothing to exchange by before the first step
            assert moves and moves[-1] == frozen, (steps, moves)
        assert all(phase.frozen == (phase.step >= frozen) for phase in found)
        for phase in found[frozen:]:
            assert phase.numbers == FIXED and phase.reach == 1 and not phase.dense
        for phase in found[:frozen]:
            assert phase.numbers == (0.5, 1.0, 0.1, 0.9) and 0 <= phase.reach <= 1
        assert [phase.progress for phase in found] == [step / steps for step in range(steps + 1)]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in DECIDED])
@pytest.mark.parametrize("moves", [1, 2, 3, 8, 1_000_000])
def test_moves_are_as_many_as_asked_for_and_evenly_spread(name, moves):
    for steps in STEPS:
        near = {"apart": 1} if name == "exchange" else {}
        schedule = build(name, moves=moves, start=0.1, freeze=0.3, **near)
        first, last = round(0.1 * steps), steps - round(0.3 * steps)
        at = [phase.step for phase in phases(schedule, steps) if phase.move]
        count = min(moves, last - first + 1)
        wanted = (
            {last} if count == 1 else {first + round(i * (last - first) / (count - 1)) for i in range(count)}
        )
        assert at == sorted(wanted - ({0} if name == "exchange" else set()))


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_moves_nothing_moves_but_where_that_cannot_be(name):
    if name in (*DECIDED, "cubic"):
        with pytest.raises(ValueError, match=r"moves must be .*1.* got 0"):
            build(name, moves=0)
        return
    found = phases(build(name, moves=0), 10)
    assert not any(phase.move for phase in found) and all(phase.frozen for phase in found)
    assert all(phase.numbers == FIXED for phase in found)


def test_before_the_start_there_is_no_move():
    for name in SCHEDULES:
        found = phases(build(name, start=0.2), 20)
        assert next(phase.step for phase in found if phase.move) == 4, name


def test_cubic_rises_as_its_formula():
    found = phases(build("cubic", initial=0.3, start=0.1, freeze=0.3), 50)
    for phase in found:
        sparsity = phase.initial + (0.9 - phase.initial) * phase.reach
        wanted = oracles.cubic(Fraction(phase.step, 50), 0.3, 0.9, Fraction(1, 10), Fraction(7, 10))
        assert sparsity == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("decay", ["cosine", "constant"])
def test_exchange_falls_by_a_cosine(decay):
    found = phases(build("exchange", share=0.4, freeze=0.25, decay=decay), 40)
    for phase in found[:30]:
        wanted = oracles.drop_share(Fraction(phase.step, 40), 0.4, Fraction(3, 4), decay)
        assert phase.share == pytest.approx(wanted)
    assert found[30].share == (0 if decay == "cosine" else 0.4)


def test_exchanges_lie_apart_and_a_span_of_one_step_has_a_progress():
    at = [phase.step for phase in phases(build("exchange", moves=30, freeze=0.2), 24) if phase.move]
    assert at == [5, 10, 14, 19]
    long = [phase.step for phase in phases(build("exchange", moves=30, freeze=0.22), 244) if phase.move]
    assert len(long) == 29, "30 fit, of which the first would lie before the first step"
    phases(build("cubic", start=0.5, freeze=0.4), 7)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_alternate_is_compressed_first_and_last(rounds):
    found = phases(build("alternate", rounds=rounds, freeze=0.2), 100)
    length = Fraction(80, 100) / (2 * rounds)
    for phase in found:
        late = Fraction(8, 10)
        dense = oracles.acdc_dense(Fraction(phase.step, 100), 0, length, late - length, late)
        assert phase.dense == (frozenset({0}) if dense else frozenset())
    assert sum(phase.move for phase in found) == 2 * rounds + 1


def test_cycle_makes_one_part_dense_after_the_other():
    found = phases(build("cycle", parts=3, rounds=2, freeze=0.25), 40)
    for phase in found:
        part = oracles.gap_part(Fraction(phase.step, 40), 3, 6, Fraction(3, 4))
        assert phase.dense == (frozenset() if part is None else frozenset({part})) and phase.parts == 3
    assert sum(phase.move for phase in found) == 7


def test_ladder_has_equal_frames_and_the_end_in_the_frozen_part():
    found = phases(build("ladder", rungs=[0.25, 0.5, 0.6], moves=1000, freeze=0.4), 50)
    for phase in found:
        rungs = [(0.25, 0), (0.5, 0), (0.6, 0)]
        wanted = oracles.rung(Fraction(phase.step, 50), rungs, Fraction(6, 10)) if phase.step < 30 else None
        assert (phase.initial, phase.reach) == ((wanted[0], 0.0) if wanted else (0.0, 1.0))


def test_numbers_fade_and_rise():
    numbers = Numbers(beta=1.0, beta_fall="linear", lam=0.2, ramp=0.25)
    found = phases(build("fixed", moves=1000, freeze=0.2), 40, numbers)
    for phase in found[:32]:
        beta, _, lam, _ = phase.numbers
        assert beta == pytest.approx(oracles.beta(phase.step, 1 / 32))
        assert lam == pytest.approx(oracles.pull(phase.step, 0.2, 10))
    numbers = Numbers(beta=1.0, beta_fall="exponential")
    for phase in phases(build("fixed", moves=1000, freeze=0.2), 40, numbers)[:32]:
        assert phase.numbers[0] == pytest.approx(oracles.beta(phase.step, 5 / 32, "exponential"))


def test_rates_rise_and_fall():
    spec = RateSpec(rate=2.0, warm_up=0.1, floor=0.1)
    rates = [spec.at(step, 100) for step in range(100)]
    for step, rate in enumerate(rates):
        wanted = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 100)))
        assert rate == pytest.approx(wanted * min(1, (step + 1) / 10))
    assert RateSpec(rate=2.0, warm_up=10).at(4, 100) == pytest.approx(
        spec.at(4, 100) * _fall(4, 0) / _fall(4, 0.1)
    )
    linear = RateSpec(rate=3.0, warm_up=0, decay="linear")
    assert [linear.at(step, 4) for step in range(4)] == [3.0, 2.25, 1.5, 0.75]
    assert RateSpec(rate=3.0, warm_up=0, decay="constant").at(7, 8) == 3.0


def _fall(step: int, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / 100))


def test_growing_rules_exchange_and_nothing_else_does():
    """The names that recipes are checked by."""
    growing = {
        name
        for name in registry.names("recovery.rules")
        if issubclass(registry.find("recovery.rules", name), Exchange)
    }
    assert growing == {name for name in registry.names("recovery.rules") if name.startswith("grow-")}
