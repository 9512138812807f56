"""The program as a user meets it: help, lists, flags, the demo, interruption."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from outputs import FILES, contents, old_output, weights

import llmprune
from llmprune import registry
from llmprune.common.shipped import shipped_names
from llmprune.hub import download as hub

SMALL = ("--samples", 4, "--seqlen", 64)


COMMANDS = {"run", "prune", "recover", "push", "eval", "inspect", "convert", "generate", "bench"}
COMMANDS |= {"sweep", "compare", "published", "methods", "recipes", "models"}


def test_help_is_quick_and_names_every_command(started):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = started("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, which a busy machine does not stretch.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.7
    assert (done.returncode, done.stderr) == (0, "")
    assert set(re.findall(r"^│ (\w+) ", done.stdout, re.M)) == COMMANDS | {"mask"}
    assert "llmprune run demo --sparsity 0.7" in done.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys, llmprune.cli; print([m for m in ('torch', 'transformers', 'datasets', 'lm_eval', "
        "'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, llmprune; llmprune.__version__; print([m for m in ('torch', 'transformers', 'typer') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [*sorted(COMMANDS), "mask diff", "mask apply", "mask check"])
def test_every_command_has_help(typed, command):
    code, out, err = typed(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert "--json" in out and "--quiet" in out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "prune",
            "recipe sparsity pattern pruner refiner allocator calibration samples seqlen seed device "
            "dtype masks set",
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
    for room in (*registry.ROOMS, *registry.RECOVERY_ROOMS):
        assert set(listed[room]) == set(registry.names(room))
        for name, entry in listed[room].items():
            assert name in out and entry["summary"] in out
    assert "damp" in listed["pruners"]["sparsegpt"]["options"]
    assert "rank" in listed["recovery.trainables"]["masked-lora"]["options"]


def test_recipes_lists_every_recipe(typed):
    code, out, err = typed("recipes")
    assert (code, err) == (0, "")
    listed = json.loads(typed("recipes", "--json")[1])
    kinds = {"pruning": shipped_names("recipes"), "recovery": shipped_names("recipes", "recovery")}
    assert {name: entry["kind"] for name, entry in listed.items()} == {
        name: kind for kind, names in kinds.items() for name in names
    }
    assert len(listed) == sum(map(len, kinds.values())), "one name for two recipes"
    assert all(name in out and entry["summary"] in out for name, entry in listed.items())


def test_models_lists_demo_and_aliases(typed):
    code, out, err = typed("models")
    assert (code, err) == (0, "")
    listed = json.loads(typed("models", "--json")[1])
    assert set(listed) == {"demo", *hub.ALIASES}
    assert all(name in out and entry["model_class"] in out for name, entry in listed.items())
    assert listed["qwen3-8b"] == {
        "repository": "Qwen/Qwen3-8B",
        "model_class": "Qwen3ForCausalLM",
        "note": "",
    }
    assert listed["demo"]["repository"] is None
    assert {"llama-7b", "llama-2-7b", "llama-3-8b", "mistral-7b", "qwen3-8b", "opt-125m"} <= set(listed)


@pytest.mark.parametrize("command", ["methods", "recipes", "models"])
def test_quiet_lists_print_nothing(typed, command):
    assert typed(command, "--quiet") == (0, "", "")


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
    flags = "--pruner sparsegpt --refiner none --seed 3 --set pruner.damp=0.05 --set scope=matrix".split()
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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_text_that_a_terminal_cannot_show_ends_no_command(encoding):
    code = """
from llmprune.terminal.console import Screen, print_anywhere
print_anywhere()
Screen().table("", [("accuracy ± 0.1", "1 × 2"), ("中", "…")])
"""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    lines = {
        "ascii": ["accuracy +- 0.1  1 x 2", "?               ..."],
        "latin-1": ["accuracy ± 0.1  1 × 2", "?               ..."],
        "utf-8": ["accuracy ± 0.1  1 × 2", "中               …"],
    }[encoding]
    assert done.returncode == 0, done.stderr
    assert [" ".join(line.split()) for line in done.stdout.decode(encoding).splitlines()] == [
        " ".join(line.split()) for line in lines
    ]


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "demo", "--sparsity", "abc"], "--sparsity': a number is wanted, got 'abc'; llmprune run -h"),
        (["eval", "demo", "--limit", "1.5"], "--limit': a whole number is wanted, got '1.5'; llmprune eval"),
        (["run"], "Missing argument"),
        (["run", "demo", "--sparsityy", "1"], "No such option: --sparsityy"),
        (["rnu"], "No such command 'rnu'"),
    ],
)
def test_wrong_usage_is_one_line_with_what_was_received(typed, arguments, said):
    code, out, err = typed(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err and err.startswith("llmprune: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "demo", "--samples-text", "9"], "--samples-text must be a whole number from 0 to 8, got 9"),
        (["run", "demo", "--sparsity", "1.5"], "--sparsity must be in [0, 1), the share of weights"),
        (["generate", "demo", "hi", "--max-new-tokens", "0"], "--max-new-tokens must be a whole number from"),
    ],
)
def test_errors_name_the_options_that_were_typed(typed, arguments, said):
    code, out, err = typed(*arguments)
    assert (code, out, err.count("\n")) == (1, "", 1) and said in err


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
