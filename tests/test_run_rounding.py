"""Runs that round kept values to 8 or 4 bits: what is stored is what the run computed with."""

from __future__ import annotations

import json

import pytest
import torch
from outputs import one_line
from test_checkpoint_packed import make, prune, tensors

import llmprune
from llmprune.contracts import VALUES
from llmprune.model.opening import open_model
from llmprune.numerics import grids
from runs import cut_off

KINDS = ("mixtral", "gpt_oss", "granitemoe", "gpt2", "gemma3")
TUNED = {"update": "block-tune", "settings": {"update.steps": 6, "update.batch": 2}}


def packed(folder, output, values="int4", **more):
    return prune(folder, output, format="packed", values=values, **more)


@pytest.mark.parametrize("more", [{}, TUNED], ids=["rounded", "tuned"])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_codes_are_what_the_run_computed_with(tmp_path, kind, more):
    folder = make(kind, tmp_path / "in")
    record = packed(folder, tmp_path / "packed", **more)
    settings = {**more.get("settings", {}), "values": "int4"}
    dense = prune(folder, tmp_path / "dense", **{**more, "settings": settings})
    assert record["format"] == {"name": "packed", "values": "int4"} and "format" not in dense
    assert record["recipe"] == dense["recipe"]
    steps = [row["steps"] for row in record["matrices"]]
    assert all(s[0] == "rounding" for s in steps)
    assert bool(more) == any("block-tune" in s for s in steps)
    source, written = open_model(tmp_path / "packed").source, tensors(tmp_path / "dense")
    assert source.values == "int4" and set(source.tensors) == set(written)
    for name, tensor in written.items():
        assert torch.equal(source.load(name), tensor), name
    for name, layout in source.layouts.items():
        codes = source.source.load(name)
        low, high = (codes & 15).int() - 8, (codes >> 4).int() - 8
        assert low.min() >= -8 and high.max() <= 7 and layout.bits == 4
    assert [r["relative_error"] for r in record["matrices"]] == [
        r["relative_error"] for r in dense["matrices"]
    ]
    assert llmprune.inspect(tmp_path / "packed")["record_agrees"]


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_a_rounded_run_is_better_than_plain_rounding(tiny_llama, calibration_tokens, tmp_path, values):
    options = {"recipe": "sparsegpt", "sparsity": 0.5, "calibration": calibration_tokens}
    made = llmprune.prune(tiny_llama, format="packed", values=values, output=tmp_path / "one", **options)
    llmprune.prune(tiny_llama, output=tmp_path / "dense", **options)
    llmprune.convert(tmp_path / "dense", to="packed", values=values, output=tmp_path / "plain")
    first = [row for row in made.record["matrices"] if ".layers.0." in row["name"]]
    dense = open_model(tiny_llama).source
    plain, ours = (open_model(tmp_path / name).source for name in ("plain", "one"))
    assert ours.values == plain.values == values
    assert all(ours.load(r["name"]).shape == plain.load(r["name"]).shape for r in first)
    # The error of the first matrices over the calibration inputs, which the record has for ours.
    grams = {}
    model = llmprune.load(tiny_llama)
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda module, args: grams.setdefault("x", []).append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        model(calibration_tokens)
    hook.remove()
    x = torch.cat(grams["x"]).float()
    name = "model.layers.0.self_attn.q_proj.weight"

    def error(source):
        wanted = x @ dense.load(name).float().T
        return float((x @ source.load(name).float().T - wanted).square().sum() / wanted.square().sum())

    recorded = next(r["relative_error"] for r in first if r["name"] == name)
    assert error(ours) == pytest.approx(recorded, rel=1e-3)
    # 8 bits cost next to nothing, so there is nothing to make up for.
    assert error(ours) < error(plain) * (1 if values == "int4" else 1.01)


@pytest.mark.parametrize("more", [{}, TUNED], ids=["rounded", "tuned"])
def test_a_rounded_run_resumes_to_the_same_bytes(tmp_path, more):
    folder = make("mixtral", tmp_path / "in")
    packed(folder, tmp_path / "whole", **more)
    with cut_off():
        packed(folder, tmp_path / "cut", **more)
    packed(folder, tmp_path / "cut", resume=True, **more)
    for file in sorted(p.name for p in (tmp_path / "whole").glob("*.safetensors")):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file


def test_a_dense_model_is_rounded_without_pruning_it(tiny_llama, calibration_tokens, tmp_path):
    options = {"recipe": "wanda", "sparsity": 0.0, "calibration": calibration_tokens}
    with pytest.warns(
        UserWarning, match="to int4, and a dense folder stores them no smaller; --format packed"
    ):
        llmprune.prune(tiny_llama, settings={"values": "int4"}, output=tmp_path / "dense", **options)
    written, source = tensors(tmp_path / "dense"), open_model(tiny_llama).source
    name = "model.layers.1.mlp.down_proj.weight"
    weight = written[name].float()
    assert not torch.equal(weight, source.load(name).float())
    for row in weight:  # all of them multiples of one scale: few values
        assert len(row[:128].abs().unique()) <= 8


def test_experts_that_no_token_reaches_are_rounded(tmp_path):
    folder = make("mixtral", tmp_path / "in")
    record = packed(folder, tmp_path / "out", settings={"experts.least": 10**6})
    routed = [row for row in record["matrices"] if ".experts." in row["name"]]
    assert routed and all(r["pruner"] == "magnitude" and r["steps"] == ["rounding"] for r in routed)
    assert llmprune.inspect(tmp_path / "out")["record_agrees"]


def test_given_masks_are_kept(tiny_llama, calibration_tokens, tmp_path):
    options = {"recipe": "wanda", "calibration": calibration_tokens}
    llmprune.prune(tiny_llama, sparsity=0.6, output=tmp_path / "first", **options)
    made = llmprune.prune(
        tiny_llama,
        masks=tmp_path / "first",
        format="packed",
        values="int4",
        output=tmp_path / "two",
        **options,
    )
    assert made.record["recipe"]["update"][-1]["name"] == "rounding"
    source = open_model(tmp_path / "two").source
    first = tensors(tmp_path / "first")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert bool((source.load(name)[first[name] == 0] == 0).all())


def test_the_folder_is_named_after_the_bits(tiny_llama, calibration_tokens, work):
    made = llmprune.prune(
        tiny_llama,
        recipe="wanda",
        sparsity=0.5,
        calibration=calibration_tokens,
        format="packed",
        values="int4",
    )
    assert made.output.name.endswith("-wanda-0.5-int4")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"values": "int4"}, "values int4 are for packed folders; add --format packed"),
        ({"values": "int5", "format": "packed"}, "values must be one of same, int8, int4, got 'int5'"),
        ({"settings": {"values": 4}, "format": "packed"}, "must be str, got 4"),
        (
            {"update": {"name": "rounding", "bits": 3}, "format": "packed"},
            "packed values have 8 or 4 bits, got 3",
        ),
        ({"update": ["rounding", "least-squares"]}, "rounding must be the last update of a matrix"),
        ({"update": ["rounding", "rounding"]}, "rounding must be the last update of a matrix"),
        ({"update": {"name": "rounding", "targets": ["*.q_proj"]}}, "rounding is of every pruned matrix"),
    ],
)
def test_bad_values_are_refused_in_one_line(tiny_llama, calibration_tokens, work, options, says):
    with pytest.raises(ValueError) as caught:
        llmprune.prune(
            tiny_llama, recipe="wanda", calibration=calibration_tokens, output=work / "out", **options
        )
    assert says in one_line(caught.value) and not (work / "out").exists()


def test_values_name_what_an_update_rounds_to():
    from llmprune.recipe import loading

    recipe = loading.load("best", {"values": "int8"})
    assert [u.name for u in recipe.update] == ["rounding", "block-tune"] and recipe.bits == VALUES["int8"]
    again = loading.from_dict(json.loads(json.dumps(recipe.as_dict())))
    assert again == recipe
    own = loading.load("wanda", {"values": "int8", "update": {"name": "rounding", "bits": 8}})
    assert own.bits == 8 and len(own.update) == 1
    with pytest.raises(ValueError, match="values int4 contradict the update rounding to 8 bits"):
        loading.load("wanda", {"values": "int4", "update": {"name": "rounding", "bits": 8}})
    assert loading.load("wanda", {"values": "same"}).bits is None


def test_scores_of_a_rounded_folder_are_those_of_its_dense_twin(tiny_llama, calibration_tokens, tmp_path):
    options = {"recipe": "wanda", "sparsity": 0.5, "calibration": calibration_tokens}
    llmprune.prune(tiny_llama, format="packed", values="int4", output=tmp_path / "packed", **options)
    llmprune.convert(tmp_path / "packed", to="dense", output=tmp_path / "dense")
    weights = [llmprune.load(tmp_path / "dense"), llmprune.load(tmp_path / "packed", dequantize=True)]
    for name, tensor in weights[0].state_dict().items():
        assert torch.equal(tensor, weights[1].state_dict()[name]), name
    scale = open_model(tmp_path / "packed").source.source.load("model.layers.0.mlp.up_proj.weight_scale")
    assert scale.dtype == torch.bfloat16 and grids.GROUP == 128


@pytest.mark.parametrize(
    ("sparsity", "values", "some"), [(0.02, None, True), (0.5, None, False), (0.0, "int4", False)]
)
def test_the_plan_says_what_stays_dense(tiny_llama, calibration_tokens, tmp_path, sparsity, values, some):
    options = {"recipe": "wanda", "sparsity": sparsity, "calibration": calibration_tokens, "format": "packed"}
    plan = llmprune.prune(tiny_llama, values=values, output=tmp_path / "out", dry_run=True, **options).plan
    told = [remark for remark in plan.remarks if "stay dense" in remark]
    assert bool(told) == some
    if some:
        made = llmprune.prune(tiny_llama, output=tmp_path / "out", **options)
        listed = json.loads((made.output / "config.json").read_text())["quantization_config"]["matrices"]
        assert (
            f"{len(plan.matrices) - len(listed)} of {len(plan.matrices)} pruned matrices stay dense"
            in told[0]
        )


@pytest.mark.parametrize(
    ("format", "values"), [("dense", None), ("packed", None), ("packed", "int8"), ("packed", "int4")]
)
def test_the_plan_counts_the_disk_of_the_output(tmp_path, format, values):
    options = {"recipe": "wanda", "sparsity": 0.7, "samples": 4, "seqlen": 32, "format": format}
    options |= {"values": values, "output": tmp_path / "out", "samples_text": 0}
    planned = llmprune.prune("demo", dry_run=True, **options).plan.disk
    made = llmprune.prune("demo", **options).output
    taken = sum(path.stat().st_size for path in made.iterdir())
    weights = sum(path.stat().st_size for path in made.glob("*.safetensors"))
    # Beside the weights: record, report, plots, card and tokenizer.
    assert taken <= planned < 1.02 * weights + 700_000
