"""Figures of papers: the files that ship, what is refused in one, which are of a model, of our protocol."""

import copy
import json
import re
from pathlib import Path

import pytest
import yaml

import llmprune
from llmprune import registry
from llmprune.common.shipped import shipped, shipped_names
from llmprune.hub.aliases import ALIASES
from llmprune.literature import protocols, published
from llmprune.literature.figure import SEEN_IN
from llmprune.literature.reading import read_figures
from llmprune.terminal import literature

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "published.md").read_text()
OTHERS = {
    "adaprune",
    "besa-layer",
    "besa-row",
    "channel-permutation",
    "maskllm",
    "pretraining",
    "relative-importance",
}  # methods that llmprune does not have under a name of its own
FILE = {
    "paper": {"name": "Us", "title": "Our paper", "url": "https://arxiv.org/abs/1"},
    "methods": {"wanda": "Wanda", "ria": "RIA"},
    "protocol": {"window": 2048, "calibration": "c4"},
    "source": {"where": "Table 1", "url": "https://arxiv.org/abs/1", "via": "paper", "seen": "2026-11-30"},
    "tables": [
        {
            "pattern": "unstructured",
            "sparsity": 0.5,
            "columns": [
                {"perplexity": "wikitext2", "windows": "whole"},
                {"accuracy": ["piqa", "boolq"], "shots": 0},
            ],
            "dense": {"a/b": [5.0, 70]},
            "values": {"a/b": {"wanda": [6.0, 60.5], "ria": [None, 61]}},
        },
        {
            "pattern": "2:4",
            "protocol": {"window": 4096},
            "source": {"where": "Table 2"},
            "columns": [{"perplexity": "c4"}],
            "values": {"a/c": {"wanda": 9}},
        },
    ],
}


def written(tmp_path, values=FILE):
    """The path of a file of figures. Days are written without quotes, as YAML has them."""
    path = tmp_path / "us.yaml"
    path.write_text(re.sub(r"'(\d{4}-\d\d-\d\d)'", r"\1", yaml.safe_dump(values, sort_keys=False)))
    return path


def changed(place, value=...):
    """The file with one value put in at a place (keys joined by blanks), or taken out."""
    values = copy.deepcopy(FILE)
    *above, last = (int(key) if key.isdigit() else key for key in place.split())
    part = values
    for key in above:
        part = part[key]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return values


# The files that ship


def test_every_file_that_ships_is_read_and_each_paper_is_there():
    names = shipped_names("eval", "published")
    assert names == sorted("alps besa dlp dsnot maskllm owl ria sparse-llama sparsegpt wanda".split())
    for name in names:
        figures = read_figures(shipped("eval", "published", f"{name}.yaml"))
        assert figures and {figure.source.paper.lower() for figure in figures} == {name}
    assert len(published.all_figures()) == 1089
    assert '"eval/published" = "llmprune/_data/eval/published"' in (ROOT / "pyproject.toml").read_text()


def test_figures_have_methods_of_known_names_and_models_as_the_aliases_have_them():
    ours = {name for room in registry.ROOMS for name in registry.names(room)} | OTHERS
    ids = {alias.repository for alias in ALIASES.values()}
    bare = {repository.rpartition("/")[2].lower() for repository in ids}
    for figure in published.all_figures():
        assert set(figure.method.split("+")) <= ours, figure.method
        assert figure.model in ids or figure.model.rpartition("/")[2].lower() not in bare, figure.model
        assert figure.value < 100 or figure.metric == "perplexity"
        assert figure.dense is None or figure.dense < 100


@pytest.mark.parametrize(
    ("model", "method", "pattern", "sparsity", "paper", "value", "dense"),
    [
        ("llama-2-7b", "wanda", "unstructured", 0.5, "Wanda", 6.42, 5.12),
        ("llama-2-7b", "wanda", "unstructured", 0.5, "BESA", 6.92, 5.47),
        ("llama-2-7b", "maskllm", "2:4", 0.5, "MaskLLM", 6.72, 5.12),
        ("llama-7b", "wanda+owl", "unstructured", 0.7, "OWL", 24.55, 5.68),
        ("llama-3-8b", "ria", "2:4", 0.5, "RIA", 23.08, 6.14),
        ("llama-3-8b", "alps", "unstructured", 0.7, "ALPS", 30.53, None),
        ("opt-13b", "sparsegpt", "4:8", 0.5, "SparseGPT", 11.77, 10.13),
        ("llama-13b", "sparsegpt+dlp", "unstructured", 0.7, "DLP", 12.63, None),
    ],
)
def test_figures_that_were_looked_up_by_hand(model, method, pattern, sparsity, paper, value, dense):
    found = [
        figure
        for figure in published.published_for(model)
        if (figure.method, figure.pattern, figure.sparsity) == (method, pattern, sparsity)
        and figure.source.paper == paper
        and figure.on == ("wikitext2",)
        and figure.protocol.trained in (None, "masks for 2000 steps")
    ]
    assert (found[0].value, found[0].dense) == (value, dense)


def test_a_mean_over_tasks_is_that_of_its_parts():
    figures = [figure for figure in published.all_figures() if figure.metric == "accuracy"]
    means = [figure for figure in figures if len(figure.on) > 1]
    assert len(means) == 7
    for mean in means:
        parts = [
            figure
            for figure in figures
            if figure.source == mean.source
            and (figure.model, figure.method) == (mean.model, mean.method)
            and len(figure.on) == 1
        ]
        assert {part.on[0] for part in parts} == set(mean.on)
        for key in ("value", "dense"):
            whole = getattr(mean, key)
            assert sum(getattr(part, key) for part in parts) / len(parts) == pytest.approx(whole, abs=0.006)


def test_the_examples_of_the_page_are_what_is_printed(capfd):
    code = re.search(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", PAGE, re.S)
    exec(code[1], {})
    assert capfd.readouterr().out == code[2]
    example = re.search(r"```yaml\n(.*?)```", PAGE, re.S)[1]
    assert yaml.safe_load(example)["tables"][0]["values"]["huggyllama/llama-7b"]["besa-row"] == 6.86


# Reading a file


def test_a_file_gives_a_figure_for_each_cell(tmp_path):
    first, mean, other, last = read_figures(written(tmp_path))
    assert (first.model, first.method, first.about, first.sparsity) == ("a/b", "wanda", "Wanda", 0.5)
    assert (first.metric, first.on, first.value, first.dense) == ("perplexity", ("wikitext2",), 6.0, 5.0)
    assert (first.protocol.window, first.protocol.windows, first.protocol.shots) == (2048, "whole", None)
    assert (first.source.paper, first.source.where, first.source.seen) == ("Us", "Table 1", "2026-11-30")
    assert (mean.metric, mean.on, mean.value, mean.dense) == ("accuracy", ("piqa", "boolq"), 60.5, 70.0)
    assert (mean.protocol.window, mean.protocol.shots) == (None, 0)
    assert (other.method, other.metric, other.value) == ("ria", "accuracy", 61.0)  # null is no figure
    assert (last.pattern, last.sparsity, last.dense, last.protocol.window) == ("2:4", 0.5, None, 4096)
    assert (last.source.where, last.protocol.calibration, last.protocol.windows) == ("Table 2", "c4", None)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (changed("tabels", []), "unknown key in us.yaml 'tabels': did you mean 'tables'"),
        (changed("tables 0 colums", 1), "us.yaml, table 1 'colums': did you mean 'columns'"),
        (changed("protocol windo", 1), "'windo': did you mean 'window'"),
        (changed("tables 0 columns 0 window", 1), "'window': did you mean 'windows'"),
        (changed("source where"), "us.yaml, table 1: where is missing; a figure without it is not entered"),
        (changed("source url"), "us.yaml, table 1: url is missing"),
        (changed("source seen"), "seen is missing"),
        (changed("source via"), "via is missing"),
        (changed("source"), "us.yaml: source is missing"),
        (changed("paper title"), "us.yaml: paper: title is missing"),
        (
            changed("source via", "memory"),
            "unknown kind of source .* 'memory': available: card, paper, quote",
        ),
        (changed("source url", "http://a.b/c"), "url must be an address that begins with https://"),
        (changed("source seen", "yesterday"), r"seen must be a day \(YYYY-MM-DD\), got 'yesterday'"),
        (changed("tables 1 pattern", "4:2"), "pattern 4:2 keeps 4 of 2"),
        (changed("tables 0 pattern", 124), "pattern must be text, got 124"),
        (changed("tables 0 pattern", "half"), "pattern must be unstructured or N:M in quotes, got 'half'"),
        (changed("tables 1 sparsity", 0.5), "pattern 2:4 keeps 2 of 4; leave sparsity out"),
        (changed("tables 0 sparsity"), "table 1: sparsity is missing"),
        (changed("tables 0 sparsity", 50), "sparsity must be a share between 0 and 1, got 50"),
        (changed("tables 0 values a/b wanda", [6.0]), r"values: a/b: wanda: needs 2 values, got \[6.0\]"),
        (changed("tables 0 values a/b wanda", [6.0, "1e9"]), "must be a number above 0, got '1e9'"),
        (changed("tables 0 values a/b wanda", [0, 60.5]), "wanda must be a number above 0, got 0"),
        (changed("tables 0 values a/b wanda", [6.0, float("nan")]), "must be a number above 0, got nan"),
        (changed("tables 0 values a/b wand", [6.0, 1]), "'wand': did you mean 'wanda'"),
        (changed("tables 0 values llama", {"wanda": [1, 1]}), "models by their hub ids .* got 'llama'"),
        (changed("tables 0 dense", {"a/d": [1, 1]}), "dense: a/d has no values"),
        (changed("tables 0 columns 1 shots"), "columns: shots is missing"),
        (changed("tables 0 columns 0 windows", "all"), "windows must be a whole number, got 'all'"),
        (changed("tables 0 columns", []), r"columns must be a list, got \[\]"),
        (changed("methods swaps", "Swaps"), "no figure of method 'swaps'; leave it out of methods"),
        (changed("methods wanda", ""), "methods: wanda must be text"),
        (changed("protocol window", -1), "window must be a whole number, got -1"),
        (changed("protocol", []), r"us.yaml: protocol must be a mapping, got \[\]"),
        (
            FILE | {"tables": [FILE["tables"][0], *FILE["tables"]]},
            "Us: wanda on a/b, unstructured 0.5, perplexity wikitext2 stands twice",
        ),
    ],
)
def test_what_is_refused_in_a_file(tmp_path, values, said):
    with pytest.raises(ValueError, match=said) as raised:
        read_figures(written(tmp_path, values))
    assert "\n" not in str(raised.value)


# Figures of a model


def test_a_model_is_known_by_alias_hub_id_copy_and_bare_name():
    figures = published.published_for("huggyllama/llama-7b")
    assert figures and all(figure.model == "huggyllama/llama-7b" for figure in figures)
    for name in ("llama-7b", "LLaMA-7B", "decapoda-research/llama-7b-hf", "HuggyLlama/llama-7b"):
        assert published.published_for(name) == figures, name
    assert published.published_for("Llama-2-7b-hf") == published.published_for("llama-2-7b")
    assert all(published.published_for(published.name_of(model)) for model in published.models())
    for name in ("someone/llama-7b", "demo", "llama", "llama-7", "", "meta-llama/Llama-2-7b-chat-hf"):
        assert published.published_for(name) == (), name


def test_models_come_family_by_family_from_small_to_large():
    found = list(published.models())
    assert found[-8:] == [f"facebook/opt-{n}" for n in "125m 350m 1.3b 2.7b 6.7b 13b 30b 66b".split()]
    assert [m.rpartition("-")[2] for m in found[:4]] == ["7b", "13b", "30b", "65b"]
    assert sum(map(len, published.models().values())) == len(published.all_figures())


# The protocol

WIKITEXT = {"text": "wikitext2", "window": 2048, "windows": 166, "dtype": "float16"}


def scored(**protocol):
    return {"perplexity": {"wikitext2": {"dense": 5.68, "pruned": 7.3, "protocol": WIKITEXT | protocol}}}


def wanda(tmp_path, place="protocol note", value="as it is"):
    return read_figures(written(tmp_path, changed(place, value)))[0]


@pytest.mark.parametrize(
    ("changes", "evaluation", "said"),
    [
        ((), scored(), "same protocol"),
        ((), scored(window=4096, windows=83), "window 4096, theirs 2048"),
        ((), scored(windows=50, limit=50), "50 windows, theirs the whole text"),
        ((), {}, "wikitext2 not measured here"),
        ((), {"perplexity": {"c4": {}}}, "wikitext2 not measured here"),
        (("protocol window", None), scored(), "their window is not stated"),
        (("tables 0 columns 0 windows", 166), scored(), "same protocol"),
        (
            ("tables 0 columns 0 windows", 256),
            scored(window=512),
            "window 512, theirs 2048; 166 windows, theirs 256",
        ),
        (
            ("tables 0 columns 0", {"perplexity": "wikitext2"}),
            scored(),
            "how much of the text they read is not stated",
        ),
    ],
)
def test_what_differs_from_the_protocol_of_a_perplexity(tmp_path, changes, evaluation, said):
    assert protocols.difference(wanda(tmp_path, *changes), ours(evaluation=evaluation)) == said


def test_an_accuracy_is_never_of_the_same_protocol(tmp_path):
    mean = read_figures(written(tmp_path))[1]
    task = {"acc": {"dense": 0.7, "pruned": 0.6, "stderr": 0.01}, "protocol": {"shots": 0}}
    other = {"acc": {"dense": 0.8, "pruned": 0.7, "stderr": 0.01}, "protocol": {"shots": 5}}
    one, both = {"tasks": {"piqa": task}}, {"tasks": {"piqa": task, "boolq": other}}
    assert protocols.difference(mean, ours(evaluation={})) == "piqa, boolq not measured here"
    assert protocols.difference(mean, ours(evaluation=one)) == "boolq not measured here"
    assert protocols.difference(mean, ours(evaluation=both)) == (
        "0 and 5 shots, theirs 0; their version of the tasks is not stated"
    )
    assert protocols.ours(mean, both) == pytest.approx((75, 65)) and protocols.ours(mean, one) == (None, None)


def ours(model="llama-7b", pattern="unstructured", sparsity=0.5, evaluation=None, **more):
    found = scored() if evaluation is None else evaluation
    return protocols.Run(model, pattern, sparsity, found, **more)


def test_work_that_differs_is_said_before_the_protocol(tmp_path):
    figure = wanda(tmp_path)
    assert protocols.difference(figure, ours(trained=True)) == "trained here, theirs is not"
    assert protocols.difference(figure, ours(partly=True)) == "some matrices are left dense here"
    trained = wanda(tmp_path, "protocol trained", "masks")
    assert protocols.difference(trained, ours()) == "theirs is trained"
    assert protocols.difference(trained, ours(trained=True)) == "same protocol"


def test_figures_beside_a_record_are_of_its_model_pattern_and_sparsity():
    found = protocols.beside(ours("huggyllama/llama-7b", "unstructured", 0.4998))
    assert {(b.figure.source.paper, b.figure.method) for b in found} == {
        *(("BESA", name) for name in ("sparsegpt", "wanda", "besa-layer", "besa-row")),
        ("Wanda", "wanda"),
    }
    assert {(b.dense, b.pruned, b.protocol) for b in found} == {(5.68, 7.3, "same protocol")}
    assert [b.figure.value for b in protocols.beside(ours("llama-7b", "2:4", 0.5))] == [11.53]
    assert protocols.beside(ours("huggyllama/llama-7b", "unstructured", 0.55)) == ()
    assert protocols.beside(ours("huggyllama/llama-7b", "4:8", 0.5)) == ()
    assert protocols.beside(ours("demo", "unstructured", 0.5)) == ()
    assert protocols.beside(ours("llama-2-7b", "2:4", 0.5))[0].protocol == "same protocol"  # ALPS: 2048
    four = protocols.beside(ours("llama-2-7b", "2:4", 0.5, scored(window=4096)))
    assert {b.protocol for b in four if b.figure.source.paper == "Wanda"} == {"same protocol"}


def test_a_record_beside_them_may_have_no_scores():
    found = protocols.beside(ours(sparsity=0.7, evaluation={}))
    assert len(found) == 12 and {b.protocol for b in found} == {"wikitext2 not measured here"}
    assert {(b.dense, b.pruned) for b in found} == {(None, None)}


def test_a_limit_is_part_of_the_protocol_where_it_left_windows_out(tiny_llama):
    limited, whole = (
        llmprune.evaluate(tiny_llama, perplexity="builtin", eval_seqlen=32, limit=limit)["perplexity"][
            "builtin"
        ]
        for limit in (3, 10**6)
    )
    assert (limited["protocol"]["limit"], limited["protocol"]["windows"]) == (3, 3)
    assert "limit" not in whole["protocol"]


# The function and the command


def test_python_returns_plain_dicts():
    found = llmprune.published("llama-7b", metric="wikitext2")
    assert json.loads(json.dumps(found)) == found and len(found) == 18
    assert set(found[0]) == set(
        "model method about pattern sparsity metric on value dense protocol source".split()
    )
    assert set(found[0]["protocol"]) == set(
        "window windows shots calibration samples length trained note".split()
    )
    assert set(found[0]["source"]) == {"paper", "title", "where", "url", "via", "seen"}
    assert found[0]["source"]["via"] in SEEN_IN
    assert len(llmprune.published()) == len(published.all_figures())
    piqa = llmprune.published("llama-2-7b", metric="piqa")
    assert {"piqa" in figure["on"] for figure in piqa} == {True}
    assert {figure["metric"] for figure in llmprune.published(metric="accuracy")} == {"accuracy"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("llama-2-7",), "'llama-2-7': did you mean 'llama-2-7b'.*available: llama-7b, llama-13b, "),
        (("qwen3-8b",), "no published figures of 'qwen3-8b': "),
        (("llama-7b", "wikitext"), "unknown metric 'wikitext': did you mean 'wikitext2'"),
        (("llama-7b", "piqa"), "unknown metric 'piqa': available: perplexity, wikitext2$"),
        ((5,), "model must be text, got 5"),
        ((None, 5), "metric must be text, got 5"),
    ],
)
def test_what_has_no_figures_is_answered_with_what_has(arguments, said):
    model, metric = (*arguments, None)[:2]
    with pytest.raises(ValueError, match=said):
        llmprune.published(model, metric=metric)


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize(
    "arguments", [(), ("llama-7b",), ("llama-3-8b",), ("llama-2-13b", "--metric", "piqa")]
)
def test_the_command_fits_the_screen(typed, monkeypatch, width, arguments):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = typed("published", *arguments)
    assert code == 0 and err == "" and "\x1b" not in out
    for line in out.splitlines():
        assert len(line) <= width or " " not in line.strip(), line


def test_the_command_names_value_dense_protocol_and_source(typed):
    out = typed("published", "llama-2-7b", "--metric", "perplexity")[1]
    block = re.search(r"Wanda \(README, LLaMA-2 results\): perplexity on wikitext2\n(.*?)\n\n", out, re.S)[1]
    lines = block.splitlines()
    assert lines[:3] == [
        "windows of 4096; the whole text; calibrated on c4, 128 rows",
        "https://github.com/locuslab/wanda",
        "read in the README of its official repository on 2026-11-30",
    ]
    assert [line.split() for line in lines[3:]] == [
        ["50%", "4:8", "2:4"],
        ["dense", "5.12", "5.12", "5.12"],
        ["magnitude", "14.89", "16.48", "54.59"],
        ["sparsegpt", "6.51", "8.12", "10.17"],
        ["wanda", "6.42", "7.97", "11.02"],
    ]
    assert (
        "40%: Table 10, 50%: Table 11, " in out
        and "accuracy on" not in out
        and out.rstrip().endswith("do not rank.")
    )
    everything = typed("published", "llama-2-7b")[1]
    assert everything.rindex(": perplexity on") < everything.index(": accuracy")
    mean = typed("published", "llama-2-7b", "--metric", "accuracy")[1]
    assert "MaskLLM (Table 1): accuracy, mean of hellaswag, race, piqa, " in mean


def test_json_is_one_object_and_the_table_goes_to_stderr(typed):
    code, out, err = typed("published", "llama-7b", "--metric", "perplexity", "--json")
    found = json.loads(out)
    assert code == 0 and found["model"] == "huggyllama/llama-7b"
    assert found["figures"] == llmprune.published("llama-7b") and "OWL (README" in err
    code, out, err = typed("published", "--json", "--quiet")
    assert json.loads(out)["models"]["huggyllama/llama-30b"] == {
        "name": "llama-30b",
        "figures": 11,
        "papers": ["BESA", "OWL", "Wanda"],
    }
    assert err == ""


def test_no_two_figures_of_a_table_have_the_same_place():
    """A table has a row for a method and a column for an amount."""
    for model in published.models():
        for rows in literature._blocks(llmprune.published(model)).values():
            cells = [(row["method"], literature._amount(row)) for row in rows]
            assert len(cells) == len(set(cells))
            dense = {(literature._amount(row), row["dense"]) for row in rows if row["dense"] is not None}
            assert len(dense) == len({amount for amount, _ in dense})


def test_an_unknown_model_is_one_line(typed):
    code, out, err = typed("published", "lama-7b")
    assert (code, out, err.count("\n")) == (1, "", 1) and "did you mean 'llama-7b'" in err
