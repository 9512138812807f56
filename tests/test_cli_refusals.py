"""The program ends in one line whatever goes wrong, and wrong usage is told as such."""

from __future__ import annotations

import math
import re
import sys
import time

import pytest
import torch
from damage import rewrite
from outputs import everything, old_output

from llmprune import __main__ as program
from llmprune.cli import frame
from llmprune.hub import download as hub


def assert_one_line(done, said):
    code, out, err = done
    assert code == 1, err
    assert len(err.splitlines()) == 1, err
    assert re.search(said, err), err
    assert "Traceback" not in err
    return out


def test_a_misspelt_flag_or_command_is_wrong_usage(typed):
    for args in (
        ("prune", "demo", "--sparsty", "0.5"),
        ("prun", "demo"),
        ("prune",),
        ("prune", "demo", "--samples", "many"),
    ):
        code, out, err = typed(*args)
        assert (code, out) == (2, ""), args
        assert "Traceback" not in err
    assert "--sparsity" in typed("prune", "demo", "--sparsty", "0.5")[2]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("prune", "demoo"), r"'demoo'.*'demo'"),
        (("prune", "MODEL", "--recipe", "wandaa"), r"'wandaa'.*'wanda'"),
        (("prune", "MODEL", "--pruner", "wnda"), r"'wnda'.*'wanda'"),
        (("prune", "MODEL", "--sparsity", "1.5"), r"\[0, 1\).*1\.5"),
        (("prune", "MODEL", "--sparsity", "nan"), r"\[0, 1\).*nan"),
        (("prune", "MODEL", "--pattern", "2:4", "--sparsity", "0.7"), r"0\.7 contradicts pattern 2:4"),
        (("prune", "MODEL", "--set", "sparsity"), r"--set takes dotted\.key=value, got 'sparsity'"),
        (("prune", "MODEL", "--set", "pruner.damp=[1"), r"--set pruner\.damp.*not valid YAML"),
        (("prune", "MODEL", "--set", "spars=1"), r"recipe key 'spars'.*did you mean 'sparsity'"),
        (("prune", "MODEL", "--seqlen", "65"), r"65.*limit of 64.*--seqlen 64"),
        (("prune", "MODEL", "--samples", "0"), r"samples.*got 0"),
        (("prune", "MODEL", "--dtype", "float16", "--device", "cpu"), r"float16"),
        (("prune", "MODEL", "--device", "cuda:99"), r"'cuda:99' is not available"),
        (("prune", "MODEL", "--calibration", "none.txt"), r"no such text file: none\.txt"),
        (("prune", "MODEL", "--json", "--calibration", "none.txt"), r"no such text file: none\.txt"),
        (("prune", "MODEL", "--quiet", "--calibration", "none.txt"), r"no such text file: none\.txt"),
        (("run", "MODEL", "--limit", "0"), r"limit must be at least 1, got 0"),
        (("run", "MODEL", "--suite", "papr"), r"'papr'.*'paper'"),
        (("run", "MODEL", "--eval-seqlen", "65"), r"65.*limit of 64.*--eval-seqlen 64"),
        (("eval", "MODEL", "--limit", "-1"), r"limit must be at least 1, got -1"),
        (("eval", "demoo"), r"'demoo'.*'demo'"),
        (("inspect", "demoo"), r"'demoo'.*'demo'"),
        (("inspect", "./nowhere"), r"no such folder: \./nowhere"),
    ],
)
def test_the_program_says_it_in_one_line(typed, tiny_llama, work, args, said):
    out = assert_one_line(typed(*(tiny_llama if a == "MODEL" else a for a in args)), said)
    assert out == ""
    assert everything(work) == {}


@pytest.mark.parametrize(
    "error",
    [
        KeyError("q"),
        RuntimeError("line one\nline two"),
        MemoryError(),
        OSError(28, "No space left on device"),
    ],
)
def test_the_program_survives_failures_of_any_kind(typed, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "locate", fail)
    monkeypatch.setattr("llmprune.model.opening.locate", fail)
    assert_one_line(typed("prune", "demo"), r"llmprune: \S")


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(frame, "debug", False)
    monkeypatch.setattr(sys, "argv", ["llmprune", "--debug", "inspect", "demoo"])
    with pytest.raises(ValueError, match="demoo"):
        program.main()


def test_a_damaged_weight_ends_the_program_in_one_line(cli, llama_copy, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(llama_copy, **{name: torch.full((96, 64), math.nan)})
    options = ("--calibration", "builtin", "--samples", 2, "--seqlen", 32, "--output", "out")
    done = cli("prune", llama_copy, *options, "--quiet")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert name in done.stderr and "NaN" in done.stderr
    assert not list(tmp_path.glob("*out*"))


def test_no_network_ends_the_program_in_one_line_soon(cli, tiny_llama, tmp_path):
    started = time.monotonic()
    done = cli("prune", tiny_llama, "--calibration", "c4", "--output", "out")
    assert time.monotonic() - started < 20
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "cannot load 'c4'" in done.stderr and "builtin" in done.stderr
    assert not list(tmp_path.glob("*out*"))


def test_an_occupied_output_ends_the_program_in_one_line(cli, tiny_llama, tmp_path):
    before = everything(old_output(tmp_path / "out"))
    done = cli("run", tiny_llama, "--output", "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "llmprune: output folder out is not empty; "
        "choose another with --output or replace it with --overwrite"
    ]
    assert everything(tmp_path / "out") == before


@pytest.mark.parametrize("value", ["9" * 6000, "0." + "3" * 6000 + "e9999", "{a: 1, a: 2}", "[" * 5000])
def test_a_value_no_number_can_hold_is_refused(typed, value):
    code, _, err = typed("prune", "demo", "--set", f"sparsity={value}")
    assert code == 1 and len(err.splitlines()) == 1 and len(err) < 600, err
    assert "sparsity" in err
