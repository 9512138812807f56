"""The main families of models, tiny and random: pruned, loaded by plain transformers, recounted.

`eval/bench/families.py` tries all that transformers has.
"""

from __future__ import annotations

import sys

import pytest
import transformers
from conftest import ROOT
from packaging.version import Version

sys.path.insert(0, str(ROOT / "eval" / "bench"))
from families import survey
from tiny_models import pairs

from llmprune.common.messages import first_line

CAUSAL = """
afmoe apertus bamba bart bert bloom cohere2 deepseek_v2 deepseek_v3 ernie4_5_moe exaone4 falcon falcon_h1
falcon_mamba gemma gemma2 gemma3_text gemma3n_text gemma4_text glm4_moe gpt2 gpt_neo gpt_neox gpt_oss gptj
granite granitemoe granitemoehybrid hunyuan_v1_moe jamba jetmoe lfm2 lfm2_moe llama llama4_text mamba mamba2
minimax mistral mixtral mllama mpt nemotron_h olmo2 olmo3 olmo_hybrid olmoe opt phi phi3 phimoe qwen2
qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma rwkv smollm3 stablelm
starcoder2 zamba2
"""
WRAPPERS = "gemma3 gemma4 llama4 llava mistral3 mllama qwen2_vl qwen2_5_vl qwen3_5 qwen3_vl"
KNOWN = pairs()
# Of the newest version that was tested; older ones lack some.
NEWEST = Version(transformers.__version__) >= Version("5.23")
UNKNOWN_BEFORE = ("mllama",)  # older versions have no model type for the text part alone
# What may stay dense inside of blocks, by the end of its name: routers, state, and vectors that are stacked.
DENSE = (
    *(
        ".gate.weight",
        ".gate.wg.weight",
        ".router.weight",
        ".router.layer.weight",
        ".A_log",
        ".diagonal_decay",
    ),
    *("gate_up_proj_bias", "down_proj_bias", "input_gate_bias", "recurrent_gate_bias"),
)


def classes():
    """(model type, class) of each family; with None for a class that this version does not have."""
    for names, wrapper in ((CAUSAL, False), (WRAPPERS, True)):
        for name in names.split():
            found = [
                c for kind, c in KNOWN if kind == name and c.endswith("ConditionalGeneration") is wrapper
            ]
            yield name, found[0] if found else None


@pytest.mark.parametrize(
    ("model_type", "class_name"), classes(), ids=lambda value: None if value is None else str(value)
)
def test_family(model_type, class_name, tmp_path):
    """The checks are in `survey`, which raises where one fails."""
    if class_name is None and not NEWEST:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    found = {}
    try:
        survey(model_type, class_name, tmp_path, found)
    except Exception as error:
        if NEWEST or (found.get("built") and model_type not in UNKNOWN_BEFORE):
            raise
        pytest.skip(f"transformers {transformers.__version__} cannot make or load it: {first_line(error)}")
    assert found["result"] == "works"
    # Zamba's attention is one for several blocks.
    shared = model_type == "zamba2"
    assert shared or all(n.endswith(DENSE) for n in found["dense_in_blocks"]), "a matrix was left out"
