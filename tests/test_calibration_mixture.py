"""Mixtures of calibration sources: syntax, shares, order and errors."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import llmprune
from llmprune import calibration
from llmprune.calibration.tokens import read_tokens
from llmprune.model.opening import open_model
from llmprune.recipe.loading import load as load_recipe
from llmprune.text import mixture
from llmprune.text import sources as text

WORDS = "def value(self, key): return the value of a key in this table of names and numbers "


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with text and token files."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"body": f"{name} {i} {WORDS}"}) + "\n" for i in range(200))
        )
    save_file({"tokens": torch.arange(96, dtype=torch.int64).view(6, 16) + 1000}, tmp_path / "t.safetensors")
    return tmp_path


@pytest.fixture
def build(tiny_llama):
    tokenizer = open_model(tiny_llama).tokenizer

    def call(source, samples=10, length=16, seed=0):
        return calibration.build(
            source,
            tokenizer,
            calibration.CalibrationRequest(
                samples=samples, length=length, limit=64, vocabulary=2048, seed=seed
            ),
        )

    return call


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("c4=0.7+self=0.3", {"c4": 0.7, "self": 0.3}),
        ("c4 = 7 + self = 3", {"c4": 7.0, "self": 3.0}),
        ("builtin=2", {"builtin": 2.0}),
        (
            "a/b.jsonl:body=1+owner/name:text=2+t.safetensors=.5",
            {"a/b.jsonl:body": 1.0, "owner/name:text": 2.0, "t.safetensors": 0.5},
        ),
        ("x+y.txt=1+self=1", {"x+y.txt": 1.0, "self": 1.0}),
        ("lr=0.1.txt=1+self=1", {"lr=0.1.txt": 1.0, "self": 1.0}),
        ("c4", None),
        ("a+b.txt", None),
        ("runs=3/a.txt", None),
        ("lr=0.1.jsonl:body", None),
        ("lr=0.1.safetensors", None),
    ],
)
def test_a_mixture_is_told_from_a_plain_source(source, parts):
    assert mixture.parse(source) == parts
    if parts:
        assert mixture.parse(mixture.as_text(parts)) == parts


@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=6), samples=st.integers(1000, 3000))
def test_shares_are_exact_and_nearest(weights, samples):
    named = {f"s{i}": w / 8 for i, w in enumerate(weights)}
    quotas = [w * samples / sum(weights) for w in weights]
    try:
        shares = list(mixture.shares(named, samples).values())
    except ValueError:
        assert min(quotas) < 1
        return
    assert sum(shares) == samples
    assert all(int(q) <= s <= int(q) + 1 for q, s in zip(quotas, shares, strict=True))
    rounded_up = [
        w * samples % sum(weights)
        for w, q, s in zip(weights, quotas, shares, strict=True)
        if s > w * samples // sum(weights)
    ]
    others = [
        w * samples % sum(weights)
        for w, s in zip(weights, shares, strict=True)
        if s == w * samples // sum(weights)
    ]
    assert not rounded_up or not others or min(rounded_up) >= max(others), "the largest remainders"


def test_shares_of_known_weights():
    assert mixture.shares({"a": 0.7, "b": 0.3}, 128) == {"a": 90, "b": 38}
    assert mixture.shares({"a": 0.1, "b": 0.2, "c": 0.7}, 10) == {"a": 1, "b": 2, "c": 7}
    assert mixture.shares({"a": 1, "b": 1, "c": 1}, 4) == {"a": 2, "b": 1, "c": 1}


def test_a_mixture_holds_the_rows_of_its_parts_in_an_order_of_the_seed(folder, build):
    mixed = build("a.jsonl:body=0.5+t.safetensors=0.3+builtin=0.2")
    parts = {"a.jsonl:body": 5, "t.safetensors": 3, "builtin": 2}
    assert (
        mixed.details == {"parts": parts} and mixed.source == "a.jsonl:body=0.5+t.safetensors=0.3+builtin=0.2"
    )
    tokens = {tuple(row) for row in read_tokens(folder / "t.safetensors").tolist()}
    here = [tuple(row) in tokens for row in mixed.tokens.tolist()]
    assert len(here) == 10 and sum(here) == 3
    assert here != sorted(here) and here != sorted(here, reverse=True), "interleaved"
    others = {
        tuple(r)
        for name in ("a.jsonl:body", "builtin")
        for r in build(name, samples=parts[name]).tokens.tolist()
    }
    assert {tuple(row) for row in mixed.tokens.tolist()} - tokens == others
    assert torch.equal(build("a.jsonl:body=0.5+t.safetensors=0.3+builtin=0.2").tokens, mixed.tokens)
    assert build("a.jsonl:body=0.5+t.safetensors=0.3+builtin=0.2", seed=1).digest != mixed.digest


def test_every_way_to_write_a_mixture_gives_the_same(folder, tiny_llama, typed):
    options = ("--samples", 8, "--seqlen", 16, "--recipe", "magnitude")
    mixture = ("--calibration", "self=0.25+a.jsonl:body=0.75")
    code, out, err = typed("prune", tiny_llama, *mixture, *options, "--output", "one", "--json")
    assert code == 0, err
    said = (
        "self=0.25+a.jsonl:body=0.75 (2 rows of self, 6 rows of a.jsonl:body, sampled from the model at "
        "temperature 1"
    )
    assert said in " ".join(err.split())
    first = json.loads(out)["calibration"]
    assert first["parts"] == {"self": 2, "a.jsonl:body": 6} and first["temperature"] == 1.0
    weights = {"self": 0.25, "a.jsonl:body": 0.75}
    small = {"samples": 8, "seqlen": 16}
    assert (
        llmprune.prune(tiny_llama, recipe="magnitude", calibration=weights, output="two", **small).record[
            "calibration"
        ]
        == first
    )
    (folder / "own.yaml").write_text(
        "pruner: magnitude\ncalibration: {source: {self: 0.25, 'a.jsonl:body': 0.75}, samples: 8}\n"
    )
    assert (
        llmprune.prune(tiny_llama, recipe="own.yaml", seqlen=16, output="three").record["calibration"]
        == first
    )
    code, out, _ = typed(
        "prune",
        tiny_llama,
        "--set",
        "calibration.source={self: 0.25, 'a.jsonl:body': 0.75}",
        *options,
        "--json",
    )
    assert code == 0 and json.loads(out)["calibration"] == first


def test_a_local_path_stays_out_of_the_record(folder, tiny_llama):
    source = {str(folder / "a.jsonl:body"): 1, str(folder / "t.safetensors"): 1}
    record = llmprune.prune(
        tiny_llama, recipe="magnitude", calibration=source, samples=4, output="out"
    ).record
    assert (
        record["calibration"]["source"]
        == "a.jsonl:body=1+t.safetensors=1"
        == record["recipe"]["calibration"]["source"]
    )
    assert record["calibration"]["sequence_length"] == 16, "of the token file"
    assert str(folder) not in (folder / "out" / "README.md").read_text()
    assert "The calibration text is a file of that name" in (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("builtin=1+c5=1", r"unknown text source 'c5': did you mean 'c4'.*self"),
        ("builtin=1+none.txt=1", r"no such text file: none\.txt"),
        ("builtin=1+none.safetensors=1", r"no such token file: none\.safetensors"),
        (
            "builtin=0+self=1",
            r"weight of calibration source 'builtin' must be a number above 0, got '0'; a mixture is written",
        ),
        ("builtin=-1+self=1", r"'builtin' must be a number above 0, got '-1'"),
        ("builtin=much+self=1", r"'builtin' must be a number above 0, got 'much'"),
        ("builtin=nan+self=1", r"'builtin' must be a number above 0, got 'nan'"),
        ("builtin=inf+self=1", r"'builtin' must be a number above 0, got 'inf'"),
        ("builtin=+self=1", r"'builtin' must be a number above 0, got ''"),
        ("builtin=1+self", r"part 'self' of mixture 'builtin=1\+self' has no weight; .*c4=0\.7\+self=0\.3"),
        ("builtin=1+", r"has no weight"),
        ("builtin=1+builtin=2", r"names 'builtin' twice"),
        (
            "a.jsonl:body=1+./a.jsonl:body=1",
            r"files of a mixture go by their names.*a\.jsonl:body, a\.jsonl:body; rename one",
        ),
        (
            "builtin=1+t.safetensors=4",
            r"t\.safetensors holds 6 rows and the mixture takes 8 of it; lower its weight or --samples",
        ),
        ("builtin=1000+a.jsonl:body=1", r"part 'a\.jsonl:body' of the mixture gets none of 10 rows"),
        ("a.jsonl=1+builtin=1", r"a\.jsonl, line 1 has no text column 'text' \(it has: body\)"),
        ({}, r"a mapping of calibration sources needs names and weights"),
        ({"c4": "much"}, r"'c4' must be a number above 0, got 'much'"),
        ({"c4": True}, r"'c4' must be a number above 0, got True"),
        ({3: 1.0}, r"needs names and weights.*got \{3: 1\.0\}"),
        ({"builtin": 1e308, "self": 1e308, "c4": 0}, r"'c4' must be a number above 0, got 0;"),
    ],
)
def test_wrong_mixtures_are_refused(folder, tiny_llama, source, said):
    with pytest.raises(ValueError, match=said) as caught:
        llmprune.prune(
            tiny_llama, recipe="magnitude", calibration=source, samples=10, seqlen=16, output="out"
        )
    assert "\n" not in str(caught.value) and not (folder / "out").exists()


def test_lengths_of_token_files_are_not_changed(folder, tiny_llama):
    with pytest.raises(
        ValueError,
        match=r"t\.safetensors is used exactly as it is and has seqlen 16, got seqlen 32; use --seqlen 16",
    ):
        llmprune.prune(
            tiny_llama,
            recipe="magnitude",
            calibration="builtin=1+t.safetensors=1",
            samples=4,
            seqlen=32,
            output="out",
        )


def test_a_recipe_says_at_once_what_is_wrong_with_its_mixture():
    with pytest.raises(ValueError, match=r"'c4' must be a number above 0, got -1"):
        load_recipe("wanda", {"calibration.source": {"c4": -1, "self": 1}})
    with pytest.raises(ValueError, match=r"part 'self' of mixture"):
        load_recipe("wanda", {"calibration.source": "c4=1+self"})


def test_every_part_is_looked_at_before_the_first_is_read(folder, build, monkeypatch):
    monkeypatch.setattr(text, "hub_documents", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=r"no such text file"):
        build("c4=1+none.txt=1")
