"""Packed folders, and folders in bitmasks, that were damaged at random: read rightly, or refused in one line.

Damage to a value cannot be seen: then what is read is what an independent decoder reads. Every other damage,
to bits, sums, scales, headers and what config.json says, ends in a `ValueError` of one line, or changes
nothing. Some cases of a kind in `make test`, 500 in all in `make test-all`, `LLMPRUNE_FUZZ_CASES=20000` by
hand.

A new form of packed folders is one more line in `FOLDERS`, and its part in `packed_decoder`.
"""

from __future__ import annotations

import copy
import json
import shutil
from datetime import timedelta

import numpy as np
import pytest
import torch
from bitmasks import compressed
from hostile import CASES, change, damaged_safetensors, damages, dumped, read_or_refused
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from other_models import make
from packed_decoder import decoded, decoded_bitmasks, stored
from safetensors.torch import load_file, save_file

import llmprune
from llmprune.checkpoint.stored_masks import masks_at
from llmprune.model.opening import open_model

TOKENS = torch.randint(0, 120, (8, 16), generator=torch.Generator().manual_seed(0))
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8]
TYPES += [torch.uint8, torch.bool, torch.int16, torch.float8_e4m3fn]
NUMBERS = [0, 1, -1, 2, 7, 8, 127, 255, 2**31 - 1, -(2**31), 2**62, float("nan"), float("inf"), -1e30, 1e-45]


def packed(kind, values="same"):
    """A builder of a packed folder of a kind of model."""

    def build(root):
        folder = make(kind, root / "in")
        options = {"recipe": "magnitude", "sparsity": 0.6, "calibration": TOKENS, "output": root / "pruned"}
        llmprune.prune(folder, **options)
        llmprune.convert(root / "pruned", to="packed", values=values, output=root / "out")
        return root / "out"

    return build


def maskless(kind, values, **sizes):
    """A builder of a packed folder of a dense model: rounded values, and no masks."""

    def build(root):
        llmprune.convert(make(kind, root / "in", **sizes), to="packed", values=values, output=root / "out")
        assert not any(name.endswith(("_mask", "_rows")) for name in stored(root / "out"))
        return root / "out"

    return build


def bitmasked(form, kind):
    """A builder of a folder of compressed-tensors."""

    def build(root, make_llama):
        folder = make_llama(tokenizer=False, layers=1, vocab_size=128, hidden_size=32, intermediate_size=48)
        compressed(folder, root / "out", form, kind)
        return root / "out"

    return build


FOLDERS = {
    "values as they are": packed("gpt_neox"),
    "int8": packed("gpt_neox", "int8"),
    "int4": packed("gpt_neox", "int4"),
    "transposed": packed("gpt2"),
    "transposed int4": packed("gpt2", "int4"),
    "stacks": packed("gpt_oss"),
    "stacks int8": packed("gpt_oss", "int8"),
    "converted experts": packed("mixtral"),
    "maskless int4": maskless("gpt_neox", "int4", intermediate_size=75),  # columns that end within a byte
    "maskless transposed int4": maskless("gpt2", "int4"),
    "maskless stacks int8": maskless("gpt_oss", "int8"),
}
BITMASKS = {
    "sparse-bitmask": bitmasked("sparse-bitmask", None),
    "sparse-bitmask int8": bitmasked("sparse-bitmask", torch.int8),
    "sparse-24-bitmask fp8": bitmasked("sparse-24-bitmask", torch.float8_e4m3fn),
}
PARTS = ("_mask", "_rows", "_scale")
OTHER_PARTS = (".shape", ".compressed", ".bitmask", ".row_offsets", ".weight_scale")

wheres = st.integers(0, 10**6)
to_tensor = st.tuples(
    st.just("tensor"),
    st.sampled_from(
        (
            "bit",
            "cut",
            "grow",
            "cast",
            "flat",
            "wide",
            "number",
            "swap",
            "drop",
            "rename",
            "empty",
            "exchange",
        )
    ),
    wheres,
    wheres,
    wheres,
)
to_entry = st.tuples(st.just("entry"), damages)
to_size = st.tuples(st.just("size"), wheres, st.sampled_from([-1, 1, 8, 32, 64, 2**31, 2**40]))
to_lies = st.tuples(
    st.just("lie"), st.sampled_from(("transposed", "stacks", "matrix", "dtype")), wheres, wheres
)
to_file = st.tuples(st.just("file"), damages)
twice = st.tuples(st.just("twice"), wheres)
to_maskless = st.tuples(
    st.just("mask"), st.sampled_from(("whole", "wrong", "bits alone", "starts alone")), wheres, wheres
)
DAMAGES = {
    "tensor": to_tensor,
    "entry": to_entry,
    "size": to_size,
    "lie": to_lies,
    "file": to_file,
    "twice": twice,
    "mask": to_maskless,
}
OFTEN = ["tensor", "tensor", "tensor", "entry", "size", "lie", "file", "twice"]  # `one_of` has no weights


def whole_damage(name):
    """One or two damages to a folder of a name; matrices without a mask may be given one."""
    kinds = OFTEN + (["mask", "mask"] if name.startswith("maskless") else [])
    return st.lists(st.sampled_from(kinds).flatmap(DAMAGES.get), min_size=1, max_size=2)


READERS = ("stream", "masks", "inspect", "convert", "load", "dequantised")
readers = st.sampled_from(["stream"] * 5 + ["load", *READERS])


def hit(tensors, names, action, which, where, what):
    """Damage one tensor of some, in place."""
    name = names[which % len(names)]
    tensor = tensors[name]
    if action == "drop":
        del tensors[name]
    elif action == "rename":
        tensors[f"{name}{'_x' if what % 2 else ''}.{what % 3}"] = tensors.pop(name)
    elif action == "exchange":
        other = names[where % len(names)]
        if other in tensors:
            tensors[name], tensors[other] = tensors[other], tensor
    else:
        tensors[name] = changed(tensor.clone(), action, where, what)


def changed(tensor, action, where, what):
    """A tensor after one damage."""
    if action == "cut":
        return tensor[: max(0, len(tensor) - 1 - what % 3)].clone() if tensor.ndim else tensor
    if action == "grow":
        return torch.cat([tensor, tensor[:1]]) if tensor.ndim and len(tensor) else tensor
    if action == "cast":
        return tensor.to(TYPES[what % len(TYPES)])
    if action == "flat":
        return tensor.flatten()
    if action == "wide":
        return tensor.reshape(1, *tensor.shape) if what % 2 else tensor.reshape(-1, 1)
    if action == "empty":
        return tensor[:0].clone() if tensor.ndim else tensor
    if tensor.numel() == 0:
        return tensor
    flat, place = tensor.view(-1), where % tensor.numel()
    if action == "bit":
        flat.view(torch.uint8)[place * tensor.element_size()] ^= 1 << what % 8
    elif action == "swap":
        other = what % tensor.numel()
        flat[place], flat[other] = flat[other].clone(), flat[place].clone()
    elif action == "number":
        number = np.float64(NUMBERS[what % len(NUMBERS)])
        if not tensor.dtype.is_floating_point:
            number = np.int64(0 if number != number else np.clip(number, -(2**62), 2**62))
        flat[place] = torch.tensor([number]).to(tensor.dtype)[0]
    return tensor


def give_mask(tensors, entry, how, which, where):
    """Give a matrix that has no mask one, in place: a whole one is right, a wrong or half a one is not."""
    sizes = sizes_of(entry)
    bare = [name for name in sizes if f"{name}_scale" in tensors and f"{name}_mask" not in tensors]
    if not bare:
        return
    name = bare[which % len(bare)]
    rows, columns = sizes[name]
    keep = np.zeros((rows, 64 * -(-columns // 64)), np.uint8)
    keep[:, :columns] = 1
    if how == "wrong":
        keep[where % rows, where % keep.shape[1]] ^= 1  # a weight less, or a bit behind the last column
    if how != "starts alone":
        tensors[f"{name}_mask"] = torch.from_numpy(np.packbits(keep, axis=1, bitorder="little"))
    if how != "bits alone":
        tensors[f"{name}_rows"] = torch.arange(rows + 1, dtype=torch.int32) * columns


def sizes_of(entry):
    """R and C of the matrices in an entry, whatever else was done to it."""
    matrices = entry.get("matrices")
    listed = matrices.items() if isinstance(matrices, dict) else ()
    sized = {n: sizes[:2] for n, sizes in sorted(listed) if isinstance(sizes, list) and len(sizes) == 3}
    return {n: pair for n, pair in sized.items() if all(type(x) is int and 0 < x < 2000 for x in pair)}


def lie(entry, what, which, where):
    """Change what config.json says of a packed folder, in place, to something plausible."""
    matrices = entry.get("matrices")
    if not isinstance(matrices, dict) or not matrices:
        return
    name = sorted(matrices)[which % len(matrices)]
    if what == "transposed":
        old = entry.get("transposed")
        listed = {n for n in old if isinstance(n, str)} if isinstance(old, list) else set()
        entry["transposed"] = sorted(listed ^ {name})
    elif what == "stacks":
        old = entry.get("stacks")
        counts = {**(old if isinstance(old, dict) else {}), name: (0, 1, 2, 3, 4, 8, 10**9)[where % 7]}
        entry["stacks"] = counts
    elif what == "dtype":
        names = ("float32", "bfloat16", "float16", "float64", "int8", "float8_e4m3fn", "x")
        entry["dtype"] = names[where % 7]
    elif where % 2:
        del matrices[name]
    else:
        matrices["x"] = matrices[name]


def spoil(folder, todo):
    """Damage a folder; its first weight file, and the entry of its config."""
    file = sorted(folder.glob("model*.safetensors"))[0]
    tensors, config = load_file(file), json.loads((folder / "config.json").read_text())
    marked = PARTS + OTHER_PARTS
    entry = config["quantization_config"]
    for kind, *damage in todo:
        names = sorted(n for n in tensors if n.endswith(marked) or {f"{n}_mask", f"{n}_scale"} & set(tensors))
        if kind == "tensor" and names:
            hit(tensors, names, *damage)
        elif kind == "entry":
            for one in damage[0]:
                change(config["quantization_config"], one)
        elif kind == "size" and isinstance(entry.get("matrices"), dict) and entry["matrices"]:
            sizes = entry["matrices"][sorted(entry["matrices"])[damage[0] % len(entry["matrices"])]]
            if isinstance(sizes, list) and sizes and type(sizes[damage[0] % len(sizes)]) is int:
                sizes[damage[0] % len(sizes)] += damage[1]
        elif kind == "lie":
            lie(entry, *damage)
        elif kind == "mask":
            give_mask(tensors, entry, *damage)
        elif kind == "twice" and names:
            others = sorted(folder.glob("model*.safetensors"))[-1]
            name = names[damage[0] % len(names)]
            if others != file:
                save_file(load_file(others) | {name: tensors[name]}, others, metadata={"format": "pt"})
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    (folder / "config.json").write_bytes(dumped(config))
    bytewise = [one for kind, *damage in todo if kind == "file" for one in damage[0]]
    file.write_bytes(damaged_safetensors(file.read_bytes(), bytewise))


def agree(found, wanted, names=None):
    """What was read is what the independent decoder reads."""
    for name in names or found:
        assert list(found[name].shape) == list(wanted[name].shape), name
        ours = found[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert ours == wanted[name].tobytes(), name


def read(folder, how, output, decode):
    """Read a folder in one of the ways, all of it; what is read must be what the decoder reads."""
    if how == "stream":
        source = open_model(folder).source
        found = {name: source.load(name) for name in source.tensors}
        return lambda: agree(found, decode(folder))
    if how == "masks" and decode is decoded:
        masks = masks_at(folder)
        found = {name: masks.load(name) for name in masks.shapes}
        return lambda: [m.shape for m in found.values()]
    if how in ("inspect", "masks"):
        counts = llmprune.inspect(folder)
        return lambda: counts["zeros"]
    if how == "convert" or decode is not decoded:
        try:
            llmprune.convert(folder, to="dense", output=output)
        except ValueError:
            assert not output.exists()
            raise
        found = {}
        for file in output.glob("model*.safetensors"):
            found |= load_file(file)
        return lambda: agree(found, decode(folder))
    model = llmprune.load(folder, dequantize=how == "dequantised")
    with torch.no_grad():
        logits = model(TOKENS[:1, :8]).logits
    if how == "dequantised":
        state = model.state_dict()
        wanted = decode(folder)
        # Where config.json lies about the dtype of rounded values, the model has its own all the same.
        same = [name for name in wanted if name in state and state[name].nbytes == wanted[name].nbytes]
        return lambda: agree({n: state[n] for n in same}, wanted)
    return lambda: logits.shape


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_llama):
    """`folders(name)`: a valid folder, made once."""
    made = {}

    def get(name):
        if name not in made:
            root = tmp_path_factory.mktemp("valid")
            made[name] = FOLDERS[name](root) if name in FOLDERS else BITMASKS[name](root, make_llama)
        return made[name]

    return get


def decoder(name):
    return decoded if name in FOLDERS else decoded_bitmasks


@pytest.mark.parametrize(
    "cases", [6, pytest.param(CASES // (len(FOLDERS) + len(BITMASKS)), marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("name", [*FOLDERS, *BITMASKS])
def test_damage_is_refused_in_one_line_or_read_rightly(folders, tmp_path, name, cases):
    valid, trial, output = folders(name), tmp_path / "trial", tmp_path / "written"
    decode = decoder(name)
    for how in READERS:  # undamaged; and the first time takes long in a process
        shutil.rmtree(output, ignore_errors=True)
        read(valid, how, output, decode)()

    @settings(
        max_examples=max(1, cases),
        deadline=timedelta(seconds=20),
        derandomize=CASES <= 500,
        database=None,
        phases=[Phase.generate],  # a smaller example would take minutes to find
        suppress_health_check=list(HealthCheck),
    )
    @given(todo=whole_damage(name), how=readers)
    def one(todo, how):
        shutil.rmtree(trial, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(valid, trial)
        spoil(trial, copy.deepcopy(todo))
        checks = []
        read_or_refused(lambda: checks.append(read(trial, how, output, decode)))
        for check in checks:
            check()

    one()
