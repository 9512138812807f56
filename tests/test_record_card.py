"""The model card and the report."""

import re

import yaml

import llmprune
from llmprune.record import card
from llmprune.record import figures as words


def test_card_and_report_are_filled_in(finished):
    text, page = ((finished.output / name).read_text() for name in ("README.md", "report.html"))
    record = finished.record
    share = words.share_of_all(record)
    assert (
        'from_pretrained("my-model", dtype="auto")' in text
        and 'AutoTokenizer.from_pretrained("my-model")' in text
    )
    assert "PATH_OR_ID" not in text and share in text and share in page
    assert "| | dense | pruned | change | |" in text and '<th scope="col">change</th>' in page
    folded = re.search(r"<details><summary>.*?</summary>\n\n```yaml\n(.*?)```\n\n</details>", text, re.DOTALL)
    assert yaml.safe_load(folded[1]) == record["recipe"]
    assert "from_pretrained(&quot;my-model&quot;" in page and "<details>" in page
    assert str(finished.output.parent) not in text + page


def test_a_pushed_card_loads_from_the_repository_whatever_the_folder_was_called(finished):
    written = card.model_card(finished.record, 'an "odd" name')
    by_hand = written.replace(
        "## Scores", 'Try `AutoModel.from_pretrained("base/model")` first.\n\n## Scores'
    )
    pushed = card.published(by_hand, "me/pruned", "v2")
    assert pushed.count('from_pretrained("me/pruned", revision="v2"') == 2 and "odd" not in pushed
    assert 'AutoModel.from_pretrained("base/model")' in pushed, "what was written by hand stays"
    assert (
        card.published('from_pretrained("PATH_OR_ID")', "me/pruned", None) == 'from_pretrained("me/pruned")'
    )
    assert 'from_pretrained("me/pruned", dtype="auto")' in card.card_text(finished.output, "me/pruned", None)


def test_a_folder_given_by_a_roundabout_path_has_a_name(tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    llmprune.prune(
        tiny_llama, recipe="magnitude", calibration="builtin", samples=4, seqlen=32, output="../here/."
    )
    assert 'from_pretrained("here", dtype="auto")' in (tmp_path / "here" / "README.md").read_text()
