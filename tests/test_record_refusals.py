"""Records that this version cannot read are not believed."""

from __future__ import annotations

import json

import pytest
from outputs import everything, one_line

import llmprune


@pytest.mark.parametrize(
    ("schema", "said"),
    [(99, r"schema 99.*reads schema 1; update"), (None, "not a record"), (True, "not a record")],
)
def test_a_record_of_another_schema_is_not_believed(
    tiny_llama, calibration_tokens, work, schema, said, monkeypatch
):
    result = llmprune.prune(tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out")
    (work / "out" / "llmprune.json").write_text(json.dumps({**result.record, "schema": schema}))
    before = everything(work)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    for call in (
        lambda: llmprune.inspect("out"),
        lambda: llmprune.push("out", "me/model"),
        lambda: llmprune.prune(
            tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out", resume=True
        ),
    ):
        with pytest.raises(ValueError, match=said) as raised:
            call()
        one_line(raised.value)
    assert everything(work) == before
