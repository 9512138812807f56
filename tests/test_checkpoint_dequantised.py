"""Quantised checkpoints that are read as bfloat16, against slow oracles and against transformers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from damage import ONE_FILE
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import llmprune
from llmprune.checkpoint.dequantised import Dequantised
from llmprune.checkpoint.reader import Checkpoint
from llmprune.model.opening import OpenOptions, open_model, whole

OLD = not hasattr(Fp8Dequantize, "_dequantize_one")
AS_THEIRS = pytest.mark.skipif(OLD, reason=f"transformers {transformers.__version__} dequantises less")
NAME = "layer.weight"
EXPERTS = "layer.experts.gate_up_proj"
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def read(folder, tensors, name, group=None):
    """A tensor as it is read from a folder with these tensors, and all names that are then there."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / ONE_FILE)
    source = Dequantised(Checkpoint(folder), group)
    found = source.load(name)
    assert tuple(found.shape) == source.tensors[name].shape and found.dtype == torch.bfloat16
    assert source.tensors[name].bytes == found.nbytes
    return found, set(source.tensors)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def codes(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("suffix", ["weight_scale_inv", "scale", "qscale_weight"])
def test_fp8_by_squares_with_ragged_edges(tmp_path, kind, suffix):
    weight, scales = random(70, 45).to(kind), random(3, 2).abs()
    stored = {NAME: weight, f"layer.{suffix}": scales, "layer.input_scale": scales.clone()}
    found, names = read(tmp_path, stored, NAME, (32, 32))
    assert names == {NAME}
    for r in range(70):
        for c in range(45):
            wanted = weight[r, c].float() * scales[r // 32, c // 32]
            assert found[r, c] == wanted.to(torch.bfloat16)


@AS_THEIRS
@pytest.mark.parametrize("scales", [random(4, 2), random(1, 1), random(1), random(1)[0]])
def test_fp8_as_transformers_does(tmp_path, scales):
    weight = random(64, 32).to(torch.float8_e4m3fn)
    found, _ = read(tmp_path, {NAME: weight, f"{NAME}_scale_inv": scales}, NAME)
    square = scales if scales.ndim == 2 else scales.reshape(1, 1)
    assert torch.equal(found, Fp8Dequantize(None)._dequantize_one(weight, square, torch.bfloat16))


@AS_THEIRS
def test_fp4_in_bytes_with_scales_as_transformers_does(tmp_path):
    packed, exponents = codes(2, 8, 32).view(torch.int8), codes(2, 8, 2) % 20 + 118
    found, _ = read(tmp_path, {EXPERTS: packed, f"{EXPERTS}_scale_inv": exponents}, EXPERTS)
    one = Fp8Dequantize(None)
    wanted = [one._dequantize_one(p, s, torch.bfloat16) for p, s in zip(packed, exponents, strict=True)]
    assert torch.equal(found, torch.stack(wanted))


def test_mxfp4(tmp_path):
    blocks, scales = codes(3, 6, 2, 16), codes(3, 6, 2) % 20 + 118
    found, names = read(tmp_path, {f"{EXPERTS}_blocks": blocks, f"{EXPERTS}_scales": scales}, EXPERTS)
    assert names == {EXPERTS} and found.shape == (3, 64, 6)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))
    for e, r, c in np.ndindex(3, 6, 64):
        byte = int(blocks[e, r, c // 32, c % 32 // 2])
        code = byte >> 4 if c % 2 else byte & 15
        value = (-1) ** (code >> 3) * E2M1[code & 7] * 2.0 ** (int(scales[e, r, c // 32]) - 127)
        assert found[e, c, r] == value


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ({NAME: random(4, 4)}, r"has no tensor in fp8 or mxfp4, so there is nothing to dequantize"),
        ({NAME: random(4, 4).to(torch.float8_e4m3fn)}, r"'layer.weight_scale_inv' is not there"),
        ({f"{EXPERTS}_blocks": codes(1, 2, 2, 16)}, r"'layer.experts.gate_up_proj_scales' is not there"),
        (
            {NAME: random(4, 4).to(torch.float8_e4m3fn), f"{NAME}_scale_inv": random(3, 3)},
            r"has shape \[4, 4\] and its scales \[3, 3\], which do not fit",
        ),
        (
            {f"{EXPERTS}_blocks": codes(1, 2, 2, 16), f"{EXPERTS}_scales": codes(1, 2, 3)},
            r"has shape \[1, 2, 2, 16\] and its scales \[1, 2, 3\], which do not fit",
        ),
    ],
)
def test_damaged_ones_are_refused(tmp_path, tensors, line):
    save_file(tensors, tmp_path / ONE_FILE)
    with pytest.raises(ValueError, match=line):
        Dequantised(Checkpoint(tmp_path))


def configured(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture
def fp8(tiny_llama, tmp_path):
    """The tiny Llama with its matrices in fp8, each square of 16 x 16 with a scale."""
    folder = shutil.copytree(tiny_llama, tmp_path / "fp8")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / ONE_FILE).items()}
    for name in [name for name in tensors if "_proj" in name]:
        rows, columns = tensors[name].shape
        squares = tensors[name].float().reshape(rows // 16, 16, columns // 16, 16)
        scales = squares.abs().amax(dim=(1, 3)) / 448
        coded = (squares / scales[:, None, :, None]).reshape(rows, columns)
        tensors[name], tensors[f"{name}_scale_inv"] = coded.to(torch.float8_e4m3fn), scales
    save_file(tensors, folder / ONE_FILE, metadata={"format": "pt"})
    configured(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    return folder, transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))


@pytest.fixture
def mxfp4(tmp_path):
    """A tiny gpt-oss with its experts in mxfp4."""
    folder = tmp_path / "mxfp4"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_oss", **sizes, **heads, **experts)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / ONE_FILE)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        number, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = codes(number, rows, columns // 32, 16)
        tensors[f"{name}_scales"] = codes(number, rows, columns // 32) % 3 + 120
    save_file(tensors, folder / ONE_FILE, metadata={"format": "pt"})
    configured(folder, quantization_config={"quant_method": "mxfp4"})
    return folder, transformers.Mxfp4Config(dequantize=True)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_quantised_folder_is_pruned_as_the_dense_one_that_transformers_makes(kind, request, tmp_path):
    folder, how = request.getfixturevalue(kind)
    tokens = torch.randint(0, 200, (16, 32), generator=torch.Generator().manual_seed(0))
    options = {"recipe": "sparsegpt", "sparsity": 0.5, "calibration": tokens, "dtype": "float32"}
    record = llmprune.prune(folder, output=tmp_path / "out", dequantize=True, **options).record
    assert record["model"]["dequantized"] is True
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert llmprune.inspect(tmp_path / "out")["record_agrees"]

    made = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)
    made.save_pretrained(tmp_path / "dense", save_original_format=False)
    llmprune.prune(tmp_path / "dense", output=tmp_path / "other", **options)
    one, other = (
        {k: v for file in (tmp_path / name).glob("model*.safetensors") for k, v in load_file(file).items()}
        for name in ("out", "other")
    )
    pruned = [row["name"] for row in record["matrices"]]
    assert set(one) == set(other) and pruned
    for name in one:
        assert one[name].shape == other[name].shape
        if name in {"lm_head.weight", "model.embed_tokens.weight"} or "norm" in name:
            assert torch.equal(one[name].float(), other[name].float())
    alike = [(one[n] != 0) == (other[n] != 0) for n in one if n.endswith("_proj.weight") or n in pruned]
    assert torch.cat([a.flatten() for a in alike]).float().mean() > 0.97
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(loaded(tokens[:1]).logits).all()


@AS_THEIRS
def test_the_whole_model_is_that_of_transformers(mxfp4):
    folder, how = mxfp4
    tokens = torch.arange(24)[None]
    ours = whole(open_model(folder, OpenOptions(dequantize=True, dtype="float32")))
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(ours(tokens).logits, theirs(tokens).logits, atol=1e-5)


def test_dequantising_what_is_not_so_quantised_is_refused(tiny_llama, llama_copy, refused):
    refused(r"nothing to dequantize; leave --dequantize out$", dequantize=True)
    configured(llama_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(
        r"dequantize works on fp8 and mxfp4, and .* has quantization_config: gptq; prune the original",
        llama_copy,
        dequantize=True,
    )
    refused(r"not for a model in memory", AutoModelForCausalLM.from_pretrained(tiny_llama), dequantize=True)
