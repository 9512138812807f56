"""Toy tasks for the loop of training with sparsity, a recorder of what a run did, and its gradients by the
reference versions.

N sequences of T tokens, R outputs, C inputs. Student: y = sum over the matrices of x V^T, logits and the only
hidden state at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import recovery_oracles_objectives as losses
import torch
from recovery_oracles import Gradient
from torch import Tensor

from llmprune import patterns, registry
from llmprune.contracts import Pattern
from llmprune.recipe import recovery as recipes
from llmprune.recipe.recovery import RecoveryRecipe
from llmprune.recovery.loop import Loop
from llmprune.recovery.method import Method, RateSpec
from llmprune.recovery.optimizer import OptimizerSpec
from llmprune.recovery.parts import Matrix, Trainable
from llmprune.recovery.phases import Numbers
from llmprune.recovery.task import Objective, Outputs, Task, Term

R, C, N, T = 8, 16, 12, 5
NAMES = ("a", "b", "c")


class MeanSquare(Objective):
    """The mean of (y - teacher)^2, for tests that compare with a reference of that loss."""

    teaches = True

    def size(self, tokens: Tensor, teacher: Outputs | None) -> float:
        return float(tokens.numel() * R)

    def total(self, student: Outputs, teacher: Outputs | None, tokens: Tensor) -> Tensor:
        assert student.logits is not None and teacher is not None and teacher.logits is not None
        return (student.logits - teacher.logits).square().sum()


@dataclass
class Toy:
    """What a toy task is made of: dense weights, masks of the start, inputs, tokens and the teacher's logits.

    `others` holds a gain [R] that scales y, where it is trained.
    """

    weights: dict[str, Tensor]
    keeps: dict[str, Tensor]
    inputs: dict[str, Tensor]
    tokens: Tensor
    wanted: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)

    def output(self, weights: Mapping[str, Tensor], rows: list[int]) -> Tensor:
        """Y, [n, T, R]."""
        total = sum(self.inputs[name][rows] @ weights[name].T.float() for name in self.weights)
        assert isinstance(total, Tensor)
        return total * weights["gain"] if self.others else total


def toy(seed: int = 0, count: int = 1, columns: int = C, rows: int = R) -> Toy:
    """A toy of `count` matrices; the masks of its start keep half of every row and of every group of four,
    at random.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    names = NAMES[:count]
    return Toy(
        weights={name: drawn(rows, columns) / 2 for name in names},
        keeps={name: patterns.parse("2:4").select(drawn(rows, columns).abs(), 0.5) for name in names}
        if columns % 4 == 0
        else {name: patterns.parse("unstructured").select(drawn(rows, columns).abs(), 0.5) for name in names},
        inputs={name: drawn(N, T, columns) * (1 + torch.arange(columns) % 3) / 2 for name in names},
        tokens=torch.randint(rows, (N, T), generator=generator),
        wanted=2 * drawn(N, T, rows),
    )


def matrices(
    given: Toy,
    pattern: str | Pattern = "unstructured",
    sparsity: float = 0.5,
    dense: bool = False,
    known: bool = True,
) -> dict[str, Matrix]:
    """The matrices of a toy: pruned with its masks, or `dense`. `known`: the dense model is."""
    found = patterns.parse(pattern) if isinstance(pattern, str) else pattern
    if isinstance(found, patterns.NM):
        sparsity = found.sparsity
    made = {}
    for number, (name, weight) in enumerate(given.weights.items()):
        keep = torch.ones_like(given.keeps[name]) if dense else given.keeps[name]
        made[name] = Matrix(
            weight=weight * keep,
            keep=keep,
            pattern=found,
            sparsity=sparsity,
            part=number / len(given.weights),
            origin=(lambda weight=weight: weight) if known and not dense else None,
        )
    return made


def task(given: Toy, held: list[int] | None = None, **changes: Any) -> Task:
    """The toy as a task, on all sequences that are not held out; `changes` are fields of `Task`."""
    held = held or []
    values: dict[str, Any] = {
        "matrices": matrices(given),
        "sequences": [row for row in range(N) if row not in held],
        "held": held,
        "tokens": lambda rows: given.tokens[rows],
        "student": lambda weights, rows: Outputs((y := given.output(weights, rows)), [y]),
        "teacher": lambda rows: Outputs(given.wanted[rows], [given.wanted[rows]]),
        "others": given.others,
        "inputs": lambda weights: {n: x.flatten(0, 1).square().mean(0) for n, x in given.inputs.items()},
        "batch": N,
    }
    return Task(**{**values, **changes})


def recipe_method(
    given: str | Mapping[str, Any], steps: int, settings: Mapping[str, Any]
) -> tuple[RecoveryRecipe, Method]:
    """A recipe, shipped or as a mapping, with settings, and its method."""
    recipe = recipes.load(given, settings)
    return recipe, recipe.method(steps)


@dataclass
class Run:
    """What a run did. Entry t is what step t computed with, the last one what is left at the end.

    Attributes:
        rows: the sequences of every step.
        tensors, keeps, weights: by matrix: the trained tensors, the masks and V; at the end the merged
            weight.
        others: the other trained tensors.
        losses: of every step.
    """

    loop: Loop
    rows: list[list[int]] = field(default_factory=list)
    tensors: list[dict[str, dict[str, np.ndarray]]] = field(default_factory=list)
    keeps: list[dict[str, np.ndarray]] = field(default_factory=list)
    weights: list[dict[str, np.ndarray]] = field(default_factory=list)
    others: list[dict[str, np.ndarray]] = field(default_factory=list)
    fixed: list[dict[str, dict[str, np.ndarray]]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def of(self, name: str, part: str) -> list[np.ndarray]:
        """A tensor of a matrix at every step and at the end."""
        return [entry[name][part] for entry in self.tensors]

    def flips(self, name: str = "a") -> int:
        """How many times its mask changed."""
        masks = [entry[name] for entry in self.keeps]
        return sum(not np.array_equal(a, b) for a, b in itertools.pairwise(masks))


def array(tensor: Tensor) -> np.ndarray:
    """A float64 copy of floating-point numbers, a copy of anything else."""
    copied = tensor.detach().cpu().clone()
    return (copied.double() if copied.is_floating_point() else copied).numpy()


def record(given: Task, method: Method) -> Run:
    """Train, and keep what every step computed with."""
    runs: list[Run] = []

    def student(weights: Mapping[str, Tensor], rows: list[int]) -> Outputs:
        run = runs[0]
        if len(run.rows) <= run.loop.step:
            run.rows.append([])
            _note(run, {name: array(weights[name]) for name in given.matrices})
        run.rows[-1].extend(rows)
        return given.student(weights, rows)

    loop = Loop(dataclasses.replace(given, student=student), method)
    runs.append(Run(loop))
    while not loop.done:
        runs[0].losses.append(loop.advance())
    _note(runs[0], {name: array(loop.merged(name)) for name in given.matrices})
    return runs[0]


def _note(run: Run, weights: dict[str, np.ndarray]) -> None:
    trained = run.loop.trained
    run.weights.append(weights)
    run.keeps.append({name: array(keep) for name, keep in run.loop.keeps.items()})
    run.tensors.append({n: {p: array(x) for p, x in t.tensors.items()} for n, t in trained.items()})
    run.fixed.append({n: {p: array(x) for p, x in t.fixed.items()} for n, t in trained.items()})
    run.others.append({name: array(tensor) for name, tensor in run.loop.others.items()})


# --- gradients by the reference versions


def slope(recipe: RecoveryRecipe, y: np.ndarray, tokens: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The gradient [n, T, R] of a recipe's loss with respect to y."""
    total = np.zeros(y.shape)
    for spec, weight in recipe.objective:
        total += weight * _SLOPES[spec.name](y, tokens, wanted, spec.options)
    return total


def _squarehead(y: np.ndarray, tokens: np.ndarray, wanted: np.ndarray, options: Mapping[str, Any]) -> Any:
    return np.stack([losses.squarehead([a], [b])[1][0] for a, b in zip(y, wanted, strict=True)]) / len(y)


def _block(y: np.ndarray, tokens: np.ndarray, wanted: np.ndarray, options: Mapping[str, Any]) -> Any:
    return losses.block_error(y, wanted)[1] / losses.block_error(wanted, np.zeros(y.shape))[0]


_SLOPES: dict[str, Callable[..., np.ndarray]] = {
    "next-token": lambda y, tokens, wanted, options: losses.next_token(y, losses.next_labels(tokens))[1],
    "kd": lambda y, tokens, wanted, options: losses.kd(y, wanted, options["tau"])[1],
    "squarehead": _squarehead,
    "block": _block,
}


def gradients(given: Toy, recipe: RecoveryRecipe, run: Run) -> Callable[[dict[str, np.ndarray], int], Any]:
    """`f(weights, t)`: dL/dV of every matrix at step t of a run, by the reference versions of its loss."""
    inputs = {name: array(x) for name, x in given.inputs.items()}
    tokens, wanted = array(given.tokens), array(given.wanted)

    def gradient(weights: dict[str, np.ndarray], t: int) -> dict[str, np.ndarray]:
        rows = run.rows[t]
        y = sum(inputs[name][rows] @ weight.T for name, weight in weights.items())
        assert isinstance(y, np.ndarray)
        d = slope(recipe, y, tokens[rows], wanted[rows]).reshape(-1, y.shape[-1])
        return {name: d.T @ inputs[name][rows].reshape(len(d), -1) for name in weights}

    return gradient


def gradient_of(given: Toy, recipe: RecoveryRecipe, run: Run) -> Gradient:
    """As `gradients`, for a toy of one matrix."""
    every = gradients(given, recipe, run)
    return lambda weight, t: every({"a": weight}, t)["a"]


def mean_square(method: Method) -> Method:
    """A method whose loss is the mean square."""
    return dataclasses.replace(method, terms=(Term(MeanSquare()),))


# --- methods of one part each, for the promises that every part makes


def method(
    trainable: str = "kept",
    rule: str | None = None,
    schedule: str = "fixed",
    steps: int = 10,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **changes: Any,
) -> Method:
    """A method of parts by name; `options` of `trainable`, `rule` and `schedule`, `changes` of the method."""
    given = {"trainable": {}, "rule": {}, "schedule": {}, **(options or {})}
    if trainable == "scaled":
        given["trainable"] = {"groups": 1, **given["trainable"]}  # a toy may have one row
    values: dict[str, Any] = {
        "schedule": registry.build("recovery.schedules", schedule, given["schedule"]),
        "rule": rule and registry.build("recovery.rules", rule, given["rule"]),
        "numbers": Numbers(),
        "terms": (Term(MeanSquare()),),
        "trainable": lambda: registry.build("recovery.trainables", trainable, given["trainable"]),
        "rate": RateSpec(rate=0.03, warm_up=0),
        "optimizer": OptimizerSpec(),
        "steps": steps,
        "batch": 4,
    }
    return Method(**{**values, **changes})


def moving(trainable: str) -> Method:
    """A method that trains with this trainable while masks move, to the end of the seventh of ten steps."""
    learns = registry.find("recovery.trainables", trainable).learned is not Trainable.learned  # type: ignore[attr-defined]
    options = {"schedule": {"moves": 4, "start": 0.1, "freeze": 0.3}}
    return method(trainable, "learned" if learns else "magnitude", options=options)


def left(loop: Loop) -> dict[str, Any]:
    """All that a loop has come to, for comparison."""
    tensors, values = loop.saved()
    return {key: tensor.clone() for key, tensor in tensors.items()} | {
        "values": json.dumps(values, sort_keys=True)
    }


def assert_left(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Two loops have come to the same, to the last bit."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        assert same, f"{key} differs"
