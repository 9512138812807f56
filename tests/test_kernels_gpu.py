"""Packed matrices on a GPU, as far as a CPU can tell: unpacking by torch alone, and Triton's kernels in its
interpreter and through its compiler.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_matrices import FLOATS, Case, pattern

from llmprune.kernels import gpu, layout, packing, plain, products, ways

ROOT = Path(__file__).resolve().parent.parent
VALUES = (*FLOATS, "int8", "int4")
SHAPES = [(1, 1), (1, 64), (7, 63), (5, 65), (9, 128), (6, 200), (5, 449), (3, 2500)]
KINDS = ("some", "empty", "full", "rows")
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")


def of_kind(shape, values, kind):
    return Case(shape, values, pattern(shape, kind if shape[0] > 2 or kind != "rows" else "some"))


def bits(tensor):
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_alone_unpacks_the_same_bits(shape, values, monkeypatch):
    monkeypatch.setattr(gpu, "_AT_ONCE", 3 * shape[1])  # three rows at a time
    for kind in KINDS:
        case = of_kind(shape, values, kind)
        packed = case.checked()
        for dtype in (torch.float32, torch.bfloat16) if case.bits < 16 else (case.dense.dtype, torch.float32):
            out = torch.full(shape, 7, dtype=dtype)
            gpu.expand_rows(packed, 0, out)
            wanted = packing.expand(*case.parts[:2], shape, dtype, case.scale)
            assert torch.equal(bits(out), bits(wanted)), (kind, dtype)
        last = torch.empty((1, shape[1]), dtype=dtype)
        gpu.expand_rows(packed, shape[0] - 1, last)
        assert torch.equal(bits(last), bits(wanted[-1:])), kind


def test_kept_zeros_and_payloads_of_nan_survive():
    raw = torch.tensor([[-0x8000, 0, 0x7FC1, 5, -1, 0]], dtype=torch.int16)
    keep = torch.tensor([[True, True, True, False, True, False]])
    mask = packing.bits_of(keep)
    dense = raw.view(torch.bfloat16)
    packed = products.checked(
        packing.compress(dense, mask), mask, packing.row_sums(mask, 6), None, (1, 6), 16
    )
    out = torch.empty((1, 6), dtype=torch.bfloat16)
    gpu.expand_rows(packed, 0, out)
    assert torch.equal(out.view(torch.int16), raw * keep)


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_without_a_mask_every_weight_is_kept(values):
    for shape in ((5, 449), (3, 64), (2, 1)):
        case = Case(shape, values, pattern(shape, "full"))
        packed = case.checked()._replace(mask=None, rows=None)
        out = torch.full(shape, 7, dtype=torch.float32)
        gpu.expand_rows(packed, 0, out)
        wanted = packing.expand(*case.parts[:2], shape, torch.float32, case.scale)
        assert torch.equal(bits(out), bits(wanted))
        gpu.expand_rows(packed, shape[0] - 1, out[:1])
        assert torch.equal(bits(out[:1]), bits(wanted[-1:]))
        with pytest.raises(ValueError, match="every weight is kept"):
            gpu.prepared(packed)


@pytest.mark.parametrize("values", ["int8", "int4", torch.bfloat16], ids=str)
def test_bad_row_starts_are_not_followed_by_torch(values):
    case = Case((6, 320), values, pattern((6, 320), "some"))
    for start in (-(10**6), -1, 10**6, 2**31 - 1):
        rows = case.rows.clone()
        rows[3] = start
        gpu.expand_rows(case.checked()._replace(rows=rows), 0, torch.empty((6, 320), dtype=torch.float32))


def test_counts_of_torch_and_numpy_agree(monkeypatch):
    mask = torch.randint(0, 256, (9, 40), dtype=torch.uint8)
    wanted = plain.word_counts(mask)
    monkeypatch.delattr("numpy.bitwise_count", raising=False)
    assert torch.equal(plain.word_counts(mask), wanted)
    assert int(wanted.sum()) == int(layout.keep_of(mask, 320).sum())


def test_first_slots_are_where_the_oracle_puts_values():
    case = Case((5, 449), "int4", pattern((5, 449), "rows"))
    starts, bases = gpu.prepared(case.checked())
    assert starts.dtype == torch.int16 and bases.dtype == torch.int32
    keep = torch.nn.functional.pad(case.keep, (0, 512 - 449)).view(5, 8, 2, 32).sum(-1)
    words = (keep.sum(-1) + 1) // 2 * 2
    first = words.cumsum(1) - words
    assert torch.equal(starts.view(5, 8, 2).int(), torch.stack((first, first + keep[..., 0]), -1).int())
    assert torch.equal(bases.long(), torch.cat((torch.zeros(1), words.sum(1).cumsum(0)[:-1])).long())
    long = torch.ones((1, 1 << 16), dtype=torch.bool)
    mask = packing.bits_of(long)
    packed = packing.Packed(long.to(torch.int8)[0], mask, torch.tensor([0, 1 << 16]), None, 1 << 16, 16)
    with pytest.raises(ValueError, match="rows of 65536 columns are too long"):
        gpu.prepared(packed)


def test_the_way_belongs_to_the_number_of_rows_of_x():
    steps = ((1, "a"), (16, "b"), (256, "c"))
    assert [ways.pick(steps, n) for n in (0, 1, 2, 16, 17, 256, 257, 10**6)] == list("aabbcccc")


def test_what_may_be_tried(monkeypatch):
    packed = Case((16, 128), torch.bfloat16, pattern((16, 128), "some")).checked()
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found = {"triton": True}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found.get(name))
    assert len(ways.candidates(packed, 1, bf16)) == 2 + len(ways.SHAPES)
    assert {way.shape[0] for way in ways.candidates(packed, 2, bf16)[2:]} == {16}
    for n, dtype in ((17, bf16), (1, fp32), (1, fp16)):
        assert ways.candidates(packed, n, dtype) == (ways.TORCH, ways.TRITON)
    found.clear()
    assert ways.candidates(packed, 1, bf16) == (ways.TORCH,)


# Triton


@TRITON
@pytest.mark.parametrize(
    "cases", ["not exhaustive", pytest.param("exhaustive", marks=pytest.mark.exhaustive)]
)
def test_its_kernels_in_its_interpreter(cases):
    file = str(Path(__file__).with_name("triton_interpreted.py"))
    program = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-m", cases]
    done = subprocess.run(
        program, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:]


@TRITON
@pytest.mark.parametrize(
    "more", [["90", "--shapes", "16x4"], pytest.param(["80,90"], marks=pytest.mark.exhaustive)]
)
def test_they_compile_for_gpus(more):
    """The interpreter takes what the compiler does not."""
    program = [sys.executable, str(ROOT / "eval" / "bench" / "gpu_instructions.py"), "--machines", *more]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    lines = [line.split("|")[1:-1] for line in done.stdout.splitlines()[2:]]
    assert len(lines) == (4 if "--shapes" in more else 2 * 4 * len(ways.SHAPES))
    assert all(float(count) > 5 for line in lines for count in line[3:] if count.strip())


# The benchmark


def test_the_benchmark_wants_a_gpu_and_says_so_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    program = [sys.executable, str(ROOT / "eval" / "bench" / "gpu.py"), "--rows", "1"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "gpu.py measures on an NVIDIA GPU, and torch sees none here\n"


def test_its_rule_is_applied_in_words(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "eval" / "bench"))
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "eval" / "bench" / "gpu.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    seconds = {
        "dense bf16": 3.0,
        "0.7, bf16, fused 8x4": 2.5,
        "0.7, bf16, torch": 0.1,
        "0.8, bf16, fused 8x4": 0.1,
    }
    said = bench.verdict({((4096, 11008), 1): seconds})
    assert (
        said.startswith("the fused kernel is 1.20 times as fast as dense, below 1.5")
        and "no speed-up" in said
    )
    said = bench.verdict({((4096, 11008), 1): seconds | {"0.7, bf16, fused 16x4": 2.0}})
    assert "1.50 times as fast as dense: from 1.5 on it counts" in said
    assert "was not measured" in bench.verdict({((4096, 4096), 1): seconds})
