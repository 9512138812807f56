"""Keep masks of packed folders: the same as those of their dense twins, in every command that takes masks."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from other_models import make
from outputs import everything, one_line, same_bits, weights
from safetensors.torch import load_file, save_file

import llmprune
from llmprune.checkpoint.masks import read_masks
from llmprune.checkpoint.stored_masks import masks_at
from llmprune.model.opening import open_model

TOKENS = torch.randint(0, 120, (16, 32), generator=torch.Generator().manual_seed(0))
KINDS = ("gpt2", "mixtral", "gpt_oss", "llama4_text", "granitemoe", "qwen3_next")


def prune(folder, output, **more):
    options = {"recipe": "wanda", "sparsity": 0.7, "calibration": TOKENS, "output": output, **more}
    return llmprune.prune(folder, **options).output


def read(folder):
    source = open_model(folder).source
    return {name: source.load(name) for name in source.tensors}


def some_stay(kind):
    """Rules by which some matrices are not pruned, and some so little that packing does not make them
    smaller.
    """
    few, none = {"gpt2": ("*.c_attn", "*.h.1.mlp.*")}.get(kind, ("*.q_proj", "*layers.1.*o_proj"))
    return {"rules": [{"match": few, "sparsity": 0.01}, {"match": none, "skip": True}]}


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_the_dense_twin(tmp_path, kind, rules):
    folder, settings = make(kind, tmp_path / "in"), some_stay(kind) if rules else {}
    dense = prune(folder, tmp_path / "dense", settings=settings)
    twins = [prune(folder, tmp_path / "packed", settings=settings, format="packed"), tmp_path / "converted"]
    llmprune.convert(dense, to="packed", output=twins[1])
    masks = read_masks(dense / "masks.safetensors")
    for twin in twins:
        found = llmprune.mask_diff(dense, twin)
        assert found["agree"] == found["jaccard"] == 1 and not found["only_a"] and not found["only_b"]
        assert {m["name"] for m in found["matrices"]} == set(masks)
        assert llmprune.mask_diff(twin, dense)["agree"] == 1
        assert masks_at(twin).digest == masks_at(dense).digest
        assert masks_at(twin).sparsity == masks_at(dense).sparsity
        assert all(torch.equal(masks_at(twin).load(name), keep) for name, keep in masks.items())
        assert llmprune.mask_check(twin)["filled"] == llmprune.mask_check(twin, dense)["filled"] == 0
        assert llmprune.mask_check(dense, twin)["pruned"] == sum(
            int((~keep).sum()) for keep in masks.values()
        )
    if rules:
        entry = json.loads((twins[0] / "config.json").read_text())["quantization_config"]
        in_stacks = {n for n in masks if n.rpartition(".")[0] in entry.get("stacks", {})}
        assert set(masks) - set(entry["matrices"]) - in_stacks
    llmprune.convert(twins[1], to="dense", output=tmp_path / "back")
    files = [(f / "masks.safetensors").read_bytes() for f in (tmp_path / "back", dense)]
    assert files[0] == files[1]
    records = [json.loads((f / "llmprune.json").read_text()) for f in (tmp_path / "back", dense)]
    for record in records:
        del record["totals"]["bytes"], record["totals"]["files"]
        record.pop("speed", None)  # of the weights as they were written
    assert records[0] == records[1] and llmprune.inspect(tmp_path / "back")["record_agrees"]


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_rounded_values_keep_their_masks(tmp_path, values):
    dense = prune(make("gpt2", tmp_path / "in"), tmp_path / "dense")
    llmprune.convert(dense, to="packed", values=values, output=tmp_path / "packed")
    assert masks_at(tmp_path / "packed").digest == masks_at(dense).digest
    line = rf"holds values rounded to {values}, which would be rounded once more; make it dense first: llm"
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=line) as refused:
        llmprune.mask_apply(tmp_path / "packed", dense, tmp_path / "out")
    one_line(refused.value)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss"])
def test_a_run_from_the_masks_of_a_packed_folder(tmp_path, kind):
    folder = make(kind, tmp_path / "in")
    dense = prune(folder, tmp_path / "dense")
    llmprune.convert(dense, to="packed", output=tmp_path / "packed")
    outputs = []
    for name in ("dense", "packed"):
        options = {"masks": tmp_path / name, "sparsity": None, "output": tmp_path / f"from-{name}"}
        outputs.append(prune(folder, **options))
        llmprune.mask_apply(folder, tmp_path / name, tmp_path / f"applied-{name}")
    assert same_bits(weights(outputs[0]), weights(outputs[1])) and same_bits(
        weights(tmp_path / "applied-dense"), weights(tmp_path / "applied-packed")
    )
    records = [json.loads((output / "llmprune.json").read_text()) for output in outputs]
    assert records[0]["masks"] == records[1]["masks"] and records[0]["masks"]["recipe"] == "wanda"


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "mixtral"])
def test_applied_to_a_packed_folder_they_give_a_packed_one(tmp_path, kind):
    folder = make(kind, tmp_path / "in")
    packed = prune(folder, tmp_path / "packed", format="packed", sparsity=0.5)
    given = prune(folder, tmp_path / "given", recipe="magnitude", sparsity=0.8)
    result = llmprune.mask_apply(packed, given, tmp_path / "out")
    assert result.record["format"] == {"name": "packed", "values": "same"}
    masks, wanted = read_masks(given / "masks.safetensors"), read(packed)
    llmprune.convert(packed, to="dense", output=tmp_path / "dense")
    llmprune.mask_apply(tmp_path / "dense", given, tmp_path / "twin")
    assert same_bits(read(tmp_path / "out"), weights(tmp_path / "twin"))
    assert set(read(tmp_path / "out")) == set(wanted)
    assert llmprune.inspect(tmp_path / "out")["record_agrees"]
    assert llmprune.mask_diff(tmp_path / "out", given)["agree"] == 1
    assert masks_at(tmp_path / "out").digest == masks_at(given).digest == result.record["masks"]["digest"]
    assert len(masks) == len(result.record["matrices"])
    assert llmprune.load(tmp_path / "out")(TOKENS[:1]).logits.isfinite().all()


def test_a_matrix_that_gets_no_mask_stays_packed(tmp_path):
    folder = make("gpt2", tmp_path / "in")
    packed = prune(folder, tmp_path / "packed", format="packed")
    given = prune(folder, tmp_path / "given", settings={"rules": [{"match": "*.h.1.mlp.*", "skip": True}]})
    with pytest.warns(UserWarning, match=r"without a mask, so dense as before: transformer.h.1.mlp"):
        llmprune.mask_apply(packed, given, tmp_path / "out")
    matrices = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["matrices"]
        for name in ("packed", "out")
    ]
    assert set(matrices[0]) == set(matrices[1])
    left = [name for name in matrices[0] if "h.1.mlp" in name]
    assert left and all(matrices[0][name] == matrices[1][name] for name in left)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return prune(make("gpt2", folder / "in"), folder / "out", format="packed")


NAME = "transformer.h.0.attn.c_attn.weight"


def record(change):
    def apply(folder):
        values = json.loads((folder / "llmprune.json").read_text())
        change(values)
        (folder / "llmprune.json").write_text(json.dumps(values))

    return apply


def bits(change):
    def apply(folder):
        file = next(f for f in folder.glob("model*.safetensors") if NAME in load_file(f))
        stored = load_file(file)
        stored[f"{NAME}_mask"] = change(stored[f"{NAME}_mask"])
        save_file(stored, file, metadata={"format": "pt"})

    return apply


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (record(lambda r: r.update(matrices=5)), r"is not a record of this program; remove it or restore"),
        (record(lambda r: r["matrices"][0].update(shape=[1, 2, 3])), r"is not a record of this program"),
        (
            record(lambda r: r["matrices"][0].update(shape=[2, 3])),
            r"names 'transformer.* of 2 x 3, which",
        ),
        (
            record(lambda r: r["matrices"][0].update(name="x")),
            r"names 'x' of .*, which the weights do not",
        ),
        (record(lambda r: r["matrices"][0].update(name="x." + "9" * 5000)), r"which the weights do not hold"),
        (record(lambda r: r.update(matrices=[])), r"holds no masks"),
        (bits(lambda t: t[:-1].clone()), r"the packed checkpoint is damaged"),
        (
            bits(lambda t: t | 128),
            r"'.*c_attn.weight' is damaged: the mask has bits set behind",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(packed, tmp_path, damage, line):
    folder = shutil.copytree(packed, tmp_path / "broken")
    damage(folder)
    with pytest.raises(ValueError, match=line) as refused:
        llmprune.mask_diff(folder, packed)
    one_line(refused.value)


def test_without_a_record_they_are_those_of_the_packed_matrices(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "copy")
    (folder / "llmprune.json").unlink()
    assert masks_at(folder).digest == masks_at(packed).digest


def test_the_commands(typed, packed):
    code, out, err = typed("mask", "diff", packed, packed)
    assert (code, err) == (0, "") and "1.0000" in out
    assert typed("mask", "check", packed, "--quiet") == (0, "", "")
    code, out, err = typed("mask", "apply", packed, "--masks", packed, "--output", "out")
    assert code == 0 and "packed" in out, err
