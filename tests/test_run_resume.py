"""Runs that end early: what they leave, how they go on, and who may write where."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from outputs import contents, old_output
from safetensors.torch import load_file, save_file

import llmprune
from llmprune.checkpoint import files
from llmprune.checkpoint.lock import Lock
from llmprune.checkpoint.masks import MaskFile
from llmprune.evaluation.scores import evaluation_spec
from llmprune.record import report
from llmprune.run import corridor as run


@pytest.fixture
def start(make_llama, calibration_tokens, tmp_path):
    """A run over four blocks into `out`."""

    def call(**more):
        options = {
            "recipe": "dsnot",
            "sparsity": 0.6,
            "calibration": calibration_tokens,
            "output": tmp_path / "out",
        } | more
        return llmprune.prune(options.pop("model", make_llama(layers=4)), **options)

    return call


@pytest.fixture
def unfinished(start, monkeypatch):
    """A run that stopped in its third block."""

    def stop(matrices=16, error=KeyboardInterrupt):
        calls = []

        def failing(target, *args):
            calls.append(target)
            if len(calls) > matrices:
                raise error("stopped")
            return real(target, *args)

        real = run.prune_matrix
        with monkeypatch.context() as patch:
            patch.setattr(run, "prune_matrix", failing)
            with pytest.raises(error) as raised:
                start()
        return raised.value

    return stop


def test_a_run_goes_on_where_it_stopped_and_ends_with_the_same_bytes(
    start, unfinished, tmp_path, monkeypatch
):
    assert unfinished().kept == "2 of 4 blocks are finished and kept"
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.lock"))
    pruned = []
    real = run.prune_matrix
    monkeypatch.setattr(
        run, "prune_matrix", lambda target, *args: (pruned.append(target.name), real(target, *args))[1]
    )
    start(resume=True)
    assert len(pruned) == 14 and all(
        name.startswith(("model.layers.2.", "model.layers.3.")) for name in pruned
    )
    resumed = contents(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    start(overwrite=True)
    assert contents(tmp_path / "out") == resumed


@pytest.mark.parametrize(
    "failure", [RuntimeError("broken"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("where", ["record", "masks", "last shard"])
def test_a_run_that_fails_late_keeps_the_old_output_and_its_work(
    start, tmp_path, monkeypatch, where, failure
):
    old = contents(old_output(tmp_path / "out"))
    place = {
        "record": (report, "write_durably"),
        "masks": (MaskFile, "write"),
        "last shard": (files, "save_tensors"),
    }[where]
    real, calls = getattr(*place), []

    def failing(*args):
        calls.append(args)
        if len(calls) > (2 if where == "masks" else 0):
            raise failure
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(*place, failing)
        if where == "last shard":
            patch.setattr(
                "llmprune.checkpoint.writer.save_tensors",
                lambda p, t: failing(p, t) if "00005-of" in p.name else real(p, t),
            )
        with pytest.raises(type(failure)) as raised:
            start(overwrite=True)
    assert re.fullmatch(r"[234] of 4 blocks are finished and kept", raised.value.kept)
    assert contents(tmp_path / "out") == old
    start(overwrite=True, resume=True)
    assert llmprune.inspect(tmp_path / "out")["record_agrees"] is True
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_run_is_not_thrown_away_unless_asked(start, unfinished, tmp_path):
    unfinished()
    with pytest.raises(
        ValueError,
        match=r"unfinished run into .*out holds 2 finished blocks; continue it with --resume or .*--restart",
    ):
        start()
    start(restart=True)
    assert llmprune.inspect(tmp_path / "out")["record_agrees"] is True


def test_a_run_that_finished_no_block_leaves_nothing_to_resume(start, unfinished, tmp_path):
    assert not hasattr(unfinished(matrices=1), "kept")
    assert list(tmp_path.iterdir()) == []
    start(resume=True)


def other_model(make_llama):
    return {"model": make_llama(layers=4, seed=1)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_model, "model was sha256:.* and is sha256:"),
        (lambda make: {"calibration": torch.ones(8, 32, dtype=torch.int64)}, "calibration was sha256:"),
        (lambda make: {"sparsity": 0.5}, r"recipe.sparsity was 0.6 and is 0.5"),
        (lambda make: {"settings": {"refiner.max_cycles": 7}}, "recipe.refiner.max_cycles was"),
        (lambda make: {"recipe": "wanda"}, "recipe.*was"),
        (lambda make: {"dtype": "bfloat16"}, "dtype was float32 and is bfloat16"),
    ],
    ids=["model", "calibration", "sparsity", "setting", "recipe", "dtype"],
)
def test_another_run_does_not_continue_it(start, unfinished, make_llama, tmp_path, change, named):
    unfinished()
    before = sorted(p.name for p in (tmp_path / ".out.partial").iterdir())
    with pytest.raises(ValueError, match=rf"unfinished run into .*out is another one: {named}.*--restart"):
        start(resume=True, **change(make_llama))
    assert sorted(p.name for p in (tmp_path / ".out.partial").iterdir()) == before
    start(resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"--sparsity": 0.5},
        {"--recipe": "wanda"},
        {"--seed": 3},
        {"--dtype": "bfloat16"},
        {"--calibration": "builtin"},
        "damage",
    ],
)
def test_a_refused_resume_does_not_offer_itself(
    unfinished, make_llama, calibration_tokens, tmp_path, typed, monkeypatch, change
):
    unfinished()
    monkeypatch.chdir(tmp_path)
    save_file({"tokens": calibration_tokens}, tmp_path / "tokens.safetensors")
    options = {
        "--recipe": "dsnot",
        "--sparsity": 0.6,
        "--calibration": "tokens.safetensors",
        "--output": "out",
    }
    if change == "damage":
        shard = tmp_path / ".out.partial" / "model-00001-of-00005.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        change = {}
    code, _, err = typed(
        "prune",
        make_llama(layers=4),
        *(x for pair in {**options, **change}.items() for x in pair),
        "--resume",
    )
    assert code == 1 and len(err.splitlines()) == 1, err
    assert "continue with" not in err and re.search(r"--restart$", err.strip()), err


def test_a_restart_that_cannot_begin_throws_nothing_away(start, unfinished, tmp_path):
    unfinished()
    before = contents(tmp_path / ".out.partial")
    with pytest.raises(ValueError, match="got samples 16"):
        start(restart=True, samples=16)
    assert contents(tmp_path / ".out.partial") == before
    (tmp_path / ".out.partial" / "journal.jsonl").write_bytes(b"\0damaged\n")
    start(restart=True)


def test_other_software_does_not_continue_it(start, unfinished, monkeypatch):
    unfinished()
    monkeypatch.setattr("llmprune.record.record.__version__", "99.0")
    with pytest.raises(ValueError, match=r"versions.llmprune was .* and is 99.0"):
        start(resume=True)


def test_a_finished_block_that_was_changed_is_noticed(start, unfinished, tmp_path):
    unfinished()
    shard = tmp_path / ".out.partial" / "model-00001-of-00005.safetensors"
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, shard)
    with pytest.raises(
        ValueError,
        match=r"model-00001-of-00005.safetensors was removed or changed since it was finished.*--restart",
    ):
        start(resume=True)


def test_a_line_torn_by_a_crash_is_work_not_done(start, unfinished, tmp_path):
    unfinished()
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    start(resume=True)
    resumed = contents(tmp_path / "out")
    start(overwrite=True)
    assert contents(tmp_path / "out") == resumed


def test_a_damaged_journal_is_refused_in_one_line(start, unfinished, tmp_path):
    unfinished()
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    journal.write_bytes(b"\x00" + journal.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"damaged.*--restart"):
        start(resume=True)


def test_resuming_a_finished_run_does_nothing_again(start, tmp_path, monkeypatch):
    first = start().record
    monkeypatch.setattr(run, "prune_blocks", lambda *args: pytest.fail("pruned again"))
    assert start(resume=True).record == first
    with pytest.raises(ValueError, match=r"holds another finished run: recipe.sparsity was 0.6 and is 0.5"):
        start(resume=True, sparsity=0.5)


def test_resume_and_restart_exclude_each_other(start):
    with pytest.raises(ValueError, match="one of the two"):
        start(resume=True, restart=True)


def test_scores_are_not_lost_either(start, tmp_path, monkeypatch):
    from llmprune.run import production as pipeline

    labels = []
    real = pipeline.score

    def scoring(model, spec, label, *args):
        labels.append(label)
        if labels.count("pruned") == 1 and label == "pruned":
            raise KeyboardInterrupt
        return real(model, spec, label, *args)

    monkeypatch.setattr(pipeline, "score", scoring)
    more = {"evaluation": evaluation_spec(["builtin"], [], window=32, limit=4)}
    with pytest.raises(KeyboardInterrupt) as raised:
        start(**more)
    assert raised.value.kept == f"{tmp_path / 'out'} is pruned and saved but not scored"
    record = start(resume=True, **more).record
    assert labels == ["dense", "pruned", "pruned"]
    assert set(record["evaluation"]["perplexity"]) == {"builtin"}
    assert json.loads((tmp_path / "out" / "llmprune.json").read_text()) == record
    assert not (tmp_path / "out" / "journal.jsonl").exists()


def test_the_second_of_two_runs_is_refused_and_says_who_holds_the_folder(start, tmp_path):
    held = Lock(tmp_path / ".out.lock", "x")
    with pytest.raises(
        ValueError,
        match=r"output .*out is being written by process \d+ on \S+ since \d{4}-.*another --output",
    ):
        start()
    held.release()
    start()


def test_a_lock_left_by_a_dead_process_does_not_hold(start, tmp_path):
    (tmp_path / ".out.lock").write_text('{"pid": 1, "host": "gone", "since": "yesterday"}')
    start()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_with_the_command_that_resumes(
    make_llama, calibration_tokens, tmp_path, forked, number
):
    save_file({"tokens": calibration_tokens}, tmp_path / "tokens.safetensors")
    model = make_llama(layers=40)
    command = [
        "prune",
        str(model),
        "--recipe",
        "sparsegpt",
        "--calibration",
        "tokens.safetensors",
        "--output",
        "my out",
    ]
    process = forked.start(command, tmp_path)
    journal = tmp_path / ".my out.partial" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    line = re.fullmatch(
        r"llmprune: interrupted; (\d+) of 40 blocks are finished and kept; continue with: (.*)\n", err
    )
    assert process.returncode == 130 and line and int(line[1]) >= 2, err
    words = shlex.split(line[2])
    assert words[0] == "llmprune" and words[-1] == "--resume"
    again = forked.start(words[1:], tmp_path)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert re.search(rf"{line[1]} of 40 blocks are finished; their outputs are computed again", out)
    assert llmprune.inspect(tmp_path / "my out")["record_agrees"] is True


@pytest.mark.parametrize(("kills", "errors"), [(6, 2), pytest.param(50, 15, marks=pytest.mark.exhaustive)])
def test_faults_at_random_moments_lose_nothing(kills, errors):
    """SIGKILL at seeded random moments, and write errors and full disks; `faults.py` says how."""
    script = Path(__file__).parent / "faults.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", str(kills), "--errors", str(errors)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    struck = [int(line.split()[0]) for line in done.stdout.splitlines() if "as in an undisturbed run" in line]
    assert len(struck) == 3 and struck[0] >= kills and min(struck) >= errors, done.stdout
