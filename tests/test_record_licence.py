"""The licence of a source: what its card says, or unknown."""

import pytest
import yaml

import llmprune
from llmprune.record.licence import read_licence


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# x", ("mit", None, None)),
        ("\ufeff---\r\nlicense: MIT\r\n---\r\n", ("mit", None, None)),
        ("---\nlicense:\n- llama2\ntags: [a]\n---", ("llama2", None, None)),
        (
            "---\nlicense: other\nlicense_name: acme 1.0\nlicense_link: LICENSE\n---",
            ("other", "acme 1.0", "LICENSE"),
        ),
        ("---\ntags: [unclosed\nlicense: mit\nother: {broken\n---", ("mit", None, None)),
        ("---\n" + "  filler: x\n" * 50_000 + "license: mit\n---", ("mit", None, None)),
        ("---\nlicense: mit\n" + "filler: x\n" * 500_000 + "---", (None, None, None)),
        ("---\nlicense: [mit, apache-2.0]\n---", (None, None, None)),
        ("---\nlicense: 2001-99-99\n---", (None, None, None)),
        ("---\nlicense: !!python/object/apply:os.system ['true']\n---", (None, None, None)),
        ("---\nlicense: &a [*a]\n---", (None, None, None)),
        ("---\nlicense: " + "[" * 1900 + "\n---", (None, None, None)),
        ("---\nlicense: 'mit\n  base_model: evil/x'\n---", (None, None, None)),
        ("---\nlicense: |\n  mit\n  tags: x\n---", (None, None, None)),
        ("---\nlicense: a b\n---", (None, None, None)),
        ("---\nlicense: mit\n", (None, None, None)),
        ("license: mit\n", (None, None, None)),
        ("---\nmodel:\n  license: mit\n---", (None, None, None)),
        ("", (None, None, None)),
        ("\x00\xff", (None, None, None)),
    ],
)
def test_the_licence_of_a_card_is_its_own_word_or_unknown(tmp_path, card, licence):
    (tmp_path / "README.md").write_bytes(card.encode("utf-8"))
    assert tuple(read_licence(tmp_path).values()) == licence


def test_no_card_no_licence(make_llama, tmp_path):
    assert set(read_licence(tmp_path / "nowhere").values()) == {None} == set(read_licence(None).values())
    record = llmprune.prune(
        make_llama(), output=tmp_path / "out", calibration="builtin", samples=4, seqlen=32
    ).record
    assert record["model"]["license"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license" not in yaml.safe_load(card.split("---")[1]) and "look it up before you share" in card
