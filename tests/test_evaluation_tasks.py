"""Tasks: every number lm-eval gives is told, a task that gives none is refused, and task files run no Python
unless asked for.
"""

import json
import math
from pathlib import Path

import pytest
import yaml

import llmprune
from llmprune.evaluation import zeroshot
from llmprune.evaluation.taskfiles import check_tasks
from llmprune.evaluation.zeroshot import load_tasks

CAPITALS = {
    "task": "capitals",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1},
}
QUESTIONS = [
    {
        "question": f"The capital of {land} is",
        "choices": ["Paris", "Rome", "Oslo"],
        "answer": n,
        "name": ["Paris", "Rome", "Oslo"][n],
    }
    for n, land in enumerate(("France", "Italy", "Norway"))
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """`tasks(name, **changes)`: a task file of that name; its folder."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "capitals.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    # Local modules of task files are cached by lm-eval under their path: each test has its own.
    (folder / "marker.py").write_text(
        f"open({str(tmp_path / 'it-ran')!r}, 'w').close()\n\n\ndef run(*args, **options):\n    return "
        "args[0]\n"
    )

    def make(name="capitals", raw="", **changes):
        values = {
            **CAPITALS,
            "task": name,
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "capitals.jsonl")}},
            **changes,
        }
        written = yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False)
        (folder / f"{name}.yaml").write_text(written + raw)
        return folder

    return make


def ran(tmp_path):
    return (tmp_path / "it-ran").exists()


def score(model, folder, *names, **options):
    return llmprune.evaluate(model, tasks=names or ["capitals"], include_tasks=folder, **options)["tasks"]


def metric(name, better=True, **more):
    return {"metric": name, "aggregation": "mean", "higher_is_better": better, **more}


# Scores


def test_every_number_is_told(tasks, tiny_llama):
    names = ["brier_score", "acc_bytes", "acc_norm", "acc"]
    listed = [metric(n) if n.startswith("acc") else {"metric": n} for n in names]
    found = score(tiny_llama, tasks(metric_list=listed))["capitals"]
    assert list(found) == ["acc", "acc_norm", "acc_bytes", "brier_score", "protocol"], (
        "known names first, then lm-eval's order"
    )
    assert all(
        isinstance(e["value"], float) and math.isfinite(e["value"])
        for n, e in found.items()
        if n != "protocol"
    )
    assert found["protocol"]["higher_is_better"] == dict.fromkeys(names, True) | {"brier_score": False}


def test_nothing_but_the_summary_stands_on_stdout(tasks, typed, tiny_llama, monkeypatch):
    monkeypatch.setattr("multiprocessing.Pool", lambda *args: pytest.fail("forked processes may hang"))
    options = {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "name"}
    folder = tasks(
        metric_list=[{"metric": "perplexity"}], **options
    )  # lm-eval prints while it estimates its error
    code, out, err = typed(
        "eval", tiny_llama, "--tasks", "capitals", "--include-tasks", folder, "--json", "--quiet"
    )
    assert (
        code == 0 and list(json.loads(out)["tasks"]["capitals"]) == ["perplexity", "protocol"] and err == ""
    )


def test_other_filters_stand_in_the_name(tasks, tiny_llama):
    filters = [
        {"name": "none", "filter": [{"function": "take_first"}]},
        {
            "name": "first word",
            "filter": [{"function": "regex", "regex_pattern": r"(\\w+)"}, {"function": "take_first"}],
        },
    ]
    folder = tasks(
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="name",
        metric_list=[metric("exact_match")],
        filter_list=filters,
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
    )
    found = score(tiny_llama, folder)["capitals"]
    assert list(found) == ["exact_match", "exact_match,first word", "protocol"]
    assert found["protocol"]["higher_is_better"] == {"exact_match": True, "exact_match,first word": True}


def test_where_lower_is_better_it_is_said(tasks, typed, tiny_llama, tmp_path):
    listed = [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]
    folder = tasks(
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_choice=None,
        doc_to_target="question",
        metric_list=listed,
    )
    code, out, err = typed("eval", tiny_llama, "--tasks", "capitals", "--include-tasks", folder)
    assert code == 0, err
    assert "capitals word_perplexity" in out and out.count("3 documents, lower is better") == 2
    options = (
        "--tasks",
        "capitals",
        "--include-tasks",
        folder,
        "--calibration",
        "builtin",
        "--samples",
        "2",
        "--seqlen",
        "16",
    )
    code, out, err = typed("run", tiny_llama, *options, "--recipe", "magnitude", "--output", "out")
    assert code == 0, err
    assert out.count("3 documents, lower is better") == 2 and "higher is better" not in out
    record = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert record["evaluation"]["tasks"]["capitals"]["protocol"]["higher_is_better"] == {
        "word_perplexity": False,
        "bits_per_byte": False,
    }
    assert (tmp_path / "out" / "README.md").read_text().count("lower is better") == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"metric_list": [metric("bleu")]},
            r"^task 'capitals' would give no score: lm-eval does not compute bleu for output_type "
            r"multiple_choice; put others into "
            r"metric_list in its file, such as acc, acc_norm$",
        ),
        (
            {"metric_list": []},
            r"would give no score: lm-eval does not compute a metric for output_type multiple_choice",
        ),
        ({"metric_list": [metric("bypass")]}, r"does not compute bypass for"),
        (
            {"metric_list": [metric("acc", aggregation="average")]},
            r"does not know the aggregation of acc; name another",
        ),
        (
            {"metric_list": [metric("accc")]},
            r"^capitals\.yaml holds the metric 'accc', which is none of lm-eval's",
        ),
    ],
)
def test_a_task_without_a_score_is_refused_before_work(tasks, tiny_llama, monkeypatch, changes, said):
    folder = tasks(**changes)
    for name in ("zero_shot", "perplexity"):
        monkeypatch.setattr(f"llmprune.evaluation.scores.{name}", lambda *args: pytest.fail("work began"))
    with pytest.raises(ValueError, match=said) as caught:
        llmprune.evaluate(tiny_llama, tasks=["capitals"], include_tasks=folder, perplexity=["builtin"])
    assert "\n" not in str(caught.value)


def test_an_unknown_metric_that_is_trusted_is_still_no_score(tasks, monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate, "load", lambda name: (_ for _ in ()).throw(FileNotFoundError(name)))
    for output_type in ("multiple_choice", "generate_until"):
        changes = {"doc_to_choice": None, "doc_to_target": "name"} if output_type == "generate_until" else {}
        folder = tasks(output_type=output_type, metric_list=[metric("accc")], **changes)
        with pytest.raises(
            ValueError,
            match=rf"would give no score: lm-eval does not compute accc for output_type {output_type}",
        ):
            load_tasks(["capitals"], folder, None, trust_remote_code=True)


def test_a_metric_that_is_not_computed_beside_others_is_told(tasks, caplog):
    load_tasks(["capitals"], tasks(metric_list=[metric("acc"), metric("bleu")]), None)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("llmprune")] == [
        "task 'capitals': lm-eval does not compute bleu for output_type multiple_choice"
    ]


def results(**metrics):
    return {
        "results": {"a": {"alias": "a", "name": "a", "sample_len": 3, **metrics}},
        "higher_is_better": {"a": {}},
    }


def test_scores_that_are_none_are_told():
    with pytest.raises(ValueError, match=r"task 'a': acc is nan, no finite number"):
        zeroshot._scores(results(**{"acc,none": math.nan}), "a")
    found = zeroshot._scores(results(**{"acc,none": 1, "acc_stderr,none": "N/A", "text,none": "x"}), "a")
    assert found["acc"] == {"value": 1, "stderr": None} and "text" not in found


def test_a_task_that_gave_no_score_fails_by_name(tasks, tiny_llama):
    folder = tasks(raw="process_results: !function marker.run\n", metric_list=None)
    (folder / "marker.py").write_text("def run(doc, results):\n    return {}\n")
    with pytest.raises(ValueError, match=r"^task 'capitals' gave no score; name metrics"):
        score(tiny_llama, folder, trust_remote_code=True)


# Python in task files

GROUP = {"group": "lands", "task": ["capitals"], "metadata": {"version": 1}}
HOLDS_CODE = {
    "function": (
        {},
        "process_docs: !function marker.run\n",
        r"capitals\.yaml holds !function in 'process_docs'",
    ),
    "metric": (
        {"metric_list": None},
        "metric_list: [{metric: !function marker.run, aggregation: mean}]\n",
        r"!function in 'metric'",
    ),
    "filter": (
        {},
        "filter_list: [{name: x, filter: [{filter_fn: !function marker.run}]}]\n",
        r"!function in 'filter_fn'",
    ),
    "in a key": ({}, "? !function marker.run\n: 1\n", r"holds !function in 'its keys'"),
    "anchor": ({}, "metadata: &a {x: !function marker.run}\ndescription: *a\n", r"!function in 'x'"),
    "merge": (
        {},
        "generation_kwargs: {<<: {process_docs: !function marker.run}}\n",
        r"!function in 'process_docs'",
    ),
    "class": ({}, "class: !function marker.run\n", r"(!function in|the key) 'class'"),
    "custom_dataset": ({"custom_dataset": "marker.run"}, "", r"the key 'custom_dataset'"),
    "unsafe_code": ({"unsafe_code": True}, "", r"the key 'unsafe_code'"),
    "trust": ({"dataset_kwargs": {"trust_remote_code": True}}, "", r"the key 'trust_remote_code'"),
    "generate": ({"generation_kwargs": {"custom_generate": "owner/code"}}, "", r"the key 'custom_generate'"),
    "hf_evaluate": ({"metric_list": [metric("exact_match", hf_evaluate=True)]}, "", r"the key 'hf_evaluate'"),
    "metric from the hub": (
        {"metric_list": [metric("./evil/evil.py")]},
        "",
        r"the metric '\./evil/evil\.py', which is none of lm-eval's",
    ),
    "script": ({"dataset_path": "evil.py"}, "", r"dataset_path 'evil\.py'"),
    "pickles": ({"dataset_path": "pandas"}, "", r"dataset_path 'pandas'"),
}


def refused(folder, said, *names):
    with pytest.raises(ValueError, match=said) as caught:
        load_tasks(names or ["capitals"], folder, None)
    assert "\n" not in str(caught.value) and "--trust-remote-code" in str(caught.value)


@pytest.mark.parametrize("how", HOLDS_CODE)
def test_a_task_file_that_runs_python_is_refused(tasks, tmp_path, how):
    changes, raw, said = HOLDS_CODE[how]
    refused(
        tasks(raw=raw, **changes),
        said + r".*, and so runs Python code; use --trust-remote-code if you trust it",
    )
    assert not ran(tmp_path)


def test_objects_of_python_are_no_task(tasks):
    folder = tasks(raw="process_docs: !!python/name:os.system\n")
    index = {"capitals": TaskEntry("TASK", yaml_path=folder / "capitals.yaml")}
    with pytest.raises(ValueError, match=r"capitals\.yaml holds !!python/name:os\.system in 'process_docs'"):
        check_tasks(["capitals"], index, [], ["acc"])


def test_it_runs_when_asked_for(tasks, tmp_path, typed, tiny_llama):
    folder = tasks(raw="process_docs: !function marker.run\n")
    options = ("eval", tiny_llama, "--tasks", "capitals", "--include-tasks", folder)
    code, _, err = typed(*options)
    assert (
        code == 1
        and len(err.splitlines()) == 1
        and "capitals.yaml holds !function in 'process_docs'" in err
        and not ran(tmp_path)
    )
    code, out, err = typed(*options, "--trust-remote-code")
    assert code == 0 and ran(tmp_path) and "capitals acc" in out, err
    small = {
        "samples": 2,
        "seqlen": 8,
        "recipe": "magnitude",
        "calibration": "builtin",
        "tasks": ["capitals"],
        "include_tasks": folder,
    }
    with pytest.raises(ValueError, match="process_docs"):
        llmprune.run_model(tiny_llama, output="out", **small)
    record = llmprune.run_model(tiny_llama, output="out", trust_remote_code=True, **small).record
    assert record["evaluation"]["tasks"]["capitals"]["acc"]["dense"] >= 0


def test_only_what_is_asked_for_is_looked_at(tasks, tmp_path):
    tasks("others", raw="process_docs: !function marker.run\n")
    assert list(load_tasks(["capitals"], tasks(), None)["tasks"]) == ["capitals"]
    assert not ran(tmp_path)


def test_what_is_included_or_a_member_counts(tasks, tmp_path):
    folder = tasks("others", raw="process_docs: !function marker.run\n")
    (folder / "deep").mkdir()
    (folder / "deep" / "part").write_text("include: ../others.yaml\n")
    tasks(raw="include: deep/part\n")
    refused(folder, r"^capitals\.yaml holds !function in 'process_docs' \(in others\.yaml\) \(in part\)")
    tasks(raw="tag: places\n")
    tasks("others", raw="process_docs: !function marker.run\ntag: places\n")
    (folder / "lands.yaml").write_text(
        yaml.dump({**GROUP, "task": ["capitals", {"group": "inner", "task": [{"task": "others"}]}]})
    )
    for name in ("places", "lands"):
        refused(folder, r"^others\.yaml holds !function", name)
    assert not ran(tmp_path)


def test_a_file_of_the_library_that_is_included_counts(tasks):
    import lm_eval.tasks

    folder = tasks()
    (folder / "capitals.yaml").write_text(
        f"include: {Path(lm_eval.tasks.__file__).parent / 'hellaswag' / 'hellaswag.yaml'}\ntask: capitals\n"
    )
    refused(folder, r"^capitals\.yaml holds !function in 'process_docs' \(in hellaswag\.yaml\)")


def test_tasks_of_the_library_and_our_own_are_trusted(tasks, monkeypatch):
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folder, asked = tasks(), []
    monkeypatch.setattr(TaskManager, "load", lambda self, names: asked.append(names) or {"tasks": {}})
    load_tasks(["demo_continuation"], None, None)
    known = ["capitals", "hellaswag", {"task": "winogrande", "num_fewshot": 3}]
    changing = ["capitals", {"task": "hellaswag", "metadata": {"tokenizer": "x/y"}}]
    (folder / "lands.yaml").write_text(yaml.dump({**GROUP, "task": known}))
    (folder / "towns.yaml").write_text(yaml.dump({**GROUP, "group": "towns", "task": changing}))
    library = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager(
        include_path=[folder, library / "hellaswag", library / "winogrande"], include_defaults=False
    )  # all take their time
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: manager)
    load_tasks(["lands", "hellaswag"], folder, None)
    assert asked == [["demo_continuation"], ["lands", "hellaswag"]]
    refused(folder, r"^towns\.yaml changes hellaswag\.yaml, which holds !function in 'process_docs'", "towns")


def test_a_group_of_the_library_s_tasks_has_them_all(tasks, monkeypatch):
    folder, seen = tasks(), []

    class Manager:
        def __init__(self, include_defaults=True, **options):
            seen.append(include_defaults)
            self.task_index = {
                "lands": TaskEntry(
                    "GROUP", cfg={**GROUP, "task": ["arc_easy"]}, yaml_path=folder / "capitals.yaml"
                )
            }
            self.task_index |= {"arc_easy": TaskEntry("TASK")} if include_defaults else {}
            self.all_tasks = list(self.task_index)

        def load(self, names):
            return {"tasks": {}}

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    load_tasks(["lands"], folder, None)
    assert seen == [False, True]


class TaskEntry:
    """As in lm-eval's index."""

    def __init__(self, kind, cfg=None, yaml_path=None, tags=()):
        self.kind, self.cfg, self.yaml_path, self.tags = (
            type("Kind", (), {"name": kind}),
            cfg,
            yaml_path,
            tags,
        )


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch it-ran') }}",
        "{{ question.__class__ }}",
    ],
)
def test_templates_do_not_reach_into_python(tasks, tmp_path, template):
    from lm_eval import utils

    free = utils.env
    with pytest.raises(
        ValueError,
        match=r"a template of capitals reaches into Python \(SecurityError: .*\); use --trust-remote-code",
    ) as caught:
        load_tasks(["capitals"], tasks(doc_to_text=template), None)
    assert "\n" not in str(caught.value) and not ran(tmp_path) and utils.env is free


def test_templates_are_contained_while_scoring_too(tasks, tiny_llama, tmp_path):
    later = (
        "{% if answer == 2 %}{{ ''.__class__ }}{% endif %}{{ question | regex_replace('capital', 'town') }}"
    )
    with pytest.raises(ValueError, match=r"^capitals: lm-eval fails with SecurityError: "):
        score(tiny_llama, tasks(doc_to_text=later))
    assert (
        score(tiny_llama, tasks(doc_to_text=later), trust_remote_code=True)["capitals"]["acc"]["value"] >= 0
    )
