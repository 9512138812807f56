"""Packed folders in `from_pretrained` of transformers, and models at work with packed weights."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from other_models import save
from safetensors.torch import load_file
from test_checkpoint_packed import KINDS, TOKENS, entry, make, prune, same, tensors

import llmprune
from llmprune.runtime.layers import PackedLinear
from llmprune.runtime.plugin import PackedConfig
from llmprune.runtime.standins import PackedStack


def auto(kind):
    wrapper = kind == "gemma3"
    return transformers.AutoModelForImageTextToText if wrapper else transformers.AutoModelForCausalLM


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS[:2]).logits


def packed_parts(model):
    layers = sum(isinstance(module, PackedLinear) for module in model.modules())
    stacks = sum(isinstance(v, PackedStack) for m in model.modules() for v in vars(m).values())
    return layers, stacks


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_loads_runs_and_saves_it(tmp_path, kind):
    folder = make(kind, tmp_path / "in")
    prune(folder, tmp_path / "dense")
    prune(folder, tmp_path / "packed", format="packed")
    dense, packed = (auto(kind).from_pretrained(tmp_path / name) for name in ("dense", "packed"))
    if hasattr(dense, "set_experts_implementation"):
        dense.set_experts_implementation("eager")
    layers, stacks = packed_parts(packed)
    assert layers and (stacks > 0) == (
        kind in ("mixtral", "gpt_oss", "llama4_text", "granitemoe", "qwen3_next")
    )
    assert torch.allclose(logits(packed), logits(dense), atol=1e-5)
    packed.save_pretrained(tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(tmp_path / "packed"))
    assert entry(tmp_path / "saved") == entry(tmp_path / "packed")
    assert packed_parts(auto(kind).from_pretrained(tmp_path / "saved")) == (layers, stacks)


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_dequantised_it_has_ordinary_layers(tmp_path, kind):
    folder = make(kind, tmp_path / "in")
    prune(folder, tmp_path / "dense")
    prune(folder, tmp_path / "packed", format="packed")
    by_config = auto(kind).from_pretrained(
        tmp_path / "packed", quantization_config=PackedConfig(dequantize=True)
    )
    for model in (by_config, llmprune.load(tmp_path / "packed", dequantize=True)):
        assert packed_parts(model) == (0, 0) and not hasattr(model.config, "quantization_config")
        wanted = llmprune.load(tmp_path / "dense")
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in wanted.state_dict().items())
    with pytest.raises(ValueError, match="is not packed, so there is nothing to dequantize"):
        llmprune.load(tmp_path / "dense", dequantize=True)


def test_generated_tokens_are_those_of_the_dense_model(tmp_path):
    prune(make("gpt2", tmp_path / "in"), tmp_path / "dense")
    llmprune.convert(tmp_path / "dense", to="packed", output=tmp_path / "packed")
    options = {"max_new_tokens": 12, "do_sample": False}
    dense, packed = (llmprune.load(tmp_path / name) for name in ("dense", "packed"))
    assert torch.equal(dense.generate(TOKENS[:2], **options), packed.generate(TOKENS[:2], **options))


def test_without_llmprune_it_stops(tmp_path):
    prune(save("gpt_neox", tmp_path / "in"), tmp_path / "packed", format="packed")
    path = str(tmp_path / "packed")
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({path!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Unknown quantization type, got llmprune" in done.stderr and "MISMATCH" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", f"import llmprune; {code}"], capture_output=True, text=True, check=True
    )
    assert "Unknown quantization type" not in done.stderr


def test_scores_and_recounts_of_a_packed_folder_are_those_of_the_dense_one(tmp_path, monkeypatch):
    from llmprune.hub.download import demo_folder

    folder = save("qwen3_next", tmp_path / "in", vocab_size=2048)
    for file in demo_folder().glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    prune(folder, tmp_path / "dense")
    prune(folder, tmp_path / "packed", format="packed")
    options = {"perplexity": ["builtin"], "tasks": ["demo_continuation"], "eval_seqlen": 32, "limit": 2}
    one, other = (llmprune.evaluate(tmp_path / name, **options) for name in ("dense", "packed"))
    assert one["perplexity"] == other["perplexity"] and one["tasks"] == other["tasks"]
    counts = [llmprune.inspect(tmp_path / name) for name in ("dense", "packed")]
    assert counts[0]["matrices"] == counts[1]["matrices"]


def test_a_model_is_compiled_with_packed_layers(tmp_path):
    prune(make("gpt2", tmp_path / "in"), tmp_path / "packed", format="packed")
    model = llmprune.load(tmp_path / "packed").eval()
    layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def test_values_are_mapped_and_not_copied(tmp_path):
    prune(make("gpt2", tmp_path / "in"), tmp_path / "packed", format="packed")
    model = llmprune.load(tmp_path / "packed")
    layer = next(module for module in model.modules() if isinstance(module, PackedLinear))
    stored = next(
        t
        for file in (tmp_path / "packed").glob("model*.safetensors")
        for n, t in load_file(file).items()
        if n.endswith("h.0.attn.c_attn.weight")
    )
    assert torch.equal(layer.parts()[""], stored)
    address = layer.parts()[""].data_ptr()
    with open("/proc/self/maps") as maps:
        spans = [line.split() for line in maps]
    inside = [
        span[-1]
        for span in spans
        if int(span[0].split("-")[0], 16) <= address < int(span[0].split("-")[1], 16)
    ]
    assert inside and inside[0].endswith(".safetensors")


def test_the_record_says_packed(tmp_path):
    prune(make("gpt2", tmp_path / "in"), tmp_path / "packed", format="packed")
    record = json.loads((tmp_path / "packed" / "llmprune.json").read_text())
    assert record["format"] == {"name": "packed", "values": "same"}
    assert record["totals"]["bytes"]["written"] < record["totals"]["bytes"]["dense"]


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss"])
def test_rounded_values_at_work(tmp_path, kind, values):
    prune(make(kind, tmp_path / "in"), tmp_path / "dense")
    llmprune.convert(tmp_path / "dense", to="packed", values=values, output=tmp_path / "packed")
    packed = llmprune.load(tmp_path / "packed")
    wanted = logits(llmprune.load(tmp_path / "packed", dequantize=True))
    # Inputs of few rows are rounded to bytes in the kernels; of many they are not.
    assert torch.allclose(logits(packed), wanted, atol=0.02 * float(wanted.abs().max()))
    packed.save_pretrained(tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(tmp_path / "packed"))


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss"])
def test_a_dense_model_in_few_bits_at_work(tmp_path, kind, values):
    """Matrices without a mask, also in stacks of experts: computed with, and saved as they are."""
    llmprune.convert(make(kind, tmp_path / "in"), to="packed", values=values, output=tmp_path / "packed")
    packed = llmprune.load(tmp_path / "packed")
    assert packed_parts(packed)[0] and not any("_mask" in name for name in packed.state_dict())
    wanted = logits(llmprune.load(tmp_path / "packed", dequantize=True))
    assert torch.allclose(logits(packed), wanted, atol=0.02 * float(wanted.abs().max()))
    packed.save_pretrained(tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(tmp_path / "packed"))
    assert entry(tmp_path / "saved") == entry(tmp_path / "packed")


def test_text_goes_on_piece_by_piece(tmp_path):
    llmprune.prune("demo", recipe="wanda", sparsity=0.5, calibration=TOKENS, output=tmp_path / "dense")
    llmprune.convert(tmp_path / "dense", to="packed", output=tmp_path / "packed")
    pieces = []
    options = {"max_new_tokens": 12, "stream": pieces.append}
    one = llmprune.generate(tmp_path / "dense", "import os\n", **options)
    assert "".join(pieces).strip() == one["text"].strip() and len(pieces) > 2 and one["tokens"] == 12
    other = llmprune.generate(tmp_path / "packed", "import os\n", max_new_tokens=12)
    assert (one["format"], other["format"]) == ("dense", "packed") and other["kernels"]
    assert other["tokens_per_second"] > 0 and other["text"]
    warm = [
        llmprune.generate(tmp_path / "dense", "def f(", temperature=1.0, seed=s)["text"] for s in (1, 1, 2)
    ]
    assert warm[0] == warm[1] != warm[2]
    with pytest.raises(ValueError, match="the prompt has no token"):
        llmprune.generate(tmp_path / "dense", "")
