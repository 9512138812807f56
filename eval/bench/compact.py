"""Kept weights held alone against pruned ones beside them: `compact.py [--sparsities 0.5,0.7,0.8]`.

For a matrix of `--shape`: making the weight of a forward pass, the gradient of its backward pass, and a step
of AdamW. Seconds are those of the processor; run it with OMP_NUM_THREADS=1. Both ways give the same bits,
which is checked.
"""

import argparse
import time

import torch

from llmprune.recovery.loop import Loop
from llmprune.recovery.method import Method, RateSpec
from llmprune.recovery.optimizer import OptimizerSpec
from llmprune.recovery.parts import Matrix
from llmprune.recovery.phases import Numbers
from llmprune.recovery.schedules.fixed import Fixed
from llmprune.recovery.task import Objective, Outputs, Task, Term
from llmprune.recovery.trainables.kept import Kept


class Product(Objective):
    """The sum of V * x, whose gradient is x."""

    def size(self, tokens, teacher):
        return 1.0

    def total(self, student, teacher, tokens):
        return student.logits


def seconds(weight, keep, gradient, steps):
    """Processor seconds of a step, and the weight after all of them."""
    task = Task(
        matrices={"a": Matrix(weight, keep)},
        sequences=[0],
        held=[0],
        tokens=lambda rows: torch.zeros(1, 1, dtype=torch.int64),
        student=lambda weights, rows: Outputs((weights["a"] * gradient).sum()),
    )
    method = Method(
        schedule=Fixed(),
        rule=None,
        numbers=Numbers(),
        terms=(Term(Product()),),
        trainable=Kept,
        rate=RateSpec(rate=1e-3, warm_up=0),
        optimizer=OptimizerSpec(),
        steps=steps + 1,
        batch=1,
    )
    loop = Loop(task, method)
    loop.advance()
    started = time.process_time()
    while not loop.done:
        loop.advance()
    return (time.process_time() - started) / steps, loop.merged("a")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--sparsities", default="0.5,0.7,0.8")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    rows, columns = map(int, arguments.shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    for sparsity in map(float, arguments.sparsities.split(",")):
        keep = torch.rand(rows, columns, generator=generator) >= sparsity
        found = []
        for alone in (False, True):
            Kept.shrinks = alone
            found.append(seconds(weight, keep, gradient, arguments.steps))
        (whole, one), (alone, other) = found
        assert torch.equal(one, other)
        print(
            f"{sparsity:.0%}: {1e3 * whole:.0f} ms with pruned weights, {1e3 * alone:.0f} ms without: "
            f"{whole / alone:.2f} times as fast; {12 * float(keep.float().mean()):.1f} bytes per weight, "
            "not 12"
        )


if __name__ == "__main__":
    main()
