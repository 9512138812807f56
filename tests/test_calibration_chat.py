"""Chats as calibration text: the tokenizer's template or lines of `role: content`, and rows that are no
chats.
"""

from __future__ import annotations

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

import llmprune
from llmprune import calibration
from llmprune.calibration.chat import Chats, Templated
from llmprune.calibration.packing import pack
from llmprune.model.opening import open_model
from llmprune.recipe import loading as recipes
from llmprune.text import files as text

TEMPLATE = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}</s>"
TURNS = [
    {"role": "user", "content": "what is a list"},
    {"role": "assistant", "content": "a mutable sequence of values"},
]
SHARED = [
    {"from": "human", "value": "what is a list"},
    {"from": "gpt", "value": "a mutable sequence of values"},
]
RENDERED = "<s>[user] what is a list\n[assistant] a mutable sequence of values\n</s>"
PLAIN = "user: what is a list\nassistant: a mutable sequence of values"


@pytest.fixture
def tokenizer(tiny_llama):
    """With a BOS of its own accord, as Llama's has, and no template."""
    loaded = open_model(tiny_llama).tokenizer
    loaded.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return loaded


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for column, chat in (("messages", TURNS), ("conversations", SHARED), ("talk", TURNS)):
        rows = [{column: chat, "id": i} for i in range(100)]
        (tmp_path / f"{column}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{column}.parquet")
    return tmp_path


def build(source, tokenizer, mode="auto", **more):
    request = calibration.CalibrationRequest(
        samples=4, length=16, limit=64, vocabulary=2048, seed=0, chat_template=mode
    )
    return calibration.build(source, tokenizer, request, **more)


@pytest.mark.parametrize("name", ["messages", "conversations", "talk"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("template", "layout", "expected"), [(TEMPLATE, "template", RENDERED), (None, "plain", PLAIN)]
)
def test_chats_become_text(folder, tokenizer, name, suffix, template, layout, expected):
    tokenizer.chat_template = template
    source = f"{name}.{suffix}" + (":talk" if name == "talk" else "")
    chats = Chats(tokenizer)
    documents = list(text.file_documents(source, chats))
    assert documents == [expected] * 100 and chats.layout == layout
    made, kept = build(source, tokenizer), build(source, tokenizer)
    assert made.details == kept.details == {"chat": layout} and made.digest == kept.digest, (
        "from the cache too"
    )


def test_special_tokens_stand_once(tokenizer):
    assert tokenizer("x")["input_ids"][0] == 0, "this tokenizer adds a BOS"
    ids = tokenizer(RENDERED, add_special_tokens=False)["input_ids"]
    assert ids[0] == 0 and ids[-1] == 1 and ids.count(0) == 1
    length = len(ids) + len(tokenizer("plain text")["input_ids"])
    rows = pack([Templated(RENDERED), "plain text"], tokenizer, 1, length, "x", 0)
    assert rows[0].tolist() == ids + tokenizer("plain text")["input_ids"]
    assert (
        pack(["plain text", Templated(RENDERED)], tokenizer, 1, length, "x", 0)[0, -len(ids) :].tolist()
        == ids
    )


def test_another_template_is_another_text(folder, tokenizer):
    digests = set()
    for template in (None, TEMPLATE, TEMPLATE.replace("[", "(")):
        tokenizer.chat_template = template
        digests.add(build("messages.jsonl", tokenizer).digest)
    assert len(digests) == 3


def test_a_file_may_hold_text_and_chats(folder, tokenizer):
    (folder / "both.jsonl").write_text(
        json.dumps({"text": "words"}) + "\n" + json.dumps({"text": None, "messages": TURNS}) + "\n"
    )
    assert list(text.file_documents("both.jsonl", Chats(tokenizer))) == ["words", PLAIN]
    (folder / "text.jsonl").write_text(json.dumps({"text": "words", "messages": TURNS}) + "\n")
    assert list(text.file_documents("text.jsonl", Chats(tokenizer))) == ["words"], "text stands before chats"
    assert list(text.file_documents("text.jsonl:messages", Chats(tokenizer))) == [PLAIN]


def test_an_empty_chat_is_an_empty_document(tokenizer):
    tokenizer.chat_template = TEMPLATE
    assert Chats(tokenizer)([], "a row") == ""


def test_plan_and_record_say_how_chats_were_laid_out(folder, typed, tiny_llama):
    options = ("--samples", 4, "--seqlen", 16, "--recipe", "magnitude", "--output", "out", "--json")
    code, out, err = typed("prune", tiny_llama, "--calibration", "messages.jsonl", *options)
    assert code == 0 and "messages.jsonl (chats as lines of role: content)" in err
    assert json.loads(out)["calibration"]["chat"] == "plain"
    assert "(chats as lines of role: content)" in (folder / "out" / "README.md").read_text()


def test_the_template_is_used_as_asked_for(folder, tokenizer):
    plain = build("messages.jsonl", tokenizer)
    tokenizer.chat_template = TEMPLATE
    rendered = build("messages.jsonl", tokenizer)
    for _ in range(2):  # the second time from the cache
        on, off = (build("messages.jsonl", tokenizer, mode) for mode in ("on", "off"))
        assert (on.details, on.digest) == ({"chat": "template"}, rendered.digest)
        assert (off.details, off.digest) == ({"chat": "plain"}, plain.digest) != (on.details, on.digest)


def test_a_template_that_is_wanted_must_be_there(folder, tokenizer):
    said = r"^calibration\.chat_template is on, and the tokenizer has no chat template; leave .* or add"
    with pytest.raises(ValueError, match=said):
        build("messages.jsonl", tokenizer, "on")
    tokenizer.chat_template = ""
    with pytest.raises(ValueError, match=said):
        build("messages.jsonl=0.5+builtin=0.5", tokenizer, "on")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("builtin", "source 'builtin'"),
        ("self", "source 'self'"),
        ("c4", "source 'c4'"),
        ("notes.txt", "source 'notes.txt'"),
        ("texts.jsonl", "source 'texts.jsonl'"),
        ("texts.jsonl=0.5+self=0.5", "source 'texts.jsonl and self'"),
        ("texts.jsonl=0.5+builtin=0.5", "source 'texts.jsonl and builtin'"),
        (["words"] * 99, "text or tokens in memory"),
        (torch.ones(4, 16, dtype=torch.int64), "text or tokens in memory"),
    ],
)
def test_with_the_template_on_there_must_be_chats(folder, tokenizer, source, named):
    tokenizer.chat_template = TEMPLATE
    (folder / "notes.txt").write_text("words and words " * 99)
    (folder / "texts.jsonl").write_text((json.dumps({"text": "words " * 9}) + "\n") * 99)
    with pytest.raises(ValueError) as caught:
        build(source, tokenizer, "on", sampler=Unwanted())
    assert str(caught.value).startswith(f"calibration.chat_template is on, and {named} has no chats (")
    assert "\n" not in str(caught.value)


class Unwanted:
    """A sampler that must not sample: it would take long."""

    def check(self, length):
        pass


def test_a_mixture_with_the_template_on_may_have_text_too(folder, tokenizer):
    tokenizer.chat_template = TEMPLATE
    mixed = build("builtin=0.5+messages.jsonl=0.5", tokenizer, "on")
    assert mixed.details == {"chat": "template", "parts": {"builtin": 2, "messages.jsonl": 2}}
    assert mixed.digest == build("builtin=0.5+messages.jsonl=0.5", tokenizer).digest


def test_the_record_and_a_recipe_keep_the_choice(folder, typed, tiny_llama):
    model = shutil.copytree(tiny_llama, folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    options = ("--samples", 4, "--seqlen", 16, "--recipe", "magnitude", "--json")
    digests = {}
    for mode in ("auto", "on", "off"):
        given = ("--calibration", "messages.jsonl", "--chat-template", mode, "--output", mode)
        record = json.loads(typed("prune", model, *options, *given)[1])
        kept = record["recipe"]["calibration"].get("chat_template", "auto")
        assert (kept, record["calibration"]["chat"]) == (mode, "plain" if mode == "off" else "template")
        digests[mode] = record["calibration"]["digest"]
        (folder / f"{mode}.yaml").write_text(yaml.safe_dump(record["recipe"]))
        again = llmprune.prune(model, recipe=f"{mode}.yaml", output=f"{mode}-again")
        assert again.record["calibration"] == record["calibration"]
        assert again.record["recipe"]["calibration"] == record["recipe"]["calibration"]
    assert digests["auto"] == digests["on"] != digests["off"]


def test_yaml_reads_on_and_off_as_truth():
    for given, kept in (("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")):
        key, value = recipes.parse_assignment(f"calibration.chat_template={given}")
        assert recipes.load("wanda", {key: value}).calibration.chat_template == kept
    for wrong in ("yes please", 1, None, ["on"]):
        with pytest.raises(ValueError, match=r"^calibration\.chat_template must be one of auto, on, off"):
            recipes.load("wanda", {"calibration.chat_template": wrong})


BAD = [
    (
        {"role": "user"},
        r"no \{role, content\} or \{from, value\} with texts, got \{'role': 'user'\}; "
        r"mend or remove the row$",
    ),
    ({"role": "user", "content": None}, r"got \{'role': 'user', 'content': None\}"),
    ({"role": "user", "content": [{"type": "text", "text": "x"}]}, r"with texts"),
    ({"from": 3, "value": "x"}, r"got \{'from': 3, 'value': 'x'\}"),
    ("hello", r"got 'hello'"),
    (None, r"got None"),
]


@pytest.mark.parametrize(("message", "said"), BAD)
def test_a_malformed_row_is_named(folder, tokenizer, message, said):
    rows = [json.dumps({"messages": TURNS}), "", json.dumps({"messages": [TURNS[0], message]})]
    (folder / "bad.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"^bad\.jsonl, line 3, message 2 is .*" + said) as caught:
        build("bad.jsonl", tokenizer)
    assert "\n" not in str(caught.value)


def test_a_malformed_row_of_a_table_is_named(folder, tokenizer):
    rows = [
        {"messages": TURNS},
        {"messages": TURNS},
        {"messages": [TURNS[0], {"role": "user", "content": None}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "bad.parquet")
    with pytest.raises(ValueError, match=r"^bad\.parquet, row 3, message 2 is no"):
        build("bad.parquet", tokenizer)
    with pytest.raises(
        ValueError, match=r"^messages\.parquet, row 1 has an int in column 'id' instead of text: 0"
    ):
        build("messages.parquet:id", tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must\n alternate') }}",
        "{% for m in messages %}",
        "{{ messages[7].content }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_refused(folder, tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(
        ValueError,
        match=r"^messages\.jsonl, line 1: the tokenizer's chat template refuses this chat \(.*\); mend or",
    ) as caught:
        build("messages.jsonl", tokenizer)
    assert "\n" not in str(caught.value)


def test_perplexity_is_not_measured_on_chats(folder, tiny_llama):
    with pytest.raises(
        ValueError, match=r"messages\.jsonl, line 1 has no text column 'text' \(it has: id, messages\)"
    ):
        llmprune.evaluate(tiny_llama, perplexity=["messages.jsonl"])
