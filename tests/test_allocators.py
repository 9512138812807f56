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


def scored(name, scale, rows=48, columns=40, seed=0, routed=False):
    """A matrix with squared gradients, both of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * scale
    gradient = torch.randn(rows, columns, generator=g).exp() * torch.rand(columns, generator=g).exp()
    return Job(name, weight, statistics(inputs(8), ALL), Unstructured(), 0.0, g, routed, gradient)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_fisher_equals_the_oracle(sparsity):
    allocator = build("fisher", strength=1)
    work = {
        0: [scored("a", 1.0), scored("b", 0.3, seed=1)],
        1: [scored("c", 0.6, rows=64, seed=2), scored("d", 2.0, seed=3)],
    }
    measures = {block: allocator.measure(matrices) for block, matrices in work.items()}
    shapes = {j.name: tuple(j.weight.shape) for matrices in work.values() for j in matrices}
    blocks = {j.name: block for block, matrices in work.items() for j in matrices}
    given = {j.name: (array(j.weight), array(j.gradient)) for matrices in work.values() for j in matrices}
    shares = allocator.allocate(shapes, blocks, measures, sparsity)
    wanted = oracles.fisher(given, sparsity)
    assert shares == pytest.approx(wanted, abs=0.006 if sparsity < 0.8 else 0.02)
    assert shares["b"] > shares["a"] > shares["d"]
    half = build("fisher").allocate(shapes, blocks, measures, sparsity)
    assert half["b"] == pytest.approx((wanted["b"] + sparsity) / 2, abs=0.01)
    none = build("fisher", strength=0).allocate(shapes, blocks, measures, sparsity)
    assert none == pytest.approx(dict.fromkeys(shapes, sparsity))
    least = build("fisher", strength=1, most=0.9).allocate(shapes, blocks, measures, 0.8)
    assert max(least.values()) <= 0.9


def test_experts_share_one_curve_and_what_no_token_reached_gets_the_model_s_sparsity():
    allocator = build("fisher")
    work = [scored("q", 1.0), *(scored(f"e{n}", 0.3 + n, seed=n, routed=True) for n in range(3))]
    measures = {0: allocator.measure(work), 1: {}}
    assert list(measures[0]) == ["q", "*"]
    shapes = {j.name: (48, 40) for j in work} | {"still": (48, 40)}
    shares = allocator.allocate(shapes, {name: int(name == "still") for name in shapes}, measures, 0.6)
    assert shares["e0"] == shares["e1"] == shares["e2"] != shares["q"]
    assert shares["still"] == 0.6 and sum(shares.values()) / 5 == pytest.approx(0.6)
    assert allocator.allocate({"still": (4, 4)}, {"still": 1}, measures, 0.6) == {"still": 0.6}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"tokens": 1}, "tokens must be at least 2, got 1"),
        ({"strength": 1.5}, r"strength must be in \[0, 1\], got 1.5"),
        ({"most": 1}, r"most must be in \(0, 1\), got 1"),
    ],
)
def test_options_of_fisher_are_checked(options, said):
    with pytest.raises(ValueError, match=said):
        build("fisher", **options)


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
