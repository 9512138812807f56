"""Sweeps: the bytes of single runs, what is shared, resumed and kept, and what is never lost."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from outputs import Listening, contents

import llmprune
from llmprune.api import sweeping
from llmprune.checkpoint import sweep_folder
from llmprune.planning.disk import record_bytes
from llmprune.run import corridor, observer, samples, sharing
from llmprune.run import measures as measuring
from llmprune.run import sweep as sweeps

# `best` with few steps of tuning: it needs the dense model beside, for its blocks and for their matrices.
LIGHT_BEST = {
    "name": "best",
    "pruner": {"name": "alps", "correction": 0.25, "max_iterations": 5},
    "order": "group",
}
LIGHT_BEST |= {"update": {"name": "block-tune", "steps": 2}}
WEIGHTS = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "masks.safetensors")
TABLES = ("table.md", "table.csv")


@pytest.fixture
def start(tiny_llama, calibration_tokens, tmp_path):
    """A sweep of a tiny model into `out`."""

    def call(**more):
        options = {
            "recipe": ["wanda", "sparsegpt"],
            "sparsity": [0.5, 0.6],
            "calibration": calibration_tokens,
            "perplexity": ["builtin"],
            "limit": 2,
            "output": tmp_path / "out",
        } | more
        return llmprune.sweep(options.pop("model", tiny_llama), **options)

    return call


@pytest.fixture
def single(tiny_llama, calibration_tokens, tmp_path):
    """A run by itself with one recipe of a sweep."""

    def call(**more):
        options = {"calibration": calibration_tokens, "perplexity": ["builtin"], "limit": 2} | more
        return llmprune.run_model(tiny_llama, output=tmp_path / "single", overwrite=True, **options)

    return call


def counted(monkeypatch, place, name):
    """The calls of a function from now on."""
    calls, real = [], getattr(place, name)

    def call(*args, **options):
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(place, name, call)
    return calls


def stopping(monkeypatch, after, error=KeyboardInterrupt, when=lambda target: True):
    """Let `prune_matrix` fail once it was called so often."""
    real, calls = corridor.prune_matrix, []

    def failing(target, *args):
        calls.append(target.name)
        if len(calls) > after and when(args):
            raise error("stopped")
        return real(target, *args)

    monkeypatch.setattr(corridor, "prune_matrix", failing)
    return calls


# The same bytes as single runs


@pytest.mark.parametrize(
    "recipe",
    [
        "wanda",
        LIGHT_BEST,
        {"name": "two", "pruner": {"name": "alps", "correction": 0.5, "max_iterations": 5}},
        {"name": "owl", "pruner": "wanda", "allocator": "owl"},
    ],
    ids=["wanda", "best", "block", "owl"],
)
def test_masks_weights_and_scores_of_a_cell_are_those_of_a_run_by_itself(recipe, start, single, tmp_path):
    swept = start(recipe=recipe, sparsity=[0.5, 0.6])
    assert [cell["status"] for cell in swept.cells] == ["done", "done"]
    for cell in swept.cells:
        alone = single(recipe=recipe, sparsity=cell["sparsity"])
        folder = tmp_path / "out" / cell["folder"]
        for name in WEIGHTS:
            assert (folder / name).read_bytes() == (alone.output / name).read_bytes(), name
        assert set(contents(folder)) == set(contents(alone.output))
        record = json.loads((folder / "llmprune.json").read_text())
        assert record["evaluation"] == alone.record["evaluation"]
        assert record["model"] == alone.record["model"]
        assert record["recipe"] == json.loads(json.dumps(alone.record["recipe"]))
        assert cell["perplexity"]["builtin"] == record["evaluation"]["perplexity"]["builtin"]["pruned"]


def test_cells_may_be_packed_with_several_kinds_of_values(start, tmp_path, single):
    swept = start(recipe="wanda", sparsity=0.75, format="packed", settings={"values": ["same", "int4"]})
    assert not swept.failed and swept.record["format"] == "packed"
    sizes = {}
    for cell, values in zip(swept.cells, ("same", "int4"), strict=True):
        folder = tmp_path / "out" / "cells" / cell["name"]
        record = json.loads((folder / "llmprune.json").read_text())
        assert record["format"] == {"name": "packed", "values": values} and cell["weights_kept"]
        assert not (folder / "masks.safetensors").exists()
        alone = single(recipe="wanda", sparsity=0.75, format="packed", values=values).output
        assert records_of(folder) == records_of(alone)
        sizes[values] = cell["bytes"]["written"]
    assert sizes["int4"] < sizes["same"]


def records_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_permuted_cell_shares_no_dense_inputs(start, single, tmp_path):
    """A permuted block sums in another order: its dense outputs differ in the last digits."""
    permuted, plain = LIGHT_BEST | {"permute": True, "pattern": "2:4"}, LIGHT_BEST | {"name": "plain"}
    swept = start(recipe=[permuted, plain], sparsity=[0.5, 0.6])
    assert [cell["name"] for cell in swept.cells] == ["best-2to4", "plain-0.5", "plain-0.6"]
    for folder, options in [
        ("best-2to4", {"recipe": permuted}),
        ("plain-0.6", {"recipe": plain, "sparsity": 0.6}),
    ]:
        alone = single(**options)
        for name in WEIGHTS:
            made = tmp_path / "out/cells" / folder / name
            assert made.read_bytes() == (alone.output / name).read_bytes(), name


# What is shared


def test_the_dense_model_is_scored_and_calibration_made_once(start, monkeypatch):
    scored, made = counted(monkeypatch, sweeps, "score"), counted(monkeypatch, sweeping, "build_calibration")
    result = start()
    assert [args[2] for args in scored] == ["dense"] and len(made) == 1
    dense = result.record["dense"]["perplexity"]["builtin"]["value"]
    for cell in result.cells:
        record = json.loads((result.output / cell["folder"] / "llmprune.json").read_text())
        assert record["evaluation"]["perplexity"]["builtin"]["dense"] == dense
        assert record["totals"]["seconds"]["evaluate dense"] == 0


def test_the_dense_model_writes_its_texts_once(start, single, monkeypatch):
    opened = counted(monkeypatch, samples, "whole")
    swept = start(recipe="wanda", samples_text=2)
    assert len(opened) == 1 + len(swept.cells)
    alone = single(recipe="wanda", sparsity=0.5, samples_text=2)
    cell = json.loads((swept.output / "cells/wanda-0.5/llmprune.json").read_text())
    assert cell["samples"] == alone.record["samples"] and len(cell["samples"]["texts"]) == 2
    assert "What they write" in (swept.output / "cells/wanda-0.5/report.html").read_text()
    page = (swept.output / "report.html").read_text()
    shown = re.findall("<figcaption>(dense|wanda-0.[56])</figcaption>", page)
    assert shown == ["dense", "wanda-0.5", "wanda-0.6"] * 2
    written = len(opened)
    again = start(recipe="wanda", samples_text=2, resume=True)
    assert len(opened) == written and again.record["samples"] == swept.record["samples"]
    assert [set(text) for text in again.record["samples"]["texts"]] == [{"prompt", "dense"}] * 2


def test_where_the_dense_model_writes_none_the_cells_do_not_either(start, monkeypatch):
    monkeypatch.setattr(samples.devices, "free_memory", lambda device: 2**10)
    listening = Listening()
    swept = start(samples_text=1, reporter=listening)
    why = swept.record["samples"]["skipped"]
    assert [why in note for note in listening.told if "no texts in the report" in note] == [True]
    for cell in swept.cells:
        record = json.loads((swept.output / cell["folder"] / "llmprune.json").read_text())
        assert record["samples"] == {"skipped": why} and cell["texts"] == []
    assert f"No texts: {why}" in (swept.output / "report.html").read_text()


def dense_passes(monkeypatch, start, **options):
    """How many passes of the dense model each cell has taken for statistics and for block outputs."""
    passes, found = [], []
    real = observer.Observer._pass

    def one(stream, number, part, weights):
        passes.append(bool(weights))
        return real(stream, number, part, weights)

    monkeypatch.setattr(observer.Observer, "_pass", staticmethod(one))
    run_cell = sweeps.Sweep._run_cell

    def cell(self, *args):
        passes.clear()
        record = run_cell(self, *args)
        found.append(sum(passes))
        return record

    monkeypatch.setattr(sweeps.Sweep, "_run_cell", cell)
    start(recipe=LIGHT_BEST, sparsity=[0.5, 0.6, 0.7], **options)
    return found


def test_only_the_first_cell_passes_the_dense_model(monkeypatch, start):
    first, *others = dense_passes(monkeypatch, start)
    assert first > 0 and others == [0, 0]


def test_without_room_every_cell_passes_it(monkeypatch, start):
    monkeypatch.setattr(sweeps, "DenseInputs", lambda room, reserved: sharing.DenseInputs(0, reserved))
    first, *others = dense_passes(monkeypatch, start)
    assert first > 0 and others == [first, first]


def test_an_allocator_measures_the_dense_model_once(monkeypatch, start):
    measured = counted(monkeypatch, measuring, "Observer")
    start(recipe={"name": "owl", "pruner": "wanda", "allocator": "owl"}, sparsity=[0.5, 0.6])
    assert len(measured) == 1


def test_blocks_that_hand_on_more_than_hidden_states_are_not_kept():
    class Inputs:
        stateless, everything = False, torch.zeros(2, 3)

    kept = sharing.DenseInputs(10**9, 0)
    kept.keep_input((0, 0, 1, "q"), [("q", torch.ones(2))])
    assert kept.input((0, 0, 1, "q"))[0] == "q"
    kept.keep_outputs(0, Inputs())
    assert kept.outputs(0) is None and kept.input((0, 0, 1, "q")) is None


# Kills, interrupts and failures


def test_an_interrupted_sweep_goes_on_and_ends_with_the_same_tables(start, tmp_path, monkeypatch):
    whole = start(output=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopping(patch, after=14 + 7)  # one cell, and a block of the next
        with pytest.raises(KeyboardInterrupt) as raised:
            start()
    assert raised.value.kept == (
        f"1 of 4 cells are finished and kept in {tmp_path / 'out'}, and 1 of 2 blocks of wanda-0.6"
    )
    assert raised.value.resumable
    table = (tmp_path / "out" / "table.md").read_text()
    assert "not yet" in table and json.loads((tmp_path / "out/sweep.json").read_text())["finished"] is False
    with pytest.raises(ValueError, match="holds an unfinished sweep; continue it with --resume or throw"):
        start()
    scored = counted(monkeypatch, sweeps, "score")
    calls = stopping(monkeypatch, after=10**6)
    resumed = start(resume=True)
    assert not scored and len(calls) == 7 + 14 + 14  # neither the dense scores nor what was finished
    for name in TABLES:
        assert (resumed.output / name).read_bytes() == (whole.output / name).read_bytes()
    for cell in whole.cells:
        for name in WEIGHTS:
            parts = [r.output / cell["folder"] / name for r in (whole, resumed)]
            assert parts[0].read_bytes() == parts[1].read_bytes()
    assert not list((tmp_path / "out/cells").glob(".*"))


@pytest.mark.parametrize("moment", ["settle", "strip", "score"])
def test_a_kill_between_a_cell_and_its_entry_repeats_nothing(start, tmp_path, monkeypatch, moment):
    whole = start(output=tmp_path / "whole", keep="best")
    places = {
        "settle": (sweeps.Sweep, "_settle"),
        "strip": (sweep_folder.SweepFolder, "strip"),
        "score": (sweeps.CellRun, "_write_pages"),
    }
    place, name = places[moment]
    real, calls = getattr(place, name), []

    def killed(*args):
        calls.append(args)
        if len(calls) == {"settle": 3, "strip": 1, "score": 1}[moment]:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, killed)
        with pytest.raises(KeyboardInterrupt):
            start(keep="best")
    pruned = stopping(monkeypatch, after=10**6)
    resumed = start(keep="best", resume=True)
    assert len(pruned) == 14 * (1 if moment == "strip" else 3)
    for table in TABLES:
        assert (resumed.output / table).read_bytes() == (whole.output / table).read_bytes()
    assert contents_of_cells(resumed) == contents_of_cells(whole)


def contents_of_cells(result):
    return {cell["name"]: set(contents(result.output / cell["folder"])) for cell in result.cells}


def test_a_killed_process_loses_nothing(start, tmp_path, tiny_llama, calibration_tokens, forked):
    whole = start(output=tmp_path / "whole")
    from safetensors.torch import save_file

    save_file({"tokens": calibration_tokens}, tmp_path / "rows.safetensors")
    arguments = ["sweep", tiny_llama, "--recipe", "wanda,sparsegpt", "--sparsity", "0.5,0.6", "--limit", 2]
    arguments += ["--calibration", "rows.safetensors", "--perplexity", "builtin", "--output", "killed"]
    for cells in (1, 3):
        child = forked.start([*arguments, *(["--resume"] if cells > 1 else [])], tmp_path, {})
        until = time.monotonic() + 120
        while time.monotonic() < until and child.poll() is None and done(tmp_path / "killed") < cells:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    before = done(tmp_path / "killed")
    assert before >= 3
    result = start(output=tmp_path / "killed", calibration=str(tmp_path / "rows.safetensors"), resume=True)
    for name in TABLES:
        assert (result.output / name).read_bytes() == (whole.output / name).read_bytes()


def done(folder):
    try:
        cells = json.loads((folder / "sweep.json").read_text())["cells"]
    except OSError:
        return 0
    return sum(cell["status"] == "done" for cell in cells)


def test_a_cell_that_fails_is_named_and_the_others_go_on(start, tmp_path, monkeypatch):
    whole = start(output=tmp_path / "whole")
    with monkeypatch.context() as patch:
        error = lambda text: RuntimeError(f"no room in /home/me/secret/file.bin\n{text}")  # noqa: E731
        stopping(patch, 0, error, lambda args: args[2].pruner_name == "sparsegpt" and args[0].sparsity == 0.5)
        with pytest.warns(UserWarning, match="cell sparsegpt-0.5 failed: no room in /home/me"):
            result = start()
    assert result.failed == {"sparsegpt-0.5": "no room in file.bin"}
    assert [cell["status"] for cell in result.cells] == ["done", "done", "failed", "done"]
    written = b"".join(path.read_bytes() for path in result.output.glob("*.*"))
    assert b"no room in file.bin" in written and b"/home/me" not in written
    assert result.record["finished"] is False and "failed" in (result.output / "table.md").read_text()
    again = start(resume=True)
    assert again.failed == {} and again.record["finished"]
    assert (again.output / "table.csv").read_bytes() == (whole.output / "table.csv").read_bytes()


def test_a_grid_may_grow(start, tmp_path):
    start(sparsity=[0.5])
    grown = start(sparsity=[0.5, 0.6], resume=True)
    whole = start(output=tmp_path / "whole")
    assert (grown.output / "table.csv").read_bytes() == (whole.output / "table.csv").read_bytes()
    with pytest.raises(ValueError, match=r"is another one: its cell wanda-0.6 is not among these; .*--over"):
        start(sparsity=[0.5], resume=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"limit": 3}, "is another one: it is scored on other texts or tasks, or with another --limit"),
        ({"keep": "none"}, "is another one: keep was all and is none"),
        ({"format": "packed"}, "is another one: format was dense and is packed"),
        ({"overwrite": True}, "a finished sweep: resume keeps its cells and overwrite replaces them; give"),
        ({"samples": None, "calibration": "builtin", "seqlen": 32}, "its cell wanda-0.5 is not among these"),
    ],
)
def test_another_sweep_does_not_go_on_with_it(start, change, said):
    start(recipe="wanda", sparsity=0.5)
    with pytest.raises(ValueError, match=said):
        start(recipe="wanda", sparsity=0.5, resume=True, **change)


def test_a_cell_whose_weights_were_removed_is_made_again(start, tmp_path):
    first = start(recipe="wanda", sparsity=0.5)
    shutil.rmtree(tmp_path / "out/cells/wanda-0.5")
    again = start(recipe="wanda", sparsity=0.5, resume=True)
    assert (tmp_path / "out/cells/wanda-0.5/masks.safetensors").is_file()
    assert again.cells[0]["perplexity"] == first.cells[0]["perplexity"]


# What is kept, and what is never removed


def test_a_cell_that_has_lost_its_weights_alone_is_made_again(start, tmp_path):
    first = start(recipe="wanda", sparsity=[0.5])
    for file in (tmp_path / "out/cells/wanda-0.5").glob("*.safetensors*"):
        file.unlink()
    again = start(recipe="wanda", sparsity=[0.5], resume=True)
    assert not again.failed and (tmp_path / "out/cells/wanda-0.5/masks.safetensors").is_file()
    assert again.cells[0]["perplexity"] == first.cells[0]["perplexity"]


def test_a_beaten_cell_is_not_said_to_have_weights_when_the_best_is_lost(start, tmp_path, monkeypatch):
    first = start(sparsity=[0.5], keep="best")
    best = next(cell["name"] for cell in first.cells if cell["weights_kept"])
    shutil.rmtree(tmp_path / f"out/cells/{best}")
    stopping(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        start(sparsity=[0.5], keep="best", resume=True)
    monkeypatch.undo()
    stored = json.loads((tmp_path / "out/sweep.json").read_text())
    assert not any(cell["weights_kept"] for cell in stored["cells"])
    again = start(sparsity=[0.5], keep="best", resume=True)
    assert not again.failed and [c["weights_kept"] for c in again.cells] == [
        c["weights_kept"] for c in first.cells
    ]


def test_what_a_killed_move_or_strip_has_left_is_removed(start, tmp_path):
    result = start(recipe="wanda", sparsity=[0.5])
    folder = sweep_folder.SweepFolder(result.output, resume=True)
    (tmp_path / "out/cells/wanda-0.5").rename(tmp_path / "out/cells/.wanda-0.5.replaced")
    folder.remove("wanda-0.5")
    assert list((tmp_path / "out/cells").iterdir()) == []
    start(recipe="wanda", sparsity=[0.5], resume=True)
    (tmp_path / "out/cells/wanda-0.5/model.safetensors.index.json").unlink()
    folder.strip("wanda-0.5")  # noqa: B005
    assert not list((tmp_path / "out/cells/wanda-0.5").glob("*.safetensors"))


def test_a_sweep_that_replaces_another_may_be_thrown_away(start, tmp_path, monkeypatch):
    start(recipe="wanda", sparsity=[0.5])
    stopping(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        start(recipe="magnitude", sparsity=[0.5], overwrite=True)
    monkeypatch.undo()
    assert (tmp_path / "out/cells/wanda-0.5").is_dir()
    start(recipe="magnitude", sparsity=[0.6], restart=True)
    assert [path.name for path in (tmp_path / "out/cells").iterdir()] == ["magnitude-0.6"]


def test_a_sweep_that_went_on_meanwhile_is_not_continued_from_an_old_record(start, tmp_path):
    start(recipe="wanda", sparsity=[0.5])
    folder = sweep_folder.SweepFolder(tmp_path / "out", resume=True)
    start(recipe="wanda", sparsity=[0.5, 0.6], resume=True)
    with pytest.raises(ValueError, match=r"another sweep has gone on in .* meanwhile; give the same command"):
        folder.begin()
    folder.close()


def test_scores_alone_may_be_kept(start):
    result = start(keep="none")
    for cell in result.cells:
        files = {path.name for path in (result.output / cell["folder"]).iterdir()}
        assert {"llmprune.json", "report.html"} <= files
        assert files <= {"llmprune.json", "report.html", "report-matrices.png"}
        assert cell["weights_kept"] is False
    assert start(keep="none", resume=True).cells == result.cells  # nothing is run for want of weights


def test_the_best_of_every_row_may_be_kept(start):
    result = start(keep="best", pattern=["unstructured", "2:4"])
    kept = [cell["name"] for cell in result.cells if cell["weights_kept"]]
    ranked = {
        amount: min(
            (c for c in result.cells if c["amount"] == amount), key=lambda c: c["perplexity"]["builtin"]
        )["name"]
        for amount in ("0.5", "0.6", "2:4")
    }
    assert sorted(kept) == sorted(ranked.values())
    for cell in result.cells:
        whole = (result.output / cell["folder"] / "model.safetensors.index.json").is_file()
        assert whole is cell["weights_kept"]
    assert llmprune.inspect(result.output / "cells" / kept[0])["record_agrees"]


def test_files_of_others_stay(start, tmp_path):
    start(recipe="wanda", sparsity=[0.5])
    (tmp_path / "out/cells/wanda-0.5/notes.txt").write_text("mine")
    (tmp_path / "out/cells/other").mkdir()
    with pytest.raises(ValueError, match="holds 'cells/other', which no sweep has written"):
        start(recipe="magnitude", sparsity=[0.5], overwrite=True)
    (tmp_path / "out/cells/other").rmdir()
    start(recipe="magnitude", sparsity=[0.5], overwrite=True)
    assert [path.name for path in (tmp_path / "out/cells/wanda-0.5").iterdir()] == ["notes.txt"]
    assert (tmp_path / "out/cells/magnitude-0.5/masks.safetensors").is_file()


def test_an_old_sweep_stays_until_its_cells_are_replaced(start, tmp_path, monkeypatch):
    start(sparsity=[0.5])
    old = contents(tmp_path / "out/cells/wanda-0.5")
    with monkeypatch.context() as patch:
        stopping(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            start(recipe="wanda", sparsity=[0.5], settings={"seed": 1}, overwrite=True)
    assert contents(tmp_path / "out/cells/wanda-0.5") == old
    result = start(recipe="wanda", sparsity=[0.5], settings={"seed": 1}, resume=True)
    assert sorted(path.name for path in (tmp_path / "out/cells").iterdir()) == ["wanda-0.5"]
    assert json.loads((tmp_path / "out/cells/wanda-0.5/llmprune.json").read_text())["recipe"]["seed"] == 1
    assert "replaces" not in result.record


def test_an_unfinished_sweep_may_be_thrown_away(start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopping(patch, 14 + 7)
        with pytest.raises(KeyboardInterrupt):
            start()
    assert start(recipe="magnitude", sparsity=0.5, restart=True).record["finished"]
    assert [path.name for path in (tmp_path / "out/cells").iterdir()] == ["magnitude-0.5"]


@pytest.mark.parametrize("name", ["../../other", "/etc", ".hidden", "a/b", "", 5])
def test_a_record_cannot_name_folders_elsewhere(start, tmp_path, name):
    result = start(recipe="wanda", sparsity=0.5)
    result.record["cells"][0]["name"] = name
    (tmp_path / "out/sweep.json").write_text(json.dumps(result.record))
    with pytest.raises(ValueError, match=r"sweep.json is no record of a sweep that this version reads"):
        start(recipe="magnitude", sparsity=0.5, overwrite=True)


def test_what_is_wrong_is_refused_before_anything_is_written(start, tmp_path, monkeypatch, tiny_llama):
    for options, said in [
        ({"recipe": ["wanda", "wandaa"]}, "unknown recipe 'wandaa'"),
        ({"pattern": ["2:4", "3:7"]}, "cell .*3to7: .* not divisible by 7"),
        ({"keep": "some"}, "keep must be one of none, best, all, got 'some'"),
        ({"settings": {"pruner.dam": [1]}}, "dam"),
        ({"settings": {"calibration.source": ["c4"]}}, "both name the source"),
        ({"settings": {"seed": []}}, "settings 'seed' has no value"),
        ({"recipe": None}, "nothing to compare"),
        ({"output": tiny_llama}, "model"),
        ({"resume": True, "restart": True}, "give one of the two"),
        (
            {"recipe": "wanda", "settings": {"precision": ["float32"]}, "dtype": "bfloat16"},
            "computes in float32",
        ),
        (
            {"recipe": "wanda", "settings": {"precision": ["float32", "stored"]}, "dtype": "bfloat16"},
            "computes in float32",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            start(**options)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"the output needs .* make room"):
        start()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_folder_that_holds_no_sweep_is_refused(start, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}, {"restart": True}):
        with pytest.raises(ValueError, match="is not empty and holds no sweep; choose another with --output"):
            start(**options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_dry_run_writes_nothing_and_counts_what_is_left(start, tmp_path, monkeypatch):
    dry = start(dry_run=True)
    assert (
        dry.left == [cell.name for cell in dry.cells] and dry.seconds > 0 and not (tmp_path / "out").exists()
    )
    assert dry.plan.disk == sum(plan.disk for plan in dry.plan.plans.values())
    record = record_bytes(14)
    each = dry.plan.disk / 4 - record  # of the weights
    assert start(dry_run=True, keep="none").plan.disk == each + 5 * record
    assert start(dry_run=True, keep="best").plan.disk == 3 * each + 7 * record
    start(sparsity=[0.5])
    assert start(dry_run=True, resume=True).left == ["wanda-0.6", "sparsegpt-0.6"]
    assert "4 cells: wanda, sparsegpt" in repr(dry) and dry.summary()["cells"][0]["name"] == "wanda-0.5"


def test_seeds_and_samples_may_be_varied(start, tmp_path):
    result = start(
        recipe="wanda",
        sparsity=0.5,
        calibration="builtin",
        seqlen=32,
        settings={"calibration.samples": [4, 8]},
    )
    assert len({cell["calibration"] for cell in result.cells}) == 2
    assert [cell["recipe"]["calibration"]["samples"] for cell in result.cells] == [4, 8]


def test_nothing_written_names_a_local_folder(start, tmp_path, make_llama):
    result = start(model=make_llama(), recipe="wanda", sparsity=0.5)
    for name in ("sweep.json", "table.md", "table.csv", "report.html"):
        text = Path(result.output / name).read_text()
        assert str(tmp_path) not in text and str(make_llama().parent) not in text, name


def test_a_field_given_twice_is_refused(start, tmp_path, tiny_llama):
    for given in ({"sparsity": [0.5], "settings": {"sparsity": [0.6]}}, {"settings": {"seed": 1}, "seed": 2}):
        with pytest.raises(ValueError, match=r"is given twice: .* in settings \(--set\); give it once"):
            start(recipe="wanda", **given)
    with pytest.raises(ValueError, match=r"sparsity is given twice: 0\.5, and 0\.6 in settings"):
        llmprune.prune(tiny_llama, recipe="wanda", sparsity=0.5, settings={"sparsity": 0.6}, dry_run=True)


def test_a_sweep_and_a_cell_without_weights_are_no_models(start, tmp_path):
    start(recipe="wanda", sparsity=0.5, keep="none")
    with pytest.raises(ValueError, match=r"out is a sweep; name one of its cells: .*/out/cells/NAME"):
        llmprune.inspect(tmp_path / "out")
    for call in (llmprune.inspect, llmprune.evaluate, lambda path: llmprune.generate(path, "x")):
        with pytest.raises(ValueError, match="has a record and no weights: it is a cell of a sweep"):
            call(tmp_path / "out" / "cells" / "wanda-0.5")


def test_cells_with_rounded_values_rank_with_the_others(start):
    swept = start(recipe="magnitude", pattern="2:4", format="packed", settings={"values": ["same", "int4"]})
    (group,) = llmprune.compare([swept.output], output=None).record["scores"]
    assert group["best"] and {cell["sparsity_reached"] for cell in swept.cells} != {0.5}
