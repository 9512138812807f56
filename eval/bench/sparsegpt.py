"""SparseGPT on a 4096 x 4096 matrix against a plain version with a column loop, and shared statistics against
one set per matrix.

The plain version is the paper's algorithm, vectorised over rows as its published code is, blocks of 128
columns. `--size` for another size.
"""

import argparse

import torch
from timing import best

from llmprune.contracts import InputStats, Job, Need
from llmprune.patterns import Unstructured
from llmprune.registry import build
from llmprune.statistics.sums import StatsSums, sample_positions


def plain(weight, gram, sparsity, damp=0.01, block=128):
    """The pruned weight, column by column, row-major."""
    w, h = weight.clone(), gram.clone()
    columns = len(h)
    h[range(columns), range(columns)] += damp * h.diagonal().mean()
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for a in range(0, columns, block):
        b = min(a + block, columns)
        part, inverse = w[:, a:b].clone(), u[a:b, a:b]
        done, errors = torch.zeros_like(part), torch.zeros_like(part)
        score = part.square() / inverse.diagonal().square()
        dropped = score <= score.flatten().sort().values[int(score.numel() * sparsity)]
        for i in range(b - a):
            column = part[:, i]
            done[:, i] = torch.where(dropped[:, i], 0, column)
            error = (column - done[:, i]) / inverse[i, i]
            part[:, i:] -= error[:, None] * inverse[i, i:][None]
            errors[:, i] = error
        w[:, a:b] = done
        w[:, b:] -= errors @ u[a:b, b:]
    return w


def collect(x, matrices):
    """The Gram matrix of one input, as often as there are matrices."""
    for _ in range(matrices):
        sums = StatsSums(Need.GRAM, sample_positions(len(x), x.shape[1], 0))
        sums.add(x, 0)
        sums.result()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    size = parser.parse_args().size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 512, size, generator=generator) * torch.rand(size, generator=generator)
    gram = x.reshape(-1, size).T @ x.reshape(-1, size) / 2048
    weight = torch.randn(size, size, generator=generator)

    def ours():
        job = Job(
            "layer", weight, InputStats(2048, 512, {Need.GRAM: gram}), Unstructured("matrix"), 0.6, generator
        )
        return build("pruners", "sparsegpt", {}).prune(job)

    slow, fast = best(lambda: plain(weight, gram, 0.6), ours, repeats=2)
    print(
        f"sparsegpt {size} x {size}: {fast:.2f} s, plain column loop {slow:.2f} s: "
        f"{slow / fast:.1f} times faster"
    )
    three, two, one = best(lambda: collect(x, 3), lambda: collect(x, 2), lambda: collect(x, 1))
    print(
        f"Gram matrix of {size} inputs, 2048 tokens: {one:.3f} s for all who share it, {two:.3f} s for "
        f"two, {three:.3f} s for three"
    )
    print(f"shared by q, k, v: {three / one:.1f} times faster; by gate, up: {two / one:.1f} times")


if __name__ == "__main__":
    main()
