"""What people read: tables at any width, the plan's remarks, the result, progress in words."""

import json
import re

import pytest
from outputs import Listening

import llmprune
from llmprune.hub.download import demo_folder
from llmprune.planning import advice, choice
from llmprune.recipe import loading as recipes
from llmprune.record import figures as words
from llmprune.run import progress
from llmprune.terminal import layout

SMALL = ("--samples", 4, "--seqlen", 32)

ROWS = [
    ("perplexity builtin", "15.53", "20.81", "+34.0%", "683 windows of 256 tokens, lower is better"),
    ("demo_continuation acc_norm", "0.575", "0.555", "-0.020", "200 documents, higher is better"),
]

HEAD = ("", "dense", "pruned", "change", "")


def test_a_wide_table_has_columns_and_notes_beside():
    lines = layout.table(ROWS, 120, HEAD)
    assert len(lines) == 3 and lines[0].split() == ["dense", "pruned", "change"]
    assert lines[1].index("15.53") == lines[2].index("0.575") == lines[0].index("dense")
    assert lines[1].endswith("lower is better")


def test_a_note_without_room_stands_below_its_row():
    lines = layout.table(ROWS, 70, HEAD)
    assert lines[2] == "  683 windows of 256 tokens, lower is better"


def test_a_narrow_table_names_its_cells():
    assert layout.table(ROWS, 40, HEAD)[:4] == [
        "perplexity builtin",
        "  dense 15.53, pruned 20.81, change",
        "  +34.0%",
        "  683 windows of 256 tokens, lower is",
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 140])
def test_no_line_is_wider_than_the_screen_and_no_note_a_sliver(width):
    lines = layout.table(ROWS, width, HEAD)
    assert all(len(line) <= max(width, len("demo_continuation acc_norm")) for line in lines)
    assert "windows of" in "\n".join(lines)


def test_words_longer_than_a_line_stay_whole():
    path = "/a/very/long/path/to/a/folder/that/someone/wants/to/copy"
    assert layout.folded(f"it is in {path}", 20) == ["it is in", path]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_every_screen_fits_its_width(width, typed, finished, monkeypatch, tiny_llama):
    monkeypatch.setenv("COLUMNS", str(width))
    commands = [
        ("inspect", finished.output),
        ("recipes",),
        ("methods",),
        ("models",),
        ("published",),
        ("published", "llama-2-7b"),
        ("prune", tiny_llama, *SMALL, "--dry-run"),
    ]
    for command in commands:
        out = typed(*command)[1]
        for line in out.splitlines():
            assert len(line) <= width or " " not in line.strip(), (command[0], line)


def test_a_pipe_is_not_folded(typed, finished, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    out = typed("inspect", finished.output)[1]
    assert re.search(r"^overall .*; .*; the record agrees$", out, re.M)


def entry(dense, pruned, stderr, documents=200):
    task = {
        "acc": {"dense": dense, "pruned": pruned, "stderr": stderr},
        "protocol": {"documents": documents, "shots": 0, "version": 1},
    }
    return words.score_rows({"evaluation": {"perplexity": {}, "tasks": {"t": task}}})[0]


@pytest.mark.parametrize(
    ("row", "change"),
    [
        (entry(0.400, 0.450, 0.114, 20), "+0.050, within its error"),
        (entry(0.575, 0.555, 0.035), "-0.020, within its error"),
        (entry(0.575, 0.400, 0.035), "-0.175"),
        (entry(0.5, 0.5, 0.035), "+0.000"),
        (entry(0.25, 0.0, 0.0, 4), "-0.250, within its error"),
        (entry(0.575, 0.555, None), "-0.020"),
        (entry(0.5, 0.49, 0.001, 13_400), "-0.010"),
    ],
)
def test_a_difference_within_its_error_is_called_so(row, change):
    assert row.change == change


def test_perplexity_changes_are_relative():
    text = {"text": {"dense": 15.53, "pruned": 20.81, "protocol": {"windows": 2, "window": 8}}}
    row = words.score_rows({"evaluation": {"perplexity": text, "tasks": {}}})[0]
    assert (row.change, row.error) == ("+34.0%", "")


def test_the_result_says_what_to_do_next(typed, tiny_llama):
    out = typed("prune", tiny_llama, *SMALL, "--recipe", "wanda", "--output", "a b")[1]
    for said in (
        "llmprune inspect 'a b'",
        "llmprune eval 'a b' --perplexity FILE",
        "llmprune push 'a b' YOUR-NAME/",
        'from_pretrained("a b"',
    ):
        assert said in out, said
    assert "of all" in out and "parameters" in out
    assert "compare" not in out


def plan_of(typed, *args):
    code, out, err = typed("run", *args, *SMALL, "--limit", 1, "--dry-run")
    assert (code, err) == (0, "")
    return " ".join(out.partition("Matrices")[0].split())


@pytest.mark.parametrize(("values", "packed"), [("same", 0), ("int4", 14)])
def test_a_conversion_says_to_measure_only_what_can_be_measured(typed, tiny_llama, values, packed):
    code, out, err = typed("convert", tiny_llama, "--to", "packed", "--values", values, "--output", "out")
    assert code == 0, err
    assert re.search(rf"matrices +{packed} packed, {14 - packed} stay dense", out)
    assert "llmprune eval out" in out and ("llmprune bench out" in out) == (packed > 0)


def test_built_in_text_for_a_model_that_is_not_the_demo_is_told(typed, tiny_llama, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("Plain English text of some length, long enough for a few rows of tokens. " * 60)
    told = plan_of(typed, tiny_llama)
    assert "is calibrated and scored on program source" in told
    assert (
        "--calibration FILE_OR_SOURCE and --perplexity FILE" in told
        and "c4" in told
        and "needs network" in told
    )
    calibrated = plan_of(typed, tiny_llama, "--perplexity", text)
    assert "is calibrated on program source" in calibrated and "--perplexity FILE" not in calibrated
    scored = plan_of(typed, tiny_llama, "--calibration", text)
    assert "is scored on program source" in scored and "c4" not in scored
    assert "program source" not in plan_of(typed, tiny_llama, "--calibration", text, "--perplexity", text)
    assert "program source" not in plan_of(
        typed, tiny_llama, "--calibration", "builtin", "--perplexity", "builtin"
    ), "asked for by name"
    assert "program source" not in plan_of(typed, "demo")
    summary = json.loads(typed("run", tiny_llama, *SMALL, "--limit", 1, "--dry-run", "--json")[1])
    assert "program source" in summary["remarks"][0]


def test_eval_tells_it_too_but_not_of_what_was_made_of_the_demo(typed, tiny_llama):
    assert "is scored on program source" in typed("eval", tiny_llama, "--limit", 1)[1]
    assert typed("prune", "demo", *SMALL, "--recipe", "magnitude", "--output", "out")[0] == 0
    assert "program source" not in typed("eval", "out", "--limit", 1)[1]


def test_a_tokenizer_that_was_not_made_for_source_is_told(shared, typed):
    told = plan_of(typed, shared / "models" / "english-8m")
    assert re.search(r"tokenizer makes 0\.4\d tokens per byte of that text and 0\.2\d of plain English", told)
    from transformers import AutoTokenizer

    made_for_source = AutoTokenizer.from_pretrained(demo_folder())
    assert advice._on_tokenizer(made_for_source) == ()


def test_a_named_pruner_says_where_the_refiner_comes_from(typed, tiny_llama):
    said = "refiner dsnot comes from recipe dsnot"
    told = plan_of(typed, tiny_llama, "--pruner", "sparsegpt")
    assert said in told and "--refiner none leaves it out" in told
    for options in (
        ("--pruner", "sparsegpt", "--refiner", "none"),
        ("--pruner", "sparsegpt", "--recipe", "dsnot"),
        ("--sparsity", 0.6),
    ):
        assert said not in plan_of(typed, tiny_llama, *options), options
    assert choice.inherited({"pruner": "sparsegpt"}, recipes.load("dsnot", {"pruner": "sparsegpt"}))


class Notes(list):
    def step(self):
        pass

    def note(self, text):
        self.append(text)


def told(seconds, blocks, monkeypatch, limit=None, recipe="best"):
    """What is said of blocks that take so many seconds each."""
    now, notes = [0.0], Notes()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    steps = progress.Progress(notes, blocks, 0, limit, recipe)
    for number, took in enumerate(seconds, 1):
        now[0] += took
        steps.block(number)
    return notes


def test_the_estimate_is_told_once_where_it_holds(monkeypatch):
    assert told([10] * 8, 8, monkeypatch) == ["block 1 done after 10.0 s; about 1 min 10 s for the other 7"]


def test_the_estimate_is_renewed_where_it_changes_much_but_not_for_ever(monkeypatch):
    notes = told([10, 10, 40, 40, 40, 40], 20, monkeypatch)
    assert (
        len(notes) == 2
        and notes[1] == "block 4 done after 1 min 40 s; now about 10 min 40 s for the other 16"
    )
    assert len(told([1, 100] * 20, 40, monkeypatch)) <= 4


def test_a_time_limit_that_will_not_hold_is_told_once(monkeypatch):
    notes = told([100] * 8, 8, monkeypatch, limit=600)
    assert len(notes) == 2 and notes[1].startswith(
        "pruning will take about 13 min 20 s, more than the time limit of 10 min 0 s"
    )
    assert all(
        said in notes[1]
        for said in ("Ctrl-C keeps", "--resume", "--recipe dsnot", "--samples", "--time-limit")
    )
    assert "--recipe dsnot" not in told([100] * 8, 8, monkeypatch, limit=600, recipe="dsnot")[1]
    assert len(told([100] * 8, 8, monkeypatch, limit=900)) == 1


def test_the_time_limit_reaches_the_run(tiny_llama, tmp_path, calibration_tokens):
    listening = Listening()
    options = {"calibration": calibration_tokens, "output": tmp_path / "out", "reporter": listening}
    llmprune.prune(tiny_llama, recipe="wanda", time_limit=1e-9, **options)
    assert any("more than the time limit" in text for text in listening.told)


def test_a_metric_that_only_one_model_has_is_shown_as_such():
    from llmprune.evaluation.scores import Scores
    from llmprune.record.figures import score_rows
    from llmprune.record.record import add_scores

    protocol = {"documents": 4, "shots": 0, "version": 1, "higher_is_better": {}}
    dense = Scores({}, {"t": {"acc": {"value": 0.5, "stderr": 0.1}, "protocol": protocol}}, 1.0)
    pruned = Scores({}, {"t": {"f1": {"value": 0.25, "stderr": None}, "protocol": protocol}}, 1.0)
    record = add_scores(
        {"totals": {"seconds": {"total": 1.0}}, "evaluation": {"perplexity": {}, "tasks": {}}}, dense, pruned
    )
    assert [(r.name, r.dense, r.pruned, r.change) for r in score_rows(record)] == [
        ("t acc", "0.500", "none", "not comparable"),
        ("t f1", "none", "0.250", "not comparable"),
    ]
