"""Folders that are no dense model of a known type: quantised ones, adapters, types that are not known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from damage import ONE_FILE, rewrite
from outputs import one_line
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from llmprune.model.config import check_folder
from llmprune.model.opening import OpenOptions, open_model
from llmprune.model.quantised import check_dense

ORIGINAL = "prune the original checkpoint in bfloat16, float16 or float32"
METHODS = sorted({*AUTO_QUANTIZER_MAPPING, *AUTO_QUANTIZATION_CONFIG_MAPPING} - {"llmprune"})


def configured(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def said(folder, **options):
    """The line with which opening a folder is refused."""
    with pytest.raises(ValueError) as caught:
        open_model(folder, OpenOptions(**options))
    one_line(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("inside", [(), ("text_config",), ("thinker_config", "text_config")])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_transformers_is_named(llama_copy, method, inside):
    value = {"quantization_config": {"quant_method": method, "bits": 4}}
    for key in reversed(inside):
        value = {key: value}
    configured(llama_copy, **value)
    line = said(llama_copy)
    key = ".".join((*inside, "quantization_config"))
    assert f"is quantised or compressed ({key}: {method}, 4 bits); {ORIGINAL}" in line


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (transformers.BitsAndBytesConfig(load_in_4bit=True), "bitsandbytes, 4 bits"),
        (transformers.BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes, 8 bits"),
        (transformers.Mxfp4Config(), "mxfp4"),
        (transformers.FineGrainedFP8Config(), "fp8"),
        (transformers.FbgemmFp8Config(), "fbgemm_fp8"),
        (transformers.EetqConfig(), "eetq"),
    ],
)
def test_a_config_that_transformers_has_written_is_read(value, named):
    with pytest.raises(ValueError, match=rf"\(quantization_config: {named}\); {ORIGINAL}"):
        check_dense({"quantization_config": value.to_dict()}, "x")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"quantization_config": 5}, "has quantization_config: 5, which names no method; if its weights are"),
        ({"quantization_config": ["gptq"]}, "has quantization_config: ['gptq'], which names no method"),
        ({"quantization_config": {"quant_method": 3}}, "which names no method"),
        ({"quantization_config": {"bits": 4}}, "if they are dense, remove quantization_config from config"),
        ({"quantization_config": "gptq"}, "(quantization_config: gptq); "),
        ({"quantization_config": {"quant_method": "a\nb" * 200}}, r"(quantization_config: 'a\nba\nb"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "(quantization_config: NVFP4); "),
        ({"compression_config": {"format": "pack-quantized"}}, "(compression_config: pack-quantized); "),
        ({"sparsity_config": {"targets": []}}, "(sparsity_config: unknown); "),
        ({"quantization": {"group_size": 64, "bits": 4}}, "(quantization: mlx, 4 bits); "),
    ],
)
def test_other_and_malformed_entries_are_refused(llama_copy, changes, line):
    configured(llama_copy, **changes)
    assert line in said(llama_copy) and ORIGINAL in said(llama_copy)


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_entry_is_none(llama_copy, empty):
    values = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(json.dumps({**values, "quantization_config": empty}))
    open_model(llama_copy)


def test_the_original_is_named_where_it_is_known(llama_copy):
    configured(llama_copy, quantization_config={"quant_method": "mxfp4"})
    assert "gpt-oss exists in mxfp4 only); or add --dequantize" in said(llama_copy)
    configured(llama_copy, quantization_config={"quant_method": "fp8"})
    assert "exist in float8 only); or add --dequantize (in Python dequantize=True)" in said(llama_copy)
    card = llama_copy / "README.md"
    card.write_text("---\nlicense: mit\nbase_model:\n- owner/Name-1.0\n---\ntext\n")
    assert f"{ORIGINAL} (its model card names owner/Name-1.0; usually under the same name" in said(llama_copy)
    card.write_text("---\nbase_model: 'rm -rf /'\n---\n")
    assert "model card" not in said(llama_copy)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_the_files_of_other_tools_are_known(llama_copy, name):
    (llama_copy / name).write_text("{}")
    assert f"(it has {name}, of " in said(llama_copy)


def test_a_folder_of_gguf_is_named(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert "holds 'model-Q4_K_M.gguf', a GGUF file; " + ORIGINAL in said(tmp_path)


QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "stored", "line"),
    [
        (f"{QUERY}.weight", torch.zeros(64, 64).to(torch.float8_e4m3fn), "F8_E4M3, as fp8 does"),
        (f"{QUERY}.weight", torch.zeros(64, 64).to(torch.float8_e5m2), "F8_E5M2, as fp8 does"),
        (f"{QUERY}.weight", torch.zeros(64, 64, dtype=torch.int8), "I8; "),
        (f"{QUERY}.weight", torch.zeros(2048, 1, dtype=torch.uint8), "U8; "),
        (f"{QUERY}.qweight", torch.zeros(8, 64, dtype=torch.int32), "I32, as gptq does"),
        (f"{QUERY}.weight_packed", torch.zeros(64, 8, dtype=torch.int32), "I32, as compressed-tensors does"),
        (f"{QUERY}.weight._data", torch.zeros(64, 64, dtype=torch.int8), "I8, as quanto does"),
        (
            "model.layers.0.mlp.experts.gate_up_proj_blocks",
            torch.zeros(2, 4, 2, 16, dtype=torch.uint8),
            "U8, as mxfp4 does",
        ),
        (
            "model.layers.0.mlp.experts.gate_up_proj_blocks",
            torch.zeros(2, 4, 2, 16, dtype=torch.bfloat16),
            "BF16, as mxfp4 does",
        ),
    ],
)
def test_quantised_weights_are_refused_whatever_the_config_says(refused, llama_copy, name, stored, line):
    rewrite(llama_copy, **{f"{QUERY}.weight": None, name: stored})
    refused(
        rf"is quantised: '{name.replace('.', r'[.]')}' is stored in {line}.*{ORIGINAL}",
        llama_copy,
        calibration="builtin",
    )


def test_buffers_of_small_integers_are_no_quantised_weights(llama_copy):
    mask = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
    rewrite(llama_copy, **{"model.layers.0.self_attn.bias": mask, "model.positions": mask[0, 0].long()})
    open_model(llama_copy)


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_is_refused_with_the_way_to_merge_it(llama_copy, config):
    (llama_copy / ONE_FILE).rename(llama_copy / "adapter_model.safetensors")
    if not config:
        (llama_copy / "config.json").unlink()
    adapter = llama_copy / "adapter_config.json"
    adapter.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base"}))
    line = said(llama_copy)
    assert "(adapter_config.json); merge it into its base model 'owner/base' first: " in line
    assert "from_pretrained('owner/base', dtype='auto'), ADAPTER).merge_and_unload().save_pretrained(" in line
    for broken in ("{", "[]", "{}", '{"base_model_name_or_path": 5}', '{"peft_type": ["x"]}'):
        adapter.write_text(broken)
        assert "merge it into its base model first: " in said(llama_copy)
    adapter.write_text(json.dumps({"base_model_name_or_path": "a\nb'); import os" + "x" * 500}))
    assert len(said(llama_copy)) < 800
    adapter.write_text(json.dumps({"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "owner/base"}))
    assert "cannot be merged; prune its base model 'owner/base' instead" in said(llama_copy)


def test_an_adapter_beside_weights_is_refused(llama_copy):
    """transformers would load both, and pruning would see the weights alone."""
    (llama_copy / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    assert "is a PEFT adapter" in said(llama_copy)


def test_a_model_in_memory_with_an_adapter_is_refused(tiny_llama, refused):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.peft_config = {"default": SimpleNamespace()}
    refused(r"model in memory has a PEFT adapter; merge it first", model)


HAVE = transformers.__version__


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "update transformers, or correct model_type in config.json"),
        ({"transformers_version": "99.1.0"}, "written by transformers 99.1.0: update to that or later"),
        ({"transformers_version": "99.1.0.dev0"}, "written by transformers 99.1.0.dev0: update to that"),
        ({"transformers_version": "4.0.0"}, "update transformers, or correct model_type"),
        ({"transformers_version": "4.x"}, "update transformers, or correct model_type"),
        ({"transformers_version": 7}, "update transformers, or correct model_type"),
        (
            {"transformers_version": "99.1.0", "auto_map": {"AutoConfig": "configuration_x.XConfig"}},
            "update to that or later; or, if you trust the Python code that comes with it, add "
            "--trust-remote-code",
        ),
    ],
)
def test_an_unknown_type_is_told_with_the_version_it_needs(llama_copy, changes, remedy):
    configured(llama_copy, model_type="llama17", transformers_version=None)
    configured(llama_copy, **changes)
    line = said(llama_copy)
    assert f"is of model type 'llama17', which the installed transformers {HAVE} does not know; " in line
    assert remedy in line
    assert ("--trust-remote-code" in line) is ("auto_map" in changes)


@pytest.mark.parametrize("kind", [None, 5, [], "", {"a": 1}])
def test_a_type_is_never_guessed_from_the_folder(llama_copy, tmp_path, kind):
    folder = llama_copy.rename(tmp_path / "my-llama")
    configured(folder, model_type=kind)
    assert "has no usable model_type (got" in said(folder) and "'LlamaForCausalLM'" in said(folder)


def test_code_that_is_trusted_may_bring_its_type(llama_copy):
    configured(llama_copy, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    check_folder(llama_copy, "x", trust_remote_code=True)


def test_a_config_of_a_later_transformers_that_fails_says_so(llama_copy):
    configured(llama_copy, transformers_version="99.1.0", rope_parameters={"rope_type": 5})
    configured(llama_copy, num_attention_heads="many")
    assert "it was written by transformers 99.1.0, update to that or later" in said(llama_copy)
