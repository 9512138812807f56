"""Text sampled from the model itself: the right tokens, the same for a seed, refused where the model does not
fit.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llmprune
from llmprune import calibration
from llmprune.calibration import sampling
from llmprune.calibration.sampling import Sampler, draw
from llmprune.machine import device
from llmprune.model.opening import OpenOptions, open_model
from llmprune.run.reporter import Silent

SMALL = {"recipe": "magnitude", "samples": 4, "seqlen": 16}


def sampled(folder, samples=5, length=24, seed=0, **options):
    return Sampler(open_model(folder, OpenOptions(dtype="float32")), Silent(), **options).sample(
        samples, length, seed
    )


def slow_choice(logits, uniform, temperature, top_p):
    """One token from one row of logits, in plain numpy: whole distribution, cut, then a walk along it."""
    scaled = logits.astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    kept, reached = [], 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        kept.append(token)
        reached += probabilities[token]
        if reached >= top_p:
            break
    walked = 0.0
    for token in kept:
        walked += probabilities[token]
        if walked > uniform * reached:
            return int(token)
    return int(kept[-1])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.95), (0.5, 0.6), (2.0, 0.01)])
def test_draws_follow_the_cut_distribution(temperature, top_p):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 2
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    chosen = draw(logits.expand(20_000, 50), uniform, temperature, top_p)
    expected = torch.tensor(
        [slow_choice(logits.numpy(), float(u), temperature, top_p) for u in uniform[::100]]
    )
    assert (
        chosen[::100] == expected
    ).float().mean() > 0.98  # rounding moves the borders between tokens a little
    probabilities = (logits / temperature).softmax(-1)
    share = torch.bincount(chosen, minlength=50) / 20_000
    alive = share > 0
    assert share[alive] == pytest.approx(probabilities[alive] / probabilities[alive].sum(), abs=1e-3)
    assert probabilities[alive].sum() >= top_p - 1e-3 or alive.all()


@torch.no_grad()
def test_rows_are_those_of_a_loop_without_cache(tiny_llama):
    rows = sampled(tiny_llama, samples=3, temperature=0.9, top_p=0.8)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    uniform = torch.rand(3, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (rows[:, 0] == 0).all(), "the tokenizer's BOS"
    for row, numbers in zip(rows, uniform, strict=True):
        written = [0]
        for place in range(1, 24):
            logits = model(torch.tensor([written]), use_cache=False).logits[0, -1].numpy().copy()
            if written[-1] == 0:
                logits[1] = -np.inf  # no empty document
            written.append(0 if written[-1] == 1 else slow_choice(logits, float(numbers[place]), 0.9, 0.8))
        assert row.tolist() == written


def test_a_seed_gives_the_same_rows_however_many_are_sampled_together(tiny_llama, monkeypatch):
    before = torch.get_rng_state()
    rows = sampled(tiny_llama)
    monkeypatch.setattr(sampling, "_BATCH", 2)
    assert torch.equal(sampled(tiny_llama), rows)
    assert not torch.equal(sampled(tiny_llama, seed=1), rows)
    assert rows.shape == (5, 24) and rows.dtype == torch.int64 and len(set(map(tuple, rows.tolist()))) == 5
    assert torch.equal(torch.get_rng_state(), before), "nobody else's random numbers are used"


def test_what_the_checkpoint_says_of_generation_is_not_used(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    other = {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "do_sample": True,
        "top_k": 1,
        "repetition_penalty": 5.0,
        "max_length": 7,
    }
    (folder / "generation_config.json").write_text(json.dumps(other))
    assert torch.equal(sampled(folder), sampled(tiny_llama))


def in_memory(**config):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            **config,
        )
    )


def test_an_end_of_text_begins_a_new_document():
    ends = list(range(1, 20))
    model = in_memory(bos_token_id=0, eos_token_id=ends)
    before = copy.deepcopy(model.generation_config)
    rows = sampled(model, samples=8, length=40)
    ended = torch.isin(rows[:, :-1], torch.tensor(ends))
    assert ended.sum() > 50
    assert (rows[:, 1:][ended] == 0).all(), "BOS follows"
    assert not torch.isin(rows[:, 1:][rows[:, :-1] == 0], torch.tensor(ends)).any(), "no empty document"
    assert model.generation_config == before and next(model.parameters()).requires_grad, (
        "the user's model is as it was"
    )


def test_rows_begin_anywhere_where_there_is_no_first_token():
    ends = list(range(1, 20))
    rows = sampled(in_memory(bos_token_id=None, eos_token_id=ends), samples=16, length=30)
    assert len(rows[:, 0].unique()) > 5
    ended = torch.isin(rows[:, 1:-1], torch.tensor(ends))
    assert ended.any() and not torch.isin(rows[:, 2:][ended], torch.tensor(ends)).any()
    assert torch.equal(rows, sampled(in_memory(bos_token_id=None, eos_token_id=ends), samples=16, length=30))


def test_a_token_that_begins_and_ends_documents_is_not_doubled():
    rows = sampled(in_memory(bos_token_id=3, eos_token_id=3), samples=16, length=60)
    assert (rows[:, 0] == 3).all() and (rows[:, 1:] == 3).any()
    assert not ((rows[:, 1:] == 3) & (rows[:, :-1] == 3)).any()


def test_tokens_without_a_meaning_are_not_sampled(make_llama):
    rows = sampled(make_llama(vocab_size=4096), samples=8, length=32, temperature=5.0, top_p=1.0)
    assert rows.max() < 2048, "the tokenizer has 2048"


def test_a_model_without_tokenizer_can_write(make_llama, tmp_path):
    result = llmprune.prune(make_llama(tokenizer=False), calibration="self", output=tmp_path / "out", **SMALL)
    assert result.record["calibration"]["source"] == "self"


def test_the_record_says_how_and_its_recipe_does_it_again(typed, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = "--calibration self --samples 4 --seqlen 16 --set calibration.temperature=0.7".split()
    code, out, err = typed("prune", tiny_llama, "--recipe", "wanda", *arguments, "--output", "one", "--json")
    assert code == 0 and "self (sampled from the model at temperature 0.7, top-p 0.95)" in err
    record = json.loads(out)
    assert record["calibration"] | {"digest": 0} == {
        "source": "self",
        "samples": 4,
        "sequence_length": 16,
        "seed": 0,
        "digest": 0,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    (tmp_path / "again.yaml").write_text(json.dumps(record["recipe"]))
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "empty"))
    again = llmprune.prune(tiny_llama, recipe="again.yaml", output="two").record
    assert (
        again["calibration"] == record["calibration"]
        and again["recipe"] | {"name": "wanda"} == record["recipe"]
    )
    other = llmprune.prune(
        tiny_llama, recipe="again.yaml", output="three", settings={"calibration.temperature": 1.0}
    ).record
    assert other["calibration"]["digest"] != record["calibration"]["digest"]


def test_rows_come_from_the_cache_until_something_changes(tiny_llama, make_llama, tmp_path, monkeypatch):
    def digest(model, **options):
        dry = llmprune.prune(model, calibration="self", dry_run=True, **{**SMALL, **options})
        return dry.recipe.calibration

    digest(tiny_llama)
    monkeypatch.setattr(Sampler, "sample", lambda self, *a: pytest.fail("sampled again"))
    assert digest(tiny_llama).temperature == 1.0 and digest(tiny_llama).top_p == 0.95
    for model, options in (
        (make_llama(seed=1), {}),
        (tiny_llama, {"seed": 1}),
        (tiny_llama, {"samples": 5}),
        (tiny_llama, {"seqlen": 17}),
        (tiny_llama, {"dtype": "bfloat16"}),
        (tiny_llama, {"settings": {"calibration.top_p": 0.9}}),
    ):
        with pytest.raises(pytest.fail.Exception, match="sampled again"):
            digest(model, **options)


@pytest.mark.parametrize("source", ["self", "builtin=0.5+self=0.5"])
def test_a_model_that_does_not_fit_is_refused_before_any_work(tiny_llama, tmp_path, monkeypatch, source):
    monkeypatch.setattr(device, "available_memory", lambda: 1_000_000)
    monkeypatch.setattr(calibration.rows, "pack", lambda *a: pytest.fail("text was packed"))
    monkeypatch.setattr(sampling, "fingerprint", lambda *a: pytest.fail("weights were read"))
    said = (
        r"sampling text needs the whole model in memory, about \d+\.\d MB.*--calibration c4, builtin or a "
        r"text file$"
    )
    with pytest.raises(ValueError, match=said):
        llmprune.prune(tiny_llama, calibration=source, output=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_the_batch_shrinks_to_what_memory_holds(tiny_llama, monkeypatch):
    sampler = Sampler(open_model(tiny_llama, OpenOptions(dtype="float32")), Silent())
    weights = sum(t.elements for t in sampler.model.source.tensors.values()) * 4
    row = sampler._row_bytes(64)
    assert row >= 2 * 2 * 32 * 64 * 4, "keys and values of two blocks"
    for free, batch in ((100, 32), (9, 8), (1.5, 1)):
        monkeypatch.setattr(device, "available_memory", lambda free=free: int((weights + free * row) / 0.8))
        assert sampler._batch(64) == batch


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"calibration": "builtin", "settings": {"calibration.temperature": 0.7}},
            r"temperature is of text sampled.*got source 'builtin'",
        ),
        (
            {"calibration": torch.zeros(4, 16, dtype=torch.int64), "settings": {"calibration.top_p": 0.7}},
            r"top_p is of .*in memory",
        ),
        (
            {"calibration": "self", "settings": {"calibration.temperature": 0}},
            r"temperature must be a number from 0\.01 to 100, got 0$",
        ),
        (
            {"calibration": "self", "settings": {"calibration.temperature": "hot"}},
            r"temperature must be a number from .*, got 'hot'",
        ),
        (
            {"calibration": "self", "settings": {"calibration.top_p": 1.5}},
            r"top_p must be a number from 1e-06 to 1, got 1\.5",
        ),
        (
            {"calibration": "self", "settings": {"calibration.top_p": float("nan")}},
            r"top_p must be .*got nan",
        ),
        (
            {"calibration": "self", "settings": {"calibration.top_k": 5}},
            r"calibration key 'top_k'.*did you mean 'top_p'",
        ),
        ({"calibration": "self", "seqlen": 65}, r"sequence length 65 is over the model's limit of 64"),
        ({"calibration": "sefl"}, r"text source 'sefl': did you mean 'self'"),
    ],
)
def test_wrong_options_are_refused(tiny_llama, tmp_path, options, said):
    small = SMALL if isinstance(options["calibration"], str) else {"recipe": "magnitude"}
    with pytest.raises(ValueError, match=said) as caught:
        llmprune.prune(tiny_llama, output=tmp_path / "out", **{**small, **options})
    assert "\n" not in str(caught.value)


def test_a_model_whose_logits_overflow_is_refused(tiny_llama, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "forward", broken := _nan_logits(LlamaForCausalLM.forward))
    with pytest.raises(ValueError, match=r"logits are NaN; use --dtype float32"):
        sampled(tiny_llama)
    assert broken.called


def _nan_logits(forward):
    def call(self, *args, **kwargs):
        call.called = True
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * torch.nan
        return output

    call.called = False
    call.__wrapped__ = forward  # generate reads the signature
    return call


def architectures():
    from transformers import GPT2Config, MixtralConfig, OPTConfig, Qwen2Config

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    yield GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=3, eos_token_id=3
    )
    yield OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16, bos_token_id=2, eos_token_id=2)
    yield Qwen2Config(
        **sizes,
        num_key_value_heads=1,
        intermediate_size=24,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    )
    yield MixtralConfig(
        **sizes, num_key_value_heads=1, intermediate_size=24, num_local_experts=2, num_experts_per_tok=1
    )


@pytest.mark.parametrize("config", architectures(), ids=lambda c: c.model_type)
def test_every_architecture_writes_what_its_logits_say(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rows = sampled(model, samples=2, length=20, temperature=0.5, top_p=1e-9)
    begins = {model.config.bos_token_id, model.config.eos_token_id}
    with torch.no_grad():
        logits = model(rows, use_cache=False).logits
    likeliest = [
        (pair[1], token)
        for row, wanted in zip(rows.tolist(), logits.argmax(-1).tolist(), strict=True)
        for pair, token in zip(itertools.pairwise(row), wanted, strict=False)
        if not begins & {*pair, token}
    ]
    assert len(likeliest) > 5 and all(written == token for written, token in likeliest)
