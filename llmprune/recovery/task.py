"""What is trained and what training makes smaller: objectives, and the task with its data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llmprune.contracts import Algorithm
from llmprune.recovery.parts import Matrix


class Outputs(NamedTuple):
    """What a model puts out for some sequences.

    Attributes:
        logits: [n, T, vocabulary]; None where only a block is trained.
        hidden: the outputs of every block, [n, T, D] each; empty where no objective asks for them.
    """

    logits: Tensor | None
    hidden: Sequence[Tensor] = ()


class Objective(Algorithm, ABC):
    """A term of the loss: a sum over sequences, which the loop divides by the sum of their `size`.

    Attributes:
        teaches: whether it compares with a teacher.
        looks: whether it needs the outputs of the blocks.
    """

    teaches: ClassVar[bool] = False
    looks: ClassVar[bool] = False

    @abstractmethod
    def size(self, tokens: Tensor, teacher: Outputs | None) -> float:
        """What the sum is divided by, for the sequences of `tokens`, int64 [n, T]."""

    @abstractmethod
    def total(self, student: Outputs, teacher: Outputs | None, tokens: Tensor) -> Tensor:
        """The sum over the sequences."""

    measures: ClassVar[bool] = False  # whether `size` needs the teacher's outputs


_CHUNK = 1 << 23  # logits in float32 that are made at once


def over_tokens(term: Callable[[Tensor, Tensor], Tensor], logits: Tensor, other: Tensor) -> Tensor:
    """The sum of a term over the tokens of a sequence, made for some of them at a time.

    With a large vocabulary, float32 logits and what is made of them take more memory than a block; here they
    are made again in the backward pass.

    Args:
        term: of some rows of both.
        logits: [T, vocabulary].
        other: [T, ...].
    """
    rows = max(1, _CHUNK // logits.shape[-1])
    if len(logits) <= rows:
        return term(logits, other)
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for some, beside in zip(logits.split(rows), other.split(rows), strict=True):
        total = total + checkpoint(term, some, beside, use_reentrant=False, preserve_rng_state=False)
    return total


@dataclass(frozen=True)
class Term:
    """An objective and its weight in the loss."""

    objective: Objective
    weight: float = 1.0


@dataclass(frozen=True)
class Task:
    """What is to be trained, on which data.

    Attributes:
        matrices: by name; a mapping that makes them when they are read saves memory.
        others: further tensors that are trained as they are, by name: norms, embeddings.
        dtypes: in which matrices and others are stored, by name, where that is not float32.
        sequences: how many there are to train on; they go by their numbers.
        held: the numbers of those that are not trained on.
        tokens: of some sequences, int64 [n, T].
        student: the outputs, given weights by name (a mapping that makes them when they are read) and
            numbers of sequences; gradients flow back to the weights.
        teacher: those of the teacher; None without one.
        inputs: the mean square of each input of every matrix, given weights; None where that is unknown.
        mine: of the sequences of a step those that this process has to do.
        batch: the most sequences at once.
        shared: whether several processes do a step together.
        add: sums tensors over all processes, in place.
        agree: replaces a tensor by that of the first process.
    """

    matrices: Mapping[str, Matrix]
    sequences: Sequence[int]
    held: Sequence[int]
    tokens: Callable[[list[int]], Tensor]
    student: Callable[[Mapping[str, Tensor], list[int]], Outputs]
    teacher: Callable[[list[int]], Outputs] | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    inputs: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    mine: Callable[[list[int]], list[int]] = list
    batch: int = 8
    shared: bool = False
    add: Callable[..., None] = lambda *tensors: None
    agree: Callable[[Tensor], None] = lambda tensor: None
