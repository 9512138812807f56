"""Kept weights held alone: the same training as with pruned ones beside them, to the bit."""

from __future__ import annotations

import pytest
import torch
from recovery_tasks import method
from test_recovery_parts import SHAPES, tasks
from torch import Tensor

import llmprune
from llmprune.kernels import library
from llmprune.recovery import compact
from llmprune.recovery.compact import Expanded, Places
from llmprune.recovery.loop import Loop
from llmprune.recovery.optimizer import OptimizerSpec
from llmprune.recovery.phases import Numbers
from llmprune.recovery.trainables.kept import Kept

QUICK = {"text": "builtin", "tokens": 600, "seqlen": 16, "score": False, "samples_text": 0}


def drawn(rows: int, columns: int, share: float = 0.4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    matrix = torch.randn(rows, columns, generator=generator)
    return matrix, torch.rand(rows, columns, generator=generator) < share


@pytest.mark.parametrize("way", ["native", "without a compiler", "as on a GPU"])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 7), (8, 64), (5, 65), (16, 130), (2, 1024), (300, 9)]
)
def test_values_and_their_places_make_the_matrix(rows, columns, way, monkeypatch):
    if way == "without a compiler":
        monkeypatch.setattr(library, "available", lambda: False)
    if way == "as on a GPU":
        monkeypatch.setattr(compact, "_packs", lambda keep: False)
    matrix, keep = drawn(rows, columns)
    places = Places(keep)
    assert torch.equal(places.values(matrix), matrix[keep])
    assert torch.equal(places.matrix(matrix[keep]), torch.where(keep, matrix, 0.0))


def test_the_gradient_of_a_value_is_that_of_its_place():
    matrix, keep = drawn(6, 70)
    inputs = torch.randn(70, 5, generator=torch.Generator().manual_seed(0))
    whole = torch.where(keep, matrix, 0.0).requires_grad_()
    alone = matrix[keep].requires_grad_()
    for weight in (whole, Expanded.apply(alone, Places(keep))):
        (weight @ inputs).square().sum().backward()
    assert alone.grad is not None and whole.grad is not None and torch.equal(alone.grad, whole.grad[keep])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_training_is_the_same_to_the_bit(shape, optimizer, monkeypatch):
    chosen = method("kept", steps=8, optimizer=OptimizerSpec(name=optimizer))
    alone = Loop(tasks(shape), chosen)
    monkeypatch.setattr(Kept, "shrinks", False)
    whole = Loop(tasks(shape), chosen)
    for loop in (alone, whole):
        while not loop.done:
            loop.advance()
    for name, keep in whole.keeps.items():
        assert torch.equal(alone.merged(name), whole.merged(name))
        assert torch.equal(alone.trained[name].compared(keep), whole.trained[name].compared(keep))
        assert alone.trained[name].tensors["theta"].shape == (int(keep.sum()),)
        assert whole.trained[name].tensors["theta"].shape == keep.shape
    kept = sum(int(keep.sum()) for keep in whole.keeps.values())
    held = sum(t.numel() for state in alone._optimizer.state.values() for t in state.values())
    beside = 8 if shape not in ("one row", "odd matrix") else SHAPES[shape][0]  # the gain
    assert held == (kept + beside) * (2 if optimizer == "adamw" else 1)


@pytest.mark.parametrize(
    "other",
    [
        {"options": {"schedule": {"moves": 2}}, "rule": "magnitude"},
        {"numbers": Numbers(gamma=1.0)},
        {"numbers": Numbers(rho=1.0)},
    ],
)
def test_where_masks_move_or_pruned_weights_count_all_are_held(other):
    loop = Loop(tasks("row"), method("kept", **other))
    assert loop.trained["a"].tensors["theta"].shape == loop.keeps["a"].shape


def test_a_matrix_that_keeps_nearly_all_is_held_whole():
    given = tasks("row", dense=True)
    loop = Loop(given, method("kept"))
    assert loop.trained["a"].tensors["theta"].shape == given.matrices["a"].weight.shape


@pytest.fixture(scope="module")
def start(tiny_llama, tmp_path_factory):
    """A pruned model."""
    output = tmp_path_factory.mktemp("start") / "out"
    options = {"recipe": "wanda", "calibration": "builtin", "samples": 4, "seqlen": 32}
    return llmprune.prune(tiny_llama, sparsity=0.75, output=output, **options).output


@pytest.mark.parametrize("recipe", ["masked-finetuning", "soup", "ebft"])
def test_whole_recoveries_write_the_same_bytes(recipe, start, tiny_llama, tmp_path, monkeypatch):
    def weights(name):
        made = llmprune.recover(start, recipe=recipe, teacher=tiny_llama, output=tmp_path / name, **QUICK)
        return {path.name: path.read_bytes() for path in made.output.glob("*.safetensors")}

    alone = weights("alone")
    monkeypatch.setattr(Kept, "shrinks", False)
    assert alone == weights("whole")


def test_the_plan_counts_the_kept_weights_alone(start, tmp_path, monkeypatch):
    def per_weight():
        options = {"recipe": "masked-finetuning", "output": tmp_path / "out", "dry_run": True, **QUICK}
        return llmprune.recover(start, **options).plan

    alone = per_weight()
    monkeypatch.setattr(Kept, "shrinks", False)
    whole = per_weight()
    assert alone.trained < 0.3 * whole.trained and alone.parts["trained"] < 0.35 * whole.parts["trained"]
    assert alone.memory < whole.memory
