"""The dtype of forward passes: bfloat16 only where the processor multiplies it faster than float32."""

import pytest
import torch

from llmprune.machine import device

INTEL, AMD = {"cpu_name": "Intel Xeon"}, {"cpu_name": "AMD Zen 4"}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (INTEL | {"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        (INTEL | {"avx512_bf16": True, "amx_bf16": False}, torch.float32),
        (AMD | {"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),  # a torch that does not tell the name
        (AMD, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_takes_the_faster_dtype(monkeypatch, processor, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert device.choose_dtype("auto", CPU, torch.bfloat16) == expected
    assert device.choose_dtype("auto", CPU, torch.float32) == torch.float32
    assert device.choose_dtype("bfloat16", CPU, torch.float32) == torch.bfloat16
    assert device.choose_dtype("auto", torch.device("cuda"), torch.bfloat16) == torch.bfloat16
