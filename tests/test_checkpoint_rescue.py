"""Folders in the sparse formats of compressed-tensors: read by every command, made dense, packed, written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from bitmasks import compressed
from damage import ONE_FILE, rewrite
from other_models import make
from outputs import Listening, everything, one_line, same_bits, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.checkpoint.masks import read_masks
from llmprune.model.opening import open_model
from runs import cut_off

TOKENS = torch.randint(0, 120, (16, 32), generator=torch.Generator().manual_seed(0))
KEYS = ("quantization_config", "compression_config", "sparsity_config")
FORMS = [
    ("sparse-bitmask", None),
    ("sparse-24-bitmask", None),
    ("sparse-bitmask", torch.int8),
    ("sparse-24-bitmask", torch.int8),
    ("sparse-24-bitmask", torch.float8_e4m3fn),
]


def read(folder):
    source = open_model(folder).source
    return {name: source.load(name) for name in source.tensors}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("form", "kind"), FORMS)
def test_it_is_made_dense_to_the_bit(make_llama, tmp_path, form, kind, key):
    dtype = torch.float32 if kind is None else torch.bfloat16
    wanted = compressed(make_llama(dtype=dtype, layers=1), tmp_path / "old", form, kind, key)
    assert same_bits(read(tmp_path / "old"), wanted)
    result = llmprune.convert(tmp_path / "old", to="dense", output=tmp_path / "dense")
    assert result["format"] == "dense" and same_bits(weights(tmp_path / "dense"), wanted)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not set(KEYS) & set(config) and config["model_type"] == "llama"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert same_bits({n: t for n, t in model.state_dict().items() if n in wanted}, wanted)
    assert llmprune.inspect(tmp_path / "dense")["record_agrees"]
    for name, keep in read_masks(tmp_path / "dense" / "masks.safetensors").items():
        assert torch.equal(keep, wanted[name] != 0)
    llmprune.convert(tmp_path / "old", to="packed", output=tmp_path / "packed")
    assert same_bits(read(tmp_path / "packed"), wanted)
    assert llmprune.inspect(tmp_path / "packed")["record_agrees"]


@pytest.fixture
def old(make_llama, tmp_path):
    """A folder as compressed-tensors has left it."""
    compressed(make_llama(), tmp_path / "old", "sparse-bitmask")
    return tmp_path / "old"


def test_what_counts_and_scores_reads_it_as_it_is(old, tmp_path):
    llmprune.convert(old, to="dense", output=tmp_path / "dense")
    one, other = llmprune.inspect(old), llmprune.inspect(tmp_path / "dense")
    assert one["matrices"] == other["matrices"] and one["record_agrees"] is None
    options = {"perplexity": "builtin", "limit": 2, "eval_seqlen": 32, "tasks": "demo_continuation"}
    one, other = (llmprune.evaluate(folder, **options) for folder in (old, tmp_path / "dense"))
    assert one["perplexity"] == other["perplexity"] and one["tasks"] == other["tasks"]


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda f, t: llmprune.load(f),
            r"transformers does not load; make it dense first: llmprune con",
        ),
        (
            lambda f, t: llmprune.generate(f, "x", max_new_tokens=4),
            r"make it dense first: llmprune convert .* --to dense",
        ),
        (
            lambda f, t: llmprune.prune(f, recipe="magnitude", calibration=TOKENS, output=t / "out"),
            r"packed already; to prune it further, first make it dense: llmprune convert .* --to dense",
        ),
        (
            lambda f, t: llmprune.evaluate(f, dequantize=True),
            r"is read without dequantize; leave",
        ),
        (
            lambda f, t: llmprune.convert(f, to="sparse-bitmask", output=t / "out"),
            r"is in sparse-bitmask or sparse-24-bitmask already; make it dense first",
        ),
        (
            lambda f, t: llmprune.convert(f, to="dense", values="int8", output=t / "out"),
            r"values int8 are for packed folders; leave them out with --to dense",
        ),
        (lambda f, t: llmprune.mask_diff(f, f), r"has no masks\.safetensors"),
    ],
)
def test_what_cannot_take_it_says_what_to_do(old, tmp_path, call, line):
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=line) as refused:
        call(old, tmp_path)
    one_line(refused.value)
    assert everything(tmp_path) == before


def test_it_is_not_pushed(make_llama, tmp_path, own_hub):
    folder = pruned(make_llama(), tmp_path / "dense")
    llmprune.convert(folder, to="sparse-bitmask", output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"does not load; make it dense first: llmprune convert"):
        llmprune.push(tmp_path / "out", "me/model")


def test_other_ways_of_compressed_tensors_are_refused(old):
    config = json.loads((old / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["format"] = "dense"
    (old / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is quantised or compressed \(quantization_config: compressed-te"):
        llmprune.inspect(old)


@pytest.mark.parametrize("damage", ["bitmask", "compressed", "shape"])
def test_a_damaged_one_is_refused_and_nothing_is_written(old, tmp_path, damage):
    rewrite(old, **{f"model.layers.1.mlp.up_proj.{damage}": None})
    with pytest.raises(ValueError, match=rf"up_proj\.{damage}' is not there; the checkpoint is incomplete"):
        llmprune.convert(old, to="dense", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def pruned(folder, output, **more):
    options = {"recipe": "magnitude", "sparsity": 0.6, "calibration": TOKENS, "output": output, **more}
    return llmprune.prune(folder, **options).output


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss"])
def test_it_is_written_and_read_back(tmp_path, kind):
    folder = pruned(make(kind, tmp_path / "in"), tmp_path / "pruned")
    llmprune.convert(folder, to="packed", output=tmp_path / "packed")
    results = [
        llmprune.convert(tmp_path / name, to="sparse-bitmask", output=tmp_path / f"from-{name}")
        for name in ("pruned", "packed")
    ]
    one, other = (weights(tmp_path / f"from-{name}") for name in ("pruned", "packed"))
    assert same_bits(one, other) and results[0]["dense"] == results[1]["dense"]
    stacks = [name for name in results[0]["dense"] if ".experts." in name]
    assert bool(stacks) == (kind == "gpt_oss") and stacks == results[0]["dense"]  # no names for them
    assert results[0]["matrices"] == sum(name.endswith(".bitmask") for name in one)
    assert not any(name in one for name in weights(folder) if f"{name[:-7]}.bitmask" in one)
    found = tmp_path / "from-pruned"
    assert not (found / "masks.safetensors").exists() and llmprune.inspect(found)["record_agrees"]
    entry = json.loads((found / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert entry["format"] == "sparse-bitmask" and entry["sparsity_structure"] == "unstructured"
    assert entry["global_sparsity"] == pytest.approx(0.6, abs=0.01)
    llmprune.convert(found, to="dense", output=tmp_path / "back")
    assert same_bits(weights(tmp_path / "back"), weights(folder))
    assert "reads it up to version 0.14" in (found / "README.md").read_text()
    files = [(f / "config.json").read_bytes() for f in (tmp_path / "back", folder)]
    assert json.loads(files[0]) == json.loads(files[1])


def test_two_of_four_is_told(make_llama, tmp_path):
    folder = pruned(make_llama(), tmp_path / "dense", pattern="2:4", sparsity=None)
    llmprune.convert(folder, to="sparse-bitmask", output=tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry["sparsity_config"]["sparsity_structure"] == "2:4"
    assert entry["sparsity_config"]["global_sparsity"] == 0.5


def test_lost_signs_are_told(make_llama, tmp_path):
    folder = shutil.copytree(make_llama(), tmp_path / "in")
    stored = load_file(folder / ONE_FILE)
    for name in stored:
        if "up_proj" in name:
            stored[name][:, ::2] = 0
            stored[name][:2, 0] = -0.0
        if "q_proj" in name:
            stored[name][0, 0] = -0.0  # it stays dense
    save_file(stored, folder / ONE_FILE, metadata={"format": "pt"})
    listening = Listening()
    llmprune.convert(folder, to="sparse-bitmask", output=tmp_path / "out", reporter=listening)
    assert "4 weights were -0.0 and are 0.0 now: sparse-bitmask keeps no sign of zeros" in listening.told
    found = read(tmp_path / "out")
    assert all(torch.equal(found[name], stored[name]) for name in stored)


@pytest.mark.parametrize("to", ["dense", "sparse-bitmask"])
def test_such_a_conversion_goes_on_where_it_stopped(make_llama, tmp_path, old, to):
    folder = old if to == "dense" else pruned(make_llama(), tmp_path / "pruned")
    llmprune.convert(folder, to=to, output=tmp_path / "whole")
    with cut_off():
        llmprune.convert(folder, to=to, output=tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    llmprune.convert(folder, to=to, output=tmp_path / "cut", resume=True)
    assert same_bits(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_the_command(typed, old):
    code, out, err = typed("convert", old, "--to", "dense", "--output", "dense", "--quiet")
    assert (code, out) == (0, ""), err
    code, out, err = typed("convert", "dense", "--to", "sparse-bitmask", "--output", "out")
    assert code == 0 and "sparse-bitmask" in out and "14 packed, 0 stay dense" in out
    code, out, err = typed(
        "eval", "out", "--perplexity", "builtin", "--limit", 2, "--eval-seqlen", 32, "--json"
    )
    assert code == 0 and json.loads(out)["perplexity"]
