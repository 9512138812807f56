"""Calibration rows with tokenizers of every kind, as folders hold them: full rows, no special token twice."""

from __future__ import annotations

import base64
import itertools
import json
import random
import sys

import pytest
from tokenizers_of_all_kinds import KINDS, gpt2, prose, wrapped

from llmprune import calibration
from llmprune.model.tokenizer import read_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{{ eos_token }}"


def tiktoken_folder(folder):
    """A byte-level vocabulary as tiktoken writes it: a line per token, its bytes in base64 and its rank."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = json.loads(gpt2().to_str())["model"]["vocab"]
    tokens = [t for t, _ in sorted(vocabulary.items(), key=lambda item: item[1]) if set(t) <= set(byte_of)]
    written = [bytes(byte_of[c] for c in token) for token in tokens if token not in ("<unk>", "<s>", "</s>")]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(written))
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.fixture(params=[*KINDS, tiktoken_folder], ids=lambda kind: kind.__name__)
def tokenizer(request, tmp_path, monkeypatch):
    """A tokenizer read from its folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    if request.param is tiktoken_folder:
        pytest.importorskip("tiktoken", reason="transformers reads such files with it")
        tiktoken_folder(folder)
    else:
        wrapped(request.param()).save_pretrained(folder)
    return read_tokenizer(folder, False)


def chat(rng):
    roles = ("user", "assistant") * 2
    return [{"role": role, "content": prose(rng, rng.randrange(5, 90)).strip()} for role in roles]


@pytest.fixture
def data(tmp_path, rng):
    """Chats and texts in files."""
    rows = [{"messages": chat(rng)} for _ in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": prose(rng, 150)} for _ in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))


@pytest.fixture
def rng():
    return random.Random(3)


@pytest.mark.parametrize("source", ["chats.jsonl", "texts.jsonl", "chats.jsonl=0.5+texts.jsonl=0.5"])
@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_rows_are_full_and_no_special_token_stands_twice(tokenizer, data, source, mode):
    tokenizer.chat_template = TEMPLATE
    request = calibration.CalibrationRequest(
        samples=12, length=40, vocabulary=len(tokenizer), chat_template=mode
    )
    if mode == "on" and source == "texts.jsonl":
        with pytest.raises(ValueError, match=r"chat_template is on, and source 'texts\.jsonl' has no chats"):
            calibration.build(source, tokenizer, request)
        return
    made = calibration.build(source, tokenizer, request)
    assert made.tokens.shape == (12, 40)
    layout = {"chat": "plain" if mode == "off" else "template"} if "chats" in source else {}
    assert made.details.items() >= layout.items() and ("chat" in made.details) is bool(layout)
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    for row in made.tokens.tolist():
        pairs = set(itertools.pairwise(row))
        assert not pairs & {(first, first), (last, last)}, tokenizer.decode(row)
    if layout == {"chat": "template"}:
        assert first in made.tokens and last in made.tokens


def test_a_tokenizer_that_needs_a_package_says_which(tmp_path, monkeypatch):
    tiktoken_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match=r"it needs a package that is not installed \(.*tiktoken") as caught:
        read_tokenizer(tmp_path, False)
    assert "\n" not in str(caught.value)
