"""Several runs side by side: which figures are ranked, what differs, how masks overlap, and the page."""

from __future__ import annotations

import copy
import csv
import io
import json

import page_records
import pytest
import torch

import llmprune
from llmprune.comparison import tables
from llmprune.comparison.comparing import compared
from llmprune.comparison.entries import Entry, names_of
from llmprune.comparison.page import comparison_page
from llmprune.comparison.plots import plot
from llmprune.record.literature import protocols_of


def run(name="one", sparsity=0.5, perplexity=7.0, accuracy=0.76, **changes):
    """A run of two blocks; `changes` by dotted path."""
    record = copy.deepcopy(page_records.record(page_records.dense_matrices(2, uniform=True)))
    record["totals"]["sparsity"] = sparsity
    record["recipe"]["name"] = changes.pop("recipe", name)
    record["evaluation"]["perplexity"]["wikitext2"]["pruned"] = perplexity
    record["evaluation"]["tasks"]["piqa"]["acc"]["pruned"] = accuracy
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = record
        for key in parents:
            place = place[key]
        place[last] = value
    return Entry(name, record)


def group(found, name, letter=""):
    (one,) = [g for g in found["scores"] if g["name"] == name and g["letter"] == letter]
    return one


# What is ranked


def test_the_best_of_each_sparsity_is_marked():
    entries = [
        run("a", 0.5, 7.0),
        run("b", 0.5, 6.5),
        run("c", 0.6, 9.0),
        run("d", 0.6, 9.5),
        run("e", 0.7, 12),
    ]
    found = compared(entries, False)
    ranked = group(found, "perplexity wikitext2")
    assert ranked["best"] == ["b", "c"] and not ranked["level"] and not found["unranked"]
    assert group(found, "piqa acc")["best"] and "e" not in group(found, "piqa acc")["best"]


def test_scores_within_the_error_are_level_with_the_best():
    # Errors of 0.0099 each: differences up to 2 * sqrt(2) * 0.0099 = 0.028 tell nothing apart.
    entries = [run("a", accuracy=0.76), run("b", accuracy=0.78), run("c", accuracy=0.74)]
    ranked = group(compared(entries, False), "piqa acc")
    assert ranked["best"] == ["b"] and ranked["level"] == ["a"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"evaluation__perplexity__wikitext2__protocol__window": 1024},
            "window 2048 (a, b); [b] window 1024 (c)",
        ),
        ({"model__digest": "sha256:other"}, "someone/a-model with other weights"),
        ({"model__digest": "sha256:other", "model__source": "someone/else"}, "model someone/else"),
    ],
)
def test_figures_of_another_protocol_or_model_are_not_ranked(change, said):
    entries = [run("a", perplexity=7.0), run("b", perplexity=8.0), run("c", perplexity=1.0, **change)]
    found = compared(entries, False)
    first, other = (group(found, "perplexity wikitext2", letter) for letter in "ab")
    assert first["best"] == ["a"] and other["best"] == [] and list(other["members"]) == ["c"]
    assert any(
        line.startswith("perplexity wikitext2 is not ranked") and said in line for line in found["unranked"]
    )
    table = tables.markdown(found)
    assert "7.00 * [a]" in table and "1.00 [b]" in table and "1.00 *" not in table


def test_a_metric_whose_direction_nobody_knows_is_not_ranked():
    entries = [run("a", accuracy=0.5), run("b", accuracy=0.9)]
    for entry in entries:
        entry.record["evaluation"]["tasks"]["piqa"]["protocol"] = {
            **entry.record["evaluation"]["tasks"]["piqa"]["protocol"],
            "higher_is_better": {},
        }
    assert group(compared(entries, False), "piqa acc")["best"] == []


# What differs, published figures, names


def test_what_differs_is_named_and_nothing_else():
    other = run("b", recipe__pruner__name="sparsegpt", calibration__samples=64, environment__dtype="float32")
    found = {e["field"]: e["values"] for e in compared([run("a"), other], False)["differences"]}
    assert found == {
        "recipe.pruner.name": {"a": "wanda", "b": "sparsegpt"},
        "calibration.samples": {"a": "128", "b": "64"},
        "dtype": {"a": "float16", "b": "float32"},
    }


def test_equal_scores_are_all_the_best():
    found = compared([run("a", 0.5, 7.0), run("b", 0.5, 7.0), run("c", 0.5, 8.0)], False)
    assert group(found, "perplexity wikitext2")["best"] == ["a", "b"]
    assert group(found, "piqa acc")["best"] == ["a", "b", "c"] and group(found, "piqa acc")["level"] == []


def test_runs_that_prune_fewer_matrices_are_not_ranked_with_others():
    whole, part, other = run("whole"), run("part", perplexity=6.1), run("other", perplexity=6.9)
    part.record["totals"]["weights"] //= 2
    part.record["recipe"]["rules"] = [{"match": "*attn*", "skip": True}]
    found = compared([whole, part, other], False)
    assert group(found, "perplexity wikitext2")["best"] == ["other"]
    assert any("prune fewer of the matrices" in note for note in tables.notes(found))
    assert not any("prune fewer" in note for note in tables.notes(compared([whole, other], False)))
    part.record["model"]["source"] = "huggyllama/llama-7b"
    protocols = {own["protocol"] for row in compared([part], False)["published"] for own in row["ours"]}
    assert protocols and all("some matrices are left dense here" in told for told in protocols)


def test_published_figures_are_of_the_pattern_that_came_out():
    entry = run("a", model__source="huggyllama/llama-7b")
    for row in entry.record["matrices"]:
        row["pattern"] = "2:4"  # after a training that moved its masks to another pattern
    assert {row["amount"] for row in compared([entry], False)["published"]} == {"2:4"}


def test_the_protocol_of_each_run_stands_beside_a_figure():
    one, other = (run(name, model__source="huggyllama/llama-7b") for name in "ab")
    other.record["evaluation"]["perplexity"]["wikitext2"]["protocol"] |= {"window": 4096}
    rows = compared([one, other], False)["published"]
    told = protocols_of(next(row for row in rows if row["paper"] == "Wanda")["ours"])
    assert told == ["a: same protocol. ", "b: window 4096, theirs 2048. "]


def test_published_figures_stand_beside_ours():
    entry = run("a", 0.5, model__source="huggyllama/llama-7b")
    found = compared([entry], False)["published"]
    wanda = next(row for row in found if row["method"] == "wanda" and "wikitext2" in row["figure"])
    assert [(own["run"], own["value"], own["protocol"]) for own in wanda["ours"]] == [
        ("a", 7.0, "same protocol")
    ]
    assert wanda["published"] > 7 and wanda["url"].startswith("https://") and wanda["amount"] == "50%"
    page = comparison_page(compared([entry], False), "0")
    assert "Published figures" in page and wanda["url"] in page


def test_texts_of_the_runs_stand_side_by_side():
    first, second, without = run("a"), run("b"), run("c")
    second.record["samples"]["texts"][0]["pruned"] = " <at> 90"
    del without.record["samples"]
    found = compared([first, second, without], False)
    (row,) = found["texts"]
    text = first.record["samples"]["texts"][0]
    assert row["written"] == {f"dense {first.model}": text["dense"], "a": text["pruned"], "b": " <at> 90"}
    page = comparison_page(found, "0")
    assert "What they write" in page and "&lt;at&gt; 90" in page
    assert "What they write" not in comparison_page(compared([without], False), "0")


def test_names_are_as_long_as_it_takes(tmp_path):
    places = [tmp_path / "a" / "out", tmp_path / "b" / "out", tmp_path / "c"]
    assert names_of(places[:2]) == ["a/out", "b/out"] and names_of(places[2:]) == ["c"]
    assert len(set(names_of(places))) == 3


# Tables, page and plots


def test_the_sheet_has_numbers_in_full():
    found = compared([run("a", 0.5, 7.123456789), run("b", 0.6, 9.0)], False)
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(found))))
    assert [row["name"] for row in rows] == ["a", "b"]
    assert (
        float(rows[0]["perplexity wikitext2"]) == 7.123456789
        and rows[0]["perplexity wikitext2 dense"] == "5.47"
    )
    assert rows[1]["piqa acc stderr"] == "0.0099" and float(rows[1]["faster_by"]) == 1.41


def test_curves_are_drawn_where_runs_lie_apart():
    near, far = ([run("a", 0.5), run("b", other)] for other in (0.501, 0.7))
    assert plot(compared(near, False), "sparsity") is None
    assert plot(compared(far, False), "sparsity")[:4] == b"\x89PNG"
    page = comparison_page(compared(far, False), "0")
    assert "perplexity wikitext2 by sparsity" in page
    assert "by sparsity" not in comparison_page(compared(near, False), "0")


def test_runs_without_scores_are_compared_in_what_they_have():
    record = page_records.record(page_records.dense_matrices(2), scored=False)
    found = compared([Entry("a", record), Entry("b", record)], False)
    assert not found["scores"] and "None of these runs was scored" in comparison_page(found, "0")


def test_text_of_records_is_escaped():
    page = comparison_page(compared([run("<i>a</i>", recipe__pruner__name="<b>")], False), "0")
    assert "<i>a" not in page and "<b>&lt;" not in page and "&lt;i&gt;" in page


# The command and the function


@pytest.fixture(scope="module")
def runs(tiny_llama, calibration_tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for recipe in ("wanda", "magnitude"):
        llmprune.run_model(
            tiny_llama,
            recipe=recipe,
            sparsity=0.5,
            calibration=calibration_tokens,
            perplexity="builtin",
            eval_seqlen=32,
            limit=2,
            samples_text=0,
            output=folder / recipe,
        )
    return folder


def test_the_overlap_is_that_of_mask_diff(runs):
    found = llmprune.compare([runs / "wanda", runs / "magnitude"]).record["overlap"]
    expected = llmprune.mask_diff(runs / "wanda", runs / "magnitude")
    assert len(found) == 1 and (found[0]["a"], found[0]["b"]) == ("wanda", "magnitude")
    for key in ("weights", "both", "agree", "overlap", "jaccard"):
        assert found[0][key] == expected[key]
    assert 0 < found[0]["jaccard"] < 1
    assert llmprune.compare([runs / "wanda", runs / "magnitude"], overlap=False).record["overlap"] == []


def test_the_command_writes_page_tables_and_plots(runs, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = typed("compare", runs / "wanda", runs / "magnitude", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert [r["name"] for r in record["runs"]] == ["wanda", "magnitude"]
    written = {path.name for path in (tmp_path / "comparison").iterdir()}
    assert {"compare.json", "table.md", "table.csv", "report.html"} <= written
    assert json.loads((tmp_path / "comparison" / "compare.json").read_text()) == record
    assert str(tmp_path) not in (tmp_path / "comparison" / "report.html").read_text()
    assert str(runs) not in "".join(p.read_text() for p in (tmp_path / "comparison").glob("*.[jmch]*"))
    code, out, err = typed("compare", runs / "wanda", runs / "magnitude")
    assert code == 1 and "is not empty" in err and "--overwrite" in err
    code, out, err = typed("compare", runs / "wanda", "--overwrite")
    assert code == 0 and "1 run of tiny-llama" in out


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for paths, options, said in (
        (tmp_path / "no", {}, "no such folder"),
        (runs / "wanda" / "config.json", {}, "this is a file, no folder"),
        (tmp_path / "empty", {}, "is no finished run of llmprune"),
        ([runs / "wanda", runs / "wanda"], {}, "is named twice"),
        (runs / "wanda", {"output": tmp_path / "mine"}, "holds letter.txt, which no comparison"),
        (
            runs / "wanda",
            {"output": tmp_path / "mine", "overwrite": True},
            "holds letter.txt, which no comparison",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            llmprune.compare(paths, **options)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_a_comparison_shows_itself(runs, monkeypatch):
    found = llmprune.compare([runs / "wanda", runs / "magnitude"], overlap=False)
    assert "| wanda |" in repr(found) and ">magnitude</td>" in found._repr_html_()
    frame = pytest.importorskip("pandas") and found.to_pandas()
    assert list(frame["name"]) == ["wanda", "magnitude"] and torch.tensor(frame["sparsity"]).max() <= 0.5


@pytest.mark.parametrize("width", [40, 80])
def test_the_screen_fits_its_width(width, runs, capsys, monkeypatch):
    from llmprune.terminal.comparison import print_comparison
    from llmprune.terminal.console import Screen

    monkeypatch.setenv("COLUMNS", str(width))
    found = llmprune.compare([runs / "wanda", runs / "magnitude"]).record
    print_comparison(Screen(), found, None)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and any("magnitude" in line for line in lines)


def test_a_folder_that_is_not_ours_is_never_replaced(runs, tmp_path):
    """Also one that holds nothing but files of our names."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "table.csv").write_text("a,b\n")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds table\.csv, which no comparison has written"):
            llmprune.compare(runs / "wanda", output=theirs, overwrite=overwrite)
    assert [path.name for path in theirs.iterdir()] == ["table.csv"]
    for place in (runs, runs / "wanda"):
        with pytest.raises(ValueError, match="never replaced"):
            llmprune.compare(runs / "wanda", output=place, overwrite=True)


def test_two_texts_of_one_name_are_not_ranked_together(runs, tiny_llama, tmp_path):
    scored = []
    for number, words in enumerate(("one two three ", "four five six ")):
        (tmp_path / f"{number}").mkdir()
        text = tmp_path / f"{number}" / "test.txt"
        text.write_text(words * 400)
        found = llmprune.evaluate(runs / "wanda", perplexity=text, eval_seqlen=32, limit=2)["perplexity"]
        record = json.loads((runs / "wanda" / "llmprune.json").read_text())
        (name,) = found
        record["evaluation"]["perplexity"] = {
            name: {"dense": 1.0, "pruned": found[name]["value"], "protocol": found[name]["protocol"]}
        }
        scored.append(Entry(f"run {number}", record))
    found = compared(scored, False)
    assert [group["letter"] for group in found["scores"]] == ["a", "b"] and "digest" in found["unranked"][0]
