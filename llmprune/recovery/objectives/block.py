"""Block error (EBFT, arXiv 2402.12419): the squared error of a block's outputs, divided by the squared
targets.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.recovery.task import Objective, Outputs


class Block(Objective):
    """For training a block at a time: the teacher's outputs are the targets."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of the block error.

        Attributes:
            inputs: what the teacher's block gets: `own`, the inputs of the student's block (EBFT); or
                `dense`, the outputs of the dense blocks before it, so that earlier errors are made up for.
        """

        inputs: str = "dense"

        def __post_init__(self) -> None:
            if self.inputs not in ("own", "dense"):
                raise ValueError(f"inputs must be own or dense, got {self.inputs!r}")

    teaches = True
    looks = True
    measures = True

    def size(self, tokens: Tensor, teacher: Outputs | None) -> float:
        assert teacher is not None
        return float(teacher.hidden[0].float().square().sum().double())

    def total(self, student: Outputs, teacher: Outputs | None, tokens: Tensor) -> Tensor:
        assert teacher is not None
        return (student.hidden[0].float() - teacher.hidden[0].float()).square().sum()
