"""`llmprune recover` as a user meets it: options, refusals, screens, the pages it writes."""

from __future__ import annotations

import copy
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from outputs import FILES

import llmprune
from llmprune.cli import commands, options
from llmprune.common.shipped import shipped_names
from llmprune.recipe import recovery as recipes
from llmprune.record import card, plots, repeating, report
from llmprune.record import figures as words
from llmprune.record.recovered import advice, training_rows
from llmprune.record.recovery import identity
from llmprune.run import training
from llmprune.terminal import screen
from llmprune.terminal.console import Screen

SMALL = ("--text", "builtin", "--tokens", "1k", "--seqlen", 32, "--dtype", "float32")


# Options


@pytest.mark.parametrize(
    ("given", "number"),
    [
        *(("200000", 200_000), ("2_000", 2000), ("500k", 500_000), ("2M", 2_000_000)),
        *(("1.5m", 1_500_000), ("0.7 B", 700_000_000), ("3G", 3_000_000_000), ("0.002k", 2)),
    ],
)
def test_tokens_may_have_a_suffix(given, number):
    assert options.count(given) == number


@pytest.mark.parametrize("given", ["", "M", "2x", "2kM", "1.5", "0.0001k", "1,5M", "-2M", "1e6", "٣k"])
def test_what_is_no_number_of_tokens_is_wrong_usage(given):
    with pytest.raises(typer.BadParameter, match="is no whole number such as 200000, 500k or 2M"):
        options.count(given)


def test_every_parameter_of_the_function_is_an_option():
    command = typer.main.get_command(commands.app).commands["recover"]
    offered = {parameter.name for parameter in command.params}
    told = {"reporter", "progress"}  # the terminal's
    known = set(inspect.signature(llmprune.recover).parameters) - told
    assert offered == known | {"as_json", "quiet"}


@pytest.mark.parametrize("missing", ["--text", "--tokens", "--output"])
def test_what_must_be_given(typed, missing):
    given = {"--text": "builtin", "--tokens": "2k", "--output": "out"}
    del given[missing]
    code, out, err = typed("recover", "demo", *(part for pair in given.items() for part in pair))
    assert (code, out) == (2, "") and f"Missing option '{missing}'" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--recipe", "rigle"), "unknown recipe of recovery 'rigle': did you mean 'rigl'"),
        ((), "has no masks, so it is dense; give --sparsity or --pattern"),
        (("--set", "rte.rate=1"), "unknown key of a recovery recipe 'rte': did you mean 'rate'"),
        (("--tokens", "0"), "tokens must be a whole number from 1, got 0"),
        (("--epochs", "0"), "epochs must be at least 1, got 0"),
        (("--format", "zip"), "format must be dense or packed, got 'zip'"),
        (("--recipe", "gmp", "--sparsity", 1.5), r"sparsity must be in \[0, 1\)"),
    ],
    ids=str,
)
def test_a_refusal_is_one_line_and_leaves_nothing(args, said, typed, tiny_llama, tmp_path):
    code, out, err = typed("recover", tiny_llama, *SMALL, "--output", "out", *args)
    assert code == 1 and len(err.splitlines()) == 1 and re.search(said, err), err
    assert out == "" and list(tmp_path.iterdir()) == []


def test_a_dense_model_is_pruned_while_it_is_trained(typed, tiny_llama, tmp_path):
    args = ("--recipe", "gmp", "--pattern", "2:4", "--no-score", "--set", "rate.rate=1e-3", "--output", "out")
    code, out, err = typed("recover", tiny_llama, *SMALL, *args, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["output"] == "out" and summary["totals"]["sparsity"] == 0.5
    assert summary["recovery"]["recipe"]["rate"]["rate"] == 1e-3
    assert summary["evaluation"] == {"perplexity": {}, "tasks": {}}
    assert words.method_of(summary) == "2:4, trained by gmp to 2:4"
    assert re.search(
        r"mask flips +\d+\.\d\d% of all mask entries, every flip counted, none after step \d", err
    )
    assert (
        "recovery " in err
        and "Result" in err
        and "dense" not in err.partition("Result")[2].split("weights")[0]
    )
    text = (tmp_path / "out" / "README.md").read_text()
    assert "tiny-llama pruned and trained by llmprune: 2:4, trained by gmp to 2:4." in text
    assert "tokens of builtin, pruned meanwhile" in text and "## Recipe" not in text
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (True, "the training is kept as it was last saved, which it is every 5 minutes; "),
        (False, "the training was not saved yet and will begin again; "),
    ],
)
def test_an_interrupted_training_offers_to_go_on(saved, said, typed, finished, tmp_path, monkeypatch):
    real, steps = training.Training._advance, []

    def advance(self, loop):
        steps.append(loop.step)
        real(self, loop)
        if len(steps) == 2:
            raise KeyboardInterrupt

    args = ("recover", finished.output, *SMALL, "--recipe", "perp", "--no-score", "--output", "out")
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_advance", advance)
        patch.setattr(training, "_SAVE_EVERY", -1.0 if saved else 1e9)
        code, _, err = typed(*args)
    assert code == 130 and err.startswith(f"llmprune: interrupted; {said}continue with: llmprune recover ")
    assert err.endswith("--output out --resume\n") and len(err.splitlines()) == 1
    assert typed(*args)[0] == 1, "an unfinished training is not begun anew unasked"
    code, out, err = typed(*args, "--resume")
    assert (code, err) == (0, "") and ("2 of 3 steps are done" in out) == saved
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# The record


def test_the_record_of_a_recovery(recovered, finished):
    record, before = recovered.record, finished.record
    assert set(record) == set(before) | {"recovery"}
    for key in ("model", "recipe", "calibration"):
        assert record[key] == before[key]
    entry = record["recovery"]
    assert set(entry) == {
        *("recipe", "text", "tokens", "steps", "asked", "start", "teacher"),
        *("rates", "rate", "best_step", "held_out", "seconds", "curve"),
    }
    assert (entry["start"]["source"], entry["teacher"]["source"]) == ("my-model", "tiny-llama")
    assert set(entry["text"]) == {"source", "sequences", "sequence_length", "seed", "digest", "held_out"}
    assert entry["asked"] == {"tokens": 2000, "epochs": 1} and entry["text"]["held_out"] == 3
    assert set(entry["start"]) == {"source", "digest", "masks", "sparsity"}
    assert {tuple(row) for row in entry["curve"]} == {
        ("step", "loss", "held_out_loss", "flipped", "sparsity")
    }
    assert entry["curve"][-1]["step"] == entry["steps"] == 2000 // (32 * 8)
    score = record["evaluation"]["perplexity"]["builtin"]
    assert set(score) == {"dense", "start", "pruned", "protocol"}
    assert score["dense"] == before["evaluation"]["perplexity"]["builtin"]["dense"]
    assert score["start"] == before["evaluation"]["perplexity"]["builtin"]["pruned"]
    assert {"dense", "start", "pruned", "stderr"} == set(
        record["evaluation"]["tasks"]["demo_continuation"]["acc"]
    )
    seconds = record["totals"]["seconds"]
    scored = sum(seconds[f"evaluate {which}"] for which in ("dense", "start", "pruned"))
    assert seconds["total"] > scored + seconds["train"]
    assert all(row["steps"] == ["recover-best"] and row["pruner"] == "wanda" for row in record["matrices"])


def test_a_second_recovery_keeps_the_first_in_its_record(recovered, tiny_llama, tmp_path):
    options = {"text": "builtin", "tokens": 600, "seqlen": 32, "score": False}
    again = llmprune.recover(recovered.output, recipe="perp", output=tmp_path / "out", **options).record
    (first,) = again["recovery"]["earlier"]
    entry = json.loads((recovered.output / "llmprune.json").read_text())["recovery"]
    assert first == {key: value for key, value in entry.items() if key != "curve"}
    assert "earlier" not in identity(again)["recovery"]
    assert words.method_of(again).endswith("(recipe wanda), recovered by recover-best, then perp")
    assert "START is the model that was trained, called my-model: sha256:" in card.model_card(again, "x")


def test_without_the_dense_model_its_scores_are_those_of_the_record(finished, tmp_path):
    options = {"text": "builtin", "tokens": 600, "seqlen": 32, "perplexity": "builtin", "limit": 4}
    known = llmprune.recover(finished.output, recipe="perp", output=tmp_path / "a", **options).record
    entry = known["evaluation"]["perplexity"]["builtin"]
    assert entry["dense"] == finished.record["evaluation"]["perplexity"]["builtin"]["dense"]
    seconds = known["totals"]["seconds"]
    assert "evaluate start" in seconds and "evaluate dense" not in seconds
    options |= {"limit": 3, "output": tmp_path / "b"}
    other = llmprune.recover(finished.output, recipe="perp", **options)
    assert other.record["evaluation"]["perplexity"]["builtin"]["dense"] is None
    (row,) = words.score_rows(other.record)
    assert (row.dense, row.gap) == ("none", "") and re.fullmatch(r"[+-]\d+\.\d%", row.change)


def test_a_dense_model_trained_dense_is_a_control(tiny_llama, tmp_path):
    options = {"text": "builtin", "tokens": 600, "seqlen": 32, "perplexity": "builtin", "limit": 2}
    result = llmprune.recover(
        tiny_llama, recipe="masked-finetuning", sparsity=0, output=tmp_path / "out", **options
    )
    entry = result.record["evaluation"]["perplexity"]["builtin"]
    assert entry["dense"] == entry["start"] and result.record["totals"]["zeros"] == 0
    head, rows = words.score_table(result.record)
    assert head == ("", "dense", "trained", "change", "") and len(rows[0]) == 5
    assert words.method_of(result.record) == "dense, trained by masked-finetuning"
    assert re.search(r"\d dense, \S+ trained \(", repr(result)) and not re.search(r"\d start, ", repr(result))
    assert card.model_card(result.record, "x").count("--sparsity 0 ") == 1


# Scores in words


def scores(dense, start, after, **task):
    protocol = {"windows": 2, "window": 8}
    perplexity = {"t": {"dense": dense, "start": start, "pruned": after, "protocol": protocol}}
    if task:
        entry = {"dense": dense, "start": start, "pruned": after, "stderr": task.pop("stderr")}
        return {"perplexity": {}, "tasks": {"t": {"acc": entry, "protocol": {"documents": 200, **task}}}}
    return {"perplexity": perplexity, "tasks": {}}


@pytest.mark.parametrize(
    ("evaluation", "change", "gap"),
    [
        (scores(10.0, 30.0, 15.0), "-50.0%", "75%"),
        (scores(10.0, 30.0, 9.0), "-70.0%", "105%"),
        (scores(10.0, 30.0, 33.0), "+10.0%", "-15%"),
        (scores(10.0, 30.0, 30.0), "+0.0%", "0%"),
        (scores(10.0, 10.0, 9.0), "-10.0%", "none"),
        (scores(10.0, 9.0, 8.0), "-11.1%", "none"),
        (scores(None, 30.0, 15.0), "-50.0%", ""),
        (scores(0.8, 0.4, 0.7, stderr=0.03), "+0.300", "75%"),
        (scores(0.8, 0.4, 0.41, stderr=0.03), "+0.010", "2%"),
        (scores(0.50, 0.48, 0.49, stderr=0.03), "+0.010", "unsure"),
        (scores(0.4, 0.5, 0.45, stderr=0.03), "-0.050", "none"),
        (scores(0.8, 0.4, None, stderr=None), "not comparable", ""),
        (scores(9.0, 3.0, 6.0, stderr=0.1, higher_is_better={"acc": False}), "+3.000", "none"),
        (scores(3.0, 9.0, 6.0, stderr=0.1, higher_is_better={"acc": False}), "-3.000", "50%"),
        (scores(3.0, 9.0, 6.0, stderr=0.1, higher_is_better={"acc": None}), "-3.000", ""),
    ],
)
def test_the_gap_that_was_closed(evaluation, change, gap):
    (row,) = words.score_rows({"recovery": {}, "evaluation": evaluation})
    assert (row.change.removesuffix(", within its error"), row.gap) == (change, gap)
    head, (cells,) = words.score_table({"recovery": {}, "evaluation": evaluation})
    note = "; a change within its error" if change in ("+0.010", "-0.050") else ""
    assert len(head) == len(cells) and cells[-1] == row.note + note
    assert ("gap closed" in head) == (row.start != row.dense)


# Screens


def test_the_screen_says_what_was_done_and_what_to_do_next(recovered, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    screen.print_result(Screen(), recovered.record, recovered.output)
    out, err = capsys.readouterr()
    entry, score = recovered.record["recovery"], recovered.record["evaluation"]["perplexity"]["builtin"]
    figures = r" +".join(rf"{score[key]:.2f}" for key in ("dense", "start", "pruned"))
    for said in (
        r"^ +dense +start +recovered +change +gap closed$",
        rf"^perplexity builtin +{figures} +[+-]\d+\.\d% +",
        r"^recovery +recover-best\. Masked fine-tuning with the dense model as teacher",
        r"^trained +kept \+ norms; loss 0\.5 next-token \+ 0\.5 kd; masks stay$",
        r"^from +my-model$",
        r"^teacher +tiny-llama$",
        rf"^text +{entry['text']['sequences']} x 32 tokens of builtin$",
        r"^tokens +1,792 in 7 steps of 8 x 32$",
        rf"^learning rate +{entry['rate']:g}, by the held-out loss of a short trial of each \(0\.0003: ",
        rf"^held-out loss +{entry['held_out']['start']:.4f} at the start, ",
        r"^sparsity +\d+\.\d+% of the pruned matrices",
        r"^output +.*my-model \(open report\.html for the curves and every matrix\)$",
        r"^pack it +llmprune convert .*my-model --to packed",
    ):
        assert re.search(said, out, re.M), said
    assert err == "" and "\x1b" not in out


@pytest.mark.parametrize("width", [40, 80])
def test_the_screen_fits_its_width(width, recovered, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    screen.print_result(Screen(), recovered.record, recovered.output)
    table, _, steps = capsys.readouterr().out.partition("load it")
    assert all(len(line) <= width or " " not in line.strip() for line in table.splitlines()), table
    assert "llmprune bench" in steps
    row = "perplexity builtin  " if width == 80 else "perplexity builtin\n  dense "
    assert row in table


def test_the_best_step_tells_what_to_do_next(recovered):
    record = copy.deepcopy(recovered.record)
    record["recovery"] |= {"best_step": 0, "rate": 3e-4}
    assert "--set rate.rate=0.0001 --set rates=[]" in advice(record)
    assert recipes.load("recover-best", {"rate.rate": 1e-4, "rates": []}).rates == ()
    rows = dict(training_rows(record))
    assert rows["held-out loss"].endswith("lower at none of 7 steps")
    record["recovery"]["best_step"] = 7
    assert "more --tokens may lower it" in advice(record)
    record["recovery"]["best_step"] = 6
    assert advice(record) == ""
    record["recovery"]["rates"][0][1] = -1.0
    assert "(0.0003: diverged, 0.001: " in dict(training_rows(record))["learning rate"]


def test_a_result_prints_as_a_few_lines(recovered):
    text = repr(recovered)
    assert len(text.splitlines()) < 18 and "sha256" not in text and "curve" not in text
    assert re.search(r"builtin +\d+\.\d\d dense, \d+\.\d\d start, \d+\.\d\d recovered \([+-]\d", text)
    assert "recovered by recover-best" in text and "held-out loss" in text


# Card and report


def test_the_card_says_that_it_was_trained(recovered):
    text = (recovered.output / "README.md").read_text()
    entry = recovered.record["recovery"]
    assert "without retraining" not in text
    assert (
        "pruned and trained by llmprune: wanda, unstructured (recipe wanda), recovered by recover-best."
        in text
    )
    assert "It was trained on 1,792 tokens of builtin, its masks kept." in text
    assert "| | dense | start | recovered | change | gap closed | |\n|---|---|---|---|---|---|---|\n" in text
    assert f"at step {entry['best_step']} of 7" in text and "| teacher | tiny-llama |" in text
    assert entry["text"]["digest"] in text and entry["start"]["digest"] in text
    assert "Dense and pruned were measured alike" not in text and "All were measured alike" in text
    folded = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(folded[0]) == json.loads(json.dumps(entry["recipe"]))
    assert yaml.safe_load(folded[1]) == recovered.record["recipe"]
    for page in (text, (recovered.output / "report.html").read_text()):
        assert str(recovered.output.parent) not in page and "/tmp/" not in page


def test_the_report_has_curves_recipe_and_how_to_repeat_it(recovered):
    page = report.html_report(recovered.record, "my-model")
    assert "<h2>Training</h2>" in page and "Loss by step" in page
    command = "recover START --recipe recover-best --text builtin"
    assert command in re.sub("</?span>", "", page)
    assert ">gap closed</th>" in page and "The recipe of the training with every default" in page
    assert "relative error" not in page, "a trained matrix has none"
    assert "http://" not in page and "https://" not in page


@pytest.fixture(scope="module")
def by_blocks(finished, tiny_llama, tmp_path_factory):
    """That model trained a block at a time."""
    options = {"teacher": tiny_llama, "text": "builtin", "tokens": 600, "seqlen": 32, "score": False}
    return llmprune.recover(
        finished.output, recipe="ebft", output=tmp_path_factory.mktemp("blocks") / "out", **options
    )


def test_training_block_by_block_is_told_by_block(by_blocks, capsys):
    entry = by_blocks.record["recovery"]
    assert len(entry["blocks"]) == 2 and "curve" not in entry
    rows = dict(training_rows(by_blocks.record))
    assert rows["trained"] == "kept, a block at a time; loss block; masks stay"
    assert rows["learning rate"] == "for each block one of 0.0025, 0.008, 0.025, by a short trial"
    assert re.fullmatch(
        r"\S+ at the start, \S+ trained, in the mean of 2 blocks; lower in \d", rows["held-out error"]
    )
    assert advice(by_blocks.record) == ""
    screen.print_result(Screen(), by_blocks.record, by_blocks.output)
    assert "open report.html for the curves" in capsys.readouterr().out
    assert plots.block_plot(entry["blocks"]).startswith(b"\x89PNG")
    assert "held-out error" in report.html_report(by_blocks.record, "x")
    assert "held-out error" in card.model_card(by_blocks.record, "x") and "held-out error" in repr(by_blocks)


def test_a_finished_one_is_resumed_at_once(by_blocks, finished, tiny_llama):
    options = {"teacher": tiny_llama, "text": "builtin", "tokens": 600, "seqlen": 32, "score": False}
    again = llmprune.recover(finished.output, recipe="ebft", output=by_blocks.output, resume=True, **options)
    assert (
        again.record["recovery"] == json.loads((by_blocks.output / "llmprune.json").read_text())["recovery"]
    )


@pytest.mark.parametrize("width", [40, 80, 140])
def test_a_dry_run_prints_the_memory_by_part_and_writes_nothing(
    width, typed, tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", str(width))
    args = (
        "recover",
        tiny_llama,
        *SMALL,
        "--recipe",
        "gmp",
        "--sparsity",
        0.5,
        "--output",
        "out",
        "--dry-run",
    )
    code, out, err = typed(*args)
    assert (code, err) == (0, "") and list(tmp_path.iterdir()) == []
    assert all(len(line) <= width or " " not in line.strip() for line in out.splitlines()), out
    assert "Plan, nothing was written" in out and re.search(r"memory\s+about \d+\.\d MB of", out)
    assert re.search(r"activations\s+\d+\.\d MB", out)
    summary = json.loads(typed(*args, "--json")[1])
    assert summary["memory_bytes"] == sum(summary["memory_bytes_by_part"].values()) > summary["weights"]
    assert (summary["output"], summary["recipe"]["name"], summary["steps"]) == ("out", "gmp", 3)
    assert typed(*args, "--quiet") == (0, "", "")


def test_the_curves_are_drawn(recovered):
    moving = copy.deepcopy(recovered.record["recovery"])
    moving["recipe"]["rule"] = {"name": "magnitude"}
    sizes = []
    for entry in (
        recovered.record["recovery"],
        moving,
        {**moving, "held_out": {"start": None, "best": None}},
    ):
        picture = plots.curve_plot(entry)
        assert picture.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(picture[16:20], "big"))
    assert sizes[0] < sizes[1] == sizes[2], "flips and sparsity stand beside, where masks move"


# Repeating it


def test_a_recovery_of_the_demo_is_repeated_by_its_card(typed, tmp_path):
    args = ("--recipe", "wanda", "--samples", 4, "--seqlen", 32, "--output", "start")
    assert typed("prune", "demo", *args)[0] == 0
    training = ("--recipe", "perp", "--set", "batch=4", *SMALL, "--seed", 3, "--no-score")
    assert typed("recover", "start", *training, "--output", "out")[0] == 0
    record = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    (tmp_path / repeating.RECIPE_FILE).write_text(card.as_yaml(record["recovery"]["recipe"]))
    (tmp_path / repeating.PRUNING_FILE).write_text(card.as_yaml(record["recipe"]))
    found = repeating.repetition(record)
    assert [command.split()[1] for command in found.commands] == ["prune", "recover"]
    assert all(command in (tmp_path / "out" / "README.md").read_text() for command in found.commands)
    for command in found.commands:
        extra = ("--no-score",) if "recover" in command else ()
        assert typed(*shlex.split(command)[1:], *extra)[0] == 0, command
    again = json.loads((tmp_path / "again" / "llmprune.json").read_text())
    assert again["recovery"]["text"] == record["recovery"]["text"]
    assert again["recovery"]["curve"] == record["recovery"]["curve"]
    for name in ("masks.safetensors", "model-00002-of-00007.safetensors", "model-00007-of-00007.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.parametrize("name", shipped_names("recipes", "recovery"))
def test_a_recipe_of_a_record_is_a_recipe_file(name, tmp_path):
    recipe = recipes.load(name, {"seed": 5})
    file = tmp_path / "own.yaml"
    file.write_text(card.as_yaml(recipe.as_dict()))
    assert recipes.load(str(file)).as_dict() == recipe.as_dict() | {"name": "own"}
    assert repeating._named(json.loads(json.dumps(recipe.as_dict()))) == ["--recipe", name, "--seed", "5"]
    changed = recipe.as_dict() | {"batch": 3}
    assert repeating._named(changed) == ["--recipe", "recovery.yaml"]


@pytest.mark.parametrize(
    ("change", "command", "needed"),
    [
        ({"source": "tokens in memory"}, None, "The text was given in memory"),
        ({"source": "own.jsonl"}, "--text own.jsonl", "The text is a file of that name"),
        ({"source": "rows.safetensors"}, "--tokens 2000 ", "The text is a file of that name"),
    ],
)
def test_what_must_be_at_hand(change, command, needed, recovered):
    record = copy.deepcopy(recovered.record)
    record["recovery"]["text"] |= change
    found = repeating.repetition(record)
    assert any(needed in line for line in found.needed)
    assert not found.commands if command is None else command in found.commands[-1]
    assert command is None or "llmprune recover START " in found.commands[-1]


def test_a_start_of_the_hub_is_named(recovered):
    record = copy.deepcopy(recovered.record)
    record["model"] |= {"source": "me/base", "revision": "abc"}
    first, second = repeating.repetition(record).commands
    assert first == "llmprune prune me/base --revision abc --recipe pruning.yaml --output pruned"
    assert second.startswith("llmprune recover pruned ") and "--teacher tiny-llama" in second
    record["recipe"] |= {"pruner": {"name": "recover-best"}}
    record["recipe"]["calibration"] = {"source": "none"}
    record["recovery"]["aim"] = {"pattern": "unstructured", "sparsity": 0.75}
    record["format"] = {"name": "packed", "values": "same"}
    (only,) = repeating.repetition(record).commands
    assert only.startswith("llmprune recover me/base ") and "--sparsity 0.75 " in only
    assert "--format packed" in only


# The documentation


DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_every_key_of_the_record_is_in_the_page_on_the_folder(recovered, by_blocks):
    text = (DOCS / "output-folder.md").read_text().partition("### The entry recovery")[2]
    entries = (recovered.record["recovery"], by_blocks.record["recovery"])
    for key in {key for entry in entries for key in entry} | {"aim", "earlier"}:
        assert f"`recovery.{key}`" in text or f"`.{key}`" in text, key
    for key in recovered.record["recovery"]["curve"][0]:
        assert f"`{key}`" in text, key


def test_every_key_of_a_recipe_is_in_the_recipe_reference():
    text = (DOCS / "recipe.md").read_text().partition("## Recipes of recover")[2]
    known = recipes.load().as_dict()
    for key, value in known.items():
        if key not in ("name", "chosen"):
            assert f"| `{key}` |" in text, key
        if key in ("numbers", "rate", "optimizer", "soup"):
            assert all(f"`{inner}`" in text for inner in value), key


def test_pruning_and_training_as_one_job(typed, tiny_llama, tmp_path):
    training = ("--recover", "perp", "--text", "builtin", "--tokens", "0.6k")
    scoring = ("--perplexity", "builtin", "--limit", 2)
    how = ("--recipe", "wanda", "--samples", 4, "--seqlen", 32, "--output", "out")
    code, out, err = typed("run", tiny_llama, *training, *scoring, *how)
    assert (code, err) == (0, "") and re.search(r"^ +dense +start +recovered", out, re.M)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out-pruned"}
    code, out, err = typed("run", tiny_llama, "--tokens", "2k", *how)
    assert code == 1 and err == (
        "llmprune: tokens is for training after pruning, and no recipe to train by was given; add --recover "
        "NAME, or leave tokens out\n"
    )


def test_a_dry_run_of_both_plans_both(typed, tiny_llama, tmp_path):
    args = (
        "--recipe",
        "magnitude",
        "--sparsity",
        "0.75",
        "--samples",
        "4",
        "--seqlen",
        "32",
        "--output",
        "out",
    )
    more = ("--recover", "masked-finetuning", "--text", "builtin", "--tokens", "2k", "--dry-run")
    code, out, _ = typed("run", tiny_llama, *args, *more)
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert "then training by recipe masked-finetuning" in out and "bytes per weight" in out
    learned = ("--pattern", "2:4", "--recover", "maskllm", "--text", "builtin", "--tokens", "2k", "--dry-run")
    assert typed("run", tiny_llama, "--recipe", "magnitude", *args[4:], *learned)[0] == 0


def test_what_training_cannot_do_is_said_before_anything_is_pruned(typed, tiny_llama, tmp_path, monkeypatch):
    args = ("--recipe", "magnitude", "--samples", 4, "--seqlen", 32, "--output", "out")
    training = ("--text", "builtin", "--tokens", "2k", "--recover")
    code, _, err = typed("run", tiny_llama, *args, *training, "maskllm")
    assert code == 1 and "patterns are learned for N:M masks, got pattern unstructured" in err
    code, _, err = typed("run", tiny_llama, *args, "--set", "pattern=2:4", *training, "maskllm", "--dry-run")
    assert (code, err) == (0, "")
    monkeypatch.setattr("llmprune.run.lesson.devices.available_memory", lambda: 10**8)
    code, _, err = typed("run", tiny_llama, *args, *training, "perp")
    assert code == 1 and "training needs about" in err
    assert list(tmp_path.iterdir()) == []
