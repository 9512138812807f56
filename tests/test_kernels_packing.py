"""Packing and unpacking against the oracle, with and without native code, to the bit; and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_matrices import FLOATS, SAME, Case, error, pattern, rows_of_x

from llmprune.kernels import layout, library, packing, plain, products

SHAPES = [(1, 1), (3, 64), (4, 65), (5, 130), (3, 520)]
VALUES = (*FLOATS, "int8", "int4")


@pytest.fixture(params=["native", "plain"])
def code(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(library, "_kept", [library._Loaded(None, 0, "no C compiler")])
    elif not library.available():
        pytest.skip(library.status())
    return request.param


def same_bits(a, b):
    width = SAME[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(width), b.view(width))


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_are_those_of_the_oracle_and_come_back(shape, values, code):
    for kind in ("some", "empty", "full"):
        case = Case(shape, values, pattern(shape, kind))
        mask = packing.bits_of(case.keep)
        assert torch.equal(mask, case.mask) and torch.equal(packing.keep_of(mask, shape[1]), case.keep)
        rows = packing.row_sums(mask, shape[1])
        assert rows.dtype == torch.int32 and torch.equal(rows, case.rows)
        made = packing.compress(case.dense, mask)
        if values == "int4":
            single = made
            made = packing.pack_nibbles(single, mask, shape[1])
            assert torch.equal(packing.unpack_nibbles(made, mask, shape[1]), single)
            assert int(packing.byte_rows(mask, shape[1])[-1]) == len(made)
        assert same_bits(made, case.values)
        back = packing.expand(made, mask, shape, case.dense.dtype)
        assert same_bits(back, torch.where(case.keep, case.dense, torch.zeros_like(case.dense)))
        if case.scale is not None:
            wide = case.scale.float().repeat_interleave(128, 1)[:, : shape[1]]
            for dtype in FLOATS:
                wanted = (case.dense.float() * case.keep * wide).to(dtype)
                assert torch.equal(packing.expand(made, mask, shape, dtype, case.scale), wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_bit_of_a_value_stays(dtype, code):
    """NaN payloads, signalling ones too, -0.0, subnormals: all 16-bit values there are."""
    raw = torch.arange(-(2**15), 2**15, dtype=torch.int32).view(256, 256)
    every = raw.to(torch.int16).view(dtype) if dtype.itemsize == 2 else (raw * 65537).view(dtype)
    keep = pattern((256, 256), "some")
    mask = packing.bits_of(keep)
    values = packing.compress(every, mask)
    width = SAME[dtype.itemsize]
    assert torch.equal(values.view(width), every.view(width)[keep])
    back = packing.expand(values, mask, (256, 256), dtype)
    assert torch.equal(back.view(width), every.view(width) * keep)


@pytest.mark.skipif(not library.available(), reason="no C compiler here")
@pytest.mark.parametrize("path", library.paths())
def test_every_path_expands_a_part_of_the_rows(path):
    for values in (*VALUES, "int8 whole", "int4 whole"):
        for columns in (1, 7, 64, 100, 449):
            shape = (9, columns)
            case = Case(shape, values, pattern(shape, "rows"))
            for dtype in {case.dense.dtype if case.bits == 16 else torch.bfloat16, torch.float32}:
                out = torch.full((4, columns), 7.0, dtype=dtype)
                packing.expand_rows(case.checked(), 3, out, library.PATHS[path])
                whole = packing.expand(*case.parts[:2], shape, dtype, case.scale)
                assert torch.equal(out, whole[3:7]), (values, columns, dtype)


@pytest.mark.parametrize("values", ["int8 whole", "int4 whole"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_mask_every_weight_comes_back(shape, values, code):
    case = Case(shape, values, None)
    wide = case.scale.float().repeat_interleave(128, 1)[:, : shape[1]]
    for dtype in FLOATS:
        wanted = (case.dense.float() * wide).to(dtype)
        assert torch.equal(packing.expand(case.values, None, shape, dtype, case.scale), wanted)
        with pytest.raises(ValueError, match="without a mask has"):
            packing.expand(case.values[:-1], None, shape, dtype, case.scale)
    assert torch.equal(packing.expand(case.values, None, shape, torch.int8), case.dense)


def test_what_cannot_be_packed_is_refused(code):
    case = Case((3, 100), "int4", pattern((3, 100), "some"))
    mask = case.mask
    with pytest.raises(ValueError, match=r"cannot pack torch\.float64"):
        packing.compress(torch.zeros(3, 100, dtype=torch.float64), mask)
    with pytest.raises(ValueError, match=r"cannot pack torch\.bfloat16"):
        packing.compress(torch.zeros(4, 100, dtype=torch.bfloat16), mask)
    for wrong in (mask[:, :8], mask.int(), mask[0]):
        with pytest.raises(ValueError, match="the mask of 100 columns must be"):
            packing.row_sums(wrong, 100)
    for column in (100, 104, 127):
        bad = mask.clone()
        bad[1, column // 8] |= 1 << column % 8
        for call in (
            lambda bad=bad: packing.row_sums(bad, 100),
            lambda bad=bad: packing.compress(case.dense, bad),
            lambda bad=bad: packing.expand(case.values, bad, (3, 100), torch.int8),
        ):
            with pytest.raises(ValueError, match="behind column 100"):
                call()
    for values in (case.values[:-1], case.values.float()):
        with pytest.raises(ValueError, match="do not make a matrix"):
            packing.expand(values, mask, (3, 100), torch.float32, case.scale)
        with pytest.raises(ValueError, match="this mask's int4 values are"):
            packing.unpack_nibbles(values, mask, 100)
    q = packing.unpack_nibbles(case.values, mask, 100)
    with pytest.raises(ValueError, match="int4 holds -8 to 7, not"):
        packing.pack_nibbles(q * 0 + 8, mask, 100)
    with pytest.raises(ValueError, match="is to be packed by this mask"):
        packing.pack_nibbles(q[1:], mask, 100)


def test_a_checked_matrix_of_any_row_start_type(code):
    case = Case((4, 90), torch.bfloat16, pattern((4, 90), "rows"))
    for rows in (case.rows, case.rows.long()):
        packed = products.checked(case.values, case.mask, rows, None, case.shape, 16)
        x = rows_of_x(2, 90, torch.float32)
        assert error(products.packed_linear(x, *packed), case.product(x)) < 3e-6
    whole = Case((2, 64), torch.float32, pattern((2, 64), "some"))
    for bits in (16, 32):
        products.check(*whole.parts, whole.shape, bits)


def data_index(draw, flat):
    return draw(st.integers(0, len(flat) - 1))


def damaged(case, draw):
    """One part of a matrix changed, and whether the result is another but valid matrix."""
    parts = dict(zip(("values", "mask", "rows", "scale"), case.parts, strict=True))
    shape, bits = case.shape, case.bits
    name = draw(st.sampled_from(["values", "mask", "rows", "shape", "bits", "scale"]))
    if name == "shape":
        shape = draw(st.tuples(st.integers(-1, 9), st.integers(-1, 400)))
    elif name == "bits":
        bits = draw(st.sampled_from([0, 2, 3, 4, 8, 16, 32, 64]))
    elif parts[name] is None:
        parts[name] = torch.ones(shape[0], -(-shape[1] // 128), dtype=torch.bfloat16)
    else:
        part = parts[name].clone()
        how = draw(st.sampled_from(["value", "shorter", "longer", "strided", "type", "gone"]))
        flat = part.view(-1)
        if how == "value" and len(flat):
            others = {"rows": [-1, 10**6], "scale": [-1.0, torch.nan, torch.inf]}.get(name, [0, 1, 127, 77])
            flat[data_index(draw, flat)] = draw(st.sampled_from(others))
        else:
            part = {
                "shorter": lambda: part[:-1].clone(),
                "longer": lambda: torch.cat((part, part[:1])),
                "strided": lambda: part.repeat(*[2] * part.ndim)[tuple([slice(None, None, 2)] * part.ndim)],
                "type": lambda: part.double(),
                "value": lambda: part,
                "gone": lambda: part[:0],
            }[how]()
        parts[name] = part
    return (*parts.values(), shape, bits)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_passes_the_check_is_what_its_parts_say(code, data):
    """Damaged parts are refused in one line, or still are a matrix: then every use of it agrees."""
    shape = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 300)))
    values = data.draw(st.sampled_from(VALUES))
    case = Case(shape, values, pattern(shape, "some", seed=data.draw(st.integers(0, 9))))
    *parts, shape, bits = damaged(case, data.draw)
    try:
        packed = layout.checked(*parts, shape, bits)
    except ValueError as refused:
        assert "\n" not in str(refused)
        return
    x = rows_of_x(1, shape[1], torch.float32)
    dense = packing.expand(packed.values, packed.mask, shape, torch.float32, packed.scale)
    assert not dense[~packing.keep_of(packed.mask, shape[1])].any()
    y = products.packed_linear(x, *packed, exact=True)
    wanted = x.double() @ dense.double().t()
    assert torch.allclose(y.double(), wanted, rtol=1e-4, atol=1e-3 * float(1 + dense.abs().max()))


def test_bits_are_counted_alike_by_numpy_1(monkeypatch):
    mask = torch.randint(0, 256, (50, 24), dtype=torch.uint8)
    mask[0], mask[1] = 0, 255
    wanted = packing.keep_of(mask, 192).view(50, 3, 64).sum(dim=-1)
    assert torch.equal(plain.word_counts(mask), wanted)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert torch.equal(plain.word_counts(mask), wanted)


def test_a_mask_bit_more_or_less_never_passes(code):
    case = Case((4, 130), torch.bfloat16, pattern((4, 130), "some"))
    for bit in range(0, 130, 7):
        mask = case.mask.clone()
        mask[2, bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="row starts do not fit"):
            products.check(case.values, mask, *case.parts[2:], case.shape, 16)
