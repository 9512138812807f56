"""Block by block is the same as the whole model, bit for bit (float32, the same micro-batches)."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import llmprune
from llmprune.checkpoint.masks import read_masks
from llmprune.evaluation.perplexity import perplexity
from llmprune.model import activations
from llmprune.model.activations import BlockInputs, micro_batch
from llmprune.model.opening import open_model
from llmprune.model.targets import targets_of
from llmprune.planning import needs

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
TOKENS = torch.randint(0, 96, (7, 16), generator=torch.Generator().manual_seed(3))


def llama(**more):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, **more)).eval()


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setitem(activations._TOKENS, "cpu", 48)  # 3 sequences, so that 7 end in a smaller batch


def batches():
    size = micro_batch(16, torch.device("cpu"))
    return [slice(i, min(i + size, 7)) for i in range(0, 7, size)]


@pytest.mark.parametrize("tied", [False, True])
def test_block_outputs_equal_the_whole_model(tmp_path, tied):
    model = llama(tie_word_embeddings=tied)
    opened = open_model(save(model, tmp_path))
    inputs = BlockInputs(opened.skeleton, TOKENS, torch.device("cpu"))
    seen = []
    handles = [b.register_forward_hook(lambda m, i, out: seen.append(out)) for b in model.model.layers]
    with torch.no_grad():
        for part in batches():
            model(input_ids=TOKENS[part], use_cache=False)
    for handle in handles:
        handle.remove()
    for number, name in enumerate(opened.skeleton.blocks):
        opened.skeleton.load(opened.skeleton.parameters_of(name))
        inputs.forward(number)
        whole = torch.cat(seen[number::3])
        assert torch.equal(inputs._hidden, whole), name


@pytest.mark.parametrize("tied", [False, True])
def test_streamed_perplexity_equals_the_whole_model(tmp_path, tied):
    model = llama(tie_word_embeddings=tied)
    losses = []
    with torch.no_grad():
        for part in batches():
            for row, logits in zip(
                TOKENS[part], model(input_ids=TOKENS[part], use_cache=False).logits, strict=True
            ):
                losses.append(cross_entropy(logits[:-1], row[1:]).item())
    opened = open_model(save(model, tmp_path))
    assert perplexity(opened.skeleton, TOKENS) == math.exp(sum(losses) / len(losses))


def wanda_on_the_whole_model(model, sparsity):
    for block in model.model.layers:
        linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
        squares = {m: torch.zeros(m.in_features, dtype=torch.float64) for m in linears}

        def collect(module, args, squares=squares):
            x = args[0].reshape(-1, module.in_features)
            squares[module] += x.square().sum(dim=0).double()

        handles = [m.register_forward_pre_hook(collect) for m in linears]
        with torch.no_grad():
            for part in batches():
                model(input_ids=TOKENS[part], use_cache=False)
        for handle in handles:
            handle.remove()
        for m in linears:
            score = m.weight.data.abs() * (squares[m] / TOKENS.numel()).float().sqrt()
            order = score.sort(dim=1, stable=True).indices[:, : int(m.in_features * sparsity)]
            m.weight.data.scatter_(1, order, 0.0)
    return model


@pytest.mark.parametrize("sharded", [False, True])
def test_a_streamed_run_equals_pruning_the_whole_model(tmp_path, sharded):
    model = llama()
    folder = save(model, tmp_path / "in", max_shard_size="20KB" if sharded else "1GB")
    llmprune.prune(folder, recipe="wanda", sparsity=0.6, calibration=TOKENS, output=tmp_path / "out")
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    whole = wanda_on_the_whole_model(model, 0.6).state_dict()
    assert streamed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(streamed[name], tensor), name


def test_a_model_in_memory_gives_the_same_as_its_folder_and_is_not_touched(tmp_path):
    model = llama(tie_word_embeddings=True)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    options = {"recipe": "dsnot", "sparsity": 0.5, "calibration": TOKENS}
    llmprune.prune(model, **options, output=tmp_path / "memory")
    llmprune.prune(save(model, tmp_path / "in"), **options, output=tmp_path / "folder")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    a, b = (llmprune.load(tmp_path / n).state_dict() for n in ("memory", "folder"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_keep_their_dtype_and_untouched_tensors_their_bytes(tmp_path, dtype):
    model = llama().to(dtype)
    llmprune.prune(save(model, tmp_path / "in"), pattern="2:4", calibration=TOKENS, output=tmp_path / "out")
    pruned = llmprune.load(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        assert pruned[name].dtype == dtype
        if "proj" not in name:
            assert torch.equal(pruned[name].view(torch.int16), tensor.view(torch.int16)), name
        else:
            assert bool(((pruned[name] != 0).view(-1, 4).sum(1) <= 2).all())


def other_architectures():
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    opt = OPTForCausalLM(
        OPTConfig(**SIZES | {"num_hidden_layers": 2}, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)
    )
    # Their loops take the first item of what a block returns.
    bloom = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=32, n_layer=5, n_head=4))
    gptj = GPTJForCausalLM(
        GPTJConfig(vocab_size=96, n_embd=32, n_layer=5, n_head=4, n_positions=64, rotary_dim=4)
    )
    return {"gpt2": gpt2.eval(), "opt": opt.eval(), "bloom": bloom.eval(), "gptj": gptj.eval()}


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gptj"])
def test_other_architectures_stream_too(tmp_path, name):
    model = other_architectures()[name]
    folder = save(model, tmp_path / "in")
    llmprune.prune(folder, recipe="sparsegpt", sparsity=0.5, calibration=TOKENS, output=tmp_path / "out")
    counts = llmprune.inspect(tmp_path / "out")
    assert counts["sparsity"] == pytest.approx(0.5, abs=1e-3) and counts["record_agrees"] is True
    opened = open_model(folder)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=TOKENS[p], use_cache=False).logits for p in batches()])
    whole = [cross_entropy(row[:-1], tokens[1:]).item() for row, tokens in zip(logits, TOKENS, strict=True)]
    assert perplexity(opened.skeleton, TOKENS) == pytest.approx(math.exp(sum(whole) / 7), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gptj"])
def test_halted_passes_prune_as_those_computed_again(tmp_path, monkeypatch, name):
    folder = save(llama() if name == "llama" else other_architectures()[name], tmp_path / "in")
    options = {"recipe": "sparsegpt", "sparsity": 0.5, "calibration": TOKENS, "settings": {"order": "group"}}
    calls, real = [], BlockInputs.run

    def counted(self, number, part, weights):
        calls.append(number)
        return real(self, number, part, weights)

    monkeypatch.setattr(BlockInputs, "run", counted)
    passes = {}
    for way, memory in (("halted", 0), ("again", 1 << 62)):
        with monkeypatch.context() as patch:
            patch.setattr(needs, "halted_bytes", lambda *args, memory=memory: memory)
            llmprune.prune(folder, output=tmp_path / way, **options)
        passes[way] = len(calls)
        calls.clear()
    blocks = json.loads((tmp_path / "in" / "config.json").read_text()).get(
        "num_hidden_layers", 5 if name in ("bloom", "gptj") else 2
    )
    if name in ("bloom", "gptj"):  # their attention would keep all its weights
        assert passes["halted"] == passes["again"]
    else:
        assert (
            passes["halted"] == 4 * blocks < passes["again"]
        )  # three micro-batches, and one sequence to see the groups
    one, two = (
        load_file(next((tmp_path / way).glob("model-00001*.safetensors"))) for way in ("halted", "again")
    )
    for key, tensor in one.items():
        assert torch.allclose(tensor, two[key], atol=1e-6), key
    one, two = (read_masks(tmp_path / way / "masks.safetensors") for way in ("halted", "again"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_q_k_v_and_gate_up_share_one_accumulation(tmp_path):
    from llmprune.contracts import Need
    from llmprune.recipe.loading import load
    from llmprune.run.observer import Observer
    from runs import ready

    opened = open_model(save(llama(), tmp_path))
    skeleton = opened.skeleton
    inputs = BlockInputs(skeleton, TOKENS, torch.device("cpu"))
    name = next(iter(skeleton.blocks))
    skeleton.load(skeleton.parameters_of(name))
    observer = Observer(ready(opened, load("wanda", {}), TOKENS), Need.SECOND_MOMENT, inputs)
    targets = targets_of(skeleton, name)
    stats = {n.rpartition(".")[2]: s for n, s in observer.collect(0, targets, {}).items()}
    assert stats["q_proj"] is stats["k_proj"] is stats["v_proj"] and stats["gate_proj"] is stats["up_proj"]
    assert len({id(s) for s in stats.values()}) == 4
    groups = [[t.name.rpartition(".")[2] for t in group] for group in observer.groups(0, targets)]
    assert groups == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_a_half_precision_model_in_memory_keeps_its_config_and_dtype(tmp_path):
    model = llama().to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    llmprune.prune(model, recipe="magnitude", calibration=TOKENS, output=tmp_path / "out")
    assert model.config.dtype == torch.bfloat16
    assert llmprune.load(tmp_path / "out").dtype == torch.bfloat16


def test_names_are_those_of_the_checkpoint_even_without_the_base_prefix(tmp_path):
    folder = save(llama(), tmp_path / "in")
    tensors = {n.removeprefix("model."): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = llmprune.prune(folder, recipe="wanda", calibration=TOKENS, output=tmp_path / "out")
    names = {m["name"] for m in result.record["matrices"]}
    assert names == set(read_masks(tmp_path / "out/masks.safetensors")) and names < set(tensors)
    assert llmprune.inspect(tmp_path / "out")["record_agrees"] is True
    record = json.loads((tmp_path / "out/llmprune.json").read_text())
    record["matrices"].append({"name": "no.such.weight", "sparsity": 0.5})
    (tmp_path / "out/llmprune.json").write_text(json.dumps(record))
    assert llmprune.inspect(tmp_path / "out")["record_agrees"] is False
