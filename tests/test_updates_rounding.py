"""Rounding to a grid, and tuning on it, against their oracles."""

import numpy as np
import oracles
import pytest
import torch
from jobs import PATTERNS, array, build, inputs, job, layer, statistics

from llmprune.contracts import BlockJob, InputStats, Job, Need
from llmprune.kernels import layout
from llmprune.numerics import grids
from llmprune.numerics.grids import Straight
from llmprune.updates import rounding as module


def rounded(work, pruned, **options):
    return build("updates", "rounding", **options).apply(work, pruned)


def codes(result, bits):
    found = grids.codes_of(result.weight, result.scales, bits, 128)
    assert torch.equal(found * grids.spread(result.scales, found.shape), result.weight), (
        "every weight is a whole number times its scale"
    )
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_equal_the_oracle(bits):
    weight, importance = torch.randn(3, 200), torch.rand(200).exp()
    found = grids.scales_of(weight, bits, 128, importance)
    least = {8: 1.0, 4: 0.7, 3: 0.5, 2: 0.4}[bits]
    for r in range(3):
        for g, part in enumerate((slice(0, 128), slice(128, 200))):
            wanted = oracles.rounding_scale(array(weight[r, part]), bits, array(importance[part]), least)
            assert float(found[r, g]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("passes", [0, 2])
def test_rounding_equals_the_oracle(pattern, bits, passes):
    work = layer(pattern)
    pruned = build("pruners", "sparsegpt").prune(work)
    result = rounded(work, pruned, bits=bits, passes=passes)
    codes(result, bits)
    scale = array(grids.spread(result.scales, result.weight.shape))
    weight, keep, gram = array(pruned.weight), pruned.keep.numpy(), array(work.stats.gram)
    wanted = oracles.rounding(weight, keep, gram, scale, bits)
    if passes:
        wanted = oracles.rounding_descent(weight, wanted, keep, gram, scale, bits, passes)
    # Where a value lies halfway between two, float32 and float64 may decide otherwise, and the rest of the
    # row follows.
    rows = np.isclose(array(result.weight), wanted, atol=1e-6).all(axis=1)
    assert rows.mean() >= 0.9
    assert np.allclose(
        oracles.row_loss(weight, array(result.weight), gram), oracles.row_loss(weight, wanted, gram), rtol=0.2
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_making_up_for_it_lowers_the_error(bits):
    work = job(PATTERNS["row"], 0.5, rows=64, columns=160, x=inputs(160, sequences=20))
    pruned = build("pruners", "sparsegpt").prune(work)
    plain = grids.rounded(
        pruned.weight, grids.spread(grids.scales_of(pruned.weight, bits, 128), pruned.weight.shape), bits
    )

    def error(weight):
        difference = work.weight - weight
        return float((difference @ work.stats.gram * difference).sum())

    errors = [error(plain), *(error(rounded(work, pruned, bits=bits, passes=n).weight) for n in (0, 1, 3))]
    assert errors[0] > errors[1] > errors[2] >= errors[3] >= error(pruned.weight) * 0.999


def test_a_matrix_that_no_token_reached_is_rounded_as_it_is():
    work = layer("row")
    start = build("pruners", "magnitude").prune(work)
    nothing = Job(work.name, work.weight, InputStats(0, 0, {}), work.pattern, work.sparsity, work.generator)
    result = rounded(nothing, start)
    wanted = grids.rounded(start.weight, grids.spread(result.scales, start.weight.shape), 4)
    assert torch.equal(result.weight, wanted) and codes(result, 4).abs().max() == 7


def test_a_dense_matrix_is_rounded_too():
    weight = torch.randn(8, 64)
    work = Job("x", weight, statistics(inputs(64)), PATTERNS["row"], 0.0, torch.Generator())
    pruned = build("pruners", "magnitude").prune(work)
    assert bool(pruned.keep.all())
    codes(rounded(work, pruned, bits=3), 3)


def test_zero_rows_and_inputs_that_are_always_zero():
    x = inputs(32)
    x[..., 3] = 0
    work = job(PATTERNS["row"], 0.5, x=x)
    work.weight[2] = 0
    pruned = build("pruners", "wanda").prune(work)
    result = rounded(work, pruned)
    assert bool(result.weight.isfinite().all()) and not result.weight[2].any()


@pytest.mark.parametrize("options", [{"bits": 5}, {"bits": 16}, {"damp": 0.0}, {"passes": -1}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build("updates", "rounding", **options)


def test_rounding_and_packing_agree_on_the_columns_of_a_scale():
    assert grids.GROUP == layout.GROUP and module.Need.GRAM in build("updates", "rounding").needs
    assert build("updates", "rounding").needs == Need.GRAM


# --- tuning on the grid


def block_job(seed=0, bits=4, sequences=8):
    """A block that is one linear layer with rounded weights; see `test_updates_tuning`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, 5, 6, generator=generator)
    dense = torch.randn(4, 6, generator=generator)
    y = x @ dense.T + 0.1 * torch.randn(sequences, 5, 4, generator=generator)
    keep = torch.rand(4, 6, generator=generator) > 0.4
    scales = grids.scales_of(dense * keep, bits, 128)
    weight = grids.rounded(dense * keep, grids.spread(scales, dense.shape), bits)
    return (
        BlockJob(
            "block",
            {"w": weight},
            {"w": keep},
            sequences,
            range(sequences),
            3,
            lambda weights, rows: x[rows] @ weights["w"].T,
            lambda rows: y[rows],
            lambda *tensors: None,
            torch.Generator().manual_seed(seed),
            {"w": scales},
            bits,
        ),
        x,
        y,
    )


@pytest.mark.parametrize("bits", [3, 4])
def test_tuning_on_the_grid_equals_the_oracle(bits):
    work, x, y = block_job(bits=bits)
    options = {"steps": 25, "batch": 3, "rates": [0.02], "held_out": 0.25, "scale_rate": 0.5}
    tuned = build("updates", "block-tune", **options).apply(work)
    generator = torch.Generator().manual_seed(0)  # the same draws as the step's, in the same order
    order = torch.randperm(8, generator=generator).tolist()
    batches_generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,), generator=generator)))
    batches = oracles.block_tune_batches(
        order[2:], 3, 25, lambda n: torch.randperm(n, generator=batches_generator).tolist()
    )
    start = array(work.weights["w"])
    size = np.sqrt((start**2).sum() / work.keeps["w"].sum())
    weight, scale = oracles.block_tune_rounded(
        start,
        work.keeps["w"].numpy(),
        array(work.scales["w"])[:, 0],
        array(x),
        array(y),
        batches,
        (0.02 * float(size), 0.02 * 0.5),
        bits,
    )
    assert tuned.notes["tune"]["applied"]
    assert np.allclose(array(tuned.scales["w"])[:, 0], scale, rtol=1e-6)
    assert np.allclose(array(tuned.weights["w"]), weight, atol=1e-6)
    assert not torch.equal(tuned.scales["w"], work.scales["w"])


def test_tuned_weights_stay_on_the_grid_and_the_mask():
    work, _, _ = block_job()
    tuned = build("updates", "block-tune", steps=12).apply(work)
    weight, scales = tuned.weights["w"], tuned.scales["w"]
    assert scales.dtype == torch.bfloat16 and not weight[~work.keeps["w"]].any()
    steps = grids.spread(scales, weight.shape)
    assert torch.equal(grids.codes_of(weight, scales, 4, 128) * steps, weight)


def test_a_rate_that_only_hurts_leaves_weights_and_scales():
    work, _, _ = block_job()
    tuned = build("updates", "block-tune", steps=3, rates=[0.99], scale_rate=1.0).apply(work)
    assert not tuned.notes["tune"]["applied"]
    assert torch.equal(tuned.weights["w"], work.weights["w"]) and tuned.scales is work.scales


def test_the_gradient_passes_the_rounding():
    weight = torch.tensor([0.2, 0.9, 8.0, -9.0], requires_grad=True)
    steps = torch.ones(4, requires_grad=True)
    out = Straight.apply(weight, steps, 4)
    assert out.tolist() == [0.0, 1.0, 7.0, -7.0]
    out.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert weight.grad.tolist() == [1.0, 2.0, 0.0, 0.0]
    assert torch.allclose(steps.grad, torch.tensor([-0.2, 0.2, 21.0, -28.0]))


@pytest.mark.parametrize("shape", [(5, 300), (3, 5, 300)])
@pytest.mark.parametrize("turned", [False, True])
def test_scales_are_spread_along_the_columns(shape, turned):
    fewer = (*shape[:-1], 3)
    scales = torch.rand(fewer).bfloat16()
    wanted = torch.stack([scales[..., j // 128] for j in range(300)], -1).float()
    given = scales.mT if turned else scales
    full = torch.Size((*shape[:-2], shape[-1], shape[-2])) if turned else torch.Size(shape)
    assert torch.equal(grids.spread(given, full), wanted.mT if turned else wanted)
