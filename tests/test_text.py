"""Text is read and tokenised in pieces: the tokens of the whole, no more read than is needed, what is no text
refused.
"""

import gzip
import io
import itertools
import json
import os
import pickle
import random
import re
import signal
import threading
import time
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT
from tokenizers_of_all_kinds import KINDS, gpt2, nasty, prose, unigram, word_piece, wrapped

import llmprune
from llmprune.calibration import CalibrationRequest, build, packing
from llmprune.evaluation.perplexity import windows
from llmprune.machine import device as devices
from llmprune.text import files as textfiles
from llmprune.text import sources as text
from llmprune.text import tokenisation

CASES = int(os.environ.get("LLMPRUNE_TEXT_CASES", "10"))


@pytest.fixture
def small(monkeypatch):
    """Windows so small that a short text has many."""
    for name, value in {
        "PIECE": 1500,
        "OVERLAP": 400,
        "MARGIN": 100,
        "STRETCH": 100,
        "LONGEST": 6000,
    }.items():
        monkeypatch.setattr(tokenisation, name, value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def byte_level():
    return wrapped(gpt2())


def rows_of(samples, length, seed=0):
    return CalibrationRequest(samples=samples, length=length, vocabulary=700, seed=seed)


def broken_up(rng, whole):
    at = 0
    while at < len(whole):
        size = rng.choice([0, 1, 3, 50, 700, 5000])
        yield whole[at : at + size]
        at += size


def read(pieces, tokenizer, **options):
    return np.concatenate(list(tokenisation.tokens_of(pieces, tokenizer, "the text", **options))).tolist()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_tokens_of_pieces_are_those_of_the_whole(kind, small):
    valid = ROOT.parent / "shared" / "data" / "wikitext-2" / "valid.txt"
    tokenizer, english = (
        wrapped(kind()),
        valid.read_text() if valid.is_file() else prose(random.Random(0), 1_100_000),
    )
    refused = 0
    for seed in range(CASES):
        rng = random.Random(seed)
        size = rng.choice([500, 1500, 3000, 20000])
        whole = nasty(rng, size) if seed % 3 else english[seed * 20_000 % 1_000_000 :][:30_000]
        for special in (True, False):
            expected = tokenizer(whole, add_special_tokens=special, verbose=False)["input_ids"]
            try:
                assert read(broken_up(rng, whole), tokenizer, special=special) == expected, (seed, special)
            except ValueError as error:
                assert "no place where the tokenizer surely splits" in str(error) and seed % 3
                refused += 1
    assert refused <= 4 * CASES / 10


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_windows_of_usual_size_give_the_tokens_of_the_whole(kind):
    tokenizer, rng = wrapped(kind()), random.Random(5)
    whole = prose(rng, 150_000) + nasty(rng, 50_000) + "\r\n" + prose(rng, 70_000)
    assert read([whole], tokenizer) == tokenizer(whole, verbose=False)["input_ids"]


@pytest.mark.parametrize("one", ["a", " ", "\n", "1", "ab", "哈", "😀", "\u0301", ". "])
def test_what_repeats_itself_is_cut_rightly_or_refused(small, one, byte_level):
    for tokenizer in (byte_level, wrapped(KINDS[3]())):
        whole = "The text: " + one * (15_000 // len(one)) + " and its end."
        try:
            found = read([whole], tokenizer)
        except ValueError as error:
            assert "no place" in str(error)
        else:
            assert found == tokenizer(whole, verbose=False)["input_ids"]


def test_a_stretch_without_a_place_to_cut_is_refused(small):
    for kind in (unigram, word_piece):
        with pytest.raises(
            ValueError,
            match=r"^the text: the [\d,]+ characters from character 1 on hold no place.*spaces or line "
            r"breaks",
        ):
            read(["abcdefg" * 3000], wrapped(kind()))


def test_an_added_token_that_swallows_white_space_is_not_cut_from_it(small):
    tokenizer = wrapped(KINDS[1]())  # <mask> takes all white space before it
    before, after = prose(random.Random(1), 2000), "<mask> and more"
    whole = before + " " * 3000 + after
    assert read([whole], tokenizer) == tokenizer(whole, verbose=False)["input_ids"]
    with pytest.raises(ValueError, match="no place"):
        read([before + " " * 20_000 + after], tokenizer)


class Slow:
    """A tokenizer written in Python: it does not tell where its tokens stand."""

    all_special_ids = (0,)

    def __init__(self):
        self.sizes = []

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}
        self.sizes.append(len(text))
        return {"input_ids": [0] * add_special_tokens + [1 + ord(c) % 50 for c in text]}


def test_a_tokenizer_written_in_python_takes_a_text_whole_or_refuses_it(small, monkeypatch):
    monkeypatch.setattr(tokenisation, "WHOLE", 5000)
    whole = prose(random.Random(1), 5000)
    assert read([whole[:3000], whole[3000:]], slow := Slow()) == Slow()(whole)["input_ids"]
    assert slow.sizes[-1] == 5000
    with pytest.raises(
        ValueError,
        match=r"^the text is longer than 5,000 characters, and tokenizer Slow can only take a text whole",
    ):
        read([whole, "x"], Slow())


def counting(tokenizer, monkeypatch):
    """The sizes of what the tokenizer is given."""
    sizes, real = [], type(tokenizer)._encode_plus

    def encode(self, text, *args, **options):
        sizes.append(sum(map(len, text)) if isinstance(text, list) else len(text))
        return real(self, text, *args, **options)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", encode)
    return sizes


def test_no_more_is_read_than_is_needed_and_never_much_at_once(folder, monkeypatch, byte_level):
    whole = prose(random.Random(2), 1_200_000)
    (folder / "long.txt").write_text(whole)
    lines = [json.dumps({"text": whole[at : at + 900]}) for at in range(0, len(whole), 900)]
    (folder / "long.jsonl").write_text("\n".join([*lines, json.dumps({"text": whole})]))
    sizes = counting(byte_level, monkeypatch)
    most = tokenisation.PIECE + tokenisation.OVERLAP

    def seen(work):
        sizes.clear()
        work()
        assert max(sizes) <= most
        return sum(sizes)

    def calibrate(name):
        return lambda: build(name, byte_level, rows_of(4, 64))

    def score(limit):
        return lambda: windows(text.evaluation_text("long.txt"), byte_level, 64, limit, 700, "long.txt")

    assert seen(calibrate("long.txt")) <= 3 * most
    assert seen(calibrate("long.jsonl")) <= 3 * most
    assert seen(score(5)) <= 3 * most
    assert len(whole) < seen(score(None)) < 1.2 * len(whole)


def test_memory_stays_a_small_part_of_what_the_whole_would_take(folder, byte_level):
    (folder / "long.txt").write_text(prose(random.Random(3), 2_000_000))
    with devices.PrivateMemory() as memory:
        before = memory.peak
        windows(text.evaluation_text("long.txt"), byte_level, 64, None, 700, "long.txt")
        time.sleep(0.05)
    if memory.peak is not None:
        assert memory.peak - before < 120_000_000, "2 MB at once take 400 MB"


def test_calibration_rows_are_those_of_the_whole_text(folder, byte_level):
    rng = random.Random(4)
    documents = [prose(rng, rng.choice([0, 30, 900, 3000])) for _ in range(150)] + [
        prose(rng, 200_000),
        prose(rng, 40),
    ]
    (folder / "a.txt").write_text("".join(documents))
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in [*documents, " \n"]))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), folder / "a.parquet")
    for name, texts in (
        ("a.txt", [(folder / "a.txt").read_text()]),
        ("a.jsonl", documents),
        ("a.parquet", documents),
        (documents, documents),
    ):
        tokens = list(
            itertools.chain.from_iterable(
                byte_level(t, verbose=False)["input_ids"] for t in texts if t.strip()
            )
        )
        for samples, length in ((4, 32), (200, 128)):
            rows = torch.tensor(tokens[: 8 * samples * length])
            rows = rows[: len(rows) // length * length].view(-1, length)
            expected = rows[
                torch.randperm(len(rows), generator=torch.Generator().manual_seed(7))[:samples].sort().values
            ]
            found = build(name, byte_level, rows_of(samples, length, seed=7)).tokens
            assert torch.equal(found, expected), (name, samples)


def test_evaluation_windows_are_those_of_the_whole_text(folder, shared, byte_level):
    path = shared / "data" / "wikitext-2" / "test.txt"
    expected = torch.tensor(byte_level(path.read_text(), verbose=False)["input_ids"])
    for limit in (None, 1, 700):
        found = windows(text.evaluation_text(str(path)), byte_level, 128, limit, 700, "test.txt")
        assert torch.equal(found, expected[: len(expected) // 128 * 128].view(-1, 128)[:limit])


def test_sigterm_ends_the_reading_soon(byte_level):
    endless = itertools.repeat(prose(random.Random(1), 10_000))

    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    timer = threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGUSR1))
    timer.start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            tokenisation.first_tokens(tokenisation.tokens_of(endless, byte_level, "x"), 10**8)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - started < 5


# What is no text

ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as _archive:
    _archive.writestr("a.txt", "words " * 100)
BINARY = {
    "gzip data": gzip.compress(b"words " * 100),
    "a zip archive": ZIP.getvalue(),
    "a pickle": pickle.dumps({"text": "words"}, protocol=4),
    "a PNG image": b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR",
    "a program": b"\x7fELF\x02\x01\x01" + b"\0" * 9,
    "a GGUF model": b"GGUF\x03\0\0\0",
    "a PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "UTF-16 text": "words of a text".encode("utf-16"),
    "binary (zero bytes among its first)": b"words\0words",
    "not UTF-8 (byte 0xe9 at 3)": "caf\u00e9 noir".encode("latin-1"),
}


@pytest.mark.parametrize("kind", BINARY)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_binary_content_is_refused_by_its_first_bytes(folder, tiny_llama, kind, name):
    data = BINARY[kind]
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    said = (
        rf"^cannot read {re.escape(name)}: it is {re.escape(kind)}.*; "
        r"calibration and evaluation take UTF-8 text in \.txt"
    )
    with pytest.raises(ValueError, match=said):
        llmprune.prune(tiny_llama, calibration=name, recipe="magnitude", output="out")
    with pytest.raises(ValueError, match=said):
        llmprune.evaluate(tiny_llama, perplexity=[name])


def test_a_parquet_file_under_another_name_is_refused(folder):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["words"]}), folder / "a.txt")
    with pytest.raises(ValueError, match=r"it is a parquet file"):
        text.check_calibration("a.txt")


def test_text_that_only_begins_like_a_format_is_text(folder, byte_level):
    for begin in ("PK is a name. ", "PAR1 too. ", "%PDF- is how a PDF begins. ", "BZh. ", "GGUF. "):
        (folder / "a.txt").write_text(begin + prose(random.Random(1), 3000))
        assert len(build("a.txt", byte_level, rows_of(2, 16)).tokens) == 2


def test_bytes_further_on_that_are_no_utf_8_are_told(folder, byte_level):
    (folder / "a.txt").write_bytes(b"words " * 20_000 + b"\xff")
    with pytest.raises(
        ValueError,
        match=r"^cannot read a\.txt: it is not UTF-8 throughout \(byte 0xff\); convert it to UTF-8$",
    ):
        windows(text.evaluation_text("a.txt"), byte_level, 16, None, 700, "a.txt")


def test_gzip_damaged_in_its_middle_is_told(folder, byte_level):
    data = bytearray(gzip.compress(random.Random(0).randbytes(400_000).hex().encode()))
    data[len(data) // 2 : len(data) // 2 + 50] = b"\xff" * 50
    for name in ("a.txt.gz", "a.jsonl.gz"):
        (folder / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"^cannot read a\.(txt|jsonl)\.gz: |is not JSON"):
            windows(text.evaluation_text(name), byte_level, 16, None, 700, name)


@pytest.mark.parametrize("one", [b"\0", b" ", b"\n"])
def test_compressed_nothing_is_refused_at_once(folder, byte_level, one):
    with gzip.open(folder / "a.txt.gz", "wb") as file:
        for _ in range(30):
            file.write(one * 1_000_000)
    for work in (
        lambda: list(text.evaluation_text("a.txt.gz")),
        lambda: build("a.txt.gz", byte_level, rows_of(2, 16)),
    ):
        with pytest.raises(
            ValueError,
            match=r"it is binary \(zero bytes|begins with more than 1,048,576 characters of white space",
        ):
            work()


def test_a_line_without_end_is_refused(folder, monkeypatch, byte_level):
    monkeypatch.setattr(textfiles, "LONGEST_ROW", 1000)
    (folder / "a.jsonl").write_text(
        json.dumps({"text": "short"}) + "\n" + json.dumps({"text": "long " * 300})
    )
    with pytest.raises(
        ValueError,
        match=r"^a\.jsonl, line 2 is longer than 1,000 characters; a \.jsonl file holds a document per line$",
    ):
        list(textfiles.file_documents("a.jsonl"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["short", "long " * 300]}), folder / "a.parquet")
    with pytest.raises(ValueError, match=r"^a\.parquet, row 2 is longer than 1,000 characters; split it"):
        list(textfiles.file_documents("a.parquet"))


# Half a character


def test_half_a_surrogate_pair_is_refused_wherever_it_stands(folder, tiny_llama, typed):
    rows = {
        "a.jsonl": '{"text": "fine"}\n{"text": "a\\ud800b"}\n',
        "chat.jsonl": '{"messages": [{"role": "user", "content": "x\\udfffy"}]}\n',
    }
    for name, written in rows.items():
        (folder / name).write_text(written)
    said = (
        r"has half a character, \\u{}, after {} others \(a surrogate without its pair\), which no "
        r"tokenizer takes; mend or remove the row"
    )
    options = {"recipe": "magnitude", "samples": 2, "seqlen": 8, "output": "out"}
    for source, where in (
        ("a.jsonl", r"^a\.jsonl, line 2 " + said.format("d800", 1)),
        ("chat.jsonl", r"^chat\.jsonl, line 1 " + said.format("dfff", 7)),
        (["fine", "a\ud800b"], r"^calibration document 2 " + said.format("d800", 1)),
    ):
        with pytest.raises(ValueError, match=where):
            llmprune.prune(tiny_llama, calibration=source, **options)
    with pytest.raises(ValueError, match=r"^a\.jsonl, line 2 " + said.format("d800", 1)):
        llmprune.evaluate(tiny_llama, perplexity=["a.jsonl"])
    for command in (
        ("prune", tiny_llama, "--calibration", "a.jsonl"),
        ("eval", tiny_llama, "--perplexity", "a.jsonl"),
    ):
        code, _, err = typed(*command)
        assert (code, len(err.splitlines())) == (1, 1) and "half a character" in err
    assert not (folder / "out").exists()


def test_a_pair_of_surrogates_is_a_character(folder):
    (folder / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert list(textfiles.file_documents("a.jsonl")) == ["😀"]


# Tokenizers that make nothing of it


class Wrong(Slow):
    """A tokenizer that is not the model's."""

    def __init__(self, ids):
        super().__init__()
        self.ids = ids

    def __call__(self, text, add_special_tokens=True):
        if self.ids is None:
            raise KeyError("vocab")
        return {"input_ids": [self.ids] * len(text) if isinstance(text, list) else self.ids}


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (
            [],
            r"^the tokenizer makes no tokens of .*: it is damaged or belongs to another language; "
            r"use the model's own$",
        ),
        ([0] * 300, r"^the tokenizer makes only special tokens \(0\) of "),
        (
            [5, 9999] * 300,
            r"^(calibration )?tokens of .* range from 5 to 9999, the model knows 0 to 699; "
            r"use its own tokenizer$",
        ),
        ([5, -1] * 300, r"range from -1 to 5, the model knows 0 to 699"),
        ([3, None, 4] * 300, r"^the tokenizer gives no token ids for .*; its files are damaged$"),
        (None, r"^the tokenizer fails on .* \(KeyError: 'vocab'\); its files are damaged"),
    ],
)
def test_a_tokenizer_of_another_model_is_told(ids, said):
    with pytest.raises(ValueError, match=said):
        build(["some words"] * 9, Wrong(ids), rows_of(2, 8))
    with pytest.raises(ValueError, match=said):
        windows(["some words"], Wrong(ids), 8, None, 700, "a.txt")


def test_it_is_packed_in_batches_of_documents(monkeypatch, byte_level):
    sizes = counting(byte_level, monkeypatch)
    documents = ["word " * 20_000] * 10  # 100,000 characters each
    packing.pack(documents, byte_level, 8, 64, "x", seed=None)
    assert max(sizes) <= tokenisation.PIECE
