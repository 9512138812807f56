"""The embedded model: small, really trained, and pruning it visibly matters."""

import json

import pytest

import llmprune
from llmprune.checkpoint.reader import Checkpoint
from llmprune.demo import text
from llmprune.hub.download import demo_folder


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Perplexity on held-out text, dense and at 70 % by recipe."""
    root = tmp_path_factory.mktemp("demo")
    folders = {"dense": "demo"}
    for recipe in ("magnitude", "wanda", "sparsegpt", "dsnot"):
        folders[recipe] = root / recipe
        llmprune.prune("demo", recipe=recipe, sparsity=0.7, dtype="float32", output=folders[recipe])

    def perplexity(folder):
        return llmprune.evaluate(folder, perplexity=["builtin"], limit=200)["perplexity"]["builtin"]["value"]

    return {name: perplexity(folder) for name, folder in folders.items()}


def test_pruning_matters_and_better_methods_hurt_less(scores):
    assert scores["dense"] < 30
    assert min(scores["magnitude"], scores["wanda"]) > 3 * scores["dense"], scores
    assert scores["sparsegpt"] < 0.5 * min(scores["magnitude"], scores["wanda"]), scores
    assert scores["dsnot"] <= 1.05 * scores["wanda"], scores


def test_it_is_small_and_tied_and_in_bf16():
    folder = demo_folder()
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) <= 10_000_000
    tensors = Checkpoint(folder).tensors
    assert 2_000_000 <= sum(t.elements for t in tensors.values()) <= 5_000_000
    assert {str(t.dtype) for t in tensors.values()} == {"torch.bfloat16"} and "lm_head.weight" not in tensors


def test_its_splits_share_no_document():
    splits = [
        set(d()) for d in (text.training_documents, text.calibration_documents, text.held_out_documents)
    ]
    assert not (splits[0] & splits[1] or splits[0] & splits[2] or splits[1] & splits[2])
    assert min(sum(map(len, s)) for s in splits) > 300_000


def test_the_training_log_belongs_to_it():
    rows = [json.loads(line) for line in (demo_folder().parent / "training.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == rows[0]["steps"] and rows[-1]["held_out_loss"] < 3 < rows[1]["held_out_loss"]
    assert rows[0]["parameters"] == sum(t.elements for t in Checkpoint(demo_folder()).tensors.values())


def test_its_own_task_is_well_above_chance():
    acc = llmprune.evaluate("demo", tasks=["demo_continuation"])["tasks"]["demo_continuation"]["acc"]
    assert acc["value"] - 4 * acc["stderr"] > 0.25
