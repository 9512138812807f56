"""The report of a run: what it shows of which record, how large it is, and how it says a run is repeated."""

from __future__ import annotations

import copy
import json
import re
import shlex

import page_records
import pytest
from test_pages import Checked

from llmprune.recipe import loading as recipes
from llmprune.record import maps, plots, report, rerunning
from llmprune.record.grouping import grid_of


@pytest.fixture(scope="module")
def known():
    return page_records.record(page_records.dense_matrices())


@pytest.fixture(scope="module")
def page(known):
    return report.html_report(known, "out")


def sections(page):
    return re.findall("<h2>([^<]*)</h2>", page)


def text_of(page):
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page.replace("<wbr>", "").replace("<small>", " ")))


def test_it_begins_with_what_came_of_the_run(known, page):
    Checked(page)
    lead = text_of(page.partition("<nav")[0].partition("<body>")[2])
    for said in (
        "someone/a-model, 50.2% sparse",
        "perplexity wikitext2 141 windows of 2048 tokens, lower is better 5.47 6.92 +26.5%",
        "piqa acc 1838 documents, higher is better 0.780 0.760 ± 0.010 -0.020",
        "Sparsity 50.18%",
        "Size on disk 13.96 GB stored densely; 8.72 GB packed (62%)",
        "Speed, packed 1.41 x the speed of dense at 1 token, 0.93 x at 16",
        "Time 9 min 11 s 1 min 0 s of it scoring, 9.00 GB of memory at the peak",
    ):
        assert said in lead, (said, lead)
    assert sections(page) == [
        "What they write",
        "Matrices",
        "Allocation",
        "Where the time went",
        "Protocol and size",
        "Load it, repeat it",
    ]


def test_nothing_of_the_record_is_trusted(known):
    evil = copy.deepcopy(known)
    evil["model"]["source"] = evil["recipe"]["name"] = "<img src=x onerror=alert(1)>"
    evil["samples"]["texts"][0]["dense"] = "</pre><script>alert(1)</script>"
    evil["matrices"][0]["name"] = "<b>.0.x"
    made = report.html_report(evil, '"><script>')
    assert len(Checked(made).found["script"]) == 1 and "img" not in Checked(made).found
    assert "<b>.0" not in made


def test_it_is_small_also_for_models_with_many_matrices(page):
    assert len(page.encode()) < 300_000, "of 32 blocks of 7 matrices"
    experts = page_records.record(page_records.expert_matrices())
    made = report.html_report(experts, "out")
    assert len(made.encode()) < 1_000_000, "of 48 blocks of 128 experts"
    said = text_of(made)
    assert "up to 128 matrices of a kind, one of each expert" in said
    assert "model.layers.47.mlp.experts.*.down_proj" in said and "336 kinds of matrices in a block" in said


def test_experts_are_taken_together(known):
    rows = page_records.expert_matrices(blocks=2, experts=4)
    grid = grid_of(rows)
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert grid.kinds == [*kinds, "experts.gate_proj", "experts.up_proj", "experts.down_proj"]
    assert grid.blocks == ["0", "1"] and grid.largest == 4
    group = grid.groups["1", "experts.up_proj"]
    own = [row for row in rows if "layers.1.mlp.experts" in row["name"] and "up_proj" in row["name"]]
    assert list(group.matrices) == own and group.name == "model.layers.1.mlp.experts.*.up_proj.weight"
    assert group.sparsity == pytest.approx(sum(row["sparsity"] for row in own) / 4)
    assert len(group.errors) == 3 and group.error == pytest.approx(
        sum(r["relative_error"] for r in own[1:]) / 3
    )
    said = maps._said(group)
    assert "4 experts (errors" in said and "1 that no token reached" in said


@pytest.mark.parametrize(
    ("names", "kinds", "blocks"),
    [
        (["h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight"], ["attn.c_proj", "mlp.c_proj"], ["0"]),
        (["l.3.m.experts.gate_up_proj.0", "l.3.m.experts.gate_up_proj.1"], ["experts.gate_up_proj"], ["3"]),
        (["l.0.m.experts.1.w.weight", "l.0.m.shared.w.weight"], ["experts.w", "shared.w"], ["0"]),
        (["encoder.0.q.weight", "decoder.0.q.weight"], ["q"], ["encoder 0", "decoder 0"]),
        (["l.0.q.weight", "lm_head.weight"], ["q", "lm_head"], ["0", "-"]),
        (["l.0.q.weight", "l.0.a.q.weight"], ["q", "a.q"], ["0"]),
    ],
)
def test_kinds_have_short_names_and_no_two_the_same(names, kinds, blocks):
    row = {"shape": [2, 2], "sparsity": 0.5, "relative_error": None}
    grid = grid_of([{**row, "name": name} for name in names])
    assert (list(grid.kinds), list(grid.blocks)) == (kinds, blocks)
    assert sum(len(group.matrices) for group in grid.groups.values()) == len(names)


def test_every_matrix_is_in_the_maps_and_in_the_table(known, page):
    shown = page.replace("<wbr>", "")
    assert all(row["name"] in shown for row in known["matrices"])
    heats = re.findall(r'<table class="heat">.*?</table>', page, re.DOTALL)
    assert ["Sparsity" in heats[0], "Relative error" in heats[1], len(heats)] == [True, True, 2]
    assert all(len(re.findall("<td ", one)) == 224 for one in heats)
    row = known["matrices"][9]
    assert (
        f'title="block 1, v_proj: sparsity {row["sparsity"]:.4f}, relative error {row["relative_error"]:.4g}"'
        in page
    )


def test_a_map_that_says_nothing_is_a_sentence():
    made = report.html_report(page_records.record(page_records.dense_matrices(uniform=True)), "out")
    assert "Every matrix has a sparsity of 0.5000." in made
    assert len(re.findall('<table class="heat">', made)) == 1 and "Allocation" not in sections(made)


def test_what_was_not_done_is_left_out_or_said(known):
    bare = page_records.record(page_records.dense_matrices(2), scored=False)
    for key in ("samples", "speed"):
        del bare[key]
    bare["matrices"] = [{**row, "relative_error": None} for row in bare["matrices"]]
    made = report.html_report(bare, "out")
    Checked(made)
    said = text_of(made)
    assert "Not scored: made without evaluation." in said and "What they write" not in said
    assert "Speed not measured llmprune bench measures it" in said
    assert "relative error" not in said.lower()
    why = {**bare, "samples": {"skipped": "the model has no tokenizer"}}
    assert "No texts: the model has no tokenizer." in report.html_report(why, "out")


def test_texts_stand_side_by_side_after_their_prompt(page):
    texts = page[page.index("What they write</h2>") : page.index("<h2>Matrices")]
    assert re.findall("<figcaption>(.*?)</figcaption>", texts) == ["dense", "pruned"]
    given = '<span class="given">Water boils at</span>'
    assert texts.count(given) == 2 and f"{given} 100 &lt;/pre&gt; C.\ufffd" in texts


def test_the_time_is_told_by_phase(known, page):
    part = page[page.index("<h2>Where the time went") : page.index("<h2>Protocol")]
    assert re.findall(r'<th scope="row">([\w ]+)</th>', part) == ["forward", "prune", "evaluate dense"]
    assert re.findall(r"width:([\d.]+)%", part) == ["100.0", "22.5", "15.0"]


def test_a_recovery_has_its_curves(known):
    made = report.html_report(page_records.moved(known), "out")
    Checked(made)
    assert "Loss by step" in made and "Masks by step, share of all entries" in made
    assert "held out: step 0, loss 3.9" in made and "saved, step 90: step 90, loss 3.08" in made
    assert ">start</th>" in made and ">gap closed</th>" in made and "relative error" not in made
    by_block = page_records.moved(known)
    del by_block["recovery"]["curve"], by_block["recovery"]["best_step"], by_block["recovery"]["held_out"]
    by_block["recovery"]["blocks"] = [{"start": 0.5, "best": 0.4}, {"start": 0.6, "best": 0.7}]
    assert "trained: block 1, error 0.7" in report.html_report(by_block, "out")


def test_what_an_allocator_measured_is_drawn(known):
    searched = copy.deepcopy(known)
    searched["allocation"] = {
        "measure": {"block 1": 0.25, "block 2": 0.5},
        "held-out loss": {"uniform": 3.5, "slope 0.1": 3.25},
    }
    made = report.html_report(searched, "out")
    part = made[made.index("<h2>Allocation") : made.index("<h2>Where the time")]
    assert (
        "owl: measure: block 1, measure 0.5" in part and "slope 0.1" in part and "Sparsity by block" in part
    )


def test_plots_are_files_beside_the_report_and_drawn_once(known, tmp_path):
    recovered = page_records.moved(page_records.record(page_records.dense_matrices(2)))
    plots.draw(tmp_path, recovered)
    names = ["report-matrices.png", "report-training.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    (tmp_path / names[0]).write_bytes(b"kept")
    plots.draw(tmp_path, recovered)
    assert (tmp_path / names[0]).read_bytes() == b"kept"


# Repeating it


def again(name="wanda", **changed):
    """The record of a run of a shipped recipe on the demo model, and how it is repeated."""
    overrides = {"calibration.source": "builtin", "calibration.samples": 4, "calibration.sequence_length": 32}
    found = page_records.record(page_records.dense_matrices(1))
    found["recipe"] = recipes.load(name, {**overrides, **changed}).as_dict()
    found["model"] |= {"source": "demo", "revision": None}
    return found, rerunning.rerun(found)


def test_a_run_of_a_shipped_recipe_is_a_command():
    _, found = again(sparsity=0.7, seed=3)
    assert found.needed == []
    assert found.commands == [
        "llmprune run demo --recipe wanda --sparsity 0.7 --calibration builtin --samples 4 --seqlen 32 "
        "--seed 3 --perplexity wikitext2 --tasks piqa,boolq,arc_easy --eval-seqlen 2048 --limit 1838 "
        "--dtype float16 --output again"
    ]
    assert "--pattern 2:4" in again(pattern="2:4")[1].commands[0]
    assert "--sparsity" not in again(pattern="2:4")[1].commands[0]


def test_another_recipe_is_a_file():
    found = again(**{"pruner.name": "magnitude"})[1]
    assert "--recipe recipe.yaml" in found.commands[0]
    assert found.needed == ["recipe.yaml is the recipe on this page, saved under that name."]


@pytest.mark.parametrize(
    ("change", "command", "needed"),
    [
        ({"format": {"name": "packed", "values": "same"}}, "--format packed --dtype", None),
        ({"model": {"source": "mine"}}, "llmprune run MODEL ", "MODEL is the folder of mine: sha256:000"),
        ({"model": {"blocks": "a.b", "dequantized": True}}, "run demo --blocks a.b --dequantize", None),
        ({"masks": {"digest": "sha256:9"}}, "--masks masks.safetensors", "that were given: sha256:9."),
        ({"calibration": {"source": "own.txt"}}, "llmprune run", "The calibration text is a file"),
        ({"evaluation": {"perplexity": {}, "tasks": {}}}, "llmprune prune demo", None),
    ],
)
def test_what_differs_is_named(change, command, needed):
    record, _ = again()
    for key, value in change.items():
        record[key] = value if key == "evaluation" else {**record.get(key, {}), **value}
    found = rerunning.rerun(record)
    assert command in found.commands[0] and len(found.commands) == 1
    assert (needed is None) == (found.needed == []) and (needed is None or needed in found.needed[0])


def test_a_folder_that_was_converted_is_made_in_two_steps():
    record, _ = again()
    record["format"] = {"name": "packed", "values": "int8"}
    first, second = rerunning.rerun(record).commands
    assert "--format" not in first
    assert second == "llmprune convert again --to packed --values int8 --output again-converted"


def test_text_in_memory_is_not_repeated():
    record, _ = again()
    record["calibration"]["source"] = "tokens in memory"
    found = rerunning.rerun(record)
    assert found.commands == [] and "in memory" in found.needed[0]


def test_the_command_of_a_report_does_the_same_again(typed, tmp_path):
    small = ("--recipe", "dsnot", "--pattern", "2:4", "--samples", 4, "--seqlen", 32, "--seed", 1)
    scored = ("--perplexity", "builtin", "--limit", 3, "--eval-seqlen", 64)
    assert typed("run", "demo", *small, *scored, "--output", "first", "--samples-text", 1)[0] == 0
    page = (tmp_path / "first" / "report.html").read_text()
    command = re.sub("<[^>]*>", "", re.findall(r"<pre><code>(llmprune .*?)</code></pre>", page)[0])
    assert typed(*shlex.split(command)[1:])[0] == 0
    first, second = (json.loads((tmp_path / n / "llmprune.json").read_text()) for n in ("first", "again"))
    assert first["recipe"] == second["recipe"] and first["evaluation"] == second["evaluation"]
    assert (tmp_path / "first" / "masks.safetensors").read_bytes() == (
        tmp_path / "again" / "masks.safetensors"
    ).read_bytes()
