"""What cannot be scored is refused in one line, before any work."""

from __future__ import annotations

import json
import math

import pytest
import yaml
from damage import spoilt
from outputs import one_line

import llmprune
from llmprune.evaluation import scores
from llmprune.run import corridor as run


def test_an_unknown_suite_is_answered_with_the_nearest(refused):
    refused(r"suite 'papr'.*did you mean 'paper'", call=llmprune.run_model, suite="papr")


def test_an_unknown_task_is_answered_with_the_nearest(refused):
    refused(r"task 'boolqq'.*did you mean 'boolq'", call=llmprune.run_model, tasks=["boolqq"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 0}, r"limit must be at least 1, got 0"),
        ({"eval_seqlen": 1}, r"window must be at least 2 tokens, got 1"),
        (
            {"eval_seqlen": 65, "perplexity": ["builtin"]},
            r"window 65 is over the model's limit of 64; use --eval-seqlen 64",
        ),
        ({"perplexity": ["wikitxt2"]}, r"text source 'wikitxt2'.*did you mean 'wikitext2'"),
        ({"perplexity": ["fineweb-edu"]}, r"'fineweb-edu' has no evaluation split; use wikitext2"),
        ({"perplexity": ["none.txt"]}, r"no such text file: none\.txt"),
        (
            {"tasks": ["demo_continuation"], "include_tasks": "nowhere"},
            r"--include-tasks nowhere is not a folder",
        ),
        ({"tasks": ["rte_local"], "task_data": "nowhere"}, r"--task-data nowhere is not a folder"),
        ({"tasks": ["rte_local"]}, r"rte_local.*--task-data DIR"),
        ({"suite": "none.yaml"}, r"none\.yaml"),
    ],
)
def test_evaluation_values_are_checked_before_work(refused, monkeypatch, options, said):
    monkeypatch.setattr(run, "prune_blocks", lambda *args: pytest.fail("work began"))
    refused(said, call=llmprune.run_model, **options)


def test_evaluation_text_shorter_than_a_window_is_refused(refused, work):
    (work / "short.txt").write_text("Only this.")
    refused(
        r"short\.txt has \d+ tokens, less than one window of 64.*--eval-seqlen",
        call=llmprune.run_model,
        perplexity=["short.txt"],
    )


def test_evaluation_text_that_is_empty_is_refused(refused, work):
    (work / "empty.txt").write_text("  \n")
    refused(r"empty\.txt holds no text", call=llmprune.run_model, perplexity=["empty.txt"])


def test_two_texts_of_the_same_file_name_are_not_mixed_up(tiny_llama, work):
    for folder in ("one", "two"):
        (work / folder).mkdir()
        (work / folder / "text.txt").write_text(f"the text of folder {folder}, " * 200)
    paths = ["one/text.txt", "two/text.txt"]
    try:
        found = llmprune.evaluate(tiny_llama, perplexity=paths, limit=1)["perplexity"]
    except ValueError as error:
        assert "text.txt" in one_line(error)
    else:
        assert len(found) == 2


def test_a_perplexity_beyond_all_numbers_is_no_crash_and_strict_json(typed, tiny_llama, monkeypatch):
    from llmprune.evaluation import perplexity

    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    for losses in ([1e4], [math.nan]):
        monkeypatch.setattr(perplexity, "_window_losses", lambda *args, losses=losses: losses)
        code, out, err = typed(
            "eval", tiny_llama, "--perplexity", "builtin", "--limit", 1, "--json", "--quiet"
        )
        assert (code == 0 and json.loads(out, parse_constant=constant)) or (
            code == 1 and len(err.splitlines()) == 1
        )


def test_a_suite_with_an_unknown_key_or_a_bare_name_is_refused(work):
    (work / "one.yaml").write_text("perplexityy: [builtin]")
    (work / "two.yaml").write_text("tasks: boolq")
    with pytest.raises(ValueError, match=r"suite key 'perplexityy'.*did you mean 'perplexity'"):
        scores.read_suite("one.yaml")
    with pytest.raises(ValueError, match=r"tasks must be a list of names, got 'boolq'"):
        scores.read_suite("two.yaml")


@pytest.mark.parametrize("limit", ["0", "many", "true", "1.5"])
def test_a_suite_with_a_bad_limit_is_refused(work, limit):
    (work / "suite.yaml").write_text(f"perplexity: [builtin]\nlimit: {limit}")
    with pytest.raises(ValueError, match=r"limit must be an integer of at least 1, got"):
        scores.read_suite("suite.yaml")


def test_a_limit_of_the_user_comes_before_that_of_the_suite(work):
    (work / "suite.yaml").write_text("perplexity: [builtin]\nlimit: 3")
    assert scores.evaluation_spec([], [], "suite.yaml").limit == 3
    assert scores.evaluation_spec([], [], "suite.yaml", limit=5).limit == 5
    assert scores.evaluation_spec(["builtin"], []).limit is None


def test_a_task_without_network_is_refused_with_a_way_out(refused, work, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/questions' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    (work / "tasks").mkdir()
    task = {
        "task": "questions",
        "dataset_path": "owner/questions",
        "output_type": "multiple_choice",
        "test_split": "test",
    }
    (work / "tasks" / "questions.yaml").write_text(
        yaml.dump({**task, "doc_to_text": "a", "doc_to_choice": ["b", "c"], "doc_to_target": 0})
    )
    said = r"questions.*owner/questions.*without network.*(demo|local|builtin)"
    refused(said, call=llmprune.run_model, tasks=["questions"], include_tasks="tasks")


def test_scoring_names_the_block_that_is_not_finite_too(llama_copy):
    spoilt(llama_copy, "weights")
    with pytest.raises(
        ValueError,
        match=r"block 2 of 2 \(model\.layers\.1\) put out the first NaN or Inf, in float32; most likely",
    ):
        llmprune.evaluate(llama_copy, perplexity=["builtin"], limit=2)
