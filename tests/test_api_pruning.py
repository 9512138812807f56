"""Pruning from Python: every kind of checkpoint, models and texts in memory."""

from __future__ import annotations

import pytest
import torch
from outputs import weights

import llmprune
from llmprune.checkpoint.masks import read_masks

VARIANTS = [
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"tied": True},
    {"sharded": True},
    {"sharded": True, "tied": True, "dtype": torch.bfloat16},
    {"layers": 3},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_kind_of_checkpoint_comes_back_as_it_was_but_for_the_zeros(
    make_llama, calibration_tokens, tmp_path, variant
):
    source = make_llama(**variant)
    result = llmprune.prune(
        source, recipe="wanda", calibration=calibration_tokens, sparsity=0.5, output=tmp_path / "out"
    )
    dense, pruned, masks = (
        weights(source),
        weights(result.output),
        read_masks(result.output / "masks.safetensors"),
    )
    assert set(pruned) == set(dense)
    for name, weight in dense.items():
        assert pruned[name].dtype == weight.dtype
        assert pruned[name].equal(weight * masks[name] if name in masks else weight), name
    loaded = llmprune.load(result.output)
    assert loaded.dtype == variant.get("dtype", torch.float32)
    for name in masks:
        assert loaded.get_parameter(name).equal(pruned[name]), name
    assert llmprune.inspect(result.output)["record_agrees"] is True


def test_a_model_in_memory_is_pruned_and_left_as_it_was(tiny_llama, calibration_tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"recipe": "wanda", "calibration": calibration_tokens, "sparsity": 0.5}
    memory = llmprune.prune(model, output=tmp_path / "memory", **options)
    folder = llmprune.prune(tiny_llama, output=tmp_path / "folder", **options)
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in before.items())
    assert all(t.equal(weights(folder.output)[n]) for n, t in weights(memory.output).items())
    assert AutoModelForCausalLM.from_pretrained(memory.output).config.hidden_size == 64
    for path in memory.output.iterdir():
        assert str(tiny_llama).encode() not in path.read_bytes(), path.name


def test_strings_in_memory_calibrate(tiny_llama, tmp_path):
    result = llmprune.prune(
        tiny_llama,
        recipe="magnitude",
        calibration=("def f(x): return x\n" * 9 for _ in range(40)),
        samples=4,
        seqlen=32,
        output=tmp_path / "out",
    )
    assert (result.record["calibration"]["samples"], result.record["calibration"]["sequence_length"]) == (
        4,
        32,
    )
