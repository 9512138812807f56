"""The first number that is not finite ends a run in one line that names its place."""

from __future__ import annotations

import pytest
from damage import spoilt
from outputs import one_line

import llmprune

INPUTS = r"inputs of model\.layers\.0\.self_attn\.q_proj hold the first NaN or Inf.*epsilon"
OUTPUTS = r"block 1 of 2 \(model\.layers\.0\) put out the first NaN or Inf.*epsilon"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        *((recipe, INPUTS) for recipe in ("magnitude", "wanda", "sparsegpt", "dsnot")),
        ("best", OUTPUTS),  # its allocator passes whole blocks, before any matrix is looked at
        ({"pruner": "alps", "update": "block-tune"}, INPUTS),
    ],
)
def test_the_first_matrix_that_reads_numbers_that_are_not_finite_is_named(refused, llama_copy, recipe, said):
    spoilt(llama_copy, "epsilon")
    refused(said, llama_copy, recipe=recipe)


@pytest.mark.parametrize("recipe", ["magnitude", "wanda", "sparsegpt", "dsnot"])
def test_the_first_number_that_is_not_finite_is_named(llama_copy, calibration_tokens, work, recipe):
    spoilt(llama_copy, "weights")
    with pytest.raises(
        ValueError, match=r"inputs of model\.layers\.1\.mlp\.down_proj hold the first NaN or Inf"
    ) as raised:
        llmprune.prune(llama_copy, calibration=calibration_tokens, output="out", recipe=recipe)
    assert one_line(raised.value) and raised.value.kept == "1 of 2 blocks are finished and kept"
