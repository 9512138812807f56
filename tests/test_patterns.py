"""Masks: exact for any pattern, sparsity and shape, stable on ties, slices that add up."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.patterns import NM, PublishedThreshold, Unstructured, exact_pattern, parse

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 40))


def scores(shape, seed, levels):
    """Few distinct levels, so that ties are everywhere; 0 levels: continuous."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, shape, generator=generator).float()
    return torch.rand(shape, generator=generator)


@settings(max_examples=200, deadline=None)
@given(
    SHAPES,
    st.floats(0, 0.999),
    st.sampled_from(["row", "matrix"]),
    st.integers(0, 99),
    st.sampled_from([0, 2, 3]),
)
def test_unstructured_masks_are_exact_and_equal_the_oracle(shape, sparsity, scope, seed, levels):
    score = scores(shape, seed, levels)
    keep = Unstructured(scope).select(score, sparsity)
    Unstructured(scope).check(keep, sparsity)
    wanted = shape[0] * int(shape[1] * sparsity) if scope == "row" else int(shape[0] * shape[1] * sparsity)
    assert int((~keep).sum()) == wanted
    assert np.array_equal(keep.numpy(), oracles.unstructured_mask(score.numpy(), sparsity, scope))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(2, 9).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    st.data(),
)
def test_n_m_masks_are_exact_and_equal_the_oracle(rows, groups, nm, data):
    n, m = nm
    score = scores((rows, groups * m), data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0, 2])))
    keep = NM(n, m).select(score, 0.5)
    NM(n, m).check(keep, 0.5)
    assert bool((keep.view(-1, m).sum(1) == n).all())
    assert np.array_equal(keep.numpy(), oracles.nm_mask(score.numpy(), n, m))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.floats(0, 0.999), st.sampled_from(["row", "matrix"]), st.integers(1, 40))
def test_slices_add_up_to_the_exact_count(shape, sparsity, scope, width):
    pattern = Unstructured(scope)
    parts = [
        pattern.select(s, sparsity, a * width) for a, s in enumerate(scores(shape, 0, 0).split(width, dim=1))
    ]
    pattern.check(torch.cat(parts, dim=1), sparsity)


def test_wide_rows_are_worked_off_in_slices_without_a_seam():
    score = scores((300, 2000), 1, 5)
    keep = Unstructured("row").select(score, 0.7)
    order = score.sort(dim=1, stable=True).indices[:, : int(2000 * 0.7)]
    assert torch.equal(keep, torch.ones_like(keep).scatter_(1, order, False))
    assert bool((NM(2, 4).select(scores((700, 2000), 1, 0), 0.5).view(-1, 4).sum(1) == 2).all())


def test_the_published_threshold_prunes_one_more_per_slice_and_overshoots_on_ties():
    score = scores((8, 16), 0, 0)
    assert int((~PublishedThreshold().select(score, 0.5)).sum()) == 65
    tied = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    assert PublishedThreshold().select(tied, 0.5).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "two:four", "2:4:8", "", "block"])
def test_a_pattern_that_makes_no_sense_is_refused(text):
    with pytest.raises(ValueError, match=r"N:M|0 < N < M"):
        parse(text)


def test_a_broken_mask_is_noticed():
    keep = Unstructured("row").select(scores((4, 8), 0, 0), 0.5)
    keep[0, 0] = ~keep[0, 0]
    with pytest.raises(ValueError, match="where 4 are wanted"):
        Unstructured("row").check(keep, 0.5)
    with pytest.raises(ValueError, match="group of 4"):
        NM(2, 4).check(torch.ones(2, 8, dtype=torch.bool), 0.5)


@pytest.mark.parametrize(
    ("pattern", "columns", "found"),
    [("2:4", 48, "2:4"), ("1:4", 48, "1:4"), ("3:8", 48, "3:8"), ("5:16", 48, "5:16"), ("2:4", 20, "2:4")],
)
def test_the_pattern_that_a_mask_holds_exactly(pattern, columns, found):
    score = torch.rand(6, columns, generator=torch.Generator().manual_seed(0))
    keep = parse(pattern).select(score, 0.5)
    assert str(exact_pattern(keep)) == found
    keep[5, -1] = ~keep[5, -1]
    assert exact_pattern(keep) is None
    assert exact_pattern(torch.ones(6, columns, dtype=torch.bool)) is None
