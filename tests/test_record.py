"""What a run tells and writes, as the interface says it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from outputs import FILES, weights
from safetensors.torch import load_file, safe_open

import llmprune
from llmprune.checkpoint.masks import read_masks

SMALL = ("--samples", 4, "--seqlen", 64)


MATRIX = {
    "name",
    "shape",
    "pattern",
    "target_sparsity",
    "sparsity",
    "relative_error",
    "pruner",
    "steps",
    "seconds",
}


@pytest.fixture(scope="module")
def tiny_run(tiny_llama, tmp_path_factory):
    """`llmprune run` on the tiny model as a subprocess: (what it said, its folder)."""
    home = tmp_path_factory.mktemp("run")
    options = (
        "--sparsity",
        0.6,
        *SMALL,
        "--limit",
        2,
        "--perplexity",
        "builtin",
        "--tasks",
        "demo_continuation",
        "--output",
        "out",
    )
    command = [sys.executable, "-m", "llmprune", "run", tiny_llama, *options]
    env = {**os.environ, "HF_TOKEN": "hf_aVeryPrivateToken", "LLMPRUNE_CACHE": str(home / "cache")}
    done = subprocess.run(
        list(map(str, command)), cwd=home, env=env, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return done, home / "out"


@pytest.fixture(scope="module")
def record(tiny_run):
    return json.loads((tiny_run[1] / "llmprune.json").read_text())


def test_run_tells_plan_progress_and_result(tiny_run):
    done, folder = tiny_run
    assert done.stderr == ""
    for said in (
        r"model +tiny-llama, LlamaForCausalLM, 2 blocks",
        r"wanda \+ dsnot \(recipe dsnot\)",
        r"4 samples x 64 = 256 tokens",
        r"memory",
        r"disk",
        r"device",
        r"ETA",
        r"sparsity +6\d\.\d+%|sparsity +59\.\d+%",
        r"perplexity builtin +\d+\.\d\d +\d+\.\d\d",
        r"demo_continuation acc +\d\.\d+ +\d\.\d+ +± \d",
        r"seconds",
        r"weights on disk",
        rf"output +{folder.name}\b",
        r"neither smaller on disk nor faster",
    ):
        assert re.search(said, done.stdout), said
    assert "\x1b" not in done.stdout


def test_the_output_folder_holds_every_file_and_no_other(tiny_run):
    assert {p.name for p in tiny_run[1].iterdir()} == FILES | {"report-matrices.png"}
    assert [p.name for p in tiny_run[1].parent.iterdir() if p.name != "cache"] == ["out"]


def test_config_and_tokenizer_are_those_of_the_source(tiny_run, tiny_llama):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tiny_run[1] / name).read_bytes() == (tiny_llama / name).read_bytes(), name


def test_the_record_has_the_keys_of_the_interface(record):
    assert set(record) == {
        "schema",
        "model",
        "recipe",
        "calibration",
        "matrices",
        "totals",
        "evaluation",
        "environment",
        "speed",
        "samples",
    }
    assert record["schema"] == 1
    licence = {"license", "license_name", "license_link"}
    assert set(record["model"]) == {"source", "revision", "architecture", "parameters", "digest"} | licence
    assert set(record["calibration"]) == {"source", "samples", "sequence_length", "seed", "digest"}
    assert all(set(row) == MATRIX for row in record["matrices"])
    assert {"weights", "zeros", "sparsity", "seconds", "peak_memory_bytes", "bytes"} <= set(record["totals"])
    assert set(record["totals"]["bytes"]) == {"dense", "written", "packed"}
    assert set(record["evaluation"]) == {"perplexity", "tasks"}
    assert {"versions", "device"} <= set(record["environment"])
    for entry in record["evaluation"]["perplexity"].values():
        assert set(entry) == {"dense", "pruned", "protocol"}
    for metrics in record["evaluation"]["tasks"].values():
        for metric in set(metrics) - {"protocol"}:
            assert set(metrics[metric]) == {"dense", "pruned", "stderr"}


def test_the_record_is_of_this_run(record, tiny_llama):
    assert record["model"]["source"] == "tiny-llama"
    assert record["model"]["revision"] is None
    assert record["model"]["architecture"] == "LlamaForCausalLM"
    assert record["model"]["parameters"] == sum(
        t.numel() for t in load_file(tiny_llama / "model.safetensors").values()
    )
    assert record["calibration"] | {"digest": 0} == {
        "source": "builtin",
        "samples": 4,
        "sequence_length": 64,
        "seed": 0,
        "digest": 0,
    }
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", record["calibration"]["digest"])
    assert len(record["matrices"]) == 14
    assert record["totals"]["weights"] == 61440
    assert record["totals"]["zeros"] / 61440 == record["totals"]["sparsity"] == pytest.approx(0.6, abs=0.01)
    assert record["totals"]["bytes"]["written"] >= record["totals"]["bytes"]["dense"] > 0
    assert set(record["evaluation"]["perplexity"]) == {"builtin"}
    assert "acc" in record["evaluation"]["tasks"]["demo_continuation"]
    assert record["environment"]["versions"]["llmprune"] == llmprune.__version__


def test_the_recipe_of_the_record_is_fully_resolved_and_runs_again(record):
    from llmprune.recipe.loading import from_dict

    assert record["recipe"]["pruner"]["name"] == "wanda"
    assert record["recipe"]["refiner"]["name"] == "dsnot"
    assert record["recipe"]["refiner"]["max_cycles"] == 50
    assert record["recipe"]["sparsity"] == 0.6
    assert record["recipe"]["calibration"] == {"source": "builtin", "samples": 4, "sequence_length": 64}
    assert from_dict(record["recipe"]).as_dict() == record["recipe"]


def test_the_record_is_strict_json(tiny_run):
    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads((tiny_run[1] / "llmprune.json").read_text(), parse_constant=constant)


def test_no_text_file_holds_a_local_path_or_a_token(tiny_run, tiny_llama):
    private = [
        str(tiny_run[1]),
        str(tiny_llama),
        "/tmp/",
        str(Path.home()) + "/",
        os.getcwd(),
        sys.prefix,
        "hf_aVeryPrivateToken",
    ]
    for path in tiny_run[1].iterdir():
        if path.suffix != ".safetensors":
            found = [text for text in private if text.encode() in path.read_bytes()]
            assert not found, (path.name, found)
    for path in tiny_run[1].glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            assert not [text for text in private if text in json.dumps(handle.metadata())]


def test_plain_transformers_loads_the_folder_and_finds_the_masks(tiny_run, tiny_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pruned = AutoModelForCausalLM.from_pretrained(tiny_run[1])
    dense, masks = load_file(tiny_llama / "model.safetensors"), read_masks(tiny_run[1] / "masks.safetensors")
    assert len(masks) == 14
    state = pruned.state_dict()
    assert set(state) == set(dense)
    for name, weight in dense.items():
        assert state[name].equal(weight * masks[name] if name in masks else weight), name
    tokens = AutoTokenizer.from_pretrained(tiny_run[1])("import os", return_tensors="pt")
    assert (
        pruned.generate(tokens["input_ids"], max_new_tokens=4, do_sample=False).shape[1]
        == tokens["input_ids"].shape[1] + 4
    )


def test_the_masks_are_stored_as_the_interface_says(tiny_run):
    with safe_open(tiny_run[1] / "masks.safetensors", framework="pt") as handle:
        shapes = json.loads(handle.metadata()["shapes"])
        for name, weight in weights(tiny_run[1]).items():
            if name in shapes:
                stored = handle.get_tensor(name)
                assert stored.dtype == torch.uint8
                assert list(stored.shape) == [weight.shape[0], math.ceil(weight.shape[1] / 8)]
                bits = [(int(stored[0, j // 8]) >> (j % 8)) & 1 for j in range(weight.shape[1])]
                assert bits == [int(value != 0) for value in weight[0]], name


def test_the_index_covers_every_tensor(tiny_run):
    index = json.loads((tiny_run[1] / "model.safetensors.index.json").read_text())
    tensors = weights(tiny_run[1])
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_card_and_report_say_what_was_done(tiny_run, record):
    card, report = (tiny_run[1] / "README.md").read_text(), (tiny_run[1] / "report.html").read_text()
    for text in (card, report):
        assert "wanda + dsnot" in text and "perplexity builtin" in text and "demo_continuation acc" in text
        assert "neither smaller on disk nor faster" in text
    assert card.startswith("---\n")
    assert "http://" not in report and "https://" not in report, "the report must open offline"
    report = report.replace("<wbr>", "")  # where a name may go on in the next line
    assert all(row["name"] in report for row in record["matrices"])


def test_inspect_recounts_what_the_record_claims(typed, tiny_run, record):
    code, out, err = typed("inspect", tiny_run[1], "--json")
    assert (code, err.count("Traceback")) == (0, 0)
    counts = json.loads(out)
    assert counts["record_agrees"] is True
    assert (counts["zeros"], counts["weights"]) == (record["totals"]["zeros"], record["totals"]["weights"])
    assert {m["name"]: m["sparsity"] for m in counts["matrices"]} == {
        m["name"]: m["sparsity"] for m in record["matrices"]
    }
    code, out, err = typed("inspect", tiny_run[1])
    assert (code, err) == (0, "")
    assert "the record agrees" in out


def test_inspect_finds_out_a_record_that_lies(typed, tiny_run, tmp_path):
    import shutil

    folder = Path(shutil.copytree(tiny_run[1], tmp_path / "copy"))
    record = json.loads((folder / "llmprune.json").read_text())
    record["matrices"][3]["sparsity"] += 0.1
    (folder / "llmprune.json").write_text(json.dumps(record))
    code, out, _ = typed("inspect", folder)
    assert code == 0
    assert "THE RECORD DISAGREES" in out
    (folder / "llmprune.json").write_text('{"schema": 1}')
    code, out, err = typed("inspect", folder)
    assert (code, out, len(err.splitlines())) == (1, "", 1)


def test_inspect_of_a_dense_folder_finds_no_pattern(typed, tiny_llama):
    counts = json.loads(typed("inspect", tiny_llama, "--json")[1])
    assert (counts["zeros"], counts["patterns"], counts["record_agrees"]) == (0, [], None)


def test_evaluate_gives_the_numbers_of_the_record(typed, tiny_run, tiny_llama, record):
    options = ("--perplexity", "builtin", "--tasks", "demo_continuation", "--limit", 2, "--json")
    for folder, which in ((tiny_llama, "dense"), (tiny_run[1], "pruned")):
        code, out, _ = typed("eval", folder, *options)
        assert code == 0
        scores = json.loads(out)
        assert scores["perplexity"]["builtin"]["value"] == pytest.approx(
            record["evaluation"]["perplexity"]["builtin"][which], rel=1e-5
        )
        for metric in ("acc", "acc_norm"):
            claimed = record["evaluation"]["tasks"]["demo_continuation"].get(metric)
            if claimed:
                assert scores["tasks"]["demo_continuation"][metric]["value"] == claimed[which]
    assert {p.name for p in tiny_run[1].iterdir()} == FILES | {"report-matrices.png"}
