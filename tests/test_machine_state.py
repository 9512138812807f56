"""What a process keeps once is as it was after a run, and two threads of one program do not disturb one
another.
"""

import logging
import os
import random
import signal
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from outputs import contents
from torch import nn

import llmprune
from llmprune.machine.device import exact_matmul


def state():
    """What a run might change for the whole process."""
    backends, numbers = torch.backends, torch.get_rng_state()
    fresh = nn.Linear(2, 2).weight
    torch.set_rng_state(numbers)
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "register_parameter": nn.Module.register_parameter,
        "initialisers": [getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_")],
        "a parameter's device": fresh.device.type,
        "a parameter's dtype": fresh.dtype,
        "gradients": torch.is_grad_enabled(),
        "matmul": (
            backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(),
            backends.cudnn.allow_tf32,
        ),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            backends.cudnn.deterministic,
            backends.cudnn.benchmark,
        ),
        "threads": torch.get_num_threads(),
        "torch's numbers": numbers.tolist(),
        "numpy's numbers": np.random.get_state()[1].tolist(),
        "Python's numbers": random.getstate(),
        "environment": dict(os.environ),
        "streams": (sys.stdout, sys.stderr),
        "warnings": list(warnings.filters),
        "loggers": {
            name: logging.getLogger(name).level
            for name in ("", "lm_eval", "transformers", "datasets", "llmprune")
        },
        "signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "folder": os.getcwd(),
    }


def differences(before):
    after = state()
    return [what for what in before if before[what] != after[what]]


@pytest.fixture(scope="module")
def warm(tiny_llama, tmp_path_factory):
    """Everything is imported once: an import may leave its mark."""
    out = tmp_path_factory.mktemp("warm") / "out"
    llmprune.run_model(
        tiny_llama, output=out, recipe="magnitude", samples=2, seqlen=16, limit=2, tasks=["demo_continuation"]
    )


RUNS = {
    "prune": {"recipe": "sparsegpt"},
    "tuned": {"recipe": "best", "settings": {"update.steps": 2}},
    "bfloat16": {"recipe": "wanda", "dtype": "bfloat16"},
    "own text": {"recipe": "wanda", "calibration": "self"},
    "permuted": {"recipe": "wanda", "pattern": "2:4", "settings": {"permute": True}},
    "broken": {"recipe": "wanda", "settings": {"pruner": "no such pruner"}},
}


@pytest.mark.parametrize("what", RUNS)
def test_a_run_leaves_no_trace_in_the_process(warm, tiny_llama, tmp_path, what):
    before = state()
    options = {"samples": 4, "seqlen": 16, "output": tmp_path / "out", **RUNS[what]}
    if what == "broken":
        with pytest.raises(ValueError, match="no such pruner"):
            llmprune.prune(tiny_llama, **options)
    else:
        llmprune.prune(tiny_llama, **options)
    assert not differences(before)


def test_scoring_and_loading_leave_no_trace_in_the_process(warm, tiny_llama, tmp_path):
    before = state()
    llmprune.evaluate(
        tiny_llama, perplexity=["builtin"], tasks=["demo_continuation"], limit=2, dtype="bfloat16"
    )
    llmprune.inspect(tiny_llama)
    llmprune.load(tiny_llama, dtype="bfloat16")
    assert not differences(before)


def test_a_failure_while_the_skeleton_is_built_leaves_no_trace_either(
    warm, tiny_llama, monkeypatch, tmp_path
):
    from transformers import LlamaForCausalLM

    before = state()
    monkeypatch.setattr(LlamaForCausalLM, "__init__", lambda *args: 1 / 0)
    with pytest.raises(ValueError, match="cannot build a model"):
        llmprune.prune(tiny_llama, dtype="bfloat16", output=tmp_path / "out")
    assert not differences(before)


def in_threads(*works):
    """Run works at the same time; what each returned or raised."""
    results = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(number):
        start.wait()
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_runs_in_several_threads_end_with_the_bytes_of_one(warm, make_llama, calibration_tokens, tmp_path):
    models = [make_llama(dtype=torch.bfloat16), make_llama(dtype=torch.float32)]
    before = state()

    def pruning(number, name):
        options = {
            "recipe": "sparsegpt",
            "calibration": calibration_tokens,
            "dtype": ("bfloat16", "float32")[number],
        }
        return lambda: llmprune.prune(models[number], output=tmp_path / name / str(number), **options)

    alone = [pruning(number, "alone")() for number in (0, 1)]
    works = [pruning(number, f"together-{turn}") for turn in range(3) for number in (0, 1)]
    done = in_threads(*works)
    assert not [r for r in done if not isinstance(r, llmprune.api.Result)]
    for result in done:
        assert contents(result.output) == contents(alone[int(result.output.name)].output)
    assert not differences(before)


def test_scoring_in_two_threads_gives_the_scores_of_one(warm, tiny_llama):
    before = state()

    def scoring():
        scores = llmprune.evaluate(tiny_llama, perplexity=["builtin"], tasks=["demo_continuation"], limit=3)
        return scores["perplexity"], scores["tasks"]

    alone = scoring()
    assert in_threads(scoring, scoring) == [alone, alone]
    assert not differences(before)


def test_models_that_another_thread_makes_meanwhile_have_weights(warm, make_llama):
    from llmprune.model.opening import OpenOptions, open_model

    stop, devices = threading.Event(), set()

    def making():
        while not stop.is_set():
            devices.add(nn.Linear(2, 2).weight.device.type)

    def opening():
        try:
            for _ in range(10):
                open_model(make_llama(), OpenOptions(dtype="float32"))
        finally:
            stop.set()

    assert in_threads(making, opening) == [None, None]
    assert devices == {"cpu"}


def test_exact_products_end_when_the_last_thread_leaves(monkeypatch):
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    settings.allow_tf32 = True
    try:
        first, second = exact_matmul(), exact_matmul()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert settings.allow_tf32 is False
        second.__exit__(None, None, None)
        assert settings.allow_tf32 is True
    finally:
        settings.allow_tf32 = before


@pytest.mark.parametrize("recipe", ["wanda", "best", "dsnot"])
def test_a_default_dtype_of_the_user_moves_nothing(warm, tiny_llama, calibration_tokens, tmp_path, recipe):
    options = {"recipe": recipe, "calibration": calibration_tokens}
    options |= {"settings": {"update.steps": 2}} if recipe == "best" else {}
    plain = llmprune.prune(tiny_llama, output=tmp_path / "plain", **options)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        other = llmprune.prune(tiny_llama, output=tmp_path / "other", **options)
    finally:
        torch.set_default_dtype(before)
    assert contents(other.output) == contents(plain.output)


FAMILIES = {
    "gemma2": {"head_dim": 16},
    "gpt2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {},
    "apertus": {},
    "gptj": {},
    "phi3": {"pad_token_id": 0},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "falcon": {},
    "mamba": {},
    "gemma3_text": {"head_dim": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_model_is_as_transformers_makes_it(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmprune.model.empty import build_empty

    small = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = AutoConfig.for_model(family, **{**small, **FAMILIES[family]})
    for dtype in (torch.float32, torch.bfloat16):
        wanted, made = (
            AutoModelForCausalLM.from_config(config, dtype=dtype),
            build_empty(config, dtype, False),
        )
        assert type(made) is type(wanted) and made.config.to_dict() == wanted.config.to_dict()
        buffers, others = dict(wanted.named_buffers()), dict(made.named_buffers())
        assert buffers.keys() == others.keys()
        for name, buffer in buffers.items():
            assert others[name].dtype == buffer.dtype and torch.equal(others[name], buffer), name
        parameters = {name: p.shape for name, p in wanted.named_parameters(remove_duplicate=False)}
        assert {name: p.shape for name, p in made.named_parameters(remove_duplicate=False)} == parameters
        assert all(p.is_meta for p in made.parameters())
