"""Allocators against their oracles, and exact totals."""

import oracles
import pytest
import torch
from jobs import ALL, array, inputs, statistics

from llmprune import registry
from llmprune.contracts import Job
from llmprune.patterns import Unstructured
from llmprune.planning.allocation import balanced, rounded

SHAPES = {
    "model.0.q": (8, 8),
    "model.0.up": (24, 8),
    "model.1.q": (8, 8),
    "model.1.up": (24, 8),
    "model.2.q": (8, 8),
    "model.2.up": (24, 8),
}

BLOCKS = {name: int(name.split(".")[1]) for name in SHAPES}

SIZES = {n: r * c for n, (r, c) in SHAPES.items()}


def build(name, **options):
    return registry.build("allocators", name, options)


def jobs(seed):
    x = inputs(8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 8), (24, 8)]
    return [
        Job(
            f"m{r}",
            torch.randn(r, c, generator=generator) ** 3,
            statistics(x, ALL),
            Unstructured(),
            0.0,
            generator,
        )
        for r, c in shapes
    ]


def total(shares):
    return sum(shares[n] * SIZES[n] for n in SIZES) / sum(SIZES.values())


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
def test_erk_equals_the_oracle(sparsity):
    shares = build("erk").allocate(SHAPES, BLOCKS, {}, sparsity)
    assert shares == pytest.approx(oracles.erk(SHAPES, sparsity))
    assert total(shares) == pytest.approx(sparsity)
    assert shares["model.0.q"] < shares["model.0.up"]


@pytest.mark.parametrize("name", ["owl", "dlp"])
def test_measured_allocators_equal_the_oracle(name):
    allocator = build(name)
    work = {b: jobs(b) for b in range(3)}
    measures = {b: allocator.measure(block) for b, block in work.items()}
    given = [[(array(j.weight), array(j.stats.second_moment)) for j in block] for block in work.values()]
    wanted = oracles.owl(given, 0.6) if name == "owl" else oracles.dlp(given, 0.6)
    shares = allocator.allocate(SHAPES, BLOCKS, measures, 0.6)
    assert [shares[f"model.{b}.q"] for b in range(3)] == pytest.approx(wanted)
    assert max(wanted) - min(wanted) == pytest.approx(0.16 if name == "owl" else 0.3)


@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_atp_is_an_arithmetic_progression(sparsity):
    allocator = build("atp", slopes=[0.0, 0.5, -0.25])
    for trial, share in enumerate((0.0, 0.5, -0.25)):
        shares = allocator.allocate(SHAPES, BLOCKS, {}, sparsity, trial)
        assert [shares[f"model.{b}.q"] for b in range(3)] == pytest.approx(oracles.atp(3, sparsity, share))
        assert total(shares) == pytest.approx(sparsity)
    assert (
        allocator.trials == ("slope 0", "slope 0.5", "slope -0.25") and build("atp", slopes=0.5).trials == ()
    )
    one_block = dict.fromkeys(list(SHAPES)[:2], 0)
    assert set(allocator.allocate({n: SHAPES[n] for n in one_block}, one_block, {}, sparsity).values()) == {
        sparsity
    }
    with pytest.raises(ValueError, match=r"slopes must be shares in \[-1, 1\], got \[2.0\]"):
        build("atp", slopes=[2])


def test_equal_blocks_get_equal_shares():
    for name in ("owl", "dlp"):
        assert set(build(name).allocate(SHAPES, BLOCKS, {0: 0.5, 1: 0.5, 2: 0.5}, 0.6).values()) == {0.6}


def test_explicit_shares_the_rest():
    shares = build("explicit", sparsity={"*.0.*": 0.2, "*.q": 0.5}).allocate(SHAPES, BLOCKS, {}, 0.6)
    assert shares["model.0.q"] == shares["model.0.up"] == 0.2 and shares["model.1.q"] == 0.5
    assert total(shares) == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"leave 1\.\d+ for the other matrices to reach 0.9"):
        build("explicit", sparsity={"*.0.*": 0.2}).allocate(SHAPES, BLOCKS, {}, 0.9)
    with pytest.raises(ValueError, match=r"'\*\.k' .* matches no matrix"):
        build("explicit", sparsity={"*.k": 0.2}).allocate(SHAPES, BLOCKS, {}, 0.5)
    for bad in ({"*": 1.0}, {"*": "most"}, [0.5]):
        with pytest.raises(ValueError, match="sparsity"):
            build("explicit", sparsity=bad)


def test_wishes_are_shifted_and_clamped_to_the_exact_total():
    wishes = dict(zip(SHAPES, [-0.3, 0.2, 0.5, 0.9, 1.4, 0.7], strict=True))
    for sparsity in (0.05, 0.5, 0.9):
        shares = balanced(wishes, SIZES, sparsity)
        assert total(shares) == pytest.approx(sparsity, abs=1e-9) and all(
            0 <= s <= 0.99 for s in shares.values()
        )
    assert balanced(dict.fromkeys(SHAPES, 0.5), SIZES, 0.5) == dict.fromkeys(SHAPES, 0.5)


def test_rounding_is_exact_to_the_weight():
    shares = balanced(dict(zip(SHAPES, [0.31, 0.22, 0.53, 0.91, 0.74, 0.7], strict=True)), SIZES, 0.637)
    wanted = int(0.637 * sum(SIZES.values()))
    counts = rounded(shares, SIZES, dict.fromkeys(SIZES, 1), wanted)
    assert sum(counts.values()) == wanted
    assert all(abs(counts[n] - shares[n] * SIZES[n]) <= 1 + 1e-6 for n in SIZES)
    rows = rounded(shares, SIZES, {n: r for n, (r, _) in SHAPES.items()}, wanted)
    assert 0 <= wanted - sum(rows[n] * SHAPES[n][0] for n in SHAPES) < 24
