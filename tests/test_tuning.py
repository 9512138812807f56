"""Block tuning against its oracle and in the whole run; the order of groups; corrections towards the dense model's inputs."""

import json

import numpy as np
import oracles
import pytest
import torch
from jobs import array, inputs, job, statistics

import llmprune
from llmprune import registry
from llmprune.contracts import BlockJob, InputStats, Job, Need
from llmprune.patterns import Unstructured
from llmprune.statistics.sums import StatsSums, sample_positions


def block_job(sequences=8, mine=None, batch=3, seed=0, add=lambda *tensors: None):
    """A block that is one linear layer: outputs x W^T, targets another layer's outputs plus noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, 5, 6, generator=generator)
    dense = torch.randn(4, 6, generator=generator)
    y = x @ dense.T + 0.1 * torch.randn(sequences, 5, 4, generator=generator)
    keep = torch.rand(4, 6, generator=generator) > 0.5
    work = BlockJob(
        "block",
        {"w": dense * keep},
        {"w": keep},
        sequences,
        mine or range(sequences),
        batch,
        lambda weights, rows: x[rows] @ weights["w"].T,
        lambda rows: y[rows],
        add,
        torch.Generator().manual_seed(seed),
    )
    return work, x, y


def test_tuning_equals_the_oracle():
    work, x, y = block_job()
    step = registry.build(
        "updates", "block-tune", {"steps": 25, "batch": 3, "rates": [0.01], "held_out": 0.25}
    )
    tuned = step.apply(work)
    generator = torch.Generator().manual_seed(0)  # the same draws as the step's, in the same order
    order = torch.randperm(8, generator=generator).tolist()
    batches_generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,), generator=generator)))
    batches = oracles.block_tune_batches(
        order[2:], 3, 25, lambda n: torch.randperm(n, generator=batches_generator).tolist()
    )
    wanted = oracles.block_tune(
        array(work.weights["w"]), work.keeps["w"].numpy(), array(x), array(y), batches, 0.01
    )
    assert np.allclose(array(tuned.weights["w"]), wanted, atol=1e-5)
    note = tuned.notes["tune"]
    assert note["applied"] and note["held_out_after"] < note["held_out_before"]
    held = oracles.relative_error_of_rows(array(work.weights["w"]), array(x)[order[:2]], array(y)[order[:2]])
    assert note["held_out_before"] == pytest.approx(held, rel=1e-5)


def test_tuning_keeps_the_mask_and_its_input():
    work, _, _ = block_job()
    before = work.weights["w"].clone()
    tuned = registry.build("updates", "block-tune", {"steps": 10}).apply(work).weights["w"]
    assert torch.equal(before, work.weights["w"])
    assert bool((tuned[~work.keeps["w"]] == 0).all()) and not torch.equal(tuned, before)


def test_a_rate_that_only_hurts_is_not_applied():
    work, _, _ = block_job()
    tuned = registry.build("updates", "block-tune", {"steps": 3, "rates": [0.99]}).apply(work)
    assert not tuned.notes["tune"]["applied"] and torch.equal(tuned.weights["w"], work.weights["w"])


def test_the_best_rate_is_chosen_by_held_out_error():
    work, _, _ = block_job()
    step = registry.build("updates", "block-tune", {"steps": 40, "rates": [1e-6, 0.01, 0.9]})
    assert step.apply(work).notes["tune"]["rate"] == 0.01


def test_micro_batches_do_not_change_the_result():
    step = registry.build("updates", "block-tune", {"steps": 12})
    whole, parts = (step.apply(block_job(batch=b)[0]).weights["w"] for b in (8, 1))
    assert torch.allclose(whole, parts, atol=1e-6)


@pytest.mark.parametrize(
    "option",
    [{"steps": 0}, {"batch": 0}, {"rates": []}, {"rates": [2.0]}, {"rates": ["fast"]}, {"held_out": 1.0}],
)
def test_bad_options_are_named(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        registry.build("updates", "block-tune", option)


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
    from llmprune.updates import block_tune

    real = block_tune._error
    monkeypatch.setattr(
        block_tune, "_error", lambda job, weights, held: next(first, None) or real(job, weights, held)
    )
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
    """Wanda by groups equals Wanda by hand: prune q, k, v; run; prune o on what it now sees; run; and so on."""
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


def cross_stats(x, dense):
    sums = StatsSums(Need.GRAM | Need.CROSS, sample_positions(x.shape[0], x.shape[1], 0))
    for n in range(len(x)):
        sums.add(x[n : n + 1], n)
        sums.add_dense(dense[n : n + 1])
    return sums.result()


def test_the_cross_gram_matrix_is_what_it_says():
    x, dense = inputs(8, seed=1), inputs(8, seed=2)
    wanted = array(dense).reshape(-1, 8).T @ array(x).reshape(-1, 8) / (x.shape[0] * x.shape[1])
    assert np.allclose(array(cross_stats(x, dense).cross), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("room", "name"), [("pruners", "alps"), ("updates", "least-squares"), ("refiners", "swaps")]
)
def test_a_corrected_layer_is_nearer_to_the_dense_outputs(room, name):
    clean = inputs(24, sequences=20)
    x = clean + 0.5 * clean.roll(1, dims=-1)
    both = cross_stats(x, clean)
    task = job(Unstructured("row"), 0.5, rows=10, columns=24, x=x)
    values = {
        need: getattr(task.stats, need.name.lower()) for need in (Need.MEAN, Need.SECOND_MOMENT, Need.GRAM)
    }
    stats = InputStats(task.stats.count, task.stats.sequence_length, values | {Need.CROSS: both.cross})
    task = Job(task.name, task.weight, stats, task.pattern, task.sparsity, task.generator)
    start = registry.build("pruners", "wanda", {}).prune(task)

    def error(correction):
        algorithm = registry.build(room, name, {"correction": correction})
        out = algorithm.prune(task) if room == "pruners" else algorithm.apply(task, start)
        return float((clean @ task.weight.T - x @ out.weight.T).square().sum())

    assert Need.CROSS in registry.build(room, name, {"correction": 0.5}).needs
    assert error(1.0) < error(0.5) < error(0.0)


def test_without_cross_terms_nothing_needs_them():
    assert statistics(inputs(8), Need.GRAM).needs == Need.GRAM
    assert all(
        Need.CROSS not in registry.build("pruners", name, {}).needs for name in registry.names("pruners")
    )


def test_the_record_of_a_tuned_run_is_plain_json(tiny_llama, calibration_tokens, tmp_path):
    record = run(
        tiny_llama, calibration_tokens, tmp_path / "out", update="least-squares,block-tune", settings={}
    )
    assert json.loads(json.dumps(record)) == json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert record["matrices"][0]["steps"] == ["least-squares", "block-tune"]
    assert [u["name"] for u in record["recipe"]["update"]] == ["least-squares", "block-tune"]
