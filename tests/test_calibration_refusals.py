"""Calibration that cannot be used is refused in one line."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import llmprune
from llmprune.text import files as text


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"tokens": torch.ones(4, 8, dtype=torch.int32)}, r"must be int64 \[N, T\].*got int32 \[4, 8\]"),
        ({"tokens": torch.ones(4, 8)}, r"must be int64 \[N, T\].*got float32 \[4, 8\]"),
        ({"tokens": torch.ones(8, dtype=torch.int64)}, r"must be int64 \[N, T\].*got int64 \[8\]"),
        ({"tokens": torch.ones(0, 8, dtype=torch.int64)}, r"must be int64 \[N, T\].*got int64 \[0, 8\]"),
        (
            {"tokens": torch.ones(4, 1, dtype=torch.int64)},
            r"must be int64 \[N, T\] with T >= 2, got int64 \[4, 1\]",
        ),
        ({"input_ids": torch.ones(4, 8, dtype=torch.int64)}, r"no tensor 'tokens' \(it has: input_ids\)"),
        ({"tokens": torch.full((4, 8), 2048)}, r"range from 2048 to 2048, the model knows 0 to 2047"),
        ({"tokens": torch.full((4, 8), -1)}, r"range from -1 to -1, the model knows 0 to 2047"),
        (
            {"tokens": torch.ones(4, 65, dtype=torch.int64)},
            r"sequence length 65, over the model's limit of 64",
        ),
    ],
)
def test_a_wrong_token_file_is_refused(refused, work, tensors, said):
    save_file(tensors, work / "tokens.safetensors")
    refused(said, calibration="tokens.safetensors")


def test_a_damaged_or_missing_token_file_is_refused(refused, work):
    refused(r"no such token file: tokens\.safetensors", calibration="tokens.safetensors")
    (work / "tokens.safetensors").write_bytes(b"\xff" * 40)
    refused(r"tokens\.safetensors is damaged", calibration="tokens.safetensors")


@pytest.mark.parametrize(("option", "asked"), [("samples", 4), ("seqlen", 16)])
def test_ready_made_tokens_are_not_cut(refused, option, asked):
    refused(rf"exactly as it is.*got {option} {asked}; leave the option out", **{option: asked})


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (torch.ones(4, 8), r"got float32 \[4, 8\] from tokens in memory"),
        (torch.full((4, 8), 9999), r"range from 9999 to 9999"),
        ([], r"holds no text"),
        (["", "  "], r"holds no text"),
        (["too short"], r"holds \d+ tokens, 0 rows of 64"),
        ([["a", "list"]], r"must be strings, got list"),
        ([b"bytes"], r"must be strings, got bytes"),
        ([1, 2], r"must be strings, got int"),
    ],
)
def test_wrong_calibration_in_memory_is_refused(refused, tokens, said):
    refused(said, calibration=tokens)


def test_calibration_of_another_type_is_refused(refused):
    refused(r"calibration.*int", calibration=3)


SENTENCE = "The calibration text of a file has to be long enough for every row that is asked for. "


@pytest.mark.parametrize(
    ("name", "written", "said"),
    [
        (
            "a.txt",
            SENTENCE,
            r"'a\.txt' holds \d+ tokens, 0 rows of 32, and 8 are wanted; "
            r"give more text or shorter rows \(--seqlen\)",
        ),
        (
            "a.txt",
            SENTENCE * 4,
            r"'a\.txt' holds \d+ tokens, [1-7] rows of 32, and 8 are wanted; .*--samples [1-7]\)",
        ),
        ("a.txt", "", r"'a\.txt' holds no text; name another with --calibration"),
        ("a.txt", "\n \n", r"'a\.txt' holds no text"),
        ("a.txt", b"\xff\xfe\xfa", r"cannot read a\.txt"),
        ("a.jsonl", "", r"'a\.jsonl' holds no text"),
        (
            "a.jsonl",
            '{"body": "x"}\n',
            r"a\.jsonl, line 1 has no text column 'text' \(it has: body\); name it as SOURCE:column",
        ),
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y"\n', r"a\.jsonl, line 3 is not JSON"),
        (
            "a.jsonl",
            '{"text": 3}\n',
            r"line 1 has an int in column 'text' instead of text: 3; mend or remove the row, or name",
        ),
        (
            "a.jsonl",
            '{"text": {"en": "x"}}\n',
            r"line 1 has a dict in column 'text' instead of text: \{'en': 'x'\}",
        ),
        ("a.jsonl", '{"text": ["x"]}\n', r"line 1, message 1 is no \{role, content\}"),
        ("a.jsonl", '{"text": true}\n', r"line 1 has a bool in column 'text' instead of text: True"),
        ("a.jsonl", '{"text": null}\n', r"line 1 is empty \(null\) in column 'text'"),
        ("a.jsonl", '["text"]\n', r"line 1 has no text column 'text' \(it has: list\)"),
        ("a.jsonl", "[" * 100_000, r"line 1 is not JSON"),
        ("a.parquet", b"PAR1 this is none", r"cannot read a\.parquet"),
        ("a.txt.gz", b"not gzip", r"cannot read a\.txt\.gz"),
        ("a.txt.gz", gzip.compress(SENTENCE.encode() * 500)[:-30], r"cannot read a\.txt\.gz"),
    ],
)
def test_a_calibration_file_without_enough_text_is_refused(refused, work, name, written, said):
    (work / name).write_bytes(written if isinstance(written, bytes) else written.encode())
    refused(said, calibration=name, samples=8, seqlen=32)


def test_a_parquet_file_without_the_column_is_refused(refused, work):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"body": [SENTENCE] * 200, "count": list(range(200)), "holes": [None] * 200})
    pyarrow.parquet.write_table(table, work / "a.parquet")
    refused(
        r"a\.parquet has no text column 'text' \(it has: body, count, holes\); name it as SOURCE:column",
        calibration="a.parquet",
    )
    refused(
        r"a\.parquet, row 1 has an int in column 'count' instead of text: 0", calibration="a.parquet:count"
    )
    refused(r"a\.parquet, row 1 is empty \(null\) in column 'holes'", calibration="a.parquet:holes")
    assert len(list(text.file_documents("a.parquet:body"))) == 200


@pytest.mark.parametrize(
    "name", ["none.txt", "none.jsonl", "none.parquet", "none.jsonl.gz", "none.jsonl:body"]
)
def test_a_missing_calibration_file_is_refused(refused, name):
    refused(rf"no such text file: {re.escape(name.removesuffix(':body'))}", calibration=name)


def test_a_path_is_a_calibration_source(tiny_llama, work):
    (work / "a.txt").write_text(SENTENCE * 100)
    options = {"samples": 4, "seqlen": 32, "recipe": "magnitude"}
    one = llmprune.prune(tiny_llama, calibration="a.txt", output="one", **options)
    two = llmprune.prune(tiny_llama, calibration=Path("a.txt"), output="two", **options)
    assert one.record["calibration"] == two.record["calibration"]


def test_a_download_that_fails_leaves_no_cached_tokens(refused, own_caches, work):
    (work / "a.txt").write_text(SENTENCE)
    refused(r"holds \d+ tokens", calibration="a.txt", samples=8, seqlen=32)
    assert list((own_caches / "cache").rglob("*.*")) == []
