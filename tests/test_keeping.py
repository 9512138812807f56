"""Zeros kept while a training loop of the user's own moves the weights: `llmprune.MaskKeeper`."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from other_models import make
from outputs import one_line
from torch.func import functional_call

import llmprune
from llmprune.checkpoint.masks import MaskFile, pack, read_masks
from llmprune.keeping.kept import unpacked_there
from llmprune.runtime.semi_structured import TwoOfFourLinear

TOKENS = torch.randint(0, 120, (8, 16), generator=torch.Generator().manual_seed(0))
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
}


def prune(folder, output, **options):
    values = {"recipe": "wanda", "sparsity": 0.6, "calibration": TOKENS, **options}
    return llmprune.prune(folder, output=output, **values).output


@pytest.fixture(scope="module")
def pruned(tiny_llama, tmp_path_factory):
    """The folder of a tiny pruned Llama. Treat as read-only."""
    return prune(tiny_llama, tmp_path_factory.mktemp("keeping") / "pruned")


@pytest.fixture
def model(pruned):
    return llmprune.load(pruned).train()


def train(model, optimizer, keeper=None, steps=4, accumulate=1, clip=None):
    """A plain loop; returns the norms that clipping saw."""
    norms = []
    for step in range(steps * accumulate):
        rows = TOKENS[step % 4 : step % 4 + 2]
        (model(rows, labels=rows).loss / accumulate).backward()
        if (step + 1) % accumulate == 0:
            if clip is not None:
                norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
            optimizer.step()
            optimizer.zero_grad()
            if keeper is not None:
                keeper.after_step()
    return norms


def not_zero(model, folder):
    """How many weights that the masks of a folder prune hold another value than +0, by their bits. For models
    whose parameters are those of the checkpoint.
    """
    state, count = model.state_dict(), 0
    for name, keep in read_masks(folder / "masks.safetensors").items():
        weight = state[name].T if state[name].shape != keep.shape else state[name]
        count += int((weight.contiguous().view(torch.int32)[~keep] != 0).sum())
    return count


def pruned_in(folder):
    return sum(int((~keep).sum()) for keep in read_masks(folder / "masks.safetensors").values())


# Zeros


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (3, 0.1)])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_zero_bit_by_bit(pruned, model, kind, accumulate, clip):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = OPTIMIZERS[kind](model.parameters())
    with llmprune.MaskKeeper(model) as keeper:
        keeper.attach(optimizer)
        train(model, optimizer, accumulate=accumulate, clip=clip)
    assert not_zero(model, pruned) == 0
    counts = keeper.check()
    assert (counts["pruned"], counts["filled"], counts["dense"]) == (pruned_in(pruned), 0, [])
    for name, keep in read_masks(pruned / "masks.safetensors").items():
        moved = model.state_dict()[name] != before[name]
        assert moved[keep].float().mean() > 0.9, name
    for parameter in model.parameters():
        for value in optimizer.state[parameter].values():
            if value.shape == parameter.shape and parameter.ndim == 2:
                assert bool(value.any())  # it has trained
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks, seen = read_masks(pruned / "masks.safetensors"), 0
    for parameter, state in optimizer.state.items():
        if names[id(parameter)] in masks:
            for value in (v for v in state.values() if v.shape == parameter.shape):
                seen += 1
                assert int(value[~masks[names[id(parameter)]]].count_nonzero()) == 0
    assert seen >= len(masks)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_a_keeper_they_are_filled(pruned, model, kind):
    train(model, OPTIMIZERS[kind](model.parameters()))
    assert not_zero(model, pruned) > 0.9 * pruned_in(pruned)


def test_kept_weights_train_as_those_of_a_masked_forward_pass(pruned, model):
    """The oracle keeps dense weights of its own and multiplies them by the mask in each forward pass."""
    masks = read_masks(pruned / "masks.safetensors")
    other = llmprune.load(pruned).train()
    own = {name: torch.nn.Parameter(p.detach().clone()) for name, p in other.named_parameters()}
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        rows = TOKENS[step : step + 2]
        weights = {name: p * masks[name] if name in masks else p for name, p in own.items()}
        functional_call(other, weights, args=(), kwargs={"input_ids": rows, "labels": rows}).loss.backward()
        torch.nn.utils.clip_grad_norm_(own.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    ours = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    llmprune.MaskKeeper(model).attach(ours)
    train(model, ours, clip=0.5)
    for name, p in model.named_parameters():
        wanted = own[name] * masks[name] if name in masks else own[name]
        torch.testing.assert_close(p, wanted, rtol=0, atol=1e-6)


def test_the_clipped_norm_is_that_of_kept_weights(pruned, model):
    masks = read_masks(pruned / "masks.safetensors")
    train(model, torch.optim.SGD(model.parameters(), lr=0), steps=1)
    rows, names = TOKENS[:2], dict(model.named_parameters())
    gradients = torch.autograd.grad(model(rows, labels=rows).loss, list(names.values()))
    kept = [g * masks[name] if name in masks else g for name, g in zip(names, gradients, strict=True)]
    norm, whole = (float(torch.stack([g.norm() for g in found]).norm()) for found in (kept, gradients))
    still = torch.optim.SGD(model.parameters(), lr=0)
    with llmprune.MaskKeeper(model).attach(still):
        seen = train(model, still, steps=1, clip=1e9)
    assert seen == pytest.approx([norm], rel=1e-5) and whole > 1.05 * norm


def test_after_step_does_without_an_attached_optimizer(pruned, model):
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with llmprune.MaskKeeper(model) as keeper:
        train(model, optimizer, keeper)
    assert not_zero(model, pruned) == 0


def test_moments_from_before_the_pruning_are_cleared(pruned, tiny_llama):
    """Masked gradients alone do not do: Adam's first moment moves what was pruned."""
    masks = read_masks(pruned / "masks.safetensors")

    def continued(kept):  # whether with a keeper
        model = llmprune.load(tiny_llama).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train(model, optimizer)
        with torch.no_grad():
            for name, keep in masks.items():
                model.get_parameter(name).mul_(keep)
        if kept:
            llmprune.MaskKeeper(model, pruned).attach(optimizer)
            assert moments(model, optimizer, masks) == 0
        else:
            for name, keep in masks.items():
                model.get_parameter(name).register_hook(lambda grad, keep=keep: grad * keep)
        train(model, optimizer)
        return not_zero(model, pruned)

    assert continued(True) == 0
    assert continued(False) > 0


def test_moments_of_gradients_set_by_hand_are_cleared(pruned, model):
    masks = read_masks(pruned / "masks.safetensors")
    optimizer = OPTIMIZERS["amsgrad"](model.parameters())
    keeper = llmprune.MaskKeeper(model).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # by no backward pass, so no hook sees it
    optimizer.step()
    assert moments(model, optimizer, masks) == 0 and keeper.check()["filled"] == 0


def moments(model, optimizer, masks):
    """How many entries of Adam's state at pruned weights are not zero."""
    states = [(optimizer.state[model.get_parameter(name)], ~keep) for name, keep in masks.items()]
    return sum(
        int(state[key][cut].count_nonzero()) for state, cut in states for key in ("exp_avg", "exp_avg_sq")
    )


def test_several_optimizers(pruned, model):
    first, rest = list(model.parameters())[:9], list(model.parameters())[9:]
    optimizers = [OPTIMIZERS["adamw"](first), OPTIMIZERS["momentum"](rest)]
    with llmprune.MaskKeeper(model) as keeper:
        for optimizer in optimizers:
            keeper.attach(optimizer).attach(optimizer)
        for _ in range(3):
            model(TOKENS, labels=TOKENS).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert not_zero(model, pruned) == 0


def test_weights_that_are_unfrozen_later_and_parameters_put_anew(pruned, model):
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    keeper = llmprune.MaskKeeper(model).attach(optimizer)
    train(model, optimizer, steps=1)
    model.requires_grad_(True)
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().clone())
    again = OPTIMIZERS["adamw"](model.parameters())
    keeper.attach(again)
    train(model, again)
    assert not_zero(model, pruned) == 0 and keeper.check()["filled"] == 0


def test_hooks_are_gone_afterwards(pruned, model):
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with llmprune.MaskKeeper(model) as keeper:
        keeper.attach(optimizer)
        train(model, optimizer)
    train(model, optimizer)
    assert not_zero(model, pruned) > 0
    with pytest.raises(ValueError, match="attach the optimizer, or call after_step") as raised:
        keeper.check()
    one_line(raised.value)
    counts = keeper.zeros()
    assert counts["filled"] == not_zero(model, pruned) == sum(m["filled"] for m in counts["matrices"])


def test_leaving_checks_unless_something_else_is_wrong(model):
    with (
        pytest.raises(
            ValueError, match=r"1 of .* pruned weights .* are not zero, 1 of them in model.layers.0"
        ),
        llmprune.MaskKeeper(model) as keeper,
    ):
        spoil(model)
    keeper.after_step()
    with pytest.raises(RuntimeError, match="mine"), llmprune.MaskKeeper(model):
        spoil(model)
        raise RuntimeError("mine")


def spoil(model, value=-1.5):
    """Fill one zero of a matrix."""
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    place = (weight == 0).nonzero()[0]
    weight[tuple(place)] = value


def test_minus_zero_is_filled_and_made_plus_zero(pruned, model):
    keeper = llmprune.MaskKeeper(model)
    spoil(model, -0.0)
    assert keeper.zeros()["filled"] == not_zero(model, pruned) == 1
    keeper.after_step()
    assert keeper.check()["filled"] == not_zero(model, pruned) == 0
    spoil(model, -0.0)
    assert llmprune.MaskKeeper(model).check()["filled"] == not_zero(model, pruned) == 0


def test_nan_does_not_stay(pruned, model):
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    keeper = llmprune.MaskKeeper(model).attach(optimizer)
    train(model, optimizer, steps=1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)  # set by hand, so by no hook
    optimizer.step()
    assert keeper.check()["filled"] == not_zero(model, pruned) == 0


# Trainer


def trainer(model, folder, callbacks, **options):
    from transformers import Trainer, TrainingArguments

    values = {
        "output_dir": str(folder),
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        **options,
    }
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    return Trainer(model, TrainingArguments(**values), train_dataset=rows, callbacks=callbacks)


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 5}]
)
def test_a_trainer_keeps_zeros(pruned, model, tmp_path, options):
    keeper = llmprune.MaskKeeper(model)
    made = trainer(model, tmp_path, [keeper.callback()], **options)
    made.train()
    assert not_zero(model, pruned) == 0 and keeper.check()["pruned"] == pruned_in(pruned)
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, state in made.optimizer.state.items():
        if (keep := read_masks(pruned / "masks.safetensors").get(names[id(parameter)])) is not None:
            assert int(state["exp_avg"][~keep].count_nonzero()) == 0 < int(state["exp_avg"].count_nonzero())
    if options:
        saved = llmprune.load(tmp_path / "checkpoint-5")
        assert not_zero(saved, pruned) == 0
        again = llmprune.load(pruned).train()
        made = trainer(again, tmp_path, [llmprune.MaskKeeper(again).callback()], **options)
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        assert not_zero(again, pruned) == 0


def test_a_trainer_without_the_callback_fills_them(pruned, model, tmp_path):
    trainer(model, tmp_path, []).train()
    assert not_zero(model, pruned) > 0.9 * pruned_in(pruned)


def test_a_trainer_of_another_model_is_refused(pruned, model, tmp_path):
    keeper = llmprune.MaskKeeper(llmprune.load(pruned))
    with pytest.raises(ValueError, match="another model than the MaskKeeper's") as refused:
        trainer(model, tmp_path, [keeper.callback()]).train()
    one_line(refused.value)


def test_a_save_with_filled_zeros_is_told(model, tmp_path):
    from transformers import TrainerCallback

    class Spoil(TrainerCallback):
        def on_save(self, args, state, control, **given):
            spoil(given["model"])

    made = trainer(
        model, tmp_path, [Spoil(), llmprune.MaskKeeper(model).callback()], save_strategy="steps", save_steps=3
    )
    with pytest.raises(ValueError, match=r"pruned weights .* are not zero"):
        made.train()
    assert made.state.global_step == 3


# Which weights: families, folders, masks


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "gemma3"])
def test_matrices_of_other_families(kind, tmp_path):
    """Transposed, stacked and fused ones, whose masks are named after the tensors of the checkpoint."""
    pruned = prune(make(kind, tmp_path / "dense"), tmp_path / "pruned", recipe="magnitude")
    for keeping in (True, False):
        model = llmprune.load(pruned).train()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        keeper = llmprune.MaskKeeper(model)
        if keeping:
            keeper.attach(optimizer)
        train(model, optimizer)
        model.save_pretrained(tmp_path / f"trained-{keeping}")
        found = llmprune.mask_check(tmp_path / f"trained-{keeping}", pruned)
        assert found["pruned"] == pruned_in(pruned) > 0
        assert found["filled"] == keeper.zeros()["filled"]
        assert (found["filled"] == 0) == keeping
    assert {m["name"]: m["shape"] for m in keeper.zeros()["matrices"]} == {
        name: list(keep.shape) for name, keep in read_masks(pruned / "masks.safetensors").items()
    }


def test_a_file_of_masks_names_stacked_experts_as_the_checkpoint(tmp_path):
    """The file lies elsewhere, and the model's parameters have other names than the tensors."""
    pruned = prune(make("mixtral", tmp_path / "dense"), tmp_path / "pruned", recipe="magnitude")
    file = tmp_path / "elsewhere" / "m.safetensors"
    file.parent.mkdir()
    (pruned / "masks.safetensors").rename(file)
    keeper = llmprune.MaskKeeper(llmprune.load(pruned), file)
    assert keeper.check()["pruned"] == sum(int((~keep).sum()) for keep in read_masks(file).values())
    assert str(file) in keeper.describe()


def test_a_base_model_and_a_classifier(pruned):
    from transformers import AutoModel, AutoModelForSequenceClassification

    for auto in (AutoModel, AutoModelForSequenceClassification):
        model = auto.from_pretrained(pruned)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        with llmprune.MaskKeeper(model) as keeper:
            keeper.attach(optimizer)
            model(TOKENS[:1])[0].float().square().mean().backward()
            optimizer.step()
        assert keeper.check()["pruned"] == pruned_in(pruned)


def test_a_model_pruned_in_memory(tmp_path, tiny_llama):
    dense = llmprune.load(make("mixtral", tmp_path / "dense"))
    pruned = prune(dense, tmp_path / "pruned", recipe="magnitude")
    assert llmprune.MaskKeeper(llmprune.load(pruned)).check()["pruned"] == pruned_in(pruned)


def test_packed_folders(pruned, tmp_path):
    llmprune.convert(pruned, to="packed", output=tmp_path / "packed")
    with pytest.raises(
        ValueError, match=r"packed layer.*llmprune.load\(FOLDER, dequantize=True\)"
    ) as refused:
        llmprune.MaskKeeper(llmprune.load(tmp_path / "packed"))
    one_line(refused.value)
    model = llmprune.load(tmp_path / "packed", dequantize=True).train()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with llmprune.MaskKeeper(model) as keeper:
        train(model, optimizer, keeper.attach(optimizer))
    assert not_zero(model, pruned) == 0 and keeper.check()["pruned"] == pruned_in(pruned)


@pytest.mark.parametrize("view", [True, False])
def test_under_distributed_data_parallel(pruned, model, view):
    """Its hooks copy the gradients into buckets and back, after they were masked."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
        optimizer = OPTIMIZERS["adamw"](wrapped.parameters())
        keeper = llmprune.MaskKeeper(wrapped).attach(optimizer)
        train(wrapped, optimizer)
        wrapped(TOKENS, labels=TOKENS).loss.backward()
    finally:
        dist.destroy_process_group()
    assert keeper.model is model and not_zero(model, pruned) == 0
    for name, keep in read_masks(pruned / "masks.safetensors").items():
        grad = model.get_parameter(name).grad
        assert int(grad[~keep].count_nonzero()) == 0 < int(grad[keep].count_nonzero())


def test_masks_unpack_alike_on_every_device():
    for shape in ((3, 5), (4, 8), (2, 3, 7)):
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
        assert torch.equal(unpacked_there(pack(keep.view(1, -1)), keep.numel()).view(shape), keep)


def test_wrapped_by_torch(pruned, model):
    assert llmprune.MaskKeeper(torch.nn.DataParallel(model)).model is model
    assert llmprune.MaskKeeper(torch.compile(model)).model is model


def test_without_masks_the_zeros_are_taken_and_told(model, tmp_path, pruned):
    model.save_pretrained(tmp_path / "saved")
    other = llmprune.load(tmp_path / "saved").train()
    with torch.no_grad():
        kept = other.model.layers[1].mlp.up_proj.weight
        kept[tuple(kept.nonzero()[0])] = 0  # of a kept weight
    with pytest.warns(UserWarning, match="the folder of saved has none, so the weights that are zero now"):
        keeper = llmprune.MaskKeeper(other)
    assert "masks taken from the weights that are not zero" in repr(keeper)
    assert "one was kept and happens to be zero" in keeper.describe()
    optimizer = OPTIMIZERS["adamw"](other.parameters())
    keeper.attach(optimizer)
    train(other, optimizer)
    assert keeper.check()["pruned"] == pruned_in(pruned) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert llmprune.MaskKeeper(llmprune.load(tmp_path / "saved"), pruned).check()["pruned"] == pruned_in(
            pruned
        )


def test_matrices_without_a_mask_train_freely(pruned, model, tmp_path):
    masks = read_masks(pruned / "masks.safetensors")
    some = {name: keep for name, keep in masks.items() if "mlp" in name}
    file = MaskFile(tmp_path / "some", {name: tuple(keep.shape) for name, keep in some.items()})
    file.write({name: pack(keep) for name, keep in some.items()})
    file.close()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with llmprune.MaskKeeper(model, tmp_path / "some") as keeper:
        train(model, optimizer, keeper.attach(optimizer))
    free = [name for name in masks if name not in some]
    assert sorted(keeper.check()["dense"]) == sorted(free)
    assert re.search(r"without a mask: .*self_attn.* and \d more", keeper.describe())
    state = model.state_dict()
    assert all(bool((state[name][~masks[name]] != 0).any()) for name in free)
    assert all(bool((state[name][~masks[name]] == 0).all()) for name in some)


def test_what_is_printed(pruned, model):
    keeper = llmprune.MaskKeeper(model)
    total, count = sum(keep.numel() for keep in read_masks(pruned / "masks.safetensors").values()), 14
    assert repr(keeper) == (
        f"MaskKeeper of pruned: {pruned_in(pruned):,} of {total:,} weights pruned in {count} matrices"
    )
    assert keeper.describe().splitlines() == [repr(keeper), f"masks: of {pruned}"]


def test_sixteen_bit_weights_are_told(pruned, tmp_path):
    model = llmprune.load(pruned, dtype=torch.bfloat16)
    keeper = llmprune.MaskKeeper(model)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with pytest.warns(UserWarning, match="bfloat16, in which a step below 1/512 of a weight changes nothing"):
        keeper.attach(optimizer)
    train(model, optimizer)
    assert "bfloat16" in keeper.describe() and keeper.check()["filled"] == 0
    one = torch.tensor(0.02, dtype=torch.bfloat16)
    assert one - one / 513 == one


# What is refused


def test_masks_of_another_model(pruned, model, make_llama, tmp_path):
    larger = prune(make_llama(hidden_size=128), tmp_path / "larger")
    longer = prune(make_llama(layers=3), tmp_path / "longer")
    other = prune(make_llama(seed=1), tmp_path / "other")
    gpt2 = prune(make("gpt2", tmp_path / "dense"), tmp_path / "gpt2")
    for masks, said in (
        (larger, "the mask of .* is 128 x 128 and the matrix of pruned 64 x 64"),
        (longer, "has a mask for 'model.layers.2"),
        (gpt2, "has a mask for 'transformer.h.0"),
        (other, "weights of model.layers.0.*are not zero where the masks of .*other prune"),
        (tmp_path / "none", "no such file or folder"),
        (tmp_path, "has no masks.safetensors"),
        (5, "masks must be a path, got 5"),
        ("", "masks must be a path, got ''"),
    ):
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        with pytest.raises(ValueError, match=said) as refused:
            llmprune.MaskKeeper(model, masks)
        one_line(refused.value)
        assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_models_that_cannot_be_kept(tiny_llama, pruned):
    for given, said in (
        (str(pruned), "model must be a transformers model in memory"),
        (torch.nn.Sequential(torch.nn.Linear(2, 2)), "model must be a transformers model in memory"),
        (llmprune.load(tiny_llama), "no weight of tiny-llama is zero, so there is nothing to keep"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            llmprune.MaskKeeper(given)
        one_line(refused.value)
    model = llmprune.load(pruned)
    mlp = model.model.layers[0].mlp
    linear = mlp.up_proj
    mlp.up_proj = TwoOfFourLinear(linear, linear.weight, ())
    with pytest.raises(ValueError, match=r"mlp.up_proj was accelerated and has its weight twice") as refused:
        llmprune.MaskKeeper(model)
    one_line(refused.value)
    mlp.up_proj = linear
    linear.weight = torch.nn.Parameter(linear.weight.detach().to("meta"))
    with pytest.raises(ValueError, match=r"meta device \(offloaded\?\)") as refused:
        llmprune.MaskKeeper(model)
    one_line(refused.value)

    class Sharded(torch.Tensor):
        pass

    linear.weight = torch.nn.Parameter(torch.zeros(96, 64).as_subclass(Sharded))
    with pytest.raises(ValueError, match=r"is Sharded .*; sharded and quantised weights cannot") as refused:
        llmprune.MaskKeeper(model)
    one_line(refused.value)
    linear.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"no weight .*up_proj.weight of shape") as refused:
        llmprune.MaskKeeper(model)
    one_line(refused.value)


def test_optimizers_that_cannot_be_attached(pruned, model):
    keeper = llmprune.MaskKeeper(model)
    for given, said in (
        (None, "must be one of torch.optim, got None"),
        (model, "must be one of torch.optim"),
        (OPTIMIZERS["adamw"](llmprune.load(pruned).parameters()), "holds none of the 14 pruned parameters"),
        (OPTIMIZERS["adamw"](model.model.norm.parameters()), "holds none of the 14 pruned parameters"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            keeper.attach(given)
        one_line(refused.value)
