"""The short names of models: hub ids, and classes that transformers makes of them."""

import re

import pytest
import transformers
from transformers.models.auto import modeling_auto

from llmprune.hub.aliases import ALIASES
from llmprune.hub.download import _HUB_ID, locate

CLASSES = {
    *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
    *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
}


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_names_a_hub_id_and_a_class_of_transformers(name):
    alias = ALIASES[name]
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) and name != "demo"
    assert re.fullmatch(_HUB_ID, alias.repository, re.ASCII)
    assert alias.model_class in CLASSES and hasattr(transformers, alias.model_class)


def test_no_two_aliases_are_the_same():
    repositories = [alias.repository for alias in ALIASES.values()]
    assert len(set(repositories)) == len(repositories)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("deepseek-v3", "float8 only: add --dequantize"),
        ("deepseek-r1", "float8 only: add --dequantize"),
        ("gpt-oss-20b", "mxfp4 only: add --dequantize"),
        ("llama-2-7b", "gated"),
        ("gemma-3n-e4b", "timm"),
    ],
)
def test_what_stands_in_the_way_is_said(name, said):
    assert said in ALIASES[name].note
    assert ALIASES["deepseek-r1-distill-qwen-7b"].note == ALIASES["qwen3-8b"].note == ""


def test_an_unknown_name_is_answered_shortly():
    with pytest.raises(
        ValueError, match=r"did you mean 'qwen3-8b'.*a name that llmprune models lists"
    ) as raised:
        locate("qwen3_8b")
    assert len(str(raised.value)) < 250
