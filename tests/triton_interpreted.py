"""Triton's kernels in its interpreter, on the CPU: `test_kernels_gpu.py` runs this in a process of its own.

The interpreter wants TRITON_INTERPRET=1 before anything imports Triton, and changes it for the whole process.
"""

import itertools

import pytest
import torch
from packed_matrices import Case, error, pattern, rows_of_x
from test_kernels_gpu import KINDS, SHAPES, VALUES, bits, of_kind

from llmprune.kernels import decode, gpu, packing, ways

SMALL = [*SHAPES[:-2], (3, 330)]  # the interpreter is slow
# It cuts bf16 off where a GPU rounds: a whole unit in the last place, not half a one.
CLOSE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def some(cases, every):
    """All cases, all but each `every`th only where exhaustive ones are wanted."""
    return [
        c if i % every == 0 else pytest.param(*c, marks=pytest.mark.exhaustive) for i, c in enumerate(cases)
    ]


@pytest.mark.parametrize(("shape", "values"), some(list(itertools.product(SMALL, VALUES)), 3), ids=str)
def test_triton_gives_the_oracles_product_and_the_same_dense_bits(shape, values):
    for kind in KINDS:
        case = of_kind(shape, values, kind)
        packed = case.checked()
        beside = gpu.prepared(packed)
        wanted = packing.expand(
            *case.parts[:2], shape, case.dense.dtype if case.bits == 16 else torch.float32, case.scale
        )
        out = torch.full_like(wanted, 7)
        decode.expand_rows(beside, packed, 0, out)
        assert torch.equal(bits(out), bits(wanted)), kind
        if shape[0] > 2:
            decode.expand_rows(beside, packed, 2, out[:1])
            assert torch.equal(bits(out[:1]), bits(wanted[2:3])), kind
        for dtype, n in itertools.product(CLOSE, (1, 2, 5, 16)):
            if case.bits == 16 and dtype != case.dense.dtype:
                continue
            x = rows_of_x(n, shape[1], dtype)
            y = decode.product(x, packed, beside, (4, 4) if n == 1 else (16, 4))
            assert y.dtype == dtype and error(y, case.product(x)) < CLOSE[dtype], (kind, dtype, n)


def test_row_starts_of_64_bits_and_every_shape_of_programs():
    case = Case((21, 200), "int4", pattern((21, 200), "some"))
    packed = case.checked()
    starts, bases = gpu.prepared(packed)
    for n, shape in itertools.product((1, 3), ways.SHAPES):
        if n == 1 or shape[0] >= 16:
            x = rows_of_x(n, 200, torch.float16)
            for at in (bases, bases.long()):
                y = decode.product(x, packed, (starts, at), shape)
                assert error(y, case.product(x)) < CLOSE[torch.float16], (n, shape)


def test_a_plan_takes_the_way_for_the_number_of_rows(monkeypatch):
    """The operator is registered for GPUs; here its arithmetic runs on the CPU."""
    case = Case((40, 200), torch.float16, pattern((40, 200), "some"))
    packed, taken = case.checked(), []

    def call(x, *rest):
        taken.append(tuple(rest[-1]))
        return ways._packed_linear_triton(x, *rest)

    monkeypatch.setattr(torch.ops.llmprune, "packed_linear_triton", call)
    fused = [ways.Way("fused", shape) for shape in ((8, 4), (16, 4))]
    for steps in (((1, fused[0]), (16, fused[1]), (64, ways.TRITON)), ((1, fused[0]), (16, fused[1]))):
        plan = ways.Plan(*gpu.prepared(packed), steps)
        for n in (0, 1, 2, 16, 17, 70):
            x = rows_of_x(n, 200, torch.float16)
            assert error(plan.product(x, packed), case.product(x)) < 2e-3
        x = rows_of_x(6, 200, torch.float16)
        assert plan.product(x.view(2, 3, 200), packed).shape == (2, 3, 40)
    whole = [(8, 4), (16, 4), (16, 4)]
    assert taken == [*whole, (), (), (16, 4), *whole, (16, 4)]
