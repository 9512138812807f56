"""The output folder: what is refused, what is replaced, and what stands until the new one is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from damage import INDEX
from outputs import everything, old_output, one_line
from safetensors.torch import save_file

import llmprune
from llmprune.checkpoint import placement, writer
from llmprune.run import corridor as run


@pytest.fixture
def occupied(work):
    """A folder with what is not ours."""
    folder = work / "out"
    (folder / "below").mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    (folder / "below" / "more.txt").write_text("more")
    return folder


@pytest.fixture
def old(work):
    """The output of an earlier run."""
    return old_output(work / "out")


def test_an_output_folder_that_is_not_empty_is_refused(refused, old, monkeypatch):
    monkeypatch.setattr(run, "prune_blocks", lambda *args: pytest.fail("work began"))
    refused(r"output folder out is not empty.*--output.*--overwrite")


@pytest.mark.parametrize(
    "flags",
    [{}, {"overwrite": True}, {"restart": True}, {"resume": True}, {"overwrite": True, "resume": True}],
)
def test_a_folder_with_anything_else_is_refused_whatever_the_flags(refused, occupied, monkeypatch, flags):
    monkeypatch.setattr(run, "prune_blocks", lambda *args: pytest.fail("work began"))
    refused(
        r"output folder out holds 'below' and 1 more, which llmprune has not written.*choose another "
        r"--output",
        **flags,
    )
    refused(r"output folder out holds 'below' and 1 more", dry_run=True, **flags)


@pytest.mark.parametrize(
    "made",
    ["dense model", "record of something else", "more beside it", "a folder beside it", "an unlisted file"],
)
def test_what_only_resembles_an_output_is_refused(refused, tiny_llama, old, made):
    if made == "dense model":
        shutil.rmtree(old)
        shutil.copytree(tiny_llama, old)
    elif made == "record of something else":
        (old / "llmprune.json").write_text('{"theme": "dark"}')
    elif made == "more beside it":
        (old / "notes.md").write_text("mine")
    elif made == "a folder beside it":
        (old / "tokenizer_data").mkdir()
    else:
        (old / "tokenizer.model").write_text("not listed in the record")
    refused(r"output folder out holds '.*which llmprune has not written", overwrite=True)


def test_a_sweep_is_refused_as_what_it_is(refused, old):
    shutil.rmtree(old)
    (old / "cells").mkdir(parents=True)
    (old / "sweep.json").write_text("{}")
    refused(r"output folder out holds a sweep, which no other output replaces; choose", overwrite=True)


def test_a_link_to_a_folder_is_looked_through(
    refused, tiny_llama, calibration_tokens, occupied, work, tmp_path
):
    (work / "link").symlink_to(occupied, target_is_directory=True)
    refused(r"output folder link holds 'below'", output="link", overwrite=True)
    home = tmp_path / "elsewhere"
    (work / "other").symlink_to(old_output(home), target_is_directory=True)
    llmprune.prune(
        tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="other", overwrite=True
    )
    assert (work / "other").is_symlink() and (home / "model.safetensors.index.json").is_file()


def never(tmp_path, work, source):
    """Folders that no output may take, and what the refusal names."""
    (tmp_path / "link").symlink_to(source.parent, target_is_directory=True)
    return {
        "the model": (source, "holds the model"),
        "above the model": (source.parent, "holds the model"),
        "above it, through a link": (tmp_path / "link", "holds the model"),
        "in the model": (source / "pruned", "lies in the folder of the model"),
        "root": ("/", "is the root"),
        "home": (Path.home(), "(holds a home folder|is a folder of the system)"),
        "current": (".", "holds the working directory"),
        "above the current": (tmp_path / "work", "holds the working directory"),
        "system": ("/usr", "is a folder of the system"),
        "below a system folder": ("/etc/llmprune-output", "is a folder of the system"),
        "home folders": ("/home", "(is a folder of the system|holds)"),
        "mount point": ("/dev/shm", "(is a folder of the system|mount point)"),
    }


def test_some_folders_are_never_an_output(tiny_llama, calibration_tokens, work, tmp_path, monkeypatch):
    source = Path(shutil.copytree(tiny_llama, tmp_path / "models" / "source"))
    (work / "below").mkdir()
    monkeypatch.chdir(work / "below")
    before = everything(tmp_path)
    for what, (folder, said) in never(tmp_path, work, source).items():
        for flags in ({}, {"overwrite": True}, {"resume": True}, {"restart": True}):
            with pytest.raises(
                ValueError, match=rf"output folder .*{said}.*never replaced; choose another"
            ) as raised:
                llmprune.prune(source, calibration=calibration_tokens, output=folder, **flags)
            assert one_line(raised.value), what
    (tmp_path / "link").unlink()
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("what", "name", "options"),
    [
        ("the recipe", "recipe.yaml", {"recipe": "FILE"}),
        ("the calibration file", "text.txt", {"calibration": "FILE"}),
        ("the calibration file", "tokens.safetensors", {"calibration": "builtin=0.5+FILE=0.5"}),
        ("the calibration file", "calibrated.yaml", {"recipe": "elsewhere.yaml"}),
        ("the perplexity text", "text.txt", {"perplexity": ["FILE"]}),
        ("the suite", "suite.yaml", {"suite": "FILE"}),
        ("the tasks", "tasks", {"include_tasks": "FILE", "perplexity": ["builtin"]}),
        ("the task data", "tasks", {"task_data": "FILE", "perplexity": ["builtin"]}),
    ],
)
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_that_holds_an_input_is_never_replaced(tiny_llama, work, what, name, options, linked):
    folder = old_output(work / "out")
    texts = {"recipe.yaml": "pruner: magnitude", "suite.yaml": "perplexity: [builtin]", "calibrated.yaml": ""}
    place = work / name if linked else folder / name
    if name == "tasks":
        place.mkdir()
    elif name == "tokens.safetensors":
        save_file({"tokens": torch.zeros(4, 16, dtype=torch.int64)}, place)
    else:
        place.write_text(texts.get(name, "words and words " * 500))
    if linked:  # the input lies elsewhere, and the link to it would be lost
        (folder / name).symlink_to(place)
    if name == "calibrated.yaml":
        (work / "elsewhere.yaml").write_text(
            f"pruner: magnitude\ncalibration: {{source: '{folder / 'text.txt'}'}}\n"
        )
        (folder / "text.txt").write_text("words")
    said = json.dumps(options).replace("FILE", str(folder / name))
    before = everything(work)
    with pytest.raises(ValueError, match=rf"output folder .* holds {what}, which is never replaced"):
        llmprune.run_model(tiny_llama, output=folder, overwrite=True, limit=2, **json.loads(said))
    assert everything(work) == before


def test_an_empty_output_folder_is_used(tiny_llama, calibration_tokens, work):
    (work / "out").mkdir()
    llmprune.prune(tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out")
    assert (work / "out" / "llmprune.json").is_file()


def test_overwrite_replaces_the_whole_folder(tiny_llama, calibration_tokens, old, work):
    (old / "README.md.tmp").write_text("of a run that was killed")
    (old / "config.json").write_text("{}")
    llmprune.prune(
        tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out", overwrite=True
    )
    record = json.loads((old / "llmprune.json").read_text())
    pages = ("README.md", "llmprune.json", "report.html")
    assert record["totals"]["files"] == {
        p.name: p.stat().st_size for p in sorted(old.iterdir()) if p.name not in pages
    }
    assert [p.name for p in work.iterdir()] == ["out"]


def test_an_output_that_is_a_file_is_refused(refused, work):
    (work / "out").write_text("a file")
    refused(r"output out is a file; name a folder")
    refused(r"output out is a file; name a folder", overwrite=True)


def test_an_output_below_a_file_is_refused_before_work(refused, work, monkeypatch):
    monkeypatch.setattr(run, "prune_blocks", lambda *args: pytest.fail("work began"))
    (work / "file").write_text("a file")
    refused(r"file.*(not a folder|is a file)", output="file/out")


@pytest.mark.parametrize("above", [False, True])
def test_the_source_is_never_overwritten(refused, tiny_llama, tmp_path, above):
    source = Path(shutil.copytree(tiny_llama, tmp_path / "models" / "source"))
    before = everything(source)
    refused(r"holds the model", source, output=source.parent if above else source, overwrite=True)
    assert everything(source) == before


def test_an_output_that_is_a_link_is_written_through(tiny_llama, calibration_tokens, work, tmp_path):
    (tmp_path / "disk").mkdir()
    (work / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    llmprune.prune(tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out")
    assert (work / "out").is_symlink()
    assert (tmp_path / "disk" / "llmprune.json").is_file()


@pytest.mark.parametrize(
    "failure", [RuntimeError("broken"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("where", ["second matrix", "first masks"])
def test_a_run_that_fails_before_a_block_is_finished_leaves_nothing(
    tiny_llama, calibration_tokens, old, work, monkeypatch, where, failure
):
    from llmprune.checkpoint.masks import MaskFile

    place = {"second matrix": (run, "prune_matrix"), "first masks": (MaskFile, "write")}[where]
    real, calls = getattr(*place), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1 or where == "first masks":
            raise failure
        return real(*args, **kwargs)

    monkeypatch.setattr(*place, failing)
    before = everything(work)
    with pytest.raises(type(failure)):
        llmprune.prune(
            tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out", overwrite=True
        )
    assert everything(work) == before


def test_the_old_output_stands_until_the_new_one_is_whole(tiny_llama, calibration_tokens, old, monkeypatch):
    real, seen = writer.CheckpointWriter.finish, []

    def finish(self):
        whole = (self.folder / INDEX).is_file() and (self.folder / "llmprune.json").is_file()
        seen.append(whole and (old / "README.md").read_text() == "years of work")
        real(self)

    monkeypatch.setattr(writer.CheckpointWriter, "finish", finish)
    llmprune.prune(
        tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out", overwrite=True
    )
    assert seen == [True]


def test_the_old_output_stands_when_the_new_one_cannot_be_moved_into_place(
    tiny_llama, calibration_tokens, old, monkeypatch
):
    real = os.replace

    def replace(source, target):
        if Path(target).name == "out" and (Path(source) / INDEX).is_file():
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(placement.os, "replace", replace)
    before = everything(old)
    with pytest.raises(RuntimeError, match=r"cannot be moved to .*Input/output.*it lies whole in"):
        llmprune.prune(
            tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out", overwrite=True
        )
    assert everything(old) == before
    assert llmprune.inspect(old.with_name(".out.partial"))["record_agrees"] is True, (
        "the finished work is not thrown away"
    )


def test_what_is_put_into_the_output_during_the_run_is_not_replaced(
    tiny_llama, calibration_tokens, old, monkeypatch
):
    real = writer.CheckpointWriter.finish

    def finish(self):
        (old / "thesis.txt").write_text("written meanwhile")
        real(self)

    monkeypatch.setattr(writer.CheckpointWriter, "finish", finish)
    with pytest.raises(RuntimeError, match=r"cannot be moved to .*holds 'thesis.txt'.*it lies whole in"):
        llmprune.prune(
            tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out", overwrite=True
        )
    assert (old / "thesis.txt").read_text() == "written meanwhile" and (
        old / "README.md"
    ).read_text() == "years of work"
    assert llmprune.inspect(old.with_name(".out.partial"))["record_agrees"] is True


@pytest.mark.parametrize("flags", [{}, {"restart": True}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
def test_folders_beside_the_output_are_not_thrown_away_either(refused, work, name, flags):
    (work / name).mkdir()
    (work / name / "thesis.txt").write_text("years of work")
    refused(rf"{name} holds 'thesis.txt', which llmprune has not written", **flags)
    shutil.rmtree(work / name)
    (work / "notes").mkdir()
    (work / name).symlink_to(work / "notes", target_is_directory=True)
    refused(rf"{name} is no folder of llmprune's", **flags)


def test_a_file_in_place_of_the_lock_is_not_emptied(refused, work):
    (work / ".out.lock").write_text("years of work")
    refused(r"\.out\.lock is no lock of llmprune.*move it away")


def test_a_partial_folder_of_a_killed_run_is_replaced(tiny_llama, calibration_tokens, work):
    (work / ".out.partial").mkdir()
    (work / ".out.partial" / "journal.jsonl").write_text('{"identity": {"model": "x"}, "files": []}\n')
    (work / ".out.partial" / "model-00001-of-00003.safetensors.tmp").write_bytes(b"half")
    llmprune.prune(tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out")
    assert [p.name for p in work.iterdir()] == ["out"]


def test_a_full_disk_is_noticed_before_work(refused, monkeypatch):
    monkeypatch.setattr(run, "prune_blocks", lambda *args: pytest.fail("work began"))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    )
    refused(r"the output needs \d+\.\d MB and .* has 0\.0 MB free; make room or choose another --output")
