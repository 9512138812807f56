"""Keep masks as files: compared, applied, checked, and as the start of a run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from other_models import save
from outputs import everything, one_line, weights
from safetensors.torch import load_file, save_file

import llmprune
from llmprune.checkpoint.masks import MaskFile, Masks, pack, read_masks
from llmprune.record import figures
from runs import cut_off

TOKENS = torch.randint(0, 120, (16, 32), generator=torch.Generator().manual_seed(0))


def write_masks(path, masks):
    """A file of these keep masks, bool [R, C] by name; returns the path."""
    file = MaskFile(path, {name: tuple(keep.shape) for name, keep in masks.items()})
    file.write({name: pack(keep) for name, keep in masks.items()})
    file.close()
    return path


@pytest.fixture(scope="module")
def pruned(tiny_llama, calibration_tokens, tmp_path_factory):
    """The tiny Llama pruned by Wanda. Treat as read-only."""
    output = tmp_path_factory.mktemp("pruned") / "wanda"
    options = {"recipe": "wanda", "sparsity": 0.6, "calibration": calibration_tokens}
    return llmprune.prune(tiny_llama, output=output, **options)


@pytest.fixture
def again(tiny_llama, calibration_tokens, tmp_path):
    """`again(masks, ...)`: a run that starts from masks."""

    def call(masks, output="out", **options):
        values = {"recipe": "wanda", "calibration": calibration_tokens, **options}
        return llmprune.prune(tiny_llama, masks=masks, output=tmp_path / output, **values)

    return call


def changed(folder, path, change):
    """The masks of a folder in a file of their own, changed in place by a function."""
    masks = read_masks(folder / "masks.safetensors")
    change(masks)
    return write_masks(path, masks)


# Compared


def test_two_sets_of_masks_are_compared(tmp_path):
    generator = torch.Generator().manual_seed(0)
    a, b = ({n: torch.rand(9, 21, generator=generator) > 0.4 for n in "xyz"} for _ in range(2))
    del a["y"], b["z"]
    a["own"] = torch.ones(2, 3, dtype=torch.bool)
    found = llmprune.mask_diff(write_masks(tmp_path / "a", a), write_masks(tmp_path / "b", b))
    assert [m["name"] for m in found["matrices"]] == ["x"]
    assert (found["only_a"], found["only_b"]) == (["z", "own"], ["y"])
    pairs = [(not p, not q) for p, q in zip(a["x"].flatten(), b["x"].flatten(), strict=True)]
    both, either = sum(p and q for p, q in pairs), sum(p or q for p, q in pairs)
    for entry in (found["matrices"][0], found):
        assert entry["agree"] == pytest.approx(sum(p == q for p, q in pairs) / len(pairs))
        assert entry["jaccard"] == pytest.approx(both / either)
        smaller = min(sum(p for p, _ in pairs), sum(q for _, q in pairs))
        assert entry["overlap"] == pytest.approx(both / smaller)


def test_the_same_masks_and_empty_ones(tmp_path, pruned):
    found = llmprune.mask_diff(pruned.output, pruned.output / "masks.safetensors")
    assert (found["agree"], found["overlap"], found["jaccard"]) == (1, 1, 1)
    assert found["pruned_a"] == pruned.record["totals"]["zeros"]
    ones = write_masks(tmp_path / "m", {"x": torch.ones(3, 5, dtype=torch.bool)})
    found = llmprune.mask_diff(ones, ones)
    assert (found["agree"], found["overlap"], found["jaccard"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"y": (4, 4)}, r"have no matrix in common \(the first has 'x', the second 'y'\)"),
        ({"x": (4, 8)}, r"x is 4 x 4 in .* and 4 x 8 in .*; compare masks of the same model"),
    ],
)
def test_masks_of_different_models_are_refused(tmp_path, other, line):
    a = write_masks(tmp_path / "a", {"x": torch.ones(4, 4, dtype=torch.bool)})
    b = write_masks(tmp_path / "b", {n: torch.ones(shape, dtype=torch.bool) for n, shape in other.items()})
    with pytest.raises(ValueError, match=line) as refused:
        llmprune.mask_diff(a, b)
    one_line(refused.value)


def test_what_holds_no_masks_is_refused(tmp_path, tiny_llama, pruned):
    (tmp_path / "text").write_text("x")
    save_file({"x": torch.ones(2, 2)}, tmp_path / "plain")
    lied = load_file(pruned.output / "masks.safetensors")
    save_file(lied, tmp_path / "lied", metadata={"shapes": json.dumps({n: [10**9, 10**9] for n in lied})})
    for path, line in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tiny_llama, "has no masks.safetensors; name an output folder"),
        (tmp_path / "text", "is not a readable mask file"),
        (tmp_path / "plain", "is not a readable mask file"),
        (tmp_path / "lied", "is not a readable mask file .*not the bits of 1000000000 x 1000000000"),
    ):
        with pytest.raises(ValueError, match=line) as refused:
            llmprune.mask_diff(path, path)
        one_line(refused.value)


def test_the_fingerprint_is_of_the_masks_alone(tmp_path):
    x, y = torch.rand(3, 9) > 0.5, torch.rand(2, 4) > 0.5
    one, other = ({"x": x, "y": y}, {"y": y, "x": x})
    digests = {Masks(write_masks(tmp_path / f"{n}", m)).digest for n, m in enumerate((one, other))}
    x[1, 8] = ~x[1, 8]
    assert len(digests) == 1 and Masks(write_masks(tmp_path / "2", one)).digest not in digests


# Applied


def by_hand(folder, masks):
    """Every tensor of a folder, with the pruned weights of these masks zero."""
    tensors = weights(folder)
    for name, keep in masks.items():
        tensors[name][~keep] = 0
    return tensors


def same_bytes(one, other):
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape
        same = one[name].view(-1).view(torch.uint8), other[name].view(-1).view(torch.uint8)
        assert torch.equal(*same), name


def test_applied_to_another_dtype(make_llama, pruned, tmp_path):
    folder = make_llama(dtype=torch.bfloat16, seed=3, tied=True)
    result = llmprune.mask_apply(folder, pruned.output, tmp_path / "out")
    masks = read_masks(pruned.output / "masks.safetensors")
    same_bytes(weights(tmp_path / "out"), by_hand(folder, masks))
    ours, theirs = ((f / "masks.safetensors").read_bytes() for f in (tmp_path / "out", pruned.output))
    assert ours == theirs
    counts = llmprune.inspect(tmp_path / "out")
    assert counts["record_agrees"] and counts["zeros"] == sum(int((~keep).sum()) for keep in masks.values())
    record = result.record
    assert record["masks"]["model"] == "tiny-llama" and record["masks"]["recipe"] == "wanda"
    assert record["masks"]["digest"] == record["recipe"]["masks"]
    assert record["recipe"]["sparsity"] == pytest.approx(0.6, abs=0.02)
    assert {row["pruner"] for row in record["matrices"]} == {"masks"}
    for file in (tmp_path / "out").glob("*"):
        assert str(tmp_path).encode() not in file.read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The masks were given: those of tiny-llama (recipe wanda), sha256:" in card
    assert "Not calibrated" in card and "Not calibrated" not in (pruned.output / "README.md").read_text()
    assert llmprune.load(tmp_path / "out")(TOKENS[:1]).logits.isfinite().all()
    assert "masks, unstructured (recipe masks)" in figures.method_of(record)


def test_what_the_record_beside_the_masks_says_holds_no_path(pruned, tiny_llama, tmp_path):
    folder = shutil.copytree(pruned.output, tmp_path / "copy")
    record = json.loads((folder / "llmprune.json").read_text())
    for source, told in (
        ("me/model", "me/model"),
        ("/home/me/model", "model"),
        ("~/model/", "model"),
        ("C:\\me\\model", "model"),
    ):
        record["model"]["source"] = source
        (folder / "llmprune.json").write_text(json.dumps(record))
        result = llmprune.mask_apply(tiny_llama, folder, tmp_path / "out", overwrite=True)
        assert result.record["masks"]["model"] == told


def test_a_damaged_record_beside_the_masks_is_refused(pruned, tiny_llama, refused, tmp_path, work):
    folder = shutil.copytree(pruned.output, tmp_path / "copy")
    (folder / "llmprune.json").write_text("{")
    refused(r"cannot read .*llmprune\.json", masks=folder, sparsity=None)
    with pytest.raises(ValueError, match=r"cannot read .*llmprune\.json"):
        llmprune.mask_apply(tiny_llama, folder, "out")
    assert everything(work) == {}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "gpt2", "qwen3_next"])
def test_applied_to_stacks_and_transposes_as_a_run_does(kind, tmp_path):
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128, n_positions=64)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "in")
        folder = tmp_path / "in"
    else:
        folder = save(kind, tmp_path / "in")
    options = {"recipe": "wanda", "calibration": TOKENS}
    first = llmprune.prune(folder, output=tmp_path / "first", sparsity=0.5, **options)
    llmprune.mask_apply(folder, first.output, tmp_path / "applied")
    one, other = weights(first.output), weights(tmp_path / "applied")
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert llmprune.inspect(tmp_path / "applied")["record_agrees"]
    assert llmprune.mask_check(first.output)["filled"] == 0
    # And a run that starts from the masks, without another step, writes the very same.
    llmprune.prune(folder, masks=first.output, output=tmp_path / "again", **options)
    same_bytes(other, weights(tmp_path / "again"))
    files = [(tmp_path / name / "masks.safetensors").read_bytes() for name in ("first", "applied", "again")]
    assert len(set(files)) == 1


def test_a_matrix_without_a_mask_stays_dense_and_is_named(tiny_llama, pruned, tmp_path):
    left = "model.layers.1.mlp.up_proj.weight"
    masks = changed(pruned.output, tmp_path / "some", lambda masks: masks.pop(left))
    with pytest.warns(UserWarning, match=rf"without a mask, so dense as before: {left}$"):
        result = llmprune.mask_apply(tiny_llama, masks, tmp_path / "out")
    assert result.record["masks"] == {"digest": Masks(masks).digest, "dense": [left]}
    assert torch.equal(weights(tmp_path / "out")[left], weights(tiny_llama)[left])
    assert llmprune.inspect(tmp_path / "out")["record_agrees"]
    assert llmprune.mask_check(tmp_path / "out")["dense"] == [left]


@pytest.mark.parametrize("call", ["apply", "check", "prune"])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda masks: masks.update({"lm_head.weight": torch.ones(4, 4, dtype=torch.bool)}),
            r"has a mask for 'lm_head.weight', which is no prunable matrix of tiny-llama",
        ),
        (
            lambda masks: masks.update({n: keep[:, :-8] for n, keep in masks.items()}),
            r"the mask of model.layers.0.self_attn.q_proj.weight .* is 64 x 56 and the matrix of tiny-llama "
            r"64 x 64 \(and 13 more likewise\)",
        ),
    ],
)
def test_masks_of_another_model_are_refused_before_any_work(
    call, change, line, tiny_llama, pruned, tmp_path, work, again
):
    masks = changed(pruned.output, tmp_path / "masks", change)
    calls = {
        "apply": lambda: llmprune.mask_apply(tiny_llama, masks, "out"),
        "check": lambda: llmprune.mask_check(tiny_llama, masks),
        "prune": lambda: again(masks),
    }
    with pytest.raises(ValueError, match=line) as refused:
        calls[call]()
    one_line(refused.value)
    assert everything(work) == {} and not (tmp_path / "out").exists()


def test_an_interrupted_call_goes_on_and_loses_nothing(tiny_llama, pruned, tmp_path):
    out = tmp_path / "out"
    llmprune.mask_apply(tiny_llama, pruned.output, tmp_path / "whole")
    with cut_off():
        llmprune.mask_apply(tiny_llama, pruned.output, out)
    assert not out.exists()
    with pytest.raises(ValueError, match="1 finished blocks; continue it with --resume"):
        llmprune.mask_apply(tiny_llama, pruned.output, out)
    others = changed(pruned.output, tmp_path / "others", lambda m: next(iter(m.values())).fill_(True))
    with pytest.raises(ValueError, match=r"is another one: recipe\.\w+ was "):
        llmprune.mask_apply(tiny_llama, others, out, resume=True)
    llmprune.mask_apply(tiny_llama, pruned.output, out, resume=True)
    same_bytes(weights(out), weights(tmp_path / "whole"))
    assert llmprune.inspect(out)["record_agrees"]
    before = everything(out)
    with pytest.raises(ValueError, match="is not empty"):
        llmprune.mask_apply(tiny_llama, pruned.output, out)
    with pytest.raises(ValueError, match="holds the masks"):
        llmprune.mask_apply(tiny_llama, out, out, overwrite=True)
    with pytest.raises(ValueError, match="holds the model"):
        llmprune.mask_apply(out, pruned.output, out, overwrite=True)
    assert everything(out) == before


# Checked


def test_filled_weights_are_counted(pruned, tmp_path):
    folder = shutil.copytree(pruned.output, tmp_path / "tuned")
    shard = next(iter(sorted(folder.glob("model-00001*"))))
    tensors, masks = load_file(shard), read_masks(folder / "masks.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    places = (~masks[name]).nonzero()[:3]
    for value, (r, c) in zip((1e-30, float("nan"), -0.0), places, strict=True):
        tensors[name][r, c] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    found = llmprune.mask_check(folder)
    filled = {m["name"]: m["filled"] for m in found["matrices"] if m["filled"]}
    assert filled == {name: 2} and found["filled"] == 2
    assert found["pruned"] == sum(int((~keep).sum()) for keep in masks.values())
    (folder / "masks.safetensors").unlink()
    with pytest.raises(ValueError, match=r"tuned has no masks\.safetensors beside its weights; name"):
        llmprune.mask_check(folder)
    assert llmprune.mask_check(folder, pruned.output)["filled"] == 2


# As the start of a run


def test_a_run_from_masks_keeps_weights_and_tells_so(again, pruned, tiny_llama, tmp_path):
    result = again(pruned.output)
    same_bytes(weights(result.output), by_hand(tiny_llama, read_masks(pruned.output / "masks.safetensors")))
    record = result.record
    assert (
        record["recipe"]["masks"]
        == record["masks"]["digest"]
        == Masks(pruned.output / "masks.safetensors").digest
    )
    assert record["recipe"]["pruner"]["name"] == "masks" and record["masks"]["recipe"] == "wanda"
    for row, before in zip(record["matrices"], pruned.record["matrices"], strict=True):
        assert row["sparsity"] == before["sparsity"] and row["pruner"] == "masks" and row["steps"] == []
        assert row["target_sparsity"] == pytest.approx(row["sparsity"], abs=0.02)
    first = [row["relative_error"] for run in (record, pruned.record) for row in run["matrices"][:7]]
    assert first[:7] == pytest.approx(first[7:])
    assert "reported" not in record and llmprune.inspect(result.output)["record_agrees"]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_refiner_finds_what_it_finds_after_wanda(pattern, again, tiny_llama, calibration_tokens, tmp_path):
    options = {"calibration": calibration_tokens, "pattern": pattern, "settings": {"refiner.margin": 0.0}}
    wanda = llmprune.prune(
        tiny_llama,
        recipe="wanda",
        pattern=pattern,
        calibration=calibration_tokens,
        output=tmp_path / "wanda",
    )
    dsnot = llmprune.prune(tiny_llama, recipe="dsnot", output=tmp_path / "dsnot", **options)
    refined = again(wanda.output, recipe="dsnot", pattern=pattern, settings={"refiner.margin": 0.0})
    masks = [read_masks(r.output / "masks.safetensors") for r in (wanda, dsnot, refined)]
    firsts = [{n: m for n, m in found.items() if ".layers.0." in n} for found in masks]
    moved = sum(int((firsts[0][n] != firsts[1][n]).sum()) for n in firsts[0])
    assert moved and all(torch.equal(firsts[1][n], firsts[2][n]) for n in firsts[0])
    assert refined.record["matrices"][0]["steps"] == ["dsnot"]
    assert llmprune.inspect(refined.output)["record_agrees"]


@pytest.mark.parametrize("recipe", ["sparsegpt", "best", "best-mask"])
@pytest.mark.parametrize("precision", ["stored", "float32"])
def test_masks_with_uneven_rows_pass_through_every_recipe(recipe, precision, again, pruned, tmp_path):
    def uneven(masks):
        masks["model.layers.0.self_attn.q_proj.weight"][0, :5] = False
        masks["model.layers.0.self_attn.k_proj.weight"][:] = True
        masks["model.layers.0.self_attn.v_proj.weight"][3] = False

    masks = changed(pruned.output, tmp_path / "uneven", uneven)
    settings = {"precision": precision} | ({"update.steps": 2} if recipe == "best" else {})
    result = again(masks, recipe=recipe, settings=settings)
    given, kept = read_masks(masks), read_masks(result.output / "masks.safetensors")
    for name, keep in given.items():
        assert int(keep.sum()) == int(kept[name].sum())
        if recipe != "best-mask":  # the others have no refiner
            assert torch.equal(keep, kept[name])
    assert llmprune.inspect(result.output)["record_agrees"] is True


def test_experts_that_see_few_tokens_keep_their_masks(tmp_path):
    folder = save("mixtral", tmp_path / "in", num_local_experts=32)
    first = llmprune.prune(
        folder, recipe="wanda", sparsity=0.5, calibration=TOKENS[:1], output=tmp_path / "1"
    )
    again = llmprune.prune(
        folder, recipe="dsnot", masks=first.output, calibration=TOKENS[:1], output=tmp_path / "2"
    )
    rows = [row for row in again.record["matrices"] if row.get("tokens", 64) < 64]
    assert rows and {(row["pruner"], *row["steps"]) for row in rows} == {("masks",)}
    one, other = (read_masks(r.output / "masks.safetensors") for r in (first, again))
    assert all(torch.equal(one[row["name"]], other[row["name"]]) for row in rows)


def test_the_plan_says_what_the_masks_have(again, pruned, tmp_path):
    def change(masks):
        masks["model.layers.0.self_attn.q_proj.weight"][:] = True

    plan = again(changed(pruned.output, tmp_path / "m", change), dry_run=True).plan
    assert {m.reason for m in plan.matrices.values()} == {"given masks"}
    assert plan.matrices["model.layers.0.self_attn.q_proj"].sparsity == 0
    removed = sum(m.sparsity * np.prod(m.shape) for m in plan.matrices.values())
    assert plan.sparsity == pytest.approx(removed / plan.weights)
    assert plan.remarks == ()


def test_a_remark_where_a_refiner_may_break_the_pattern(again, tiny_llama, calibration_tokens, tmp_path):
    options = {"pattern": "2:4", "calibration": calibration_tokens, "output": tmp_path / "w"}
    masks = llmprune.prune(tiny_llama, recipe="wanda", **options).output
    with pytest.warns(UserWarning, match="the masks hold 2:4 in every group, which dsnot need not keep"):
        again(masks, recipe="dsnot", dry_run=True)
    assert again(masks, recipe="dsnot", pattern="2:4", dry_run=True).plan.remarks == ()
    assert again(masks, recipe="wanda", dry_run=True).plan.remarks == ()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"sparsity": 0.5}, r"sparsity 0.5 contradicts the masks of .*, which decide it; leave out one"),
        ({"pruner": "magnitude"}, r"pruner 'magnitude' contradicts the masks"),
        ({"settings": {"pruner.damp": 0.1}}, r"pruner.damp 0.1 contradicts the masks"),
        ({"allocator": "owl"}, r"allocator 'owl' contradicts the masks"),
        ({"recipe": {"pruner": "wanda", "allocator": "erk"}}, r"allocator 'erk' decides the sparsity"),
        (
            {"recipe": {"pruner": "wanda", "rules": [{"match": "*up_proj", "sparsity": 0.5}]}},
            r"rule '\*up_proj' sets sparsity 0.5, and the masks have their own",
        ),
        ({"pattern": "2:4"}, r"the mask of model.layers.0.self_attn.q_proj.weight in .* is not 2:4: a group"),
        ({"recipe": {"pruner": "wanda", "masks": "sha256:0"}}, r"the recipe starts from masks sha256:0, and"),
        ({"settings": {"masks": "sha256:0"}}, r"the recipe starts from masks sha256:0, and"),
        ({"settings": {"masks": 3}}, r"the recipe starts from masks 3, and"),
        ({"masks": None, "settings": {"masks": 3}}, r"'masks' must be str, got 3"),
        ({"masks": None, "settings": {"masks": "sha256:0"}}, r"starts from masks sha256:0; give their file"),
    ],
)
def test_contradictions_are_refused_in_one_line(options, line, pruned, refused):
    given = {"masks": pruned.output, "sparsity": None, "recipe": "wanda", **options}
    refused(line, **given)


def test_permuted_columns_are_not_those_of_the_masks(refused, tiny_llama, calibration_tokens, tmp_path):
    options = {"pattern": "2:4", "calibration": calibration_tokens, "output": tmp_path / "w"}
    masks = llmprune.prune(tiny_llama, recipe="wanda", **options).output
    settings = {"permute": True}
    line = r"permute reorders the columns that the masks are of; leave it out \(--set permute=false\)"
    refused(line, masks=masks, sparsity=None, recipe="wanda", pattern="2:4", settings=settings)


def test_every_planned_matrix_needs_a_mask(again, pruned, refused, tmp_path):
    left = "model.layers.1.mlp.up_proj.weight"
    masks = changed(pruned.output, tmp_path / "some", lambda masks: masks.pop(left))
    refused(
        rf"has no mask for {left}; give masks of every matrix", masks=masks, sparsity=None, recipe="wanda"
    )
    recipe = {"pruner": "wanda", "rules": [{"match": "*.1.mlp.up_proj", "skip": True}]}
    record = again(masks, recipe=recipe).record
    assert left not in {row["name"] for row in record["matrices"]} and len(record["matrices"]) == 13


def test_resuming_with_other_masks_is_refused(again, pruned, tmp_path):
    with cut_off():
        again(pruned.output, output="cut")

    def other(masks):  # of the same sparsity
        keep = masks["model.layers.0.self_attn.q_proj.weight"]
        keep[0] = keep[0].flip(0)

    others = changed(pruned.output, tmp_path / "others", other)
    with pytest.raises(ValueError, match=r"is another one: recipe.masks was sha256:.* and is sha256:"):
        again(others, output="cut", resume=True)
    with pytest.raises(ValueError, match=r"is another one: "):
        again(None, output="cut", resume=True, sparsity=0.6)
    again(pruned.output, output="cut", resume=True)
    same_bytes(weights(again(pruned.output, output="whole").output), weights(tmp_path / "cut"))


def test_the_recipe_of_the_record_needs_the_same_masks(again, pruned, tmp_path):
    first = again(pruned.output, recipe="dsnot")
    recipe = {k: v for k, v in first.record["recipe"].items() if k not in ("calibration", "chosen")}
    other = again(pruned.output, output="other", recipe={**recipe, "sparsity": None})
    same_bytes(weights(first.output), weights(other.output))


# The commands


def test_the_commands(typed, tiny_llama, pruned):
    code, out, err = typed("mask", "apply", tiny_llama, "--masks", pruned.output, "--output", "out")
    assert code == 0 and "Result" in out, err
    code, out, err = typed("mask", "diff", "out", pruned.output / "masks.safetensors")
    assert (code, err) == (0, "") and "overall" in out and "1.0000" in out
    found = json.loads(typed("mask", "diff", "out", pruned.output, "--json")[1])
    assert found["jaccard"] == 1 and len(found["matrices"]) == 14
    assert typed("mask", "check", "./out", "--quiet") == (0, "", "")
    code, out, err = typed("mask", "check", tiny_llama, "--masks", "out", "--json")
    zeros = pruned.record["totals"]["zeros"]
    assert code == 1 and json.loads(out)["filled"] == zeros
    assert err.splitlines()[-1].startswith(f"llmprune: {zeros:,} of {zeros:,} pruned weights of ")
    assert err.splitlines()[-1].endswith("in 14 of 14 matrices; llmprune mask apply makes them zero again")
    code, out, err = typed("mask", "check", tiny_llama)
    assert code == 1 and len(err.splitlines()) == 1 and "name the masks with --masks FILE" in err
    assert typed("mask", "apply", tiny_llama)[0] == 2
    code, out, err = typed(
        "prune", tiny_llama, "--masks", "out", "--samples", 4, "--seqlen", 32, "--dry-run", "--json"
    )
    assert code == 0 and {m["set_by"] for m in json.loads(out)["matrices"]} == {"given masks"}
