"""Families of models, tiny and random: pruned, loaded by plain transformers, recounted.

`eval/bench/families.py` tries them all.
"""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "eval" / "bench"))
from families import survey

FAMILIES = (
    ("llama", "LlamaForCausalLM"),
    ("opt", "OPTForCausalLM"),
    ("gpt2", "GPT2LMHeadModel"),
    ("gpt_neox", "GPTNeoXForCausalLM"),
    ("mixtral", "MixtralForCausalLM"),
    ("qwen3_moe", "Qwen3MoeForCausalLM"),
    ("mamba", "MambaForCausalLM"),
    ("gemma3", "Gemma3ForConditionalGeneration"),
)


@pytest.mark.parametrize("model_type, class_name", FAMILIES, ids=[name for name, _ in FAMILIES])
def test_family(model_type, class_name, tmp_path):
    """The checks are in `survey`, which raises where one fails."""
    found = {}
    survey(model_type, class_name, tmp_path, found)
    assert found["result"] == "works"
    router = ".gate.weight"
    assert all(n.endswith((router, ".A_log")) for n in found["dense_in_blocks"]), "a matrix was left out"
