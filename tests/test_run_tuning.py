"""Block tuning and the order of groups in the whole run."""

import json

import oracles
import pytest
import torch
from jobs import array

import llmprune


def run(model, tokens, output, recipe="wanda", **options):
    result = llmprune.prune(
        model, recipe=recipe, sparsity=0.6, calibration=tokens, output=output, dtype="float32", **options
    )
    return result.record


def small(**settings):
    return {"update.steps": 20, "update.batch": 4, **settings}


def test_a_tuned_run_keeps_masks_and_lowers_the_error_of_the_block(tiny_llama, calibration_tokens, tmp_path):
    record = run(tiny_llama, calibration_tokens, tmp_path / "tuned", update="block-tune", settings=small())
    run(tiny_llama, calibration_tokens, tmp_path / "plain")
    masks = [(tmp_path / name / "masks.safetensors") for name in ("tuned", "plain")]
    first = [m for m in record["matrices"] if ".layers.0." in m["name"]]
    assert all(
        m["steps"] == ["block-tune"] and m["tune"]["held_out_after"] < m["tune"]["held_out_before"]
        for m in first
    )
    tuned, plain = (llmprune.load(tmp_path / name).state_dict() for name in ("tuned", "plain"))
    name = first[0]["name"]
    assert torch.equal(tuned[name] != 0, plain[name] != 0) and not torch.equal(tuned[name], plain[name])
    assert masks[0].stat().st_size == masks[1].stat().st_size
    assert llmprune.inspect(tmp_path / "tuned")


def test_a_tuned_run_resumes_to_the_same_bytes(tiny_llama, calibration_tokens, tmp_path, monkeypatch):
    options = {"recipe": "wanda", "update": "block-tune", "settings": small(order="group")}
    run(tiny_llama, calibration_tokens, tmp_path / "whole", **options)
    from llmprune.checkpoint.writer import CheckpointWriter

    real = CheckpointWriter.block

    def cut(self, number, *args):
        if number == 2:
            raise KeyboardInterrupt
        return real(self, number, *args)

    monkeypatch.setattr(CheckpointWriter, "block", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, calibration_tokens, tmp_path / "cut", **options)
    monkeypatch.setattr(CheckpointWriter, "block", real)
    run(tiny_llama, calibration_tokens, tmp_path / "cut", resume=True, **options)
    for file in sorted(p.name for p in (tmp_path / "whole").glob("*.safetensors")):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file


def test_a_rate_that_diverges_loses(tiny_llama, calibration_tokens, tmp_path, monkeypatch):
    from llmprune.recovery.loop import Loop

    real = Loop.error
    monkeypatch.setattr(Loop, "error", lambda self, terms: next(first, None) or real(self, terms))
    first = iter([float("nan")])
    record = run(
        tiny_llama,
        calibration_tokens,
        tmp_path / "out",
        update="block-tune",
        settings=small(**{"update.rates": [0.9, 1e-3]}),
    )
    assert record["matrices"][0]["tune"]["rate"] == 1e-3


def test_group_order_sees_what_the_pruned_matrices_before_it_make(tiny_llama, calibration_tokens, tmp_path):
    """Wanda by groups equals Wanda by hand: prune q, k, v; run; prune o on what it now sees; and so on."""
    run(tiny_llama, calibration_tokens, tmp_path / "out", settings={"order": "group"})
    out = llmprune.load(tmp_path / "out")
    model = llmprune.load(tiny_llama)
    block = model.model.layers[0]
    groups = (
        [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj],
        [block.self_attn.o_proj],
        [block.mlp.gate_proj, block.mlp.up_proj],
        [block.mlp.down_proj],
    )
    for group in groups:
        seen = []
        handle = group[0].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(calibration_tokens)
        handle.remove()
        square = seen[0].double().square().mean(dim=(0, 1)).numpy()
        for module in group:
            score = oracles.wanda_score(array(module.weight.detach()), square)
            module.weight.data *= torch.from_numpy(oracles.unstructured_mask(score, 0.6))
    for mine, wanted in zip(out.model.layers[0].parameters(), block.parameters(), strict=True):
        assert ((mine != 0) == (wanted != 0)).float().mean() > 0.999


def test_the_record_of_a_tuned_run_is_plain_json(tiny_llama, calibration_tokens, tmp_path):
    record = run(
        tiny_llama, calibration_tokens, tmp_path / "out", update="least-squares,block-tune", settings={}
    )
    assert json.loads(json.dumps(record)) == json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert record["matrices"][0]["steps"] == ["least-squares", "block-tune"]
    assert [u["name"] for u in record["recipe"]["update"]] == ["least-squares", "block-tune"]
