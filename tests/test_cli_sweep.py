"""The command sweep: its flags, what it prints at any width, its exit codes, and results in a notebook."""

import json
import re
import sys
from pathlib import Path

import page_records
import pytest

import llmprune
from llmprune.api.sweep_result import SweepResult
from llmprune.record import sweep_page, sweep_table, sweeps
from llmprune.run import corridor
from llmprune.terminal.console import Screen
from llmprune.terminal.sweep import print_sweep

SMALL = ("--samples", 4, "--seqlen", 32, "--calibration", "builtin", "--perplexity", "builtin", "--limit", 2)
GRID = ("--recipe", "wanda,magnitude", "--sparsity", "0.5,0.6")


@pytest.fixture
def record():
    return page_records.swept()


def test_a_sweep_prints_its_table_and_what_to_do_next(typed, tiny_llama, tmp_path):
    code, out, err = typed(
        "sweep", tiny_llama, *GRID, "--pattern", "unstructured,2:4", *SMALL, "--output", "a b"
    )
    assert code == 0, err
    assert "6 cells: wanda, magnitude" in out and "2 more combinations have the recipe of one of these" in out
    assert re.search(r"1/6 wanda-0.5: pruning blocks +2/2", out)
    assert re.search(r"^dense +[\d.]+ +[\d.]+$", out, re.M) and re.search(r"^2:4 +[\d.]+", out, re.M)
    assert out.count(" *") >= 3 and "* is the best of its row" in out
    for said in ("'a b'/report.html", "'a b'/table.csv", "llmprune eval 'a b/cells/"):
        assert said in out, said
    made = {path.name for path in (tmp_path / "a b").iterdir()}
    assert made == {"cells", "report.html", "sweep.json", "sweep.png", "table.csv", "table.md"}
    assert not list(tmp_path.glob(".*"))


def test_json_is_one_object_and_nothing_else(typed, tiny_llama, tmp_path):
    code, out, err = typed("sweep", tiny_llama, *GRID, *SMALL, "--output", "out", "--json")
    found = json.loads(out)
    assert code == 0 and found["output"] == "out" and len(found["cells"]) == 4 and "Sweep, perplexity" in err
    assert {k: v for k, v in found.items() if k != "output"} == json.loads(
        (tmp_path / "out/sweep.json").read_text()
    )
    code, out, err = typed("sweep", tiny_llama, *GRID, *SMALL, "--output", "out", "--resume", "--quiet")
    assert (code, out, err) == (0, "", "")


def test_the_cells_of_a_sweep_are_compared(typed, tiny_llama):
    assert typed("sweep", tiny_llama, *GRID, *SMALL, "--output", "out", "--keep", "best", "--quiet")[0] == 0
    code, out, err = typed("compare", "out", "--json")
    assert code == 0, err
    found = {run["name"] for run in json.loads(out)["runs"]}
    assert found == {"wanda-0.5", "wanda-0.6", "magnitude-0.5", "magnitude-0.6"}
    (told,) = json.loads(out)["missing"]
    assert told.startswith("Overlap is without ") and "whose masks are not at hand" in told
    path = Path("out/sweep.json")
    stored = json.loads(path.read_text())
    stored["cells"][0]["status"] = "waiting"
    path.write_text(json.dumps(stored))
    shown = " ".join(typed("compare", "out", "--overwrite")[1].split())
    assert "1 of 4 cells of out are not finished: wanda-0.5" in shown


def test_a_dry_run_prints_time_and_disk(typed, tiny_llama, tmp_path):
    code, out, _ = typed("sweep", tiny_llama, *GRID, *SMALL, "--dry-run")
    assert code == 0 and re.search(r"^wanda-0.5 +\d+ s +\d+\.\d MB +wanda, unstructured, 0.5$", out, re.M)
    assert re.search(r"at most about \d+ s by estimate, [\d.]+ MB of disk \(--keep all\)", out)
    found = json.loads(typed("sweep", tiny_llama, *GRID, *SMALL, "--dry-run", "--json")[1])
    assert found["disk_bytes"] == sum(cell["disk_bytes"] for cell in found["cells"]) and found["seconds"] > 0
    assert found["output"] == "tiny-llama-sweep" and not list(tmp_path.iterdir())


def test_a_failing_cell_ends_with_exit_code_1_after_the_others(typed, tiny_llama, tmp_path, monkeypatch):
    real = corridor.prune_matrix

    def failing(target, plan, stats, methods, stored):
        if methods.pruner_name == "wanda":
            raise RuntimeError("made NaN")
        return real(target, plan, stats, methods, stored)

    with monkeypatch.context() as patch:
        patch.setattr(corridor, "prune_matrix", failing)
        code, out, err = typed("sweep", tiny_llama, *GRID, *SMALL, "--output", "out")
    assert code == 1 and "failed" in out and "cell wanda-0.5 failed: made NaN" in out
    assert err.strip().splitlines()[-1] == (
        "llmprune: 2 of 4 cells failed: wanda-0.5 (and 1 more): made NaN; --resume tries them again"
    )
    code, out, _ = typed("sweep", tiny_llama, *GRID, *SMALL, "--output", "out", "--resume")
    assert code == 0 and "2 finished" in out and "4 of 4 cells are finished" in out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--recipe", "wanda,wandaa"), 1, "unknown recipe 'wandaa': did you mean 'wanda'?"),
        (("--sparsity", "0.5"), 1, "nothing to compare: name recipes with --recipe"),
        (("--recipe", "wanda", "--sparsity", "0.5,half"), 2, "--sparsity takes numbers with commas between"),
        (("--recipe", "wanda,,magnitude"), 2, "--recipe takes values with commas between them, got"),
        (("--recipe", "wanda", "--set", "pruner.damp"), 1, "--set takes dotted.key=value, got 'pruner.damp'"),
        (("--recipe", "wanda", "--keep", "some"), 1, "keep must be one of none, best, all, got 'some'"),
        (("--recipe", "wanda", "--resume", "--restart"), 1, "give one of the two"),
    ],
)
def test_wrong_usage_is_one_line_before_any_work(typed, tiny_llama, work, arguments, code, said):
    ended, out, err = typed("sweep", tiny_llama, *arguments)
    assert ended == code and said in " ".join(err.replace("│", " ").split()) and out == ""
    assert list(work.iterdir()) == []


def test_an_interrupt_says_what_is_kept(typed, tiny_llama, monkeypatch):
    real, calls = corridor.prune_matrix, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 14:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(corridor, "prune_matrix", interrupted)
    code, _, err = typed("sweep", tiny_llama, *GRID, *SMALL, "--output", "out")
    line = err.strip().splitlines()[-1]
    assert code == 130 and line.startswith(
        "llmprune: interrupted; 1 of 4 cells are finished and kept in out;"
    )
    assert "continue with: llmprune sweep" in line and line.endswith("--output out --resume")


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_screens_fit(typed, tiny_llama, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    arguments = ("sweep", tiny_llama, *GRID, "--set", "seed=0,1", *SMALL, "--output", "out")
    for more in (("--dry-run",), ()):
        for line in typed(*arguments, *more)[1].splitlines():
            progress = re.match(r"^(\d/8 )?\S+: |^checking", line)
            command = re.match(r"^(  )?(llmprune |score one|measure|see it|go on)", line)
            assert len(line) <= width or " " not in line.strip() or progress or command, line


def test_tables_are_of_amounts_and_methods(record):
    first, second = sweep_table.tables_of(record)
    assert first.methods == ["wanda", "best seed=1", "sparsegpt"]
    assert first.rows == [
        ["dense", "20.00", "20.00", "20.00"],
        ["0.5", "30.00", "22.00", ""],
        ["0.6", "50.00", "failed", "40.00"],
        ["2:4", "1.23e+05", "", "not yet"],
    ]
    assert first.best == {(1, 1), (2, 2), (3, 0)} and first.marked("{} *".format)[1][2] == "22.00 *"
    assert second.rows[1][1] == "0.500 ± 0.030" and not second.best
    assert "100 documents, higher is better" in second.note


def test_the_table_in_markdown_and_csv(record):
    text = sweep_table.markdown(record)
    assert "| 0.5 | 30.00 | **22.00** |  |" in text and "failed: no &lt;room> \\| left" in text
    lines = sweep_table.csv_table(record).splitlines()
    assert lines[1].startswith("dense,dense,0,,0.0,done,0.0,20.0,0.6,0.03") and len(lines) == 9
    assert "seconds" not in lines[0]


def test_the_page_is_escaped_and_links_to_the_cells(record):
    page = sweep_page.html_page(record)
    assert "a &lt;model&gt;" in page and "<model>" not in page and "no &lt;room&gt;" in page
    assert 'href="cells/wanda-0.5/report.html"' in page and 'href="cells/best seed=1-0.6' not in page
    for said in ("best at 0.5", "best at 2:4", "<strong>22.00</strong>", "<svg", "1 min 1 s in all"):
        assert said in page, said


def test_published_figures_stand_beside_the_cells(record, capsys):
    assert "Published figures" not in sweep_page.html_page(record)
    known = page_records.swept("huggyllama/llama-7b", "wikitext2")
    rows = sweeps.published_beside(known)
    assert {row["amount"] for row in rows} == {"50%", "2:4"}
    wanda = next(
        row for row in rows if (row["paper"], row["method"], row["amount"]) == ("Wanda", "wanda", "50%")
    )
    assert [(own["run"], own["value"], own["dense"]) for own in wanda["ours"]] == [
        ("wanda-0.5", 30.0, 20.0),
        ("best seed=1-0.5", 22.0, 20.0),
    ]
    assert {own["protocol"] for own in wanda["ours"]} == {"window 32, theirs 2048"}
    page = sweep_page.html_page(known)
    assert "Published figures" in page and wanda["url"] in page and "wanda-0.5" in page
    print_sweep(Screen(), known, Path("out"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "Published figures" in shown and "wanda 50% (Wanda)" in shown and "30.00 wanda-0.5" in shown


def test_a_sweep_without_scored_text_has_tables_and_no_curve(record):
    record["protocol"] |= {"ranked_by": None, "perplexity": {}}
    record["dense"]["perplexity"] = {}
    for cell in record["cells"]:
        cell.get("perplexity", {}).clear()
    page = sweep_page.html_page(record)
    assert "<svg" not in page and "0.500 ± 0.030" in page
    assert sweeps.best_of(record["cells"], None) == {}


def test_equal_perplexities_have_the_first_as_the_best(record):
    for cell in record["cells"]:
        if "perplexity" in cell:
            cell["perplexity"] = {"text": 5.0}
    assert sweeps.best_of(record["cells"], "text") == {
        "0.5": "wanda-0.5",
        "0.6": "wanda-0.6",
        "2:4": "wanda-2to4",
    }


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("no such file: /home/me/a b.txt", "no such file: a b.txt"),
        ("cannot read ~/x/y.yaml: broken", "cannot read y.yaml: broken"),
        ("see https://host/path and owner/name", "see https://host/path and owner/name"),
        ("../up/file and ./here/f", "file and f"),
    ],
)
def test_errors_are_recorded_without_local_folders(text, without):
    assert sweeps.without_paths(text) == without


def test_a_sweep_in_a_notebook(record, tmp_path, monkeypatch):
    result = SweepResult(tmp_path, record)
    assert "<caption>perplexity text" in result._repr_html_() and "no <room>" not in result._repr_html_()
    assert result.failed == {"best seed=1-0.6": "no <room> | left"} and "| dense |" in repr(result)
    frame = result.to_pandas()
    assert list(frame["name"][:2]) == ["dense", "wanda-0.5"] and frame["perplexity text"][1] == 30.0
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        ValueError, match="to_pandas needs pandas, which is not installed: pip install pandas"
    ):
        result.to_pandas()


def test_a_run_in_a_notebook(tiny_llama, calibration_tokens, tmp_path):
    result = llmprune.prune(
        tiny_llama, recipe="wanda", sparsity=0.5, calibration=calibration_tokens, output=tmp_path / "out"
    )
    assert "<caption>Result</caption>" in result._repr_html_() and "50.00%" in result._repr_html_()
    frame = result.to_pandas()
    assert len(frame) == len(result.record["matrices"]) and set(frame["sparsity"]) == {0.5}
