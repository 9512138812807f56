"""Where output goes: one JSON object on stdout, all else on stderr, and readers that go away."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from llmprune import registry
from llmprune.common.shipped import shipped_names
from llmprune.hub import download as hub
from llmprune.run import progress
from llmprune.terminal import console

SMALL = ("--samples", 4, "--seqlen", 32)

RECORD = (
    "schema",
    "model",
    "recipe",
    "calibration",
    "matrices",
    "totals",
    "evaluation",
    "environment",
    "speed",
)


def test_a_strict_inspection_fails_where_record_and_weights_disagree(typed, finished, tiny_llama, tmp_path):
    folder = Path(shutil.copytree(finished.output, tmp_path / "copy"))
    assert typed("inspect", folder, "--strict")[::2] == (0, "")
    record = json.loads((folder / "llmprune.json").read_text())
    record["matrices"][3]["sparsity"] += 0.1
    (folder / "llmprune.json").write_text(json.dumps(record))
    assert typed("inspect", folder)[0] == 0
    code, out, err = typed("inspect", folder, "--strict")
    assert code == 1 and "THE RECORD DISAGREES" in out
    assert err.splitlines() == [f"llmprune: llmprune.json of {folder} disagrees with its weights"]
    (folder / "llmprune.json").unlink()
    code, out, err = typed("inspect", folder, "--strict", "--json")
    assert code == 1 and json.loads(out)["record_agrees"] is None
    assert err.splitlines()[-1].endswith("is not there: no record to check against")
    assert typed("inspect", tiny_llama)[0] == 0


@pytest.mark.parametrize(
    ("args", "keys"),
    [
        (
            ("inspect", "DIR"),
            {"model", "matrices", "weights", "zeros", "sparsity", "patterns", "bytes", "record_agrees"},
        ),
        (
            ("eval", "DIR", "--perplexity", "builtin", "--limit", 1),
            {
                "model",
                "perplexity",
                "tasks",
                "seconds",
                "peak_memory_bytes",
                "peak_private_memory_bytes",
                "environment",
            },
        ),
        (("methods",), {*registry.ROOMS, *registry.RECOVERY_ROOMS}),
        (("recipes",), {*shipped_names("recipes"), *shipped_names("recipes", "recovery")}),
        (("models",), {"demo", *hub.ALIASES}),
        (
            ("prune", "DIR", *SMALL, "--recipe", "wanda", "--overwrite", "--output", "out"),
            {"output", *RECORD},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_json_is_one_object_on_stdout_and_all_else_on_stderr(args, keys, typed, finished):
    code, out, err = typed(*(finished.output if a == "DIR" else a for a in args), "--json")
    assert code == 0 and len(out.splitlines()) == 1 and err
    assert set(json.loads(out)) == keys
    code, again, err = typed(*(finished.output if a == "DIR" else a for a in args), "--json", "--quiet")
    assert (code, err) == (0, "") and set(json.loads(again)) == keys


@pytest.fixture
def gone(forked, tmp_path):
    """The program writing to a pipe whose reader has left: (stderr, exit code)."""

    def call(*args):
        reader, writer = os.pipe()
        os.close(reader)
        child = forked.start(args, tmp_path, stdout=writer)
        os.close(writer)
        return child.communicate()[1], child.returncode

    return call


@pytest.mark.parametrize(
    "args",
    [("--version",), ("--help",), ("recipes",), ("models", "--json"), ("inspect", "demo")],
    ids=" ".join,
)
def test_an_output_nobody_reads_ends_quietly(args, gone):
    err, code = gone(*args)
    assert code == 141 and "Traceback" not in err and "BrokenPipe" not in err
    assert err == "" or "--json" in args


def test_a_run_whose_output_nobody_reads_leaves_nothing_behind(gone, tmp_path, tiny_llama):
    err, code = gone("prune", tiny_llama, *SMALL, "--recipe", "magnitude", "--output", "out")
    assert (code, err) == (141, "") and list(tmp_path.iterdir()) == []


def test_a_run_that_loses_its_reader_says_what_is_kept(typed, cli, tiny_llama, monkeypatch):
    real = progress.Progress.block

    def block(self, number):
        real(self, number)
        raise console.OutputClosed

    monkeypatch.setattr(progress.Progress, "block", block)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # stdout is this process's own
    code, _, err = typed("prune", tiny_llama, *SMALL, "--recipe", "magnitude", "--output", "out")
    assert code == 141 and len(err.splitlines()) == 1
    assert re.search(
        r"the output was closed; 1 of 2 blocks are finished and kept; continue with: "
        r"llmprune prune .* --resume",
        err,
    )
    monkeypatch.undo()
    resumed = ("prune", tiny_llama, *SMALL, "--recipe", "magnitude", "--output", "out", "--resume")
    done = cli(*resumed)
    assert done.returncode == 0, done.stderr
