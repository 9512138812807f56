"""LoRA adapters of PEFT on pruned models: masked while they train, and merged without filling a zero."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from other_models import make
from outputs import one_line
from torch.func import functional_call

import llmprune
from llmprune.checkpoint.masks import MaskFile, pack, read_masks

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'llmprune[peft]'")
TOKENS = torch.randint(0, 120, (8, 16), generator=torch.Generator().manual_seed(0))
LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]


def prune(folder, output, **options):
    values = {"recipe": "wanda", "sparsity": 0.6, "calibration": TOKENS, **options}
    return llmprune.prune(folder, output=output, **values).output


@pytest.fixture(scope="module")
def pruned(tiny_llama, tmp_path_factory):
    """The folder of a tiny pruned Llama. Treat as read-only."""
    return prune(tiny_llama, tmp_path_factory.mktemp("adapters") / "pruned")


def adapted(folder, seed=0, noise=0.1, dtype="auto", **options):
    """A model with a LoRA adapter whose B is not zero, as after training."""
    torch.manual_seed(seed)
    values = {"r": 4, "lora_alpha": 12, "target_modules": LINEAR, **options}
    model = peft.get_peft_model(llmprune.load(folder, dtype=dtype), peft.LoraConfig(**values))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=noise)
    return model


def factors(model, adapter="default"):
    """Per matrix with the adapter, by its weight: A [r, C] and B [R, r] in float64, and the base weight."""
    found = {}
    for path, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and adapter in module.lora_A:
            a, b = (part[adapter].weight.detach().double().numpy() for part in (module.lora_A, module.lora_B))
            found[f"{path}.weight"] = a, b, module.get_base_layer().weight.detach().clone()
    return found


def turned(name):
    """Whether a weight lies as [C, R], as those of GPT-2 do."""
    return ".c_" in name


def keep_of(folder, name):
    """The keep mask in the layout of the weight."""
    keep = read_masks(folder / "masks.safetensors")[name].numpy()
    return keep.T if turned(name) else keep


def merged_by_hand(folder, found, scale):
    """V = W + s k * (B A) in float64, rounded once, for each adapted matrix."""
    result = {}
    for name, (a, b, weight) in found.items():
        change = scale * (b @ a)
        change = change.T if turned(name) else change
        value = weight.double().numpy() + np.where(keep_of(folder, name), change, 0)
        result[name] = torch.from_numpy(value).to(weight.dtype)
    return result


def filled(model, folder):
    """How many weights that the masks prune are not +0, by their bits."""
    state, count = model.state_dict(), 0
    for name in read_masks(folder / "masks.safetensors"):
        bits = state[name].view({2: torch.int16, 4: torch.int32}[state[name].element_size()]).numpy()
        count += int(np.count_nonzero(bits[~keep_of(folder, name)]))
    return count


def train(model, steps=6, keeper=None):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    if keeper is not None:
        keeper.attach(optimizer)
    for step in range(steps):
        rows = TOKENS[step % 4 : step % 4 + 2]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def quiet(function, *args):
    """The result of a call that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


# Merged


@pytest.mark.parametrize("masks", [True, False])
def test_the_merge_is_the_formula_and_fills_no_zero(pruned, masks):
    model = adapted(pruned)
    found, before = factors(model), {n: p.clone() for n, p in model.get_base_model().named_parameters()}
    with pytest.warns(UserWarning, match="merge_adapter: .*% of the adapter's squared change"):
        merged = llmprune.merge_adapter(model, pruned if masks else None)
    assert type(merged).__name__ == "LlamaForCausalLM" and filled(merged, pruned) == 0
    wanted = merged_by_hand(pruned, found, 12 / 4)
    assert len(wanted) == 8
    for name, weight in merged.named_parameters():
        if name in wanted:
            torch.testing.assert_close(weight.detach(), wanted[name], rtol=1e-6, atol=1e-7)
            keep = keep_of(pruned, name)
            assert (weight.detach() != found[name][2]).numpy()[keep].mean() > 0.99
        else:
            assert torch.equal(weight, before[name])
    assert not hasattr(merged, "peft_config") and "lora" not in str(merged).lower()


def test_the_merge_of_peft_fills_them(pruned):
    merged = adapted(pruned).merge_and_unload()
    masks = read_masks(pruned / "masks.safetensors")
    adapted_ones = [name for name in masks if name.split(".")[-2] in LINEAR]
    pruned_there = sum(int((~masks[name]).sum()) for name in adapted_ones)
    assert filled(merged, pruned) > 0.99 * pruned_there


def test_what_is_dropped_is_told(pruned):
    model = adapted(pruned)
    lost = total = 0.0
    for name, (a, b, _) in factors(model).items():
        change = (b @ a) ** 2
        total += change.sum()
        lost += change[~keep_of(pruned, name)].sum()
    with pytest.warns(UserWarning, match=f"merge_adapter: {lost / total:.1%} of the adapter's"):
        llmprune.merge_adapter(model)


def test_sixteen_bit_weights_are_rounded_once(pruned):
    model = adapted(pruned, dtype=torch.bfloat16)
    found = factors(model)
    quiet(llmprune.MaskKeeper, model)
    merged = quiet(llmprune.merge_adapter, model)
    wanted = merged_by_hand(pruned, found, 3)
    state, other = merged.state_dict(), 0
    for name, weight in wanted.items():
        # Of sums that lie between two values of bfloat16 float32 may take the other one.
        other += int((state[name] != weight).sum())
    assert state[next(iter(wanted))].dtype == torch.bfloat16 and filled(merged, pruned) == 0
    assert other < 5
    two = llmprune.load(pruned, dtype=torch.bfloat16).state_dict()
    twice = sum(
        int((two[n] + (3 * torch.from_numpy(b @ a)).bfloat16() != wanted[n])[wanted[n] != 0].sum())
        for n, (a, b, _) in found.items()
    )
    assert twice > 100  # what is rounded before the sum and after it


def test_transposed_layers(tmp_path):
    pruned = prune(make("gpt2", tmp_path / "dense"), tmp_path / "pruned")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = adapted(pruned, target_modules=["c_attn", "c_proj", "c_fc"])
    found = factors(model)
    quiet(llmprune.MaskKeeper, model)
    masked = logits(model)
    merged = quiet(llmprune.merge_adapter, model)
    for name, weight in merged_by_hand(pruned, found, 3).items():
        torch.testing.assert_close(merged.state_dict()[name], weight, rtol=1e-6, atol=1e-7)
    assert len(found) == 8 and filled(merged, pruned) == 0
    torch.testing.assert_close(logits(merged), masked, rtol=1e-5, atol=1e-5)


def test_several_adapters_and_their_scales(pruned):
    model = adapted(pruned, use_rslora=True)
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "o_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.base_model.set_adapter(["default", "other"])
    llmprune.MaskKeeper(model)
    wanted = merged_by_hand(pruned, factors(model), 12 / np.sqrt(4))
    second = merged_by_hand(pruned, factors(model, "other"), 3 / 2)
    base = {n: weight for each in ("default", "other") for n, (*_, weight) in factors(model, each).items()}
    masked = logits(model)
    merged = quiet(llmprune.merge_adapter, model)
    assert filled(merged, pruned) == 0
    for name, weight in base.items():
        both = sum((each[name] - weight for each in (wanted, second) if name in each), weight)
        torch.testing.assert_close(merged.state_dict()[name], both, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(merged), masked, rtol=1e-5, atol=1e-5)


def test_an_adapter_over_dense_matrices_is_merged_plainly(pruned, tmp_path):
    masks = {n: k for n, k in read_masks(pruned / "masks.safetensors").items() if "mlp" in n}
    file = MaskFile(tmp_path / "some", {name: tuple(keep.shape) for name, keep in masks.items()})
    file.write({name: pack(keep) for name, keep in masks.items()})
    file.close()
    model = adapted(pruned)
    found = factors(model)
    keeper = llmprune.MaskKeeper(model, tmp_path / "some")
    said = "LoRA layers: 4 masked, 4 plain, as their matrices have no mask: model.layers.0.self_attn.q_proj"
    assert said in keeper.describe()
    merged = quiet(llmprune.merge_adapter, model)
    for name, (a, b, weight) in found.items():
        value = merged.state_dict()[name].double().numpy()
        plain = weight.double().numpy() + 3 * (b @ a)
        kept = masks[name].numpy() if name in masks else np.ones(value.shape, bool)
        np.testing.assert_allclose(value, np.where(kept, plain, 0), rtol=1e-5, atol=1e-6)


def test_a_head_that_is_saved_whole_is_taken_too(pruned):
    model = adapted(pruned, modules_to_save=["lm_head"])
    with llmprune.MaskKeeper(model) as keeper:
        train(model, keeper=keeper)
    before, head = logits(model), model.get_base_model().lm_head.modules_to_save["default"].weight.clone()
    merged = llmprune.merge_adapter(model)
    assert torch.equal(merged.lm_head.weight, head)
    assert not torch.equal(head, llmprune.load(pruned).lm_head.weight)
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)
    assert filled(merged, pruned) == 0 and keeper.check()["filled"] == 0


# Trained with the mask


def test_what_was_trained_is_what_is_merged(pruned):
    model = adapted(pruned, noise=0)
    with llmprune.MaskKeeper(model) as keeper:
        train(model, keeper=keeper)
    before = logits(model)
    assert not torch.allclose(before, logits(llmprune.load(pruned)), atol=1e-2)
    merged = quiet(llmprune.merge_adapter, model)
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)
    assert filled(merged, pruned) == 0


def test_plain_lora_differs_from_its_masked_merge(pruned):
    model = train(adapted(pruned, noise=0))
    before = logits(model)
    with pytest.warns(UserWarning, match="the merged model is not the one that was trained"):
        merged = llmprune.merge_adapter(model)
    assert filled(merged, pruned) == 0
    assert (logits(merged) - before).abs().max() > 0.01


def test_gradients_are_those_of_the_formula(pruned):
    """The oracle computes with whole weights W + s k * (B A), and lets autograd find the gradients."""
    model = adapted(pruned)
    llmprune.MaskKeeper(model)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    base, weights, own = llmprune.load(pruned), {}, {}
    for name, (a, b, weight) in factors(model).items():
        own[name] = a, b = [torch.tensor(part, dtype=torch.float32, requires_grad=True) for part in (a, b)]
        weights[name] = weight + 3 * torch.from_numpy(keep_of(pruned, name)) * (b @ a)
    values = {"input_ids": TOKENS, "labels": TOKENS}
    functional_call(base, weights, args=(), kwargs=values).loss.backward()
    for name, (a, b) in own.items():
        layer = model.get_base_model().get_submodule(name.removesuffix(".weight"))
        for part, wanted in ((layer.lora_A, a), (layer.lora_B, b)):
            torch.testing.assert_close(part["default"].weight.grad, wanted.grad, rtol=1e-4, atol=1e-7)


def test_autograd_holds_no_change_of_a_layer(pruned):
    """Between forward and backward nothing of a matrix's size is held for an adapter."""
    model = adapted(pruned, target_modules=["up_proj"])
    llmprune.MaskKeeper(model)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    held, own = [], {p.data_ptr() for p in model.parameters()}

    def note(tensor):
        held.append(tensor.shape if tensor.data_ptr() not in own else None)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(torch.randn(3, 64, requires_grad=True))
    assert held and layer.get_base_layer().weight.shape not in held
    y.sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0


def test_gradient_checkpoints_and_dropout(pruned):
    model = adapted(pruned, noise=0, lora_dropout=0.2)
    model.gradient_checkpointing_enable()
    with llmprune.MaskKeeper(model) as keeper:
        model.train()
        train(model, keeper=keeper)
    before = logits(model)
    merged = llmprune.merge_adapter(model)
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)
    assert filled(merged, pruned) == 0


def test_a_trainer_with_an_adapter(pruned, tmp_path):
    from test_keeping import trainer

    model = adapted(pruned, noise=0)
    keeper = llmprune.MaskKeeper(model)
    trainer(model, tmp_path, [keeper.callback()], save_strategy="steps", save_steps=5).train()
    before = logits(model)
    merged = llmprune.merge_adapter(model)
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)
    assert filled(merged, pruned) == 0


def test_a_saved_adapter_is_masked_again(pruned, tmp_path):
    model = adapted(pruned, noise=0)
    with llmprune.MaskKeeper(model) as keeper:
        train(model, keeper=keeper)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(llmprune.load(pruned), tmp_path / "adapter")
    assert not torch.allclose(logits(again), logits(model), atol=1e-3)  # plain LoRA, as PEFT loads it
    llmprune.MaskKeeper(again)
    torch.testing.assert_close(logits(again), logits(model))
    one, other = llmprune.merge_adapter(model), llmprune.merge_adapter(again)
    assert all(torch.equal(w, other.state_dict()[name]) for name, w in one.state_dict().items())


def test_what_peft_does_with_a_masked_layer(pruned):
    model = adapted(pruned)
    plain = logits(llmprune.load(pruned))
    llmprune.MaskKeeper(model)
    masked = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), masked, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="is merged already; call unmerge_adapter"):
        llmprune.merge_adapter(model)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), masked, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="adapter_names per row cannot be masked"):
        model(TOKENS[:2], adapter_names=["default", "__base__"])
    merged = model.merge_and_unload(safe_merge=True)
    assert filled(merged, pruned) == 0
    torch.testing.assert_close(logits(merged), masked, rtol=1e-5, atol=1e-5)


def test_a_merged_model_trains_on(pruned):
    merged = llmprune.merge_adapter(quiet_adapter(pruned))
    assert not any(p.requires_grad for p in merged.parameters())
    merged.requires_grad_(True)
    optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-3)
    with llmprune.MaskKeeper(merged, pruned) as keeper:
        keeper.attach(optimizer)
        merged(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    assert filled(merged, pruned) == 0


def quiet_adapter(folder):
    model = adapted(folder)
    llmprune.MaskKeeper(model)
    return model


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "is DoRA, which changes more than B A"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens is over embeddings"),
        ({"bias": "lora_only"}, r"the adapter 'default' trains biases \(bias='lora_only'\)"),
        ({"lora_bias": True}, r"q_proj trains a bias \(lora_bias\)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which moves base weights"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "has layer_replication"),
        (
            {"modules_to_save": ["up_proj"], "target_modules": ["q_proj"]},
            "modules_to_save .*trains a copy of",
        ),
        (
            {"trainable_token_indices": [3]},
            "embed_tokens.token_adapter is TrainableTokensLayer of Embedding; only plain",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_that_cannot_be_masked(pruned, options, said):
    for call in (llmprune.MaskKeeper, llmprune.merge_adapter):
        model = adapted(pruned, **options)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        with pytest.raises(ValueError, match=said) as refused:
            call(model)
        one_line(refused.value)
        assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_adapters_of_another_kind(pruned):
    model = peft.get_peft_model(
        llmprune.load(pruned), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    prompts = peft.get_peft_model(
        llmprune.load(pruned), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    for given, said in (
        (model, "is IA3; only plain LoRA"),
        (prompts, "must be a PeftModel with a LoRA adapter"),
        (llmprune.load(pruned), "must be a PeftModel with a LoRA adapter"),
        (None, "must be a PeftModel with a LoRA adapter, got None"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            llmprune.merge_adapter(given)
        one_line(refused.value)


def test_experts_in_stacks(tmp_path):
    pruned = prune(make("mixtral", tmp_path / "dense"), tmp_path / "pruned")
    model = adapted(pruned, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match=r"experts is ParamWrapper of .*; only plain LoRA") as refused:
        llmprune.MaskKeeper(model)
    one_line(refused.value)
    llmprune.MaskKeeper(adapted(pruned, target_modules=["q_proj"]))


def test_tied_heads(make_llama, tmp_path):
    pruned = prune(make_llama(tied=True), tmp_path / "pruned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(pruned, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head is over a weight that it shares with the input") as refused:
        llmprune.merge_adapter(model)
    one_line(refused.value)


def test_masks_of_another_model_and_other_masks(pruned, make_llama, tmp_path):
    longer = prune(make_llama(layers=3), tmp_path / "longer")
    model = adapted(pruned)
    with pytest.raises(ValueError, match=r"has a mask for 'model.layers.2") as refused:
        llmprune.merge_adapter(model, longer)
    one_line(refused.value)
    llmprune.MaskKeeper(model)
    masks = read_masks(pruned / "masks.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    masks[name][tuple((~masks[name]).nonzero()[0])] = True
    file = MaskFile(tmp_path / "changed", {n: tuple(keep.shape) for n, keep in masks.items()})
    file.write({n: pack(keep) for n, keep in masks.items()})
    file.close()
    with pytest.raises(ValueError, match="q_proj is masked with another mask already") as refused:
        llmprune.merge_adapter(model, tmp_path / "changed")
    one_line(refused.value)
    assert filled(llmprune.merge_adapter(model, pruned), pruned) == 0


def test_values_that_are_not_finite(pruned):
    model = adapted(pruned)
    llmprune.MaskKeeper(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"on model.layers.1.mlp.down_proj holds NaN or Inf") as refused:
        llmprune.merge_adapter(model)
    one_line(refused.value)
    state = model.state_dict()
    assert all(torch.equal(before[n], w) for n, w in state.items() if "base_layer" in n)


def test_zeros_filled_beside_the_adapter(pruned):
    model = adapted(pruned)
    llmprune.MaskKeeper(model)
    weight = model.get_base_model().model.layers[0].mlp.gate_proj.weight
    weight.data[tuple((weight == 0).nonzero()[0])] = 1
    with pytest.raises(
        ValueError, match=r"1 pruned weights of model.layers.0.mlp.gate_proj.weight are not"
    ) as refused:
        llmprune.merge_adapter(model)
    one_line(refused.value)
    assert hasattr(model.get_base_model().model.layers[0].mlp.up_proj, "lora_A")


def test_an_adapter_put_on_by_transformers(pruned):
    torch.manual_seed(0)
    model = llmprune.load(pruned)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=False))
    plain = logits(model)
    with llmprune.MaskKeeper(model) as keeper:
        assert "LoRA layers: 8 masked, 0 plain" in keeper.describe()
        train(model, keeper=keeper)
    assert not torch.allclose(logits(model), plain, atol=1e-2)
    with pytest.raises(ValueError, match="must be a PeftModel"):
        llmprune.merge_adapter(model)


def test_adapters_that_are_not_active_or_came_later(pruned):
    model = adapted(pruned)
    keeper = llmprune.MaskKeeper(model)
    model.add_adapter("late", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    for call in (keeper.check, lambda: llmprune.merge_adapter(model)):
        with pytest.raises(ValueError, match="o_proj came after the MaskKeeper; make a new one") as refused:
            call()
        one_line(refused.value)
    model = adapted(pruned)
    model.base_model.set_adapter([])
    with pytest.raises(ValueError, match="no active LoRA adapter to merge") as refused:
        llmprune.merge_adapter(model)
    one_line(refused.value)


def test_without_masks_the_merge_tells(pruned, tmp_path):
    llmprune.load(pruned).save_pretrained(tmp_path / "saved")
    model = adapted(tmp_path / "saved")
    with pytest.warns(UserWarning, match="merge_adapter: the folder of saved has none, so the weights"):
        merged = llmprune.merge_adapter(model)
    assert filled(merged, pruned) == 0
