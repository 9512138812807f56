"""Texts that the dense and the pruned model write for the report: when, which, and why not."""

from __future__ import annotations

import json
import re

import pytest
from outputs import Listening, one_line
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.run import samples
from llmprune.run.samples import Wish
from llmprune.text.prompts import MOST, prompts

QUICK = {"recipe": "magnitude", "calibration": "builtin", "samples": 4, "seqlen": 32}
SCORED = {"perplexity": "builtin", "limit": 2}


@pytest.fixture(scope="module")
def written(tiny_llama, tmp_path_factory):
    """A run whose models have written three texts."""
    output = tmp_path_factory.mktemp("texts") / "out"
    return llmprune.run_model(tiny_llama, output=output, samples_text=3, **QUICK, **SCORED)


def test_both_models_go_on_with_the_same_prompts(written, tiny_llama):
    entry = written.record["samples"]
    assert [text["prompt"] for text in entry["texts"]] == list(prompts("tiny-llama", 3))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for name, folder in (("dense", tiny_llama), ("pruned", written.output)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for text in entry["texts"]:
            tokens = tokenizer(text["prompt"], return_tensors="pt")["input_ids"]
            most = min(entry["tokens"], 64 - tokens.shape[1])  # what this model was made for
            new = model.generate(tokens, do_sample=False, max_new_tokens=most)[0, tokens.shape[1] :]
            assert text[name] == tokenizer.decode(new, skip_special_tokens=True)
    assert any(text["dense"] != text["pruned"] for text in entry["texts"])


def test_they_are_in_the_record_the_report_and_the_seconds(written):
    stored = json.loads((written.output / "llmprune.json").read_text())
    assert stored["samples"] == written.record["samples"]
    seconds = stored["totals"]["seconds"]
    assert seconds["write texts"] > 0
    assert sum(v for k, v in seconds.items() if k != "total") == pytest.approx(seconds["total"], abs=0.02)
    page = (written.output / "report.html").read_text()
    assert "<h2>What they write</h2>" in page and page.count("<h3>Prompt") == 3


def test_resume_writes_what_is_missing_and_no_more(written, tiny_llama, monkeypatch):
    options = {"output": written.output, "resume": True, **QUICK, **SCORED}
    again = llmprune.run_model(tiny_llama, samples_text=3, **options)
    assert again.record["totals"]["seconds"] == written.record["totals"]["seconds"]
    fewer = llmprune.run_model(tiny_llama, samples_text=1, **options)
    assert fewer.record["samples"]["texts"] == written.record["samples"]["texts"][:1]
    none = llmprune.run_model(tiny_llama, samples_text=0, **options)
    assert none.record["samples"] == fewer.record["samples"], "0 writes none and takes none away"
    assert (
        llmprune.run_model(tiny_llama, samples_text=3, **options).record["samples"]
        == written.record["samples"]
    )


def test_a_run_that_is_stopped_while_they_are_written_goes_on(tiny_llama, tmp_path, monkeypatch):
    options = {"output": tmp_path / "out", "samples_text": 1, **QUICK, **SCORED}

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(samples, "generate", stop)
        with pytest.raises(KeyboardInterrupt) as stopped:
            llmprune.run_model(tiny_llama, **options)
    assert "complete but for the texts of its report" in stopped.value.kept and stopped.value.resumable
    record = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert record["evaluation"]["perplexity"] and "samples" not in record
    again = llmprune.run_model(tiny_llama, resume=True, **options)
    assert len(again.record["samples"]["texts"]) == 1
    assert again.record["evaluation"] == record["evaluation"]


def test_none_are_written_by_prune_and_where_none_are_wanted(tiny_llama, tmp_path):
    assert "samples" not in llmprune.prune(tiny_llama, output=tmp_path / "a", **QUICK).record
    found = llmprune.run_model(tiny_llama, output=tmp_path / "b", samples_text=0, **QUICK, **SCORED)
    assert "samples" not in found.record
    assert "What they write" not in (tmp_path / "b" / "report.html").read_text()


def skipped(model, tmp_path, given=None, **options):
    """Why a run has written none: by its record, its report and its reporter."""
    listening = Listening()
    found = llmprune.run_model(
        model, output=tmp_path / "out", samples_text=given, reporter=listening, **QUICK, **SCORED, **options
    )
    (said,) = [note for note in listening.told if "no texts in the report" in note]
    assert "No texts: " in (tmp_path / "out" / "report.html").read_text()
    return found.record["samples"]["skipped"], said


def test_a_model_that_does_not_fit_is_left_out_and_that_is_said(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(samples.devices, "free_memory", lambda device: 2**10)
    why, said = skipped(tiny_llama, tmp_path, 1)
    assert re.fullmatch(r"the whole model takes \S+ GiB of memory, and 0.0 GiB are free", why) and why in said


def test_slow_ones_are_left_out_unless_they_are_asked_for(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "DEFAULT", 2)
    monkeypatch.setattr(samples, "_LEAST", 1e-5)
    monkeypatch.setattr(samples, "_SHARE", 0.0)
    monkeypatch.setattr(samples, "_LOADED", 1e18)
    why, _ = skipped(tiny_llama, tmp_path)
    assert re.fullmatch(r"a token takes \S+ s, so that is too slow; --samples-text N writes them", why)
    monkeypatch.setattr(samples, "_LOADED", 1.0)
    options = {"output": tmp_path / "out", "resume": True, **QUICK, **SCORED}
    again = llmprune.run_model(tiny_llama, **options)
    assert again.record["samples"]["skipped"] == why, "nobody tries again without being asked"
    asked = llmprune.run_model(tiny_llama, samples_text=2, **options)
    assert len(asked.record["samples"]["texts"]) == 2


def test_the_time_to_load_counts(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "DEFAULT", 2)
    monkeypatch.setattr(samples, "_LOADED", 1.0)
    why, _ = skipped(tiny_llama, tmp_path)
    assert why.startswith("loading the models takes about ") and "--samples-text N" in why


def test_a_model_whose_code_fails_is_still_pruned_and_its_path_stays_out(tiny_llama, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(f"{tmp_path}/secret is gone")

    monkeypatch.setattr(samples, "generate", fail)
    why, said = skipped(tiny_llama, tmp_path, 1)
    assert why == "generating them failed with OSError" and "secret is gone" in said
    assert str(tmp_path) not in (tmp_path / "out" / "llmprune.json").read_text()


def test_a_model_for_very_short_texts_writes_none(make_llama, tmp_path):
    tiny = make_llama(max_position_embeddings=4)
    listening = Listening()
    found = llmprune.run_model(
        tiny,
        output=tmp_path / "out",
        samples_text=1,
        reporter=listening,
        **QUICK | {"seqlen": 4},
        **SCORED,
    )
    assert found.record["samples"]["skipped"] == "the model takes at most 4 tokens"


def test_after_a_recovery_start_and_result_stand_beside_the_dense_model(written, tiny_llama, tmp_path):
    options = {"text": "builtin", "tokens": 300, "seqlen": 32, "score": False, "recipe": "masked-finetuning"}
    found = llmprune.recover(
        written.output, teacher=tiny_llama, output=tmp_path / "out", samples_text=1, **options
    )
    (text,) = found.record["samples"]["texts"]
    before = written.record["samples"]["texts"][0]
    assert set(text) == {"prompt", "dense", "start", "pruned"}
    assert (text["dense"], text["start"]) == (before["dense"], before["pruned"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.findall("<figcaption>(dense|start|recovered|pruned)</figcaption>", page) == [
        "dense",
        "start",
        "recovered",
    ]


def test_packed_weights_that_are_rounded_have_no_texts_of_others(written, tmp_path):
    llmprune.convert(written.output, to="packed", output=tmp_path / "same")
    llmprune.convert(written.output, to="packed", values="int8", output=tmp_path / "rounded")
    same, rounded = (
        json.loads((tmp_path / name / "llmprune.json").read_text()) for name in ("same", "rounded")
    )
    assert same["samples"] == written.record["samples"] and "samples" not in rounded


@pytest.mark.parametrize("given", [-1, MOST + 1, 1.5, True, "2"])
def test_a_number_out_of_range_is_refused(given, tiny_llama, work):
    for call in (llmprune.run_model, llmprune.prune):
        with pytest.raises(ValueError) as caught:
            call(tiny_llama, output="out", samples_text=given, **QUICK)
        assert one_line(caught.value).startswith("samples_text must be a whole number")
    if type(given) is int:
        training = {"recover": "perp", "text": "builtin", "tokens": 100}
        with pytest.raises(ValueError, match="samples_text must be"):
            llmprune.run_model(tiny_llama, output="out", samples_text=given, **training, **QUICK)
    with pytest.raises(ValueError) as caught:
        llmprune.recover(tiny_llama, text="builtin", tokens=100, output="out", samples_text=given)
    assert one_line(caught.value).startswith("samples_text must be a whole number")
    assert list(work.iterdir()) == []


def test_wishes_are_met_or_not():
    two, skip = {"samples": {"texts": [{}, {}]}}, {"samples": {"skipped": "too slow"}}
    assert Wish(0, True).met({}) and Wish(2, True).met(two) and not Wish(3, True).met(two)
    assert not Wish(2, False).met({}) and Wish(2, False).met(skip) and not Wish(2, True).met(skip)


def test_prompts_are_many_and_fit_the_model():
    assert len(set(prompts("demo", MOST))) == len(set(prompts("other", MOST))) == MOST == 8
    assert not set(prompts("demo", MOST)) & set(prompts("other", MOST))
    assert not any(prompt.endswith((" ", "\n")) for prompt in prompts("demo", MOST) + prompts("x", MOST))


@pytest.mark.parametrize(("number", "writers"), [(2, ["dense", "start", "pruned"]), (4, ["start", "pruned"])])
def test_a_recovery_without_the_dense_model_has_its_texts_from_the_record(written, tmp_path, number, writers):
    options = {"text": "builtin", "tokens": 200, "seqlen": 16, "score": False, "samples_text": number}
    found = llmprune.recover(
        written.output, recipe="masked-finetuning", output=tmp_path / "out", **options
    ).record["samples"]
    assert [[key for key in text if key != "prompt"] for text in found["texts"]] == [writers] * number
    before = written.record["samples"]["texts"]
    for text, known in zip(found["texts"], before, strict=False):
        assert text["start"] == known["pruned"] and text.get("dense", known["dense"]) == known["dense"]


@pytest.mark.parametrize("before", [0, None])
def test_a_recovery_of_a_start_without_texts_writes_its_own(tiny_llama, tmp_path, before):
    """`prune` writes none; of a model that writes none the record says why."""
    start = llmprune.prune(tiny_llama, output=tmp_path / "start", samples_text=0, **QUICK).output
    if before is None:
        record = json.loads((start / "llmprune.json").read_text()) | {"samples": {"skipped": "too slow"}}
        (start / "llmprune.json").write_text(json.dumps(record))
    options = {"text": "builtin", "tokens": 200, "seqlen": 16, "score": False, "samples_text": 1}
    found = llmprune.recover(start, recipe="masked-finetuning", output=tmp_path / "out", **options)
    (text,) = found.record["samples"]["texts"]
    assert set(text) == {"prompt", "start", "pruned"}
