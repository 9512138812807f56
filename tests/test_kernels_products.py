"""Products with packed weights: every path of this processor, every type, against the oracle in float64."""

import gc

import pytest
import torch
from packed_matrices import FLOATS, Case, Guarded, error, pattern, rows_of_x

from llmprune.kernels import library, packing, products

PATHS = library.paths()
MASKED = (*FLOATS, "int8", "int4")
VALUES = (*MASKED, "int8 whole", "int4 whole")
SHAPES = [(1, 1), (1, 64), (7, 63), (5, 65), (9, 128), (6, 200), (5, 449), (3, 2500)]
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}
NATIVE = pytest.mark.skipif(not PATHS, reason="no C compiler here")


def plain_only(monkeypatch, reason="no C compiler"):
    monkeypatch.setattr(library, "_kept", [library._Loaded(None, 0, reason)])


@NATIVE
@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_gives_the_oracles_product(shape, path, values):
    case = Case(shape, values, pattern(shape, "rows" if shape[0] > 2 else "some"))
    packed = case.checked()
    for dtype in FLOATS:
        x = rows_of_x(16, shape[1], dtype)
        wanted = case.product(x)
        for n in (1, 16) if dtype != torch.bfloat16 else range(1, 17):
            y = products.fused(x[:n].contiguous(), packed, True, library.PATHS[path])
            assert error(y, wanted[:n]) < 3e-6, (dtype, n)
            y = products.fused(x[:n].contiguous(), packed, False, library.PATHS[path])
            if case.bits < 16:
                assert ((y - wanted[:n]).abs() <= case.rounding(x[:n]) * 1.001 + 1e-3).all(), (dtype, n)
            else:
                assert error(y, wanted[:n]) < 3e-6, (dtype, n)


@NATIVE
@pytest.mark.parametrize("values", MASKED, ids=str)
@pytest.mark.parametrize("kind", ["empty", "full", "2:4", "rows"])
def test_patterns_on_every_path(kind, values):
    shape = (6, 320)
    case = Case(shape, values, pattern(shape, kind))
    x = rows_of_x(3, shape[1], torch.bfloat16)
    wanted = case.product(x)
    for path in PATHS:
        y = products.fused(x, case.checked(), True, library.PATHS[path])
        assert error(y, wanted) < 3e-6 and (kind != "empty" or not y.any())


@pytest.mark.parametrize("native", [pytest.param(True, marks=NATIVE), False])
@pytest.mark.parametrize("values", VALUES, ids=str)
def test_the_operator_takes_any_number_of_rows(values, native, monkeypatch):
    if not native:
        plain_only(monkeypatch)
    shape = (13, 330)
    case = Case(shape, values, pattern(shape, "rows"))
    packed = case.checked()
    for dtype in FLOATS:
        x = rows_of_x(40, shape[1], dtype)
        wanted = case.product(x)
        for n in (1, 2, 16, 17, 33, 40):
            y = products.packed_linear(x[:n], *packed, exact=True)
            assert y.dtype == dtype and y.shape == (n, 13)
            assert error(y, wanted[:n]) < ROUNDING[dtype], (dtype, n)
    assert products.packed_linear(x[:0], *packed).shape == (0, 13)
    assert products.packed_linear(x[0], *packed).shape == (13,)
    assert products.packed_linear(x.view(2, 4, 5, -1), *packed).shape == (2, 4, 5, 13)
    strided = x.t().contiguous().t()[:3]
    assert torch.equal(products.packed_linear(strided, *packed), products.packed_linear(x[:3], *packed))


@NATIVE
def test_many_blocks_of_rows_and_many_threads(monkeypatch):
    monkeypatch.setattr(products, "_BLOCK_BYTES", 1)
    shape = (150, 330)
    case = Case(shape, torch.bfloat16, pattern(shape, "some"))
    x = rows_of_x(40, 330, torch.bfloat16)
    assert error(products.packed_linear(x, *case.checked()), case.product(x)) < 4e-3
    keep = pattern((700, 1000), "some")
    keep[:600] = False  # the rows that hold something are few
    dense = torch.randn(700, 1000)
    mask = packing.bits_of(keep)
    packed = products.checked(
        packing.compress(dense, mask), mask, packing.row_sums(mask, 1000), None, (700, 1000), 32
    )
    y, before = {}, torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y[threads] = products.packed_linear(rows_of_x(2, 1000, torch.float32), *packed)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y[1], y[3])
    assert error(y[1], rows_of_x(2, 1000, torch.float32).double() @ (dense * keep).double().t()) < 3e-6


@NATIVE
@pytest.mark.parametrize("values", VALUES, ids=str)
def test_nothing_is_read_or_written_outside_the_buffers(values):
    """Every buffer ends at a page that must not be read, then begins after one; also with other alignment."""
    for shape, kind in (((5, 449), "some"), ((4, 128), "full"), ((3, 65), "rows"), ((2, 8), "some")):
        case = Case(shape, values, pattern(shape, kind))
        guard = Guarded()
        for front in (False, True):
            packed = guard.packed(case.checked(), front)
            x = guard.copy(rows_of_x(3, shape[1], torch.bfloat16), front)
            for path in PATHS:
                y = products.fused(x, packed, path=library.PATHS[path])
                assert error(y, case.product(x)) < 0.04
                wide = torch.float32 if case.scale is not None else case.dense.dtype
                out = guard.copy(torch.zeros(shape, dtype=wide), front)
                packing.expand_rows(packed, 0, out, library.PATHS[path])
                assert error(out, packing.expand(*case.parts[:2], shape, wide, case.scale).double()) == 0
            many = guard.copy(rows_of_x(37, shape[1], torch.bfloat16), front)
            assert error(products.by_blocks(many, packed), case.product(many)) < 5e-3
            if case.bits != 4 and case.mask is not None:
                dense = guard.copy(case.dense, front)
                assert torch.equal(packing.compress(dense, packed.mask), case.values)
        del packed, x, out
        gc.collect()
        guard.close()


@NATIVE
@pytest.mark.parametrize("values", [torch.bfloat16, "int8", "int4 whole"], ids=str)
@pytest.mark.parametrize("shape", [(300, 1100), (70, 9000)], ids=str)
def test_many_rows_of_x_in_blocks_of_many_rows(shape, values):
    case = Case(shape, values, pattern(shape, "rows"))
    packed, dense, before = case.checked(), case.dense.double() * case.keep, torch.get_num_threads()
    if case.scale is not None:
        dense *= case.scale.double().repeat_interleave(128, 1)[:, : shape[1]]
    try:
        for n, threads in ((33, 1), (70, 3)):
            torch.set_num_threads(threads)
            x = rows_of_x(n, shape[1], torch.bfloat16)
            assert error(products.packed_linear(x, *packed), x.double() @ dense.t()) < 5e-3
    finally:
        torch.set_num_threads(before)


@NATIVE
@pytest.mark.parametrize("values", ["int8", torch.bfloat16], ids=str)
def test_bad_row_starts_and_masks_are_not_followed(values):
    """What `check` would refuse does no harm in the native code either: an error, or some number."""
    shape = (6, 320)
    case = Case(shape, values, pattern(shape, "some"))
    guard = Guarded()
    x = rows_of_x(1, 320, torch.bfloat16)
    for start in (-1, -(2**31), 10**6, 2**31 - 1):
        rows = case.rows.clone()
        rows[3] = start
        packed = guard.packed(case.checked()._replace(rows=rows))
        for path in PATHS:
            with pytest.raises(ValueError, match="row starts do not fit"):
                products.fused(x, packed, path=library.PATHS[path])
        with pytest.raises(ValueError, match="row starts do not fit"):
            products.by_blocks(x, packed)
    for rows in (torch.full_like(case.rows, int(case.rows[-1])), case.rows + 1, case.rows // 2):
        packed = guard.packed(case.checked()._replace(rows=rows))
        with pytest.raises(ValueError, match="row starts do not fit"):
            products.packed_linear(x, *packed)
    full = guard.packed(case.checked()._replace(mask=torch.full_like(case.mask, 255)))
    for path in PATHS:
        products.fused(x, full, path=library.PATHS[path])
        packing.expand_rows(full, 0, torch.empty(shape, dtype=torch.float32), library.PATHS[path])


@NATIVE
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_x_in_bytes_keeps_what_is_not_a_number_and_what_is_nothing(values):
    shape = (4, 300)
    packed = Case(shape, values, pattern(shape, "some")).checked()
    for bad in (torch.nan, torch.inf):
        x = torch.zeros(1, 300)
        x[0, 270] = bad
        for exact in (True, False):
            assert not products.packed_linear(x, *packed, exact=exact).isfinite().all()
    for small in (0.0, 1e-38):
        assert products.packed_linear(torch.full((1, 300), small), *packed).abs().max() < 1e-30


def test_the_operator_compiles_and_has_a_shape_without_data():
    shape = (8, 192)
    case = Case(shape, torch.float32, pattern(shape, "some"))
    packed = case.checked()
    compiled = torch.compile(
        lambda x: products.packed_linear(x, *packed) + 1, fullgraph=True, backend="eager"
    )
    x = rows_of_x(3, 192, torch.float32)
    assert torch.equal(compiled(x), products.packed_linear(x, *packed) + 1)
    torch.library.opcheck(
        torch.ops.llmprune.packed_linear.default,
        (x, *packed, False),
        test_utils=("test_schema", "test_faketensor"),
    )
    meta = torch.ops.llmprune.packed_linear(
        x.to("meta"), *(p.to("meta") if isinstance(p, torch.Tensor) else p for p in packed)
    )
    assert meta.shape == (3, 8)


@pytest.mark.parametrize("values", ["int8 whole", "int4 whole"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_mask_all_is_kept(shape, values):
    """The same product, to the bit, as with a mask that keeps everything, and as many values."""
    case = Case(shape, values, None)
    masked = Case(shape, values.removesuffix(" whole"), case.keep)
    entries = {8: shape[1], 4: sum(-(-min(64, shape[1] - c) // 2) for c in range(0, shape[1], 64))}[case.bits]
    assert len(case.values) == shape[0] * entries and torch.equal(case.values, masked.values)
    for n in (1, 3, 16, 33):
        x = rows_of_x(n, shape[1], torch.bfloat16)
        one, other = (products.packed_linear(x, *c.checked()) for c in (case, masked))
        assert torch.equal(one, other)
    for wrong, line in (
        ({"values": case.values[:-1]}, "without a mask has"),
        ({"rows": masked.rows}, "may lack both"),
        ({"scale": None}, "have a scale"),
    ):
        with pytest.raises(ValueError, match=line) as refused:
            products.checked(*case.checked()._replace(**wrong)[:4], shape, case.bits)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="may lack both"):
        products.checked(case.dense.float().flatten(), None, None, None, shape, 32)
    with pytest.raises(ValueError, match="row starts do not fit"):
        products.packed_linear(x, *case.checked()._replace(values=case.values[:-1]))


def test_a_call_with_parts_of_another_shape_is_refused():
    case = Case((4, 200), "int8", pattern((4, 200), "some"))
    packed, x = case.checked(), rows_of_x(1, 200, torch.float32)
    for wrong in (
        {"mask": packed.mask[:, :8].contiguous()},
        {"mask": packed.mask.view(torch.int8)},
        {"rows": packed.rows[:-1]},
        {"rows": packed.rows.float()},
        {"scale": None},
        {"scale": packed.scale[:, :1].contiguous()},
        {"scale": packed.scale.float()},
        {"values": packed.values[::2]},
        {"values": packed.values.float()},
        {"bits": 4},
        {"bits": 5},
        {"columns": 300},
    ):
        with pytest.raises(ValueError) as refused:
            products.packed_linear(x, *packed._replace(**wrong))
        assert "\n" not in str(refused.value)
    for other in (x.double(), x.int(), x[:, :100]):
        with pytest.raises(ValueError, match="x must be"):
            products.packed_linear(other, *packed)
