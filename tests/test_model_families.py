"""Mixtures of experts, hybrids and wrappers: names and shapes of the file, statistics of routed tokens."""

import math

import oracles
import pytest
import torch
from jobs import array
from other_models import MODELS, SMALL, save
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration

import llmprune
from llmprune.evaluation.perplexity import windows
from llmprune.model.opening import open_model
from llmprune.model.targets import all_targets
from llmprune.text.sources import evaluation_text
from runs import cut_off, logits_by_block

TOKENS = torch.randint(0, 120, (16, 32), generator=torch.Generator().manual_seed(0))
WANDA = {"recipe": "wanda", "sparsity": 0.5}
PLAIN = [kind for kind in MODELS if kind != "gemma3"]


def tensors(folder):
    return {k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()}


def check_files(source, out, record):
    """The output has the source's names, shapes and dtypes; what is no matrix of the record is unchanged."""
    before, after = tensors(source), tensors(out)
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    pruned = {row["name"] for row in record["matrices"]}
    pruned |= {name.rpartition(".")[0] for name in pruned}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= pruned


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize(
    "options", [{"recipe": "wanda", "sparsity": 0.5}, {"recipe": "sparsegpt", "pattern": "2:4"}]
)
def test_the_folder_has_the_names_and_shapes_of_the_file(tmp_path, kind, options):
    folder, out = save(kind, tmp_path / "in"), tmp_path / "out"
    record = llmprune.prune(folder, calibration=TOKENS, output=out, **options).record
    check_files(folder, out, record)
    assert all(row["sparsity"] == 0.5 for row in record["matrices"])
    assert llmprune.inspect(out)["record_agrees"]
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("kind", PLAIN)
def test_a_dense_model_passes_its_blocks_as_a_whole_model_does(tmp_path, kind):
    folder = save(kind, tmp_path / "in")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.set_experts_implementation("eager") if hasattr(model, "set_experts_implementation") else None
    with torch.no_grad():
        wanted = model(TOKENS[:3]).logits
    found = logits_by_block(open_model(folder).skeleton, TOKENS[:3])
    assert torch.allclose(found, wanted, atol=1e-5)


def routed_inputs(folder, layer=0):
    """What each expert of a Mixtral layer reads: its tokens, by the router's choice."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen = []
    experts = model.model.layers[layer].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    (hidden, chosen, _) = seen[0]
    return {e: hidden[(chosen == e).any(dim=1)] for e in range(4)}


@pytest.mark.parametrize("which", ["routed", "all"])
def test_experts_are_pruned_by_the_tokens_routed_to_them(tmp_path, which):
    folder, out = save("mixtral", tmp_path / "in"), tmp_path / "out"
    settings = {"experts.tokens": which}
    record = llmprune.prune(
        folder, recipe="wanda", sparsity=0.5, calibration=TOKENS, output=out, settings=settings
    ).record
    rows = {row["name"]: row for row in record["matrices"]}
    inputs, weights, pruned = routed_inputs(folder), tensors(folder), tensors(out)
    everything = torch.cat([inputs[e] for e in range(4)])
    distinct = torch.unique(everything, dim=0)
    for expert, x in inputs.items():
        x = distinct if which == "all" else x
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"
        assert rows[name]["tokens"] == len(x)
        score = oracles.wanda_score(array(weights[name]), x.double().square().mean(dim=0).numpy())
        agree = oracles.unstructured_mask(score, 0.5) == (pruned[name] != 0).numpy()
        assert agree.mean() > 0.999


def test_experts_that_few_tokens_reach(tmp_path):
    folder = save("mixtral", tmp_path / "in")

    def rows(**settings):
        options = {f"experts.{key}": value for key, value in settings.items()}
        record = llmprune.prune(
            folder,
            recipe="wanda",
            sparsity=0.5,
            calibration=TOKENS[:1],
            output=tmp_path / "out",
            overwrite=True,
            settings=options,
        ).record
        return [row for row in record["matrices"] if "tokens" in row]

    assert all(row["pruner"] == "magnitude" and row["tokens"] < 64 for row in rows())
    assert all(row["pruner"] == "wanda" for row in rows(least=0) if row["tokens"])
    assert all(row["pruner"] == "wanda" and row["tokens"] == 32 for row in rows(fewer="all-tokens", least=31))
    with pytest.raises(ValueError, match=r"12 matrices of experts see fewer than 64 .*samples"):
        rows(fewer="error")


@pytest.mark.parametrize("allocator", ["owl", "dlp"])
def test_allocators_measure_what_tokens_reach(tmp_path, allocator):
    folder = save("mixtral", tmp_path / "in", num_local_experts=32)
    options = {"sparsity": 0.5, "calibration": TOKENS[:1, :8], "settings": {"experts.least": 0}}
    record = llmprune.prune(
        folder, recipe="wanda", allocator=allocator, output=tmp_path / "out", **options
    ).record
    assert any(row.get("tokens") == 0 for row in record["matrices"])
    assert record["totals"]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_tuning_leaves_alone_what_holds_a_dense_matrix(tmp_path):
    folder, out = save("mixtral", tmp_path / "in"), tmp_path / "out"
    dense = "model.layers.0.block_sparse_moe.experts.0.w1"
    settings = {"update.steps": 6, "rules": [{"match": dense, "skip": True}]}
    record = llmprune.prune(
        folder, recipe="best", sparsity=0.5, calibration=TOKENS, output=out, settings=settings
    ).record
    assert torch.equal(tensors(folder)[f"{dense}.weight"], tensors(out)[f"{dense}.weight"])
    tuned = {row["name"] for row in record["matrices"] if "tune" in row}
    # The stack of gates and ups holds the dense one, the stack of downs does not.
    of_block = {n.removeprefix("model.layers.0.block_sparse_moe.experts.") for n in tuned if "layers.0" in n}
    assert {n for n in of_block if n[0].isdigit()} == {f"{expert}.w2.weight" for expert in range(4)}


@pytest.mark.parametrize("order", ["block", "group"])
def test_experts_in_portions_are_pruned_as_all_together(tmp_path, monkeypatch, order):
    from llmprune.run import observer

    folder = save("qwen2_moe", tmp_path / "in")
    options = {"recipe": "sparsegpt", "sparsity": 0.5, "calibration": TOKENS, "settings": {"order": order}}
    llmprune.prune(folder, output=tmp_path / "whole", **options)
    monkeypatch.setattr(observer, "EXPERT_BYTES", 2 * 4 * (32**2 + 48**2))
    calls, real = [], observer.Observer.collect
    monkeypatch.setattr(
        observer.Observer, "collect", lambda self, *args: calls.append(args) or real(self, *args)
    )
    llmprune.prune(folder, output=tmp_path / "portions", **options)
    assert len(calls) > (2 if order == "block" else 10)
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "portions")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_best_works_on_experts(tmp_path):
    folder, out = save("qwen3_moe", tmp_path / "in"), tmp_path / "out"
    record = llmprune.prune(
        folder,
        recipe="best",
        sparsity=0.5,
        calibration=TOKENS,
        output=out,
        settings={"update.steps": 6, "update.rates": [1e-3]},
    ).record
    check_files(folder, out, record)
    assert record["totals"]["zeros"] == record["totals"]["weights"] // 2
    for row in record["matrices"]:
        assert row["sparsity"] == pytest.approx(row["target_sparsity"], abs=1e-3)
    experts = {row["target_sparsity"] for row in record["matrices"] if ".0.mlp.experts." in row["name"]}
    assert max(experts) - min(experts) < 1e-3 and llmprune.inspect(out)["record_agrees"]
    assert any(row["tune"]["applied"] for row in record["matrices"])


def test_a_wrapper_keeps_its_class_and_its_image_part(tmp_path):
    save("gemma3", tmp_path / "in")
    result = llmprune.prune(
        tmp_path / "in", recipe="wanda", sparsity=0.5, calibration=TOKENS, output=tmp_path / "out"
    )
    check_files(tmp_path / "in", tmp_path / "out", result.record)
    assert not any("vision" in row["name"] for row in result.record["matrices"])
    assert len(result.record["matrices"]) == 14
    assert type(llmprune.load(tmp_path / "out")) is Gemma3ForConditionalGeneration
    plan = llmprune.prune(
        tmp_path / "in", recipe="wanda", sparsity=0.5, calibration=TOKENS, dry_run=True, output=tmp_path / "x"
    )
    assert any("vision_tower (SiglipVisionModel" in line for line in plan.plan.dense)


def test_routers_convolutions_and_shared_gates_are_no_targets(tmp_path):
    for kind, dense in (
        ("qwen2_moe", "gate"),
        ("mixtral", "gate"),
        ("mamba", "conv1d"),
        ("gpt_oss", "router"),
    ):
        skeleton = open_model(save(kind, tmp_path / kind)).skeleton
        assert not any(dense in target.name.split(".") for target in all_targets(skeleton))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "mamba", "qwen3_next", "gemma3"])
def test_a_run_resumes_to_the_same_bytes(tmp_path, kind):
    folder = save(kind, tmp_path / "in")
    options = {"recipe": "sparsegpt", "sparsity": 0.5, "calibration": TOKENS}
    llmprune.prune(folder, output=tmp_path / "whole", **options)
    with cut_off():
        llmprune.prune(folder, output=tmp_path / "cut", **options)
    llmprune.prune(folder, output=tmp_path / "cut", resume=True, **options)
    for file in sorted(p.name for p in (tmp_path / "whole").glob("*.safetensors")):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file


@pytest.mark.parametrize("kind", ["mixtral", "mamba", "qwen3_next", "gemma3"])
def test_perplexity_and_tasks_of_other_families(tmp_path, kind, monkeypatch):
    from llmprune.hub.download import demo_folder

    monkeypatch.setitem(SMALL, "vocab_size", 2048)
    folder = save(kind, tmp_path / "in")
    for file in demo_folder().glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    llmprune.prune(folder, recipe="wanda", sparsity=0.5, calibration=TOKENS, output=tmp_path / "out")
    scores = llmprune.evaluate(
        tmp_path / "out", perplexity=["builtin"], tasks=["demo_continuation"], eval_seqlen=32, limit=2
    )
    model, tokenizer = llmprune.load(tmp_path / "out").eval(), open_model(tmp_path / "out").tokenizer
    rows = windows(evaluation_text("builtin"), tokenizer, 32, 2, 2048, "builtin")
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in rows]
    assert scores["perplexity"]["builtin"]["value"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-3)
    assert 0 <= scores["tasks"]["demo_continuation"]["acc"]["value"] <= 1
