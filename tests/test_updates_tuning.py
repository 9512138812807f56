"""Block tuning against its oracle."""

import numpy as np
import oracles
import pytest
import torch
from jobs import array

from llmprune import registry
from llmprune.contracts import BlockJob


def block_job(sequences=8, mine=None, batch=3, seed=0, add=lambda *tensors: None):
    """A block that is one linear layer: outputs x W^T, targets another layer's outputs plus noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, 5, 6, generator=generator)
    dense = torch.randn(4, 6, generator=generator)
    y = x @ dense.T + 0.1 * torch.randn(sequences, 5, 4, generator=generator)
    keep = torch.rand(4, 6, generator=generator) > 0.5
    work = BlockJob(
        "block",
        {"w": dense * keep},
        {"w": keep},
        sequences,
        mine or range(sequences),
        batch,
        lambda weights, rows: x[rows] @ weights["w"].T,
        lambda rows: y[rows],
        add,
        torch.Generator().manual_seed(seed),
    )
    return work, x, y


def test_tuning_equals_the_oracle():
    work, x, y = block_job()
    step = registry.build(
        "updates", "block-tune", {"steps": 25, "batch": 3, "rates": [0.01], "held_out": 0.25}
    )
    tuned = step.apply(work)
    kept = array(work.weights["w"])[work.keeps["w"].numpy()]
    generator = torch.Generator().manual_seed(0)  # the same draws as the step's, in the same order
    order = torch.randperm(8, generator=generator).tolist()
    batches_generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,), generator=generator)))
    batches = oracles.block_tune_batches(
        order[2:], 3, 25, lambda n: torch.randperm(n, generator=batches_generator).tolist()
    )
    wanted = oracles.block_tune(
        array(work.weights["w"]),
        work.keeps["w"].numpy(),
        array(x),
        array(y),
        batches,
        0.01 * np.sqrt(np.mean(kept**2)),
    )
    assert np.allclose(array(tuned.weights["w"]), wanted, atol=1e-5)
    note = tuned.notes["tune"]
    assert note["applied"] and note["held_out_after"] < note["held_out_before"]
    held = oracles.relative_error_of_rows(array(work.weights["w"]), array(x)[order[:2]], array(y)[order[:2]])
    assert note["held_out_before"] == pytest.approx(held, rel=1e-5)


def test_tuning_keeps_the_mask_and_its_input():
    work, _, _ = block_job()
    before = work.weights["w"].clone()
    tuned = registry.build("updates", "block-tune", {"steps": 10}).apply(work).weights["w"]
    assert torch.equal(before, work.weights["w"])
    assert bool((tuned[~work.keeps["w"]] == 0).all()) and not torch.equal(tuned, before)


def test_a_rate_that_only_hurts_is_not_applied():
    work, _, _ = block_job()
    tuned = registry.build("updates", "block-tune", {"steps": 3, "rates": [0.99]}).apply(work)
    assert not tuned.notes["tune"]["applied"] and torch.equal(tuned.weights["w"], work.weights["w"])


def test_the_next_rate_is_taken_where_one_does_not_lower_the_held_out_error():
    tuned, alone = (
        registry.build("updates", "block-tune", {"steps": 3, "rates": rates}).apply(block_job()[0])
        for rates in ([0.99, 0.01, 0.02], [0.01])
    )
    assert tuned.notes == alone.notes and tuned.notes["tune"]["rate"] == 0.01
    assert torch.equal(tuned.weights["w"], alone.weights["w"])


def test_micro_batches_do_not_change_the_result():
    step = registry.build("updates", "block-tune", {"steps": 12})
    whole, parts = (step.apply(block_job(batch=b)[0]).weights["w"] for b in (8, 1))
    assert torch.allclose(whole, parts, atol=1e-6)


@pytest.mark.parametrize(
    "option",
    [{"steps": 0}, {"batch": 0}, {"rates": []}, {"rates": [2.0]}, {"rates": ["fast"]}, {"held_out": 1.0}],
)
def test_bad_options_are_named(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        registry.build("updates", "block-tune", option)
