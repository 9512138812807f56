"""A model that changes while it is being worked on is noticed, and nothing is called finished."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmprune
from llmprune.checkpoint import writer
from llmprune.run import corridor as run


@pytest.fixture
def model(make_llama, tmp_path):
    return Path(shutil.copytree(make_llama(layers=4, sharded=True), tmp_path / "model"))


def shard_of(model, block):
    wanted = f"model.layers.{block}.mlp.up_proj.weight"
    return next(p for p in sorted(model.glob("*.safetensors")) if wanted in load_file(p))


def renamed(path):
    """Another file of the same size takes its place, as when a download is repeated."""
    tensors = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(tensors, path.with_name("new"), metadata={"format": "pt"})
    os.replace(path.with_name("new"), path)


def overwritten(path):
    """Other bytes in the same file."""
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\x01" * 64)


def removed(path):
    path.unlink()


def truncated(path):
    os.truncate(path, path.stat().st_size - 100)


def during(monkeypatch, change, moment):
    """Make the change while block 2 is pruned, or when the last shard was written."""
    real_matrix, real_rest, done = run.prune_matrix, writer.CheckpointWriter.rest, []

    def matrix(target, *args):
        if moment == "block" and target.name.startswith("model.layers.1.") and not done:
            done.append(change())
        return real_matrix(target, *args)

    def rest(self, source):
        real_rest(self, source)
        if moment == "end":
            done.append(change())

    monkeypatch.setattr(run, "prune_matrix", matrix)
    monkeypatch.setattr(writer.CheckpointWriter, "rest", rest)


@pytest.mark.parametrize("moment", ["block", "end"])
@pytest.mark.parametrize("change", [renamed, overwritten, removed, truncated], ids=lambda f: f.__name__)
def test_a_weight_file_that_changes_ends_the_run(
    model, calibration_tokens, tmp_path, monkeypatch, change, moment
):
    file = shard_of(model, 3)
    during(monkeypatch, lambda: change(file), moment)
    options = {"recipe": "wanda", "calibration": calibration_tokens, "output": tmp_path / "out"}
    with pytest.raises(ValueError, match=rf"{file.name} changed during the run.*--restart") as raised:
        llmprune.prune(model, **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    if change in (renamed, overwritten) and getattr(raised.value, "kept", None):
        with pytest.raises(ValueError, match=r"another one: model was sha256:.*--restart"):
            llmprune.prune(model, **options, resume=True)
        assert llmprune.prune(model, **options, restart=True).output.is_dir()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_small_file_that_changes_ends_the_run(model, calibration_tokens, tmp_path, monkeypatch, name):
    during(monkeypatch, lambda: (model / name).write_text((model / name).read_text() + " "), "block")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} changed during the run"):
        llmprune.prune(model, recipe="wanda", calibration=calibration_tokens, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_appears_meanwhile_is_not_taken_along(model, calibration_tokens, tmp_path, monkeypatch):
    during(monkeypatch, lambda: (model / "tokenizer.model").write_bytes(b"new"), "block")
    llmprune.prune(model, recipe="wanda", calibration=calibration_tokens, output=tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_a_model_in_memory_that_is_written_to_ends_the_run(model, calibration_tokens, tmp_path, monkeypatch):
    loaded = llmprune.load(model)
    weight = loaded.model.layers[3].mlp.up_proj.weight

    def change():
        with torch.no_grad():
            weight.mul_(2)

    during(monkeypatch, change, "block")
    with pytest.raises(
        ValueError, match=r"layers\.3\.mlp\.up_proj\.weight of the model in memory changed during the run"
    ):
        llmprune.prune(loaded, recipe="wanda", calibration=calibration_tokens, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_changes_while_it_is_scored_gets_no_score(model, monkeypatch):
    from llmprune.evaluation import scores

    real = scores.perplexity
    monkeypatch.setattr(scores, "perplexity", lambda *args: (real(*args), renamed(shard_of(model, 0)))[0])
    with pytest.raises(ValueError, match="changed during the run"):
        llmprune.evaluate(model, perplexity=["builtin"], limit=2)


def test_a_model_that_changes_while_it_is_counted_or_loaded_is_refused(model, monkeypatch):
    from transformers import AutoModelForCausalLM

    from llmprune.evaluation import audit

    counting, loading = audit.recount, AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(audit, "recount", lambda *args: (counting(*args), overwritten(shard_of(model, 0)))[0])
    with pytest.raises(ValueError, match="changed during the run"):
        llmprune.inspect(model)
    changing = classmethod(
        lambda cls, *args, **more: (loading(*args, **more), renamed(shard_of(model, 0)))[0]
    )
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", changing)
    with pytest.raises(ValueError, match="changed during the run"):
        llmprune.load(model)
