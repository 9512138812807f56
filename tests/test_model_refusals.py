"""Configs and tokenizers that make no sense are refused in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from damage import ONE_FILE
from safetensors.torch import load_file

import llmprune


def test_a_quantised_model_in_memory_is_refused(refused, tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    refused(r"model in memory is quantised", model)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", r"config\.json"),
        ("[]", r"config\.json must hold a JSON object, got list"),
        ("{}", r"config"),
        ('{"model_type": "llamma"}', r"'llamma'"),
        ('{"model_type": "bert", "vocab_size": 2048}', r"weights|architecture|blocks|config"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(refused, llama_copy, written, said):
    (llama_copy / "config.json").write_text(written)
    refused(said, llama_copy)


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 128}, {"intermediate_size": 97}, {"vocab_size": 4096}, {"num_hidden_layers": 3}],
)
def test_a_config_of_another_model_is_refused(refused, llama_copy, change):
    values = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(json.dumps({**values, **change}))
    refused(r"do not match|the checkpoint lacks", llama_copy)


def test_a_folder_without_tokenizer_prunes_with_tokens_only(
    make_llama, refused, calibration_tokens, tmp_path
):
    folder = make_llama(tokenizer=False)
    refused(r"no tokenizer.*tokenizer files.*TOKENS\.safetensors", folder, calibration="builtin")
    refused(r"no tokenizer.*cannot be scored.*prune instead of run", folder, call=llmprune.run_model)
    with pytest.raises(ValueError, match=r"no tokenizer"):
        llmprune.evaluate(folder)
    llmprune.prune(folder, calibration=calibration_tokens, recipe="magnitude", output=tmp_path / "out")


def in_json(name, **changes):
    """Damage: values of a JSON file exchanged; None leaves one out."""

    def damage(folder):
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return damage


def in_file(name, written):
    return lambda folder: (folder / name).write_bytes(written)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            in_file("tokenizer.json", b"{"),
            r"tokenizer\.json is damaged \(JSONDecodeError: .*\); download it again or restore the original$",
        ),
        (in_file("tokenizer.json", b""), r"tokenizer\.json is damaged \(JSONDecodeError: "),
        (in_file("tokenizer.json", b"\x80\x04\x00"), r"tokenizer\.json is damaged \(UnicodeDecodeError: "),
        (
            in_file("tokenizer.json", b"[]"),
            r"tokenizer\.json is damaged \(it holds \[\] and no JSON object\)",
        ),
        (
            in_file("tokenizer.json", b"{}"),
            r"tokenizer\.json is damaged \('added_tokens' is missing, not a list\)",
        ),
        (in_file("tokenizer.json", b"[" * 100_000), r"tokenizer\.json is damaged \(RecursionError: "),
        (
            in_json("tokenizer.json", added_tokens=5),
            r"tokenizer\.json is damaged \('added_tokens' is 5, not a list\)",
        ),
        (
            in_json("tokenizer.json", added_tokens=[{"id": 0}]),
            r"tokenizer\.json is damaged \(Exception: missing field `content`",
        ),
        (in_json("tokenizer.json", model=None), r"tokenizer\.json is damaged \(Exception: Model missing"),
        (
            in_json("tokenizer.json", model={"type": "BPE", "vocab": []}),
            r"tokenizer\.json is damaged \(Exception: .*(sequence|vocab)",
        ),
        (
            in_json("tokenizer.json", pre_tokenizer={"type": "Own"}),
            r"tokenizer\.json is damaged \(Exception: data did not match",
        ),
        (in_file("tokenizer_config.json", b"{"), r"tokenizer_config\.json is damaged \(JSONDecodeError: "),
        (
            in_file("tokenizer_config.json", b"[]"),
            r"tokenizer_config\.json is damaged \(it holds \[\] and no JSON object\)",
        ),
        (
            in_json("tokenizer_config.json", bos_token=5),
            r"tokenizer_config\.json is damaged or of another model \(TypeError: Special token",
        ),
        (
            in_json("tokenizer_config.json", added_tokens_decoder=5),
            r"tokenizer_config\.json is damaged or of another model \(AttributeError: ",
        ),
        (
            in_file("special_tokens_map.json", b"{"),
            r"special_tokens_map\.json is damaged \(JSONDecodeError: ",
        ),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            r"tokenizer_config\.json names no vocabulary \(.*add tokenizer\.json",
        ),
    ],
)
def test_a_damaged_tokenizer_is_refused(refused, llama_copy, damage, said):
    damage(llama_copy)
    refused(r"^cannot read the tokenizer of damaged: " + said, llama_copy, calibration="builtin")


def test_a_tokenizer_whose_library_panics_is_refused(refused, llama_copy, monkeypatch):
    class PanicException(BaseException):
        """What the library below raises."""

    def panic(*args, **options):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    refused(
        r"^cannot read the tokenizer of damaged: .*\(PanicException: index out of bounds\)",
        llama_copy,
        calibration="builtin",
    )
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained",
        lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        llmprune.prune(llama_copy, calibration="builtin", output="out")


def test_a_vocabulary_without_words_is_refused(refused, llama_copy):
    in_json("tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []})(llama_copy)
    refused(
        r"^the tokenizer makes no tokens of calibration source 'builtin'", llama_copy, calibration="builtin"
    )
    refused(
        r"^the tokenizer makes no tokens of builtin",
        llama_copy,
        call=llmprune.run_model,
        perplexity=["builtin"],
    )


def test_tokens_beyond_the_model_s_vocabulary_are_refused(refused, make_llama):
    folder = make_llama(vocab_size=300)
    said = r"range from \d+ to \d+, the model knows 0 to 299; use its own tokenizer"
    refused("^calibration tokens of builtin " + said, folder, calibration="builtin")
    refused("^tokens of builtin " + said, folder, call=llmprune.run_model, perplexity=["builtin"])


def test_a_block_more_than_the_config_asks_for_is_mentioned(typed, make_llama, tmp_path):
    folder = Path(shutil.copytree(make_llama(layers=4), tmp_path / "more"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    code, out, _ = typed(
        "prune", folder, "--samples", 2, "--seqlen", 16, "--recipe", "wanda", "--output", "out"
    )
    assert code == 0
    assert re.search(
        r"asks for 3 blocks and the checkpoint holds 1 more; "
        r"9 tensors .* pass unchanged, the first is 'model\.layers\.3\.",
        out,
    )
    record = json.loads(Path("out/llmprune.json").read_text())
    assert len(record["model"]["unused_tensors"]) == 9
    before, after = load_file(folder / ONE_FILE), load_file("out/model-00004-of-00004.safetensors")
    assert torch.equal(
        before["model.layers.3.mlp.up_proj.weight"], after["model.layers.3.mlp.up_proj.weight"]
    )
