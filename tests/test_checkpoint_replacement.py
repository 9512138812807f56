"""What may be replaced or removed: nothing that a run of this program has not written, by whatever way it
came there.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from outputs import contents, old_output

import llmprune
from llmprune.checkpoint import placement, replacement, writer
from llmprune.evaluation.scores import evaluation_spec
from llmprune.run.reporter import Silent


@pytest.fixture
def prune(tiny_llama, calibration_tokens, tmp_path, monkeypatch):
    """Prune the tiny model in an empty folder of the test's own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(output="out", **options):
        return llmprune.prune(
            options.pop("model", tiny_llama),
            recipe="magnitude",
            calibration=calibration_tokens,
            output=output,
            **options,
        )

    return call


@pytest.fixture
def stopped(prune, monkeypatch):
    """A run into `out` that stopped after its first block."""
    real = writer.CheckpointWriter.block

    def block(self, number, *args):
        real(self, number, *args)
        self._wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.CheckpointWriter, "block", block)
        with pytest.raises(KeyboardInterrupt):
            prune()
    return Path(".out.partial")


def refused(call, said):
    before = contents_of_all()
    with pytest.raises(ValueError, match=said) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert contents_of_all() == before


def contents_of_all():
    """Every file and link below the working folder."""
    return {
        str(p): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(Path().rglob("*"))
    }


def test_a_journal_of_something_else_makes_no_output(prune):
    folder = Path("project")
    folder.mkdir()
    for name, text in {
        "journal.jsonl": '{"day": 1}\n',
        "main.py": "",
        "README.md": "",
        "LICENSE": "",
        "tokenizer.py": "",
    }.items():
        (folder / name).write_text(text)
    refused(lambda: prune("project", overwrite=True), "holds '.*' and .*, which llmprune has not written")
    (folder / "journal.jsonl").write_text('{"identity": {"name": "me"}}\n')
    refused(lambda: prune("project", overwrite=True), "which llmprune has not written")


def test_files_of_the_same_name_and_another_size_are_not_ours(prune):
    prune()
    (Path("out") / "tokenizer.json").write_text("my own")
    refused(lambda: prune(overwrite=True), "holds 'tokenizer.json', which llmprune has not written")


@pytest.mark.parametrize(
    "record",
    [
        '{"totals": {}, "matrices": 0}',
        '{"schema": 1, "totals": {"files": ["model.safetensors"]}, "matrices": []}',
    ],
)
def test_a_record_that_proves_nothing_opens_no_folder(prune, tiny_llama, record):
    shutil.copytree(tiny_llama, "out")
    (Path("out") / "llmprune.json").write_text(record)
    refused(lambda: prune(overwrite=True), "which llmprune has not written")


@pytest.mark.parametrize("name", [".o.partial", ".o.replaced", ".o.lock", "sub/.o.partial"])
def test_names_of_unfinished_runs_are_no_outputs(prune, name):
    refused(lambda: prune(name), "belong to unfinished runs; choose another --output")


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"restart": True}, {"resume": True}])
@pytest.mark.parametrize("kind", ["partial", "replaced"])
def test_a_finished_output_beside_it_is_not_taken_for_a_left_over(prune, kind, flags):
    prune("other")
    os.rename("other", f".out.{kind}")
    refused(
        lambda: prune(**flags),
        rf"\.out\.{kind} (holds .*which llmprune has not written|is of no run into out)",
    )


def test_a_model_whose_files_are_links_is_not_replaced_where_they_lie(prune, tiny_llama):
    prune("source")
    Path("farm").mkdir()
    for path in sorted(Path("source").iterdir()):
        (Path("farm") / path.name).symlink_to(path.resolve())
    refused(lambda: prune("source", model="farm", overwrite=True), "holds the model, which is never replaced")


@pytest.mark.parametrize(
    "name", ["masks.safetensors", "config.json.tmp", "model-00002-of-00003.safetensors.tmp", "journal.jsonl"]
)
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("flags", [{"resume": True}, {"restart": True}, {}])
def test_nothing_is_written_through_a_link(stopped, prune, name, link, flags):
    mine = Path("mine.txt").resolve()
    mine.write_bytes((stopped / name).read_bytes() if (stopped / name).is_file() else b"years of work")
    (stopped / name).unlink(missing_ok=True)
    link(mine, stopped / name)
    refused(lambda: prune(**flags), "which llmprune has not written")


@pytest.mark.parametrize("what", ["symbolic link", "folder", "pipe"])
def test_what_is_no_plain_file_is_not_ours(prune, what):
    old_output(Path("out"))
    place = Path("out") / "config.json"
    {
        "symbolic link": lambda: place.symlink_to("/etc/hostname"),
        "folder": place.mkdir,
        "pipe": lambda: os.mkfifo(place),
    }[what]()
    refused(lambda: prune(overwrite=True), "holds 'config.json', which llmprune has not written")


def test_a_pipe_in_place_of_the_record_is_refused_and_not_waited_for(prune):
    Path("out").mkdir()
    os.mkfifo("out/llmprune.json")
    refused(lambda: prune(overwrite=True), "holds 'llmprune.json', which llmprune has not written")


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"restart": True}])
def test_a_pipe_in_place_of_the_journal_is_refused_and_not_waited_for(stopped, prune, flags):
    (stopped / "journal.jsonl").unlink()
    os.mkfifo(stopped / "journal.jsonl")
    refused(lambda: prune(**flags), "which llmprune has not written")


def test_a_link_that_appears_during_the_run_is_not_followed(prune, monkeypatch):
    old_output(Path("out"))
    prune("other")
    before = contents(Path("other"))
    real = writer.CheckpointWriter.finish

    def finish(self):
        Path(".out.replaced").symlink_to(Path("other").resolve(), target_is_directory=True)
        real(self)

    monkeypatch.setattr(writer.CheckpointWriter, "finish", finish)
    with pytest.raises(
        RuntimeError, match=r"cannot be moved.*\.out\.replaced was put there meanwhile.*it lies whole in"
    ):
        prune(overwrite=True)
    assert contents(Path("other")) == before
    with pytest.raises(ValueError, match="is a link and no folder"):
        replacement.remove(Path(".out.replaced"))


def evaluation(limit):
    return evaluation_spec(["builtin"], [], window=32, limit=limit)


def test_a_card_that_was_edited_by_hand_stays(prune):
    prune(evaluation=evaluation(2))
    card = Path("out/README.md")
    card.write_text(card.read_text() + "my own words\n")
    edited = card.read_text()
    prune(evaluation=evaluation(2), resume=True)
    prune(resume=True)
    assert card.read_text() == edited
    told = []

    class Listening(Silent):
        def note(self, text):
            told.append(text)

    spec = evaluation_spec(["builtin", "other.txt"], [], window=32, limit=2)
    Path("other.txt").write_text("plain words " * 400)
    prune(evaluation=spec, resume=True, reporter=Listening())
    assert card.read_text() == edited and any("edited by hand" in text for text in told)
    assert set(json.loads(Path("out/llmprune.json").read_text())["evaluation"]["perplexity"]) == {
        "builtin",
        "other.txt",
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("n" * 246, r"output name 'n+.* is too long"),
        ("n" * 300, r"output name 'n+.* is too long"),
        (os.fsdecode(b"\xff"), "is not UTF-8"),
    ],
)
def test_a_name_that_cannot_be_finished_under_is_refused_at_once(prune, name, said):
    refused(lambda: prune(name), said)


def test_a_tilde_is_the_home(prune, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    prune("~/out")
    assert (tmp_path / "home" / "out" / "llmprune.json").is_file() and not Path("~").exists()


@pytest.mark.parametrize(
    "make",
    [lambda p: p.write_bytes(b"\xff\xfe"), lambda p: p.mkdir(), os.mkfifo, lambda p: p.symlink_to("mine")],
)
def test_a_lock_that_is_none_is_one_line(prune, make):
    Path("mine").touch()
    make(Path(".out.lock"))
    refused(prune, r"\.out\.lock is no lock of llmprune")


def killed_while_moving(prune, monkeypatch, renames, **options):
    """A run that replaces `out` and dies after so many renames of folders."""
    real, done = os.replace, []

    def replace(source, target):
        if Path(source).is_dir():
            if len(done) == renames:
                raise SystemExit("killed")
            done.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(placement.os, "replace", replace)
        with pytest.raises(SystemExit):
            prune(overwrite=True, **options)


@pytest.mark.parametrize(
    "flags", [{"resume": True, "overwrite": True}, {"resume": True}, {"restart": True, "overwrite": True}]
)
def test_a_run_that_died_between_its_renames_goes_on(prune, monkeypatch, flags):
    prune(sparsity=0.3)
    killed_while_moving(prune, monkeypatch, 1, sparsity=0.6)
    assert not Path("out").exists() and Path(".out.replaced").is_dir()
    assert prune(sparsity=0.6, **flags).record["recipe"]["sparsity"] == 0.6
    assert sorted(p.name for p in Path().iterdir()) == ["out"]


def test_an_old_output_that_was_moved_away_is_put_back_where_it_may_not_be_replaced(prune, monkeypatch):
    prune(sparsity=0.3)
    killed_while_moving(prune, monkeypatch, 1, sparsity=0.6)
    with pytest.raises(ValueError, match="not empty"):
        prune(sparsity=0.7, restart=True)
    assert json.loads(Path("out/llmprune.json").read_text())["recipe"]["sparsity"] == 0.3
    assert not Path(".out.replaced").exists()


@pytest.mark.parametrize("moment", ["moved", "completed", "printed"])
def test_an_interrupt_says_what_the_disk_holds(tiny_llama, tmp_path, typed, monkeypatch, moment):
    from llmprune.terminal import screen

    monkeypatch.chdir(tmp_path)

    def struck(*args):
        raise KeyboardInterrupt

    def after(cls, name):
        real = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, *args: (real(self, *args), struck()))

    if moment == "moved":
        after(writer.CheckpointWriter, "finish")
    elif moment == "completed":
        after(writer.CheckpointWriter, "complete")
    else:
        monkeypatch.setattr(screen, "print_result", struck)
    options = ("--recipe", "magnitude", "--samples", 2, "--seqlen", 16, "--output", "out")
    code, _, err = typed("prune", tiny_llama, *options)
    assert code == 130
    state = "pruned and saved; continue with: .* --resume" if moment == "moved" else "finished"
    assert err.startswith("llmprune: interrupted; out is ") and len(err.splitlines()) == 1
    assert err.rstrip().partition("out is ")[2].startswith(state.partition(";")[0]), err
    assert ("--resume" in err) == (moment == "moved")
    assert llmprune.inspect("out")["record_agrees"]


def test_a_signal_that_is_swallowed_ends_the_run_at_its_next_step(tiny_llama, tmp_path, typed, monkeypatch):
    from llmprune.run import corridor as run

    monkeypatch.chdir(tmp_path)
    real, struck = run.prune_matrix, []

    def matrix(*args):
        if not struck:
            struck.append(1)
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:  # as a finalizer would
                pass
        return real(*args)

    monkeypatch.setattr(run, "prune_matrix", matrix)
    code, _, err = typed(
        "prune", tiny_llama, "--recipe", "magnitude", "--samples", 2, "--seqlen", 16, "--output", "out"
    )
    assert code == 130 and "1 of 2 blocks are finished and kept; continue with" in err
    assert not Path("out").exists()


def test_a_companion_that_appears_is_told(prune, tiny_llama, tmp_path, monkeypatch):
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    told = []

    class Listening(Silent):
        def note(self, text):
            told.append(text)

    real = writer.CheckpointWriter.rest
    monkeypatch.setattr(
        writer.CheckpointWriter,
        "rest",
        lambda self, source: (real(self, source), (model / "chat_template.jinja").touch()),
    )
    prune(model=model, reporter=Listening())
    assert (
        any("chat_template.jinja appeared" in text for text in told)
        and not Path("out/chat_template.jinja").exists()
    )


def test_every_output_may_be_replaced_by_another(prune):
    """The rule is one of names and sizes, so it must hold for everything that a run writes."""
    assert replacement.foreign_entries(prune().output) == []
    loaded = llmprune.load("out")
    for _ in range(2):  # a model in memory writes its config by itself
        assert replacement.foreign_entries(prune("again", model=loaded, overwrite=True).output) == []
    prune(overwrite=True, evaluation=evaluation(2))
    assert replacement.foreign_entries(Path("out")) == []
