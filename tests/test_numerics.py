"""Hard layers: every method gives finite weights and exact counts, says what damping it took, and refuses
what cannot be done.
"""

import pytest
import torch
from jobs import ALL, inputs, job, statistics

from llmprune import registry
from llmprune.contracts import InputStats, Job, Need, Step
from llmprune.numerics.gram import inverse_factor
from llmprune.patterns import NM, Unstructured
from llmprune.run.matrix import check_promises

COLUMNS = 32


def dead(x):
    x[..., ::5] = 0
    return x


INPUTS = {
    "dead features": lambda: dead(inputs(COLUMNS)),
    "all zero": lambda: torch.zeros(4, 10, COLUMNS),
    "fewer tokens than features": lambda: inputs(COLUMNS, sequences=2, tokens=3),
    "badly scaled": lambda: inputs(COLUMNS) * torch.logspace(-4, 4, COLUMNS),
    "copies of a feature": lambda: inputs(COLUMNS)[..., :1].expand(-1, -1, COLUMNS).contiguous(),
    "rounded to bfloat16": lambda: inputs(COLUMNS).bfloat16().float(),
}
STEPS = [
    (r, n)
    for r in ("refiners", "updates")
    for n in registry.names(r)
    if issubclass(registry.find(r, n), Step)
]
METHODS = [("pruners", n) for n in registry.names("pruners")] + STEPS


def run(room, name, work):
    if room == "pruners":
        return registry.build(room, name, {}).prune(work), None
    start = registry.build("pruners", "wanda", {}).prune(work)
    return registry.build(room, name, {}).apply(work, start), start


def task(pattern, x, rows=12):
    return job(pattern, pattern.sparsity if isinstance(pattern, NM) else 0.6, rows=rows, columns=COLUMNS, x=x)


@pytest.mark.parametrize(
    "pattern", [Unstructured("row"), Unstructured("matrix"), NM(2, 4)], ids=["row", "matrix", "2:4"]
)
@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize(("room", "name"), METHODS)
def test_hard_inputs(room, name, case, pattern):
    work = task(pattern, INPUTS[case]())
    out, start = run(room, name, work)
    check_promises(work, out, registry.build(room, name, {}), start)
    gram_alone = Need.GRAM in registry.build(room, name, {}).needs and name != "swaps"
    assert not gram_alone or out.notes["damp"] >= 0.01


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_constant_and_empty_rows_and_bfloat16_weights(room, name):
    work = task(Unstructured("row"), inputs(COLUMNS))
    weight = work.weight.bfloat16().float()
    weight[0], weight[1] = 0.5, 0.0
    weight[:, 3] = 0.0
    work = Job(work.name, weight, work.stats, work.pattern, work.sparsity, work.generator)
    out, start = run(room, name, work)
    check_promises(work, out, registry.build(room, name, {}), start)


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_the_number_of_threads_hardly_matters(room, name):
    masks = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            work = job(Unstructured("row"), 0.6, rows=64, columns=128)
            masks.append(run(room, name, work)[0].keep)
        finally:
            torch.set_num_threads(before)
    assert (masks[0] == masks[1]).float().mean() >= 0.999


def given(gram):
    stats = statistics(inputs(len(gram)), ALL)
    values = {Need.GRAM: gram, Need.SECOND_MOMENT: stats.second_moment}
    return Job(
        "model.layers.3.mlp.down_proj",
        torch.ones(4, len(gram)),
        InputStats(100, 10, values),
        Unstructured(),
        0.5,
        torch.Generator(),
    )


def test_damping_is_raised_in_steps_and_told():
    gram = torch.full((4, 4), 1.0)
    gram[0, 1] = gram[1, 0] = (
        1.15  # one eigenvalue is below zero: rounding of sums can do that, on a smaller scale
    )
    _, used = inverse_factor(given(gram), 0.01)
    assert used == pytest.approx(1.0)
    assert inverse_factor(given(torch.eye(4)), 0.01)[1] == 0.01


def test_beyond_the_limit_the_matrix_is_named():
    gram = torch.full((4, 4), 1.0)
    gram[0, 1] = gram[1, 0] = 9.0
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.down_proj .* damping 1 \(asked: 0\.01\)"):
        inverse_factor(given(gram), 0.01)
