"""The sparse formats of compressed-tensors, against slow oracles; damaged files are refused in one line."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
import torch
from bitmasks import packed, sparse, two_of_four
from damage import ONE_FILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outputs import one_line
from safetensors.torch import save_file

from llmprune.checkpoint.bitmask import Bitmasked, sparse_bitmask_config, sparse_bitmask_tensors
from llmprune.checkpoint.reader import Checkpoint

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CODES = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


def opened(folder, tensors):
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / ONE_FILE)
    return Bitmasked(Checkpoint(folder))


def same(found, wanted):
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(5, 21), (8, 8), (1, 1), (4, 64)])
def test_a_matrix_is_read_and_written(tmp_path, dtype, shape):
    weight, rest = sparse(*shape, dtype=dtype), torch.randn(3)
    source = opened(tmp_path, {**packed("a.b", weight, weight != 0), "norm.weight": rest})
    same(source.load("a.b.weight"), weight)
    same(source.load("norm.weight"), rest)
    assert set(source.tensors) == {"a.b.weight", "norm.weight"} and source.files == {ONE_FILE}
    info = source.tensors["a.b.weight"]
    assert (info.shape, info.dtype, info.bytes) == (shape, dtype, weight.nbytes)
    written = sparse_bitmask_tensors("a.b.weight", weight)
    slow = packed("a.b", weight, weight != 0)
    assert set(written) == set(slow)
    for name in slow:
        same(written[name], slow[name])


def test_stacks_and_vectors_are_read(tmp_path):
    stack, vector = sparse(3, 4, 10), sparse(13, seed=3)
    tensors = packed("experts", stack, stack != 0)
    tensors["experts.row_offsets"] += 7  # those of stacks are wrong, and not needed
    source = opened(tmp_path, tensors | packed("norm", vector, vector != 0))
    same(source.load("experts.weight"), stack)
    same(source.load("norm.weight"), vector)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6, 1), (6, 4), (1, 4), (2, 2)])
@pytest.mark.parametrize("form", ["bitmask", "24", "dense"])
def test_quantised_values(tmp_path, kind, scale, shape, form):
    weight, keep = two_of_four(6, 16)
    codes = (weight * 9).to(kind)
    scales = (torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.5).to(scale)
    beside = {"weight_scale": scales, "input_scale": torch.ones(1)}
    tensors = packed("q", codes.float(), keep, **beside)
    tensors["q.compressed"] = tensors["q.compressed"].to(kind)
    if form == "24":
        tensors["q.compressed"] = tensors["q.compressed"].reshape(6, 8)
        tensors["q.shape"] = torch.tensor([[6], [16]])
        del tensors["q.row_offsets"]
    if form == "dense":
        tensors = {"q.weight": codes, **{f"q.{k}": v for k, v in beside.items()}}
        tensors |= packed("other", weight, keep)
    source = opened(tmp_path, tensors)
    assert set(source.tensors) - {"other.weight"} == {"q.weight"}
    assert source.tensors["q.weight"].dtype == scale
    found = source.load("q.weight")
    square = scales if scales.ndim == 2 else scales.reshape(1, 1)
    for r, c in np.ndindex(6, 16):
        own = square[r * square.shape[0] // 6, c * square.shape[1] // 16]
        assert found[r, c] == codes[r, c].to(scale) * own


def test_zero_points(tmp_path):
    codes = torch.randint(-9, 9, (4, 8), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scales, zeros = torch.rand(4, 1) + 0.5, torch.tensor([[1], [0], [-3], [7]], dtype=torch.int8)
    beside = {"weight_scale": scales, "weight_zero_point": zeros}
    source = opened(tmp_path, packed("q", codes, codes != 0, **beside))
    same(source.load("q.weight"), (codes.float() - zeros) * scales)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"p.bitmask": None}, r"'p.bitmask' is not there; the checkpoint is incomplete or damaged"),
        ({"p.compressed": None}, r"'p.compressed' is not there"),
        ({"p.shape": None}, r"'p.shape' is not there"),
        ({"p.shape": torch.tensor([4, 21])}, r"its shape is \[4, 21\] and its bitmask \[5, 3\]"),
        ({"p.shape": torch.tensor([5, 2**62])}, r"its shape is \[5, 4611686018427387904\]"),
        ({"p.shape": torch.tensor([-5, 21])}, r"its shape is \[-5, 21\]"),
        ({"p.shape": torch.tensor([5.0, 21.0])}, r"its shape is F32 \[2\]"),
        ({"p.shape": torch.zeros(0, dtype=torch.int64)}, r"its shape is I64 \[0\]"),
        ({"p.shape": torch.ones(1000, dtype=torch.int64)}, r"its shape is I64 \[1000\]"),
        ({"p.bitmask": torch.zeros(5, 3, dtype=torch.int8)}, r"its bitmask is stored in I8"),
        ({"p.compressed": torch.ones(3)}, r"its bitmask keeps \d+ weights and 3 are there"),
        ({"p.compressed": torch.ones(3, 1)}, r"its shape is \[5, 21\] and its values \[3, 1\]"),
        ({"p.compressed": torch.ones(3, dtype=torch.int32)}, r"is stored in I32, which is no value of"),
        ({"p.compressed": torch.ones(3, dtype=torch.int8)}, r"'p.weight_scale' is not there, and the values"),
        ({"p.weight_scale": torch.ones(1)}, r"is stored in F32 beside 'p.weight_scale', which is no value"),
        ({"p.weight": torch.ones(5, 21)}, r"'p.weight' stands there both compressed and dense"),
        ({"p.row_offsets": torch.arange(5)}, r"its row_offsets are not those of its bitmask"),
        ({"p.row_offsets": torch.zeros(5)}, r"its row_offsets are not those of its bitmask"),
    ],
)
def test_damage_is_refused_in_one_line(tmp_path, changes, line):
    weight = sparse(5, 21)
    tensors = {**packed("p", weight, weight != 0), **changes}
    with pytest.raises(ValueError, match=line) as refused:
        opened(tmp_path, {n: t for n, t in tensors.items() if t is not None}).load("p.weight")
    one_line(refused.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"p.weight_scale": torch.tensor([float("nan")])}, r"its scales hold NaN or Inf"),
        ({"p.weight_scale": torch.tensor([3e38])}, r"values times scales hold NaN or Inf"),
        ({"p.weight_scale": torch.ones(3, 1)}, r"its shape is \[4, 8\] and its scales F32 \[3, 1\]"),
        ({"p.weight_scale": torch.ones(4)}, r"its shape is \[4, 8\] and its scales F32 \[4\]"),
        ({"p.weight_scale": torch.ones(0, 1)}, r"its scales F32 \[0, 1\]"),
        ({"p.weight_scale": torch.ones(4, 1, dtype=torch.int8)}, r"its scales I8 \[4, 1\]"),
        ({"p.weight_zero_point": torch.ones(2, 1, dtype=torch.int8)}, r"its zero points are I8 \[2, 1\]"),
        ({"p.weight_g_idx": torch.arange(8)}, r"quantised with its columns reordered \(weight_g_idx\)"),
        ({"p.weight_scale": None}, r"'p.weight_scale' is not there, and the values are quantised"),
        ({"p.bitmask": torch.full((4, 1), 0b00010111, dtype=torch.uint8)}, r"two of every four weights"),
    ],
)
def test_damaged_quantised_ones_are_refused_in_one_line(tmp_path, changes, line):
    codes = torch.full((4, 8), 100, dtype=torch.int8)
    codes.view(4, 2, 4)[..., 1:3] = 0
    tensors = {**packed("p", codes, codes != 0), "p.weight_scale": torch.ones(4, 1)}
    tensors["p.compressed"] = tensors["p.compressed"].reshape(4, 4)
    tensors |= changes
    with pytest.raises(ValueError, match=line) as refused:
        opened(tmp_path, {n: t for n, t in tensors.items() if t is not None}).load("p.weight")
    one_line(refused.value)


def test_bits_beyond_the_last_column_are_refused(tmp_path):
    weight = sparse(5, 21)
    tensors = packed("p", weight, weight != 0)
    tensors["p.bitmask"][3, 2] |= 1 << 5
    with pytest.raises(
        ValueError, match=r"'p.weight' cannot be unpacked: its bitmask has bits beyond column 21"
    ):
        opened(tmp_path, tensors).load("p.weight")


def test_nothing_compressed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no matrix in sparse-bitmask or sparse-24-bitmask, so"):
        opened(tmp_path, {"p.weight": torch.ones(2, 2)})


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("experts.gate_up_proj", torch.ones(2, 2)),
        ("p.weight", torch.ones(2, 2, 2)),
        ("p.weight", torch.ones(2, 2, dtype=torch.int8)),
    ],
)
def test_what_the_format_does_not_have_is_not_written(name, weight):
    with pytest.raises(ValueError, match=r"stores matrices whose names end in \.weight, got '") as refused:
        sparse_bitmask_tensors(name, weight)
    one_line(refused.value)


def test_the_entry_of_the_config():
    entry = sparse_bitmask_config(["b.weight", "a.weight"], 0.5, "2:4")["sparsity_config"]
    assert entry["targets"] == ["a", "b"] and entry["format"] == "sparse-bitmask"
    assert (entry["global_sparsity"], entry["sparsity_structure"]) == (0.5, "2:4")


DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn]
ANY = st.builds(
    lambda dtype, shape, seed: (
        torch.randint(-9, 99, shape, generator=torch.Generator().manual_seed(seed)).float().to(dtype)
    ),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 9), max_size=3),
    st.integers(0, 3),
)


@pytest.mark.parametrize("cases", [150, pytest.param(3000, marks=pytest.mark.exhaustive)])
def test_whatever_stands_there_is_read_or_refused_in_one_line(tmp_path_factory, cases):
    folder = tmp_path_factory.mktemp("fuzz")
    parts = ("shape", "compressed", "bitmask", "row_offsets", "weight_scale", "weight_zero_point", "weight")
    codes = (two_of_four(6, 16)[0] * 5).to(torch.int8)
    scales = torch.ones(6, 1)

    @settings(
        max_examples=cases,
        deadline=timedelta(seconds=20),
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.booleans(), st.dictionaries(st.sampled_from(parts), st.none() | ANY, max_size=3), st.data())
    def check(pairs, changes, data):
        tensors = packed("p", codes, codes != 0, weight_scale=scales)
        if pairs:
            tensors["p.compressed"] = tensors["p.compressed"][:48].reshape(6, 8)
        for part, tensor in changes.items():
            tensors[f"p.{part}"] = tensor
        tensors = {name: t.clone() for name, t in tensors.items() if t is not None}
        if tensors and data.draw(st.booleans()):  # a number of one of them is another one
            name = data.draw(st.sampled_from(sorted(tensors)))
            if tensors[name].numel() and tensors[name].dtype in (torch.int64, torch.uint8):
                place = data.draw(st.integers(0, tensors[name].numel() - 1))
                tensors[name].view(-1)[place] = data.draw(st.sampled_from([0, 1, 3, 127, 255]))
        try:
            source = opened(folder, tensors or {"x": torch.ones(1)})
            for name, info in source.tensors.items():
                found = source.load(name)
                assert tuple(found.shape) == info.shape and found.nbytes == info.bytes
        except ValueError as error:
            one_line(error)

    check()
