"""The cache of calibration tokens: used where it can be, done without and told once where it cannot."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import llmprune
from llmprune.calibration import CalibrationRequest, build, cache
from llmprune.common.folders import cache_folder

SENTENCE = "The calibration text of a file has to be long enough for every row that is asked for. "


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(SENTENCE * 100 + name)
    return tmp_path


@pytest.fixture
def rows(folder, tiny_llama):
    from llmprune.model.opening import open_model

    tokenizer = open_model(tiny_llama).tokenizer

    def make(source="a.txt"):
        return build(
            source, tokenizer, CalibrationRequest(samples=4, length=16, limit=64, vocabulary=2048, seed=0)
        ).tokens

    return make


def kept():
    return sorted((cache_folder() / "calibration").glob("*"))


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("llmprune")]


def test_rows_are_made_once(rows, caplog, monkeypatch):
    made = rows()
    (path,) = kept()
    monkeypatch.setattr("llmprune.calibration.rows.pack", lambda *args: pytest.fail("made again"))
    assert torch.equal(rows(), made) and kept() == [path] and said(caplog) == []


def unusable(tmp_path, monkeypatch, how):
    """Make the cache folder one that cannot be used."""
    if how == "a file in its place":
        (tmp_path / "file").write_text("x")
        monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "file"))
    elif how == "a file above it":
        (tmp_path / "file").write_text("x")
        monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "file" / "cache"))
    elif how == "read-only":
        monkeypatch.setenv("LLMPRUNE_CACHE", "/proc/llmprune")
    elif how == "no home":
        monkeypatch.delenv("LLMPRUNE_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(
            Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
        )
    elif how == "no access":
        monkeypatch.setattr(
            Path,
            "exists",
            lambda self: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied")),
        )
    else:
        error = (
            OSError(errno.ENOSPC, "No space left on device")
            if how == "full"
            else SafetensorError("I/O error: No space left on device")
        )
        monkeypatch.setattr(cache, "save_file", lambda *args, **options: (_ for _ in ()).throw(error))


HOWS = [
    "a file in its place",
    "a file above it",
    "read-only",
    "no home",
    "no access",
    "full",
    "full, told by safetensors",
]


@pytest.mark.parametrize("how", HOWS)
def test_a_folder_that_cannot_be_used_is_done_without_and_told_once(rows, folder, monkeypatch, caplog, how):
    expected = rows()
    caplog.clear()
    monkeypatch.setenv("LLMPRUNE_CACHE", str(folder / "other"))
    with monkeypatch.context() as patched:
        unusable(folder, patched, how)
        assert torch.equal(rows(), expected)
        assert len(said(caplog)) == 1
        assert (
            "the cache of calibration tokens cannot be " in said(caplog)[0]
            and "LLMPRUNE_CACHE names another folder" in said(caplog)[0]
        )
        caplog.clear()
        rows("a.txt=1+b.txt=1")
        assert len(said(caplog)) == 1, "once per run, whatever it is made of"
    assert [p for p in folder.rglob("*") if p.suffix == ".tmp"] == []


OPTIONS = ("--calibration", "a.txt", "--samples", "4", "--seqlen", "16", "--recipe", "magnitude")


def test_the_program_says_so_and_goes_on(folder, cli, tiny_llama):
    done = cli(
        "prune",
        tiny_llama,
        *OPTIONS,
        "--output",
        "out",
        "--json",
        env={"LLMPRUNE_CACHE": str(folder / "a.txt" / "cache")},
    )
    assert done.returncode == 0 and json.loads(done.stdout)["totals"]["sparsity"] > 0
    assert done.stderr.count("the cache of calibration tokens cannot be written") == 1


def test_quiet_is_quiet(folder, typed, tiny_llama, monkeypatch, caplog):
    unusable(folder, monkeypatch, "a file above it")
    assert typed("prune", tiny_llama, *OPTIONS, "--output", "out", "--quiet") == (0, "", "")
    assert said(caplog) == []


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # in a token
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        lambda path: path.write_bytes(path.read_bytes()[:50]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(os.urandom(500)),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["a token changed", "cut", "empty", "noise", "a folder"],
)
def test_a_damaged_file_is_told_and_made_again(rows, caplog, damage):
    made = rows()
    (path,) = kept()
    damage(path)
    assert torch.equal(rows(), made)
    assert len(said(caplog)) == 1 and "is damaged and made again" in said(caplog)[0]
    if path.is_file():
        caplog.clear()
        assert torch.equal(rows(), made) and said(caplog) == []


def test_what_the_rows_fail_with_is_no_matter_of_the_cache(rows, folder, caplog):
    (folder / "a.txt").write_text("short")
    with pytest.raises(ValueError, match=r"holds \d+ tokens"):
        rows()
    assert said(caplog) == [] and kept() == []


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/own", "/shared", "/own"),
        ("~/own", "/shared", "HOME/own"),
        ("", "/shared", "/shared/llmprune"),
        (None, "/shared", "/shared/llmprune"),
        (None, "", "HOME/.cache/llmprune"),
        (None, "relative/folder", "HOME/.cache/llmprune"),
        (None, None, "HOME/.cache/llmprune"),
    ],
)
def test_where_it_lies(monkeypatch, own, shared, expected):
    for name, value in (("LLMPRUNE_CACHE", own), ("XDG_CACHE_HOME", shared)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected.replace("HOME", str(Path.home())))


def test_sampled_text_is_kept_too(folder, tiny_llama):
    options = {"recipe": "magnitude", "samples": 2, "seqlen": 8, "calibration": "self"}
    one = llmprune.prune(tiny_llama, output="one", **options).record["calibration"]
    assert len(kept()) == 1
    assert llmprune.prune(tiny_llama, output="two", **options).record["calibration"] == one
