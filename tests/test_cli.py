"""The program as a user meets it: output, exit codes, the output folder, and what it never does."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from outputs import contents, old_output
from safetensors.torch import load_file, safe_open

import llmprune
from llmprune import registry
from llmprune.checkpoint.masks import read_masks
from llmprune.common.shipped import shipped_names
from llmprune.hub import download as hub

SMALL = ("--samples", 4, "--seqlen", 64)
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "llmprune.json",
    "masks.safetensors",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "report.html",
    "tokenizer.json",
    "tokenizer_config.json",
}
COMMANDS = {"run", "prune", "push", "eval", "inspect", "methods", "recipes", "models"}
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


@pytest.fixture
def typed(typed, tmp_path, monkeypatch):
    """Typed in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return typed


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


# Help and lists


def test_help_is_quick_and_names_every_command(cli):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = cli("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, which a busy machine does not stretch.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.7
    assert (done.returncode, done.stderr) == (0, "")
    assert set(re.findall(r"^│ (\w+) ", done.stdout, re.M)) == COMMANDS
    assert "llmprune run demo --sparsity 0.7" in done.stdout


def test_help_imports_nothing_heavy():
    code = "import sys, llmprune.cli; print([m for m in ('torch', 'transformers', 'datasets', 'lm_eval', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, llmprune; llmprune.__version__; print([m for m in ('torch', 'transformers', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(typed, command):
    code, out, err = typed(command, "--help")
    assert (code, err) == (0, "")
    assert "--json" in out and "--quiet" in out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "prune",
            "recipe sparsity pattern pruner refiner allocator calibration samples seqlen seed device dtype set",
        ),
        ("prune", "output overwrite dry-run json quiet"),
        ("run", "recipe sparsity perplexity eval-seqlen tasks suite include-tasks limit"),
        ("eval", "perplexity eval-seqlen tasks suite include-tasks limit json quiet"),
    ],
)
def test_the_options_of_the_interface_exist(typed, command, options):
    out = typed(command, "--help")[1]
    for option in options.split():
        assert re.search(rf"--{option}\b", out), option


def test_the_version(typed):
    assert typed("--version") == (0, f"{llmprune.__version__}\n", "")


def test_without_a_command_the_help_is_shown(typed):
    code, out, err = typed()
    assert code in (0, 2)
    assert "Commands" in out + err


def test_methods_lists_every_algorithm_with_its_options(typed):
    code, out, err = typed("methods")
    assert (code, err) == (0, "")
    listed = json.loads(typed("methods", "--json")[1])
    for room in registry.ROOMS:
        assert set(listed[room]) == set(registry.names(room))
        for name, entry in listed[room].items():
            assert name in out and entry["summary"] in out
    assert "damp" in listed["pruners"]["sparsegpt"]["options"]


def test_recipes_lists_every_recipe(typed):
    code, out, err = typed("recipes")
    assert (code, err) == (0, "")
    listed = json.loads(typed("recipes", "--json")[1])
    assert set(listed) == set(shipped_names("recipes"))
    assert all(name in out and summary for name, summary in listed.items())


def test_models_lists_demo_and_aliases(typed):
    code, out, err = typed("models")
    assert (code, err) == (0, "")
    listed = json.loads(typed("models", "--json")[1])
    assert set(listed) == {"demo", *hub.ALIASES}
    assert all(name in out for name in listed)
    assert {"llama-7b", "llama-2-7b", "llama-3-8b", "mistral-7b", "qwen3-8b", "opt-125m"} <= set(listed)


@pytest.mark.parametrize("command", ["methods", "recipes", "models"])
def test_quiet_lists_print_nothing(typed, command):
    assert typed(command, "--quiet") == (0, "", "")


# The main job


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
        r"demo_continuation acc +\d\.\d+ +\d\.\d+ +\+- \d",
        r"seconds",
        r"weights on disk",
        rf"output +{folder.name}\b",
        r"neither smaller on disk nor faster",
    ):
        assert re.search(said, done.stdout), said
    assert "\x1b" not in done.stdout


def test_the_output_folder_holds_every_file_and_no_other(tiny_run):
    assert {p.name for p in tiny_run[1].iterdir()} == FILES
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
    }
    assert record["schema"] == 1
    licence = {"license", "license_name", "license_link"}
    assert set(record["model"]) == {"source", "revision", "architecture", "parameters", "digest"} | licence
    assert set(record["calibration"]) == {"source", "samples", "sequence_length", "seed", "digest"}
    assert all(set(row) == MATRIX for row in record["matrices"])
    assert {"weights", "zeros", "sparsity", "seconds", "peak_memory_bytes", "bytes"} <= set(record["totals"])
    assert set(record["totals"]["bytes"]) == {"dense", "written"}
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
            found = [text for text in private if text in path.read_text(encoding="utf-8")]
            assert not found, (path.name, found)
    for path in tiny_run[1].glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            assert not [text for text in private if text in json.dumps(handle.metadata())]


def weights(folder):
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
    return tensors


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
    assert {p.name for p in tiny_run[1].iterdir()} == FILES


# From Python


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


# Flags


def test_json_is_one_object_on_stdout(cli, tiny_llama):
    done = cli(
        "prune", tiny_llama, *SMALL, "--pattern", "2:4", "--recipe", "wanda", "--output", "out", "--json"
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["output"] == "out"
    assert summary["totals"]["sparsity"] == 0.5
    assert {row["pattern"] for row in summary["matrices"]} == {"2:4"}
    assert summary["recipe"]["sparsity"] == 0.5
    assert "Plan" in done.stderr and "Result" in done.stderr


def test_quiet_prints_nothing(typed, tiny_llama, tmp_path):
    for args in (
        ("prune", tiny_llama, *SMALL, "--output", "out"),
        ("eval", tiny_llama, "--perplexity", "builtin", "--limit", 1),
        ("inspect", tiny_llama),
        ("prune", tiny_llama, *SMALL, "--dry-run"),
    ):
        assert typed(*args, "--quiet") == (0, "", ""), args
    assert (tmp_path / "out" / "llmprune.json").is_file()


def test_json_under_quiet_is_the_object_alone(typed, tiny_llama):
    code, out, err = typed("prune", tiny_llama, *SMALL, "--output", "out", "--json", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(out)["totals"]["weights"] == 61440


def test_a_dry_run_lists_every_matrix_and_writes_nothing(typed, tiny_llama, tmp_path):
    rules = "rules=[{match: '*.down_proj', skip: true}, {match: '*.1.*q_proj', sparsity: 0.25}]"
    code, out, err = typed("prune", tiny_llama, *SMALL, "--sparsity", "0.7", "--set", rules, "--dry-run")
    assert (code, err) == (0, "")
    for block in range(2):
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            sparsity, by = (
                ("0.25", r"rule '\*\.1\.\*q_proj'")
                if (block, name) == (1, "self_attn.q_proj")
                else ("0.7", "uniform")
            )
            assert re.search(
                rf"model\.layers\.{block}\.{name} +\d+ x \d+ +unstructured +{sparsity} +{by}", out
            ), name
        assert re.search(rf"model\.layers\.{block}\.mlp\.down_proj +skipped", out)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_as_json(typed, tiny_llama, tmp_path):
    code, out, _ = typed(
        "run", tiny_llama, *SMALL, "--limit", 1, "--perplexity", "builtin", "--dry-run", "--json"
    )
    assert code == 0
    summary = json.loads(out)
    assert len(summary["matrices"]) == 14
    assert summary["output"] == "tiny-llama-dsnot-0.5"
    assert summary["disk_bytes"] > 1_000_000 and summary["memory_bytes"] > 1_000_000
    assert list(tmp_path.iterdir()) == []


def test_without_output_the_folder_is_named_after_model_recipe_and_sparsity(typed, tiny_llama, tmp_path):
    typed("prune", tiny_llama, *SMALL, "--sparsity", "0.3", "--recipe", "magnitude")
    typed("prune", tiny_llama, *SMALL, "--pattern", "2:4")
    assert {p.name for p in tmp_path.iterdir()} == {"tiny-llama-magnitude-0.3", "tiny-llama-dsnot-2to4"}
    assert (
        json.loads((tmp_path / "tiny-llama-dsnot-2to4" / "llmprune.json").read_text())["totals"]["sparsity"]
        == 0.5
    )


def test_flags_reach_the_recipe(typed, tiny_llama):
    flags = (
        "--pruner",
        "sparsegpt",
        "--refiner",
        "none",
        "--seed",
        3,
        "--set",
        "pruner.damp=0.05",
        "--set",
        "scope=matrix",
    )
    summary = json.loads(typed("prune", tiny_llama, *SMALL, *flags, "--output", "out", "--json")[1])
    assert summary["recipe"]["pruner"]["name"] == "sparsegpt"
    assert summary["recipe"]["pruner"]["damp"] == 0.05
    assert summary["recipe"]["refiner"] is None
    assert (summary["recipe"]["seed"], summary["recipe"]["scope"]) == (3, "matrix")
    assert all(row["steps"] == [] and row["pruner"] == "sparsegpt" for row in summary["matrices"])


def test_tokens_in_a_file_are_used_as_they_are(typed, tiny_llama, calibration_tokens, tmp_path):
    from safetensors.torch import save_file

    save_file({"tokens": calibration_tokens}, tmp_path / "tokens.safetensors")
    first = json.loads(
        typed("prune", tiny_llama, "--calibration", "tokens.safetensors", "--output", "one", "--json")[1]
    )
    assert first["calibration"]["source"] == "tokens.safetensors"
    assert (first["calibration"]["samples"], first["calibration"]["sequence_length"]) == (8, 32)
    second = llmprune.prune(tiny_llama, calibration=calibration_tokens, output=tmp_path / "two").record
    assert second["calibration"]["digest"] == first["calibration"]["digest"]
    assert (tmp_path / "one" / "masks.safetensors").read_bytes() == (
        tmp_path / "two" / "masks.safetensors"
    ).read_bytes()


def test_the_same_command_writes_the_same_weights(typed, tiny_llama, tmp_path):
    for name in ("one", "two"):
        typed("prune", tiny_llama, *SMALL, "--pruner", "random", "--output", name)
    for name in ("masks.safetensors", "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


# Demo


def test_run_demo_works_out_of_the_box(cli, tmp_path):
    done = cli("run", "demo", "--sparsity", "0.7", *SMALL, "--limit", 2, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["model"]["source"] == "demo"
    assert summary["output"] == "demo-dsnot-0.7"
    assert summary["totals"]["sparsity"] == pytest.approx(0.7, abs=0.01)
    assert (
        summary["evaluation"]["perplexity"]["builtin"]["dense"]
        < summary["evaluation"]["perplexity"]["builtin"]["pruned"]
    )
    assert "demo_continuation" in summary["evaluation"]["tasks"]
    folder = tmp_path / "demo-dsnot-0.7"
    assert FILES - {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)} <= {
        p.name for p in folder.iterdir()
    }
    assert all(t.dtype == torch.bfloat16 for t in weights(folder).values())


# Interruption


def test_ctrl_c_ends_with_130_one_line_and_no_partial_folder(tiny_llama, tmp_path):
    # Many rows: the blocks take long enough to be interrupted.
    options = ("--samples", 2000, "--seqlen", 64, "--pruner", "sparsegpt", "--output", "out", "--overwrite")
    before = contents(old_output(tmp_path / "out"))
    command = [sys.executable, "-m", "llmprune", "prune", tiny_llama, *options]
    with subprocess.Popen(
        list(map(str, command)),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            wait_for(lambda: (tmp_path / ".out.partial").is_dir() or running.poll() is not None, 120)
            assert running.poll() is None, running.stderr.read()
            running.send_signal(signal.SIGINT)
            err = running.communicate(timeout=60)[1]
        finally:
            running.kill()
    assert running.returncode == 130, err
    assert len(err.splitlines()) == 1, err
    assert "interrupted" in err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == before


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("module", ["typer", "torch", "transformers", "llmprune.run.production"])
def test_a_signal_that_a_library_turns_into_an_error_of_its_own_is_still_an_interrupt(tmp_path, module):
    """SIGTERM in the middle of an import, which ends in another error, as lazy imports make of it."""
    code = f"""
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                raise ValueError("cannot use the config")
sys.argv = ["llmprune", "prune", "demo", "--samples", "1", "--seqlen", "16", "--output", "out"]
from llmprune.__main__ import main
sys.meta_path.insert(0, Finder())
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, list(tmp_path.iterdir())) == (130, []), done.stderr
    assert (
        done.stderr
        == "llmprune: interrupted; nothing was changed in the output folder, run the same command again\n"
    )


def test_processes_that_a_command_forks_die_of_sigterm():
    """lm-eval's bootstrap ends a pool of workers so, and waits for them."""
    from llmprune.machine.interrupts import Interrupts

    with Interrupts().watched():
        pid = os.fork()
        if not pid:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.2)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
