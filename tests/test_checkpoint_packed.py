"""Packed checkpoints: the layout, what is lost (nothing), conversions, and damage."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from damage import ONE_FILE
from other_models import make
from outputs import one_line
from outputs import same_bits as same
from outputs import weights as tensors
from safetensors.torch import load_file, save_file

import llmprune
from llmprune.checkpoint.masks import read_masks
from llmprune.checkpoint.packed_tensor import Layout, unpack
from llmprune.checkpoint.packing import Packing
from llmprune.kernels.layout import bits_of, keep_of
from llmprune.model.opening import open_model
from llmprune.numerics import grids
from runs import cut_off

TOKENS = torch.randint(0, 120, (16, 32), generator=torch.Generator().manual_seed(0))
KINDS = ("mixtral", "gpt_oss", "llama4_text", "granitemoe", "qwen3_next", "gemma3", "mamba", "gpt2")


def entry(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def prune(folder, output, **more):
    options = {"recipe": "wanda", "sparsity": 0.7, "calibration": TOKENS, "output": output} | more
    return llmprune.prune(folder, **options).record


def by_hand(weight, keep):
    """The parts of a packed matrix [R, C], weight by weight."""
    rows, columns = weight.shape
    values, sums, mask = [], [0], torch.zeros(rows, 8 * -(-columns // 64), dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            if keep[r, c]:
                values.append(weight[r, c])
                mask[r, c // 8] |= 1 << (c % 8)
        sums.append(len(values))
    return torch.stack(values), mask, torch.tensor(sums, dtype=torch.int32)


def test_the_layout_weight_by_weight(tmp_path):
    prune(make("gpt2", tmp_path / "in"), tmp_path / "dense")
    prune(tmp_path / "in", tmp_path / "packed", format="packed")
    dense, packed, masks = (
        tensors(tmp_path / "dense"),
        tensors(tmp_path / "packed"),
        read_masks(tmp_path / "dense" / "masks.safetensors"),
    )
    listed = entry(tmp_path / "packed")
    assert (listed["quant_method"], listed["version"], listed["bits"], listed["group"]) == (
        "llmprune",
        1,
        16,
        128,
    )
    assert set(listed["matrices"]) == set(masks) and listed["transposed"] == sorted(masks)  # Conv1D
    for name, keep in masks.items():
        values, mask, rows = by_hand(dense[name].T, keep)
        assert torch.equal(packed[name], values) and torch.equal(packed[f"{name}_mask"], mask)
        assert torch.equal(packed[f"{name}_rows"], rows)
        assert listed["matrices"][name] == [*dense[name].T.shape, len(values)]
    untouched = set(dense) - set(masks)
    assert all(torch.equal(dense[name], packed[name]) for name in untouched)
    assert not (tmp_path / "packed" / "masks.safetensors").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_dense_are_one_another_to_the_bit(tmp_path, kind):
    folder = make(kind, tmp_path / "in")
    record = prune(folder, tmp_path / "dense")
    packed = prune(folder, tmp_path / "packed", format="packed")
    assert packed["format"] == {"name": "packed", "values": "same"} and "format" not in record
    assert packed["totals"]["zeros"] == record["totals"]["zeros"]
    source = open_model(tmp_path / "packed").source
    read = {name: source.load(name) for name in source.tensors}
    assert same(read, tensors(tmp_path / "dense"))
    assert {n: (t.shape, t.dtype) for n, t in source.tensors.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in read.items() if t.dtype.is_floating_point
    } | {n: (source.tensors[n].shape, None) for n in read if not read[n].dtype.is_floating_point}

    converted = llmprune.convert(tmp_path / "dense", to="packed", output=tmp_path / "one")
    assert same(tensors(tmp_path / "one"), tensors(tmp_path / "packed"))
    assert entry(tmp_path / "one") == entry(tmp_path / "packed")
    assert set(converted["bytes"]) == {"dense", "written"}
    assert converted["bytes"]["written"] < converted["bytes"]["dense"]
    llmprune.convert(tmp_path / "one", to="dense", output=tmp_path / "back")
    assert same(tensors(tmp_path / "back"), tensors(tmp_path / "dense"))
    assert same(*(load_file(tmp_path / f / "masks.safetensors") for f in ("back", "dense")))
    for folder in ("packed", "one", "back"):
        assert llmprune.inspect(tmp_path / folder)["record_agrees"], folder
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (tmp_path / "dense" / "config.json").read_text()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_zeros_and_signs_survive(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 130, generator=generator).to(dtype)
    keep = torch.rand(37, 130, generator=generator) < 0.4
    keep[3], keep[4] = False, True
    weight[~keep] = 0
    weight[:2][keep[:2]] = -0.0  # kept, and zero
    layout = Layout(37, 130, dtype)
    bits = bits_of(keep)[:, : -(-130 // 8)]
    stored = Packing({"x": layout}).parts({"x": weight}, {"x": bits})
    assert set(stored) == {"x", "x_mask", "x_rows"}
    size = sum(t.nbytes for t in stored.values())
    assert size == layout.bytes(bits_of(keep))
    assert size == dtype.itemsize * int(keep.sum()) + 37 * 8 * 3 + 4 * 38
    back = unpack({part: stored[f"x{part}"] for part in ("", "_mask", "_rows")}, layout, "x")
    kind = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(back.view(kind), weight.view(kind))


def test_what_would_not_become_smaller_stays_dense(tmp_path):
    folder = make("gpt2", tmp_path / "in")
    rules = {"rules": [{"match": "*.c_attn", "sparsity": 0.01}, {"match": "*.h.1.mlp.*", "skip": True}]}
    prune(folder, tmp_path / "packed", format="packed", settings=rules)
    packed = set(entry(tmp_path / "packed")["matrices"])
    assert packed and not any("c_attn" in name or "h.1.mlp" in name for name in packed)
    source = open_model(tmp_path / "packed").source
    dense = prune(folder, tmp_path / "dense", settings=rules)
    assert dense and same({n: source.load(n) for n in source.tensors}, tensors(tmp_path / "dense"))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("recipe", ["wanda", "sparsegpt"])
def test_a_packed_run_resumes_to_the_same_bytes(tmp_path, kind, recipe):
    folder = make(kind, tmp_path / "in")
    options = {"recipe": recipe, "format": "packed"}
    prune(folder, tmp_path / "whole", **options)
    with cut_off():
        prune(folder, tmp_path / "cut", **options)
    with pytest.raises(ValueError, match="another one: format"):
        prune(folder, tmp_path / "cut", recipe=recipe, resume=True)
    prune(folder, tmp_path / "cut", resume=True, **options)
    assert same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))
    assert entry(tmp_path / "cut") == entry(tmp_path / "whole")


@pytest.mark.parametrize("to", ["packed", "dense"])
def test_a_conversion_goes_on_where_it_stopped(tmp_path, to):
    folder = make("mixtral", tmp_path / "in")
    prune(folder, tmp_path / "from", format="dense" if to == "packed" else "packed")
    llmprune.convert(tmp_path / "from", to=to, output=tmp_path / "whole")
    with cut_off():
        llmprune.convert(tmp_path / "from", to=to, output=tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ValueError, match=r"unfinished run into .*cut holds 1 finished blocks"):
        llmprune.convert(tmp_path / "from", to=to, output=tmp_path / "cut")
    llmprune.convert(tmp_path / "from", to=to, output=tmp_path / "cut", resume=True)
    assert same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))


def test_a_sparse_folder_of_another_tool_is_packed(tmp_path):
    """Without masks every weight whose bytes are not all zero is kept."""
    folder = make("gpt2", tmp_path / "in")
    stored = load_file(folder / ONE_FILE)
    for name, tensor in stored.items():
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            tensor[torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) < 0.7] = 0
            tensor[0, :3] = -0.0
    save_file(stored, folder / ONE_FILE, metadata={"format": "pt"})
    result = llmprune.convert(folder, to="packed", output=tmp_path / "packed")
    assert result["matrices"] == 4 and len(result["dense"]) == 4
    source = open_model(tmp_path / "packed").source
    assert same({n: source.load(n) for n in source.tensors}, stored)
    assert llmprune.inspect(tmp_path / "packed")["record_agrees"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"to": "gguf"}, r"to must be one of dense, packed.*got 'gguf'"),
        ({"to": "dense"}, r"is dense already"),
    ],
)
def test_conversions_that_make_no_sense(tmp_path, tiny_llama, options, line):
    with pytest.raises(ValueError, match=line) as caught:
        llmprune.convert(tiny_llama, output=tmp_path / "out", **options)
    one_line(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    prune(make("gpt2", folder / "in"), folder / "out", format="packed")
    return folder / "out"


def test_a_packed_folder_is_not_pruned_again(packed, tmp_path):
    with pytest.raises(ValueError, match=r"packed already; .* llmprune convert .* --to dense --output DIR"):
        prune(packed, tmp_path / "out")


NAME = "transformer.h.0.attn.c_attn.weight"


def damaged(packed, folder, change):
    """A copy of a packed folder with changed tensors or config."""
    shutil.copytree(packed, folder)
    file = next(f for f in folder.glob("model*.safetensors") if NAME in load_file(f))
    stored, values = load_file(file), json.loads((folder / "config.json").read_text())
    change(stored, values["quantization_config"])
    save_file(stored, file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def put(part, make):
    return lambda stored, entry: stored.__setitem__(NAME + part, make(stored[NAME + part]))


def tell(key, make):
    return lambda stored, entry: entry.__setitem__(key, make(entry[key]))


def swapped(rows):
    rows = rows.clone()
    rows[3], rows[4] = rows[4].item(), rows[3].item()
    return rows


DAMAGE = {
    "values too few": put("", lambda t: t[:-1].clone()),
    "values of another type": put("", lambda t: t.to(torch.int32)),
    "bits beyond the columns": put("_mask", lambda t: t | 128),
    "a bit more": put("_mask", lambda t: torch.where(torch.arange(len(t))[:, None] == 2, t | 1, t)),
    "mask too short": put("_mask", lambda t: t[:-1].clone()),
    "descending rows": put("_rows", swapped),
    "negative rows": put("_rows", lambda t: -t),
    "rows that start late": put("_rows", lambda t: t + 1),
    "no rows": lambda stored, entry: stored.pop(f"{NAME}_rows"),
    "another version": tell("version", lambda v: 2),
    "other bits": tell("bits", lambda v: 8),
    "no number": tell("bits", lambda v: "16"),
    "another group": tell("group", lambda v: 64),
    "no matrices": tell("matrices", lambda v: 5),
    "other sizes": tell("matrices", lambda v: {**v, NAME: [v[NAME][0] + 64, *v[NAME][1:]]}),
    "two sizes": tell("matrices", lambda v: {**v, NAME: v[NAME][:2]}),
    "negative sizes": tell("matrices", lambda v: {**v, NAME: [-1, 2, 3]}),
    "a matrix that is not there": tell("matrices", lambda v: {**v, "x": [1, 2, 1]}),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told_in_one_line(packed, tmp_path, what):
    folder = damaged(packed, tmp_path / "broken", DAMAGE[what])
    with pytest.raises(ValueError, match=r"damaged|version|packed|does not hold") as caught:
        source = open_model(folder).source
        for name in source.tensors:
            source.load(name)
    one_line(caught.value)
    with pytest.raises(ValueError, match=r"damaged|version|packed|does not hold"):
        llmprune.load(folder)


def test_int4_values_of_more_dimensions_are_told_in_one_line(packed, tmp_path):
    # How many bytes they take is known from the mask alone, which the headers do not hold.
    llmprune.convert(packed, to="packed", values="int4", output=tmp_path / "int4")
    folder = damaged(tmp_path / "int4", tmp_path / "broken", put("", lambda t: t[None].clone()))
    for read in (open_model, llmprune.load):
        with pytest.raises(ValueError, match=r"asks for U8 \[bytes\] in .* the files hold U8 \[1, "):
            read(folder)


@pytest.mark.parametrize(("values", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss"])
def test_rounded_values_are_on_their_grid(tmp_path, kind, values, bits):
    """q times scale, the nearest q; nothing that is not packed changes."""
    prune(make(kind, tmp_path / "in"), tmp_path / "dense")
    result = llmprune.convert(tmp_path / "dense", to="packed", values=values, output=tmp_path / "packed")
    assert result["matrices"] and entry(tmp_path / "packed")["bits"] == bits
    opened, dense = open_model(tmp_path / "packed"), tensors(tmp_path / "dense")
    source, stored = opened.source, tensors(tmp_path / "packed")
    for name, layout in source.layouts.items():
        mask, scales = keep_of(stored[f"{name}_mask"], layout.columns), stored[f"{name}_scale"].float()
        weight, found = layout.matrix(dense[name]), layout.matrix(source.load(name))
        spread = scales.repeat_interleave(128, dim=1)[:, : layout.columns]
        largest = 2 ** (bits - 1) - 1
        codes = torch.zeros(weight.shape)
        codes[mask] = unpacked(stored[name], mask, bits).float()
        wanted = (weight / spread).nan_to_num().round().clamp(-largest, largest)
        assert torch.equal(codes[mask], wanted[mask]) and not codes[~mask].any()
        assert torch.equal(found, codes * spread)
    assert all(torch.equal(stored[n], dense[n]) for n in dense if n not in source.layouts)
    assert llmprune.inspect(tmp_path / "packed")["record_agrees"]
    llmprune.convert(tmp_path / "packed", to="dense", output=tmp_path / "back")
    assert same(tensors(tmp_path / "back"), {n: source.load(n) for n in source.tensors})
    with pytest.raises(ValueError, match="is packed with these values already"):
        llmprune.convert(tmp_path / "packed", to="packed", values=values, output=tmp_path / "x")


def unpacked(stored, mask, bits):
    """The codes of a packed tensor in order; those of 4 bits begin a new byte with every mask word."""
    if bits == 8:
        return stored
    codes, place = [], 0
    for row in mask:
        for word in row.split(64):
            kept = int(word.sum())
            for number in range(kept):
                byte = int(stored[place + number // 2])
                codes.append((byte >> 4 if number % 2 else byte & 15) - 8)
            place += -(-kept // 2)
    assert place == len(stored)
    return torch.tensor(codes, dtype=torch.int8)


@pytest.mark.parametrize(("values", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss"])
def test_a_dense_model_is_rounded_without_masks(tmp_path, kind, values, bits):
    folder = make(kind, tmp_path / "in")
    result = llmprune.convert(folder, to="packed", values=values, output=tmp_path / "packed")
    assert result["matrices"] and not result["dense"]
    source, stored = open_model(tmp_path / "packed").source, tensors(tmp_path / "packed")
    dense = tensors(folder)
    for name, layout in source.layouts.items():
        assert (
            layout.whole and entry(tmp_path / "packed")["matrices"][name][2] == layout.rows * layout.columns
        )
        assert f"{name}_mask" not in stored and f"{name}_rows" not in stored
        every = torch.ones(layout.rows, layout.columns, dtype=torch.bool)
        assert torch.equal(keep_of(source.load_mask(name), layout.columns), every)
        spread = stored[f"{name}_scale"].float().repeat_interleave(128, dim=1)[:, : layout.columns]
        largest, weight = 2 ** (bits - 1) - 1, layout.matrix(dense[name])
        codes = unpacked(stored[name], every, bits).view(weight.shape).float()
        assert torch.equal(codes, (weight / spread).nan_to_num().round().clamp(-largest, largest))
        assert torch.equal(layout.matrix(source.load(name)), codes * spread)
        if layout.columns % 2 == 0:
            size = layout.rows * (layout.columns * bits // 8 + 2 * -(-layout.columns // 128))
            assert stored[name].nbytes + stored[f"{name}_scale"].nbytes == size
    assert llmprune.inspect(tmp_path / "packed")["record_agrees"]
    llmprune.convert(tmp_path / "packed", to="dense", output=tmp_path / "back")
    assert same(tensors(tmp_path / "back"), {n: source.load(n) for n in source.tensors})


def test_a_full_matrix_with_a_mask_is_read_as_well(tmp_path):
    """As it was written before matrices could lack one."""
    folder = tmp_path / "packed"
    llmprune.convert(make("gpt2", tmp_path / "in"), to="packed", values="int8", output=folder)
    source = open_model(folder).source
    wanted = {name: source.load(name) for name in source.tensors}
    layout = source.layouts[NAME]
    file = next(f for f in folder.glob("model*.safetensors") if NAME in load_file(f))
    stored = load_file(file)
    stored[f"{NAME}_mask"] = source.load_mask(NAME)
    stored[f"{NAME}_rows"] = (torch.arange(layout.rows + 1) * layout.columns).int()
    save_file(stored, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        known = json.loads(index.read_text())
        known["weight_map"] |= {f"{NAME}{part}": file.name for part in ("_mask", "_rows")}
        index.write_text(json.dumps(known))
    again = open_model(folder).source
    assert not again.layouts[NAME].whole and same({n: again.load(n) for n in again.tensors}, wanted)


def test_a_mask_is_kept_where_it_is_known_or_saves_bytes(tmp_path):
    """Few zeros of a model without masks are values like others; those of a pruned one are not."""
    folder = make("gpt2", tmp_path / "in")
    stored = load_file(folder / ONE_FILE)
    few, many = (f"transformer.h.{n}.attn.c_attn.weight" for n in (0, 1))
    stored[few][:3, :5] = 0
    stored[many][:20] = 0
    save_file(stored, folder / ONE_FILE, metadata={"format": "pt"})
    llmprune.convert(folder, to="packed", values="int4", output=tmp_path / "packed")
    layouts = open_model(tmp_path / "packed").source.layouts
    assert layouts[few].whole and not layouts[many].whole
    prune(folder, tmp_path / "dense", sparsity=0.05)
    llmprune.convert(tmp_path / "dense", to="packed", values="int4", output=tmp_path / "pruned")
    source = open_model(tmp_path / "pruned").source
    assert not any(layout.whole for layout in source.layouts.values())
    masks = read_masks(tmp_path / "dense" / "masks.safetensors")
    for name, keep in masks.items():
        assert torch.equal(keep_of(source.load_mask(name), keep.shape[1]), keep)


WHOLE_DAMAGE = {
    "values too few": put("", lambda t: t[:-1].clone()),
    "values of another type": put("", lambda t: t.to(torch.int32)),
    "no scale": lambda stored, entry: stored.pop(f"{NAME}_scale"),
    "scale of another shape": put("_scale", lambda t: t[:-1].clone()),
    "a scale that is not a number": put("_scale", lambda t: t * torch.nan),
    "rows alone": lambda stored, entry: stored.__setitem__(
        f"{NAME}_rows", torch.zeros(97, dtype=torch.int32)
    ),
    "fewer values told": tell("matrices", lambda v: {**v, NAME: [*v[NAME][:2], v[NAME][2] - 1]}),
    "other columns told": tell("matrices", lambda v: {**v, NAME: [v[NAME][0], 64, v[NAME][0] * 64]}),
    "16 bits told": tell("bits", lambda v: 16),
}


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("what", WHOLE_DAMAGE)
def test_damage_of_a_matrix_without_a_mask_is_told_in_one_line(tmp_path, what, values):
    llmprune.convert(make("gpt2", tmp_path / "in"), to="packed", values=values, output=tmp_path / "packed")
    folder = damaged(tmp_path / "packed", tmp_path / "broken", WHOLE_DAMAGE[what])
    with pytest.raises(ValueError, match=r"damaged|does not hold") as caught:
        source = open_model(folder).source
        for name in source.tensors:
            source.load(name)
    one_line(caught.value)
    with pytest.raises(ValueError, match=r"damaged|does not hold"):
        llmprune.load(folder)


def test_a_scale_that_cuts_off_is_taken_where_it_is_better():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for bits in (8, 4):
        scales = grids.scales_of(weight, bits, 128)
        largest = (weight.unflatten(1, (2, 128)).abs().amax(-1) / (2 ** (bits - 1) - 1)).bfloat16()
        error, plain = (error_of(weight, scale, bits) for scale in (scales, largest))
        assert error <= plain and (bits == 8) == bool(torch.equal(scales, largest))


def error_of(weight, scale, bits):
    rounded = grids.codes_of(weight, scale, bits, 128) * scale.float().repeat_interleave(128, 1)
    return float((rounded - weight).square().sum())


def test_damage_in_a_stack_of_experts_is_told_when_it_is_loaded(tmp_path):
    prune(make("mixtral", tmp_path / "in"), tmp_path / "out", format="packed")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    file = next(f for f in (tmp_path / "out").glob("model*.safetensors") if name in load_file(f))
    stored = load_file(file)
    stored[f"{name}_rows"] = swapped(stored[f"{name}_rows"])
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"packed tensor '{name}' is damaged"):
        llmprune.load(tmp_path / "out")


def test_weights_of_several_dtypes_are_not_rounded_into_one(tmp_path):
    folder = make("gpt2", tmp_path / "in")
    stored = load_file(folder / ONE_FILE)
    name = next(name for name in stored if name.endswith("h.1.mlp.c_fc.weight"))
    stored[name] = stored[name].bfloat16()
    save_file(stored, folder / ONE_FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"several dtypes \(bfloat16, float32\).*--values same"):
        llmprune.convert(folder, to="packed", values="int4", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
