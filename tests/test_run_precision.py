"""Results kept in float32 between blocks: the same bytes after a stop, by two processes, and nothing left."""

import json

import pytest
import torch
from outputs import contents

import llmprune
from llmprune.checkpoint.masks import read_masks
from llmprune.run import corridor

OPTIONS = {"recipe": "sparsegpt-paper", "sparsity": 0.6}


@pytest.fixture
def half(make_llama):
    """A bfloat16 checkpoint of four blocks."""
    return make_llama(layers=4, dtype=torch.bfloat16)


@pytest.fixture
def start(half, calibration_tokens, tmp_path):
    def call(model=half, name="out", **more):
        options = {**OPTIONS, "calibration": calibration_tokens, "output": tmp_path / name} | more
        return llmprune.prune(model, **options)

    return call


def stop_in_block(monkeypatch, start, block, **more):
    real = corridor.prune_matrix

    def failing(target, *args):
        if f".{block}." in target.name:
            raise KeyboardInterrupt
        return real(target, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corridor, "prune_matrix", failing)
        start(**more)


def test_the_next_block_sees_float32_and_the_output_has_the_dtype_of_the_checkpoint(start, half, tmp_path):
    """The same masks as on a float32 copy of the checkpoint, whose results need no cast."""
    start()
    copy = tmp_path / "copy"
    llmprune.load(half, dtype=torch.float32).save_pretrained(copy)
    start(model=copy, name="exact")
    kept, exact = (read_masks(tmp_path / name / "masks.safetensors") for name in ("out", "exact"))
    assert all(torch.equal(kept[name], exact[name]) for name in exact)
    ours, wanted = (llmprune.load(tmp_path / name).state_dict() for name in ("out", "exact"))
    for name in exact:
        assert ours[name].dtype == torch.bfloat16 and torch.equal(ours[name], wanted[name].bfloat16())
    start(name="rounded", settings={"precision": "stored"})
    rounded = read_masks(tmp_path / "rounded" / "masks.safetensors")
    assert any(not torch.equal(kept[name], rounded[name]) for name in kept)


@pytest.mark.parametrize("update", [None, {"name": "block-tune", "steps": 3}])
def test_a_run_goes_on_with_the_float32_results(start, tmp_path, monkeypatch, update):
    more = {"update": update} if update else {}
    start(name="whole", **more)
    stop_in_block(monkeypatch, start, 2, **more)
    partial = tmp_path / ".out.partial"
    kept = sorted(p.name for p in partial.glob("exact-*"))
    assert kept == ["exact-00001.safetensors", "exact-00002.safetensors"]
    start(resume=True, **more)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not partial.exists() and not list((tmp_path / "out").glob("exact-*"))


def test_a_changed_or_lost_float32_result_is_refused(start, tmp_path, monkeypatch):
    stop_in_block(monkeypatch, start, 2)
    exact = tmp_path / ".out.partial" / "exact-00001.safetensors"
    damaged = bytearray(exact.read_bytes())
    damaged[-1] ^= 1
    exact.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"exact-00001.* was removed or changed .*--restart"):
        start(resume=True)
    start(restart=True)
    assert not list(tmp_path.rglob("exact-*"))


def test_a_float32_checkpoint_needs_no_second_copy(start, make_llama, tmp_path, monkeypatch):
    model = make_llama(layers=4)
    stop_in_block(monkeypatch, start, 2, model=model)
    assert not list((tmp_path / ".out.partial").glob("exact-*"))


def test_another_dtype_contradicts_the_recipe(start):
    with pytest.raises(ValueError, match=r"'sparsegpt-paper' .*computes in float32, got dtype bfloat16"):
        start(dtype="bfloat16")


@pytest.mark.parametrize(("key", "value"), [("sums", "exakt"), ("precision", "half")])
def test_unknown_values_are_refused(start, key, value):
    with pytest.raises(ValueError, match=rf"{key} must be .*got"):
        start(settings={key: value})


def test_the_record_mentions_them_only_where_they_are_unusual(start, tmp_path):
    start()
    recipe = json.loads((tmp_path / "out" / "llmprune.json").read_text())["recipe"]
    assert (recipe["sums"], recipe["precision"]) == ("published", "float32")
    assert not {"sums", "precision"} & set(start(name="usual", recipe="wanda").record["recipe"])


def test_a_file_of_that_name_is_foreign_to_a_run_that_keeps_no_float32_results(start, tmp_path, monkeypatch):
    stop_in_block(monkeypatch, start, 2, recipe="sparsegpt")
    foreign = tmp_path / ".out.partial" / "exact-00001.safetensors"
    foreign.write_bytes(b"mine")
    for choice in ("resume", "restart"):
        with pytest.raises(
            ValueError, match=r"holds 'exact-00001.safetensors', which llmprune has not written"
        ):
            start(recipe="sparsegpt", **{choice: True})
    assert foreign.read_bytes() == b"mine"


def test_the_plan_counts_the_float32_results(start, half, make_llama):
    def disk(model, precision):
        return start(model=model, dry_run=True, settings={"precision": precision}).plan

    stored, exact = disk(half, "stored"), disk(half, "float32")
    assert exact.disk - stored.disk == 4 * exact.weights and exact.memory > stored.memory
    single = make_llama(layers=4)
    assert disk(single, "float32").disk == disk(single, "stored").disk
