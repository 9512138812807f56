"""Mask selection on a 4096 x 11008 matrix: partial selection against a full stable sort, and against reading
the matrix.
"""

import torch
from timing import best

from llmprune.patterns import NM, Unstructured

ROWS, COLUMNS, SPARSITY = 4096, 11008, 0.7


def full_sort(score):
    order = torch.sort(score, dim=1, stable=True).indices[:, : int(score.shape[1] * SPARSITY)]
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order, False)


def sort_groups(score):
    groups = score.view(-1, 4)
    order = torch.sort(groups, dim=1, stable=True).indices[:, :2]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, order, False).view_as(score)


def main():
    score = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    row, pattern = Unstructured("row"), NM(2, 4)
    assert torch.equal(row.select(score, SPARSITY), full_sort(score))
    assert torch.equal(pattern.select(score, 0.5), sort_groups(score))
    ours, sort, reading = best(
        lambda: row.select(score, SPARSITY), lambda: full_sort(score), lambda: [score.sum() for _ in range(4)]
    )
    print(
        f"unstructured, per row: {ours:.3f} s, full stable sort {sort:.3f} s: {sort / ours:.1f} times faster"
    )
    print(
        f"                       reading the matrix four times {reading:.3f} s: "
        f"selection takes {ours / reading:.1f} times that"
    )
    ours, sort = best(lambda: pattern.select(score, 0.5), lambda: sort_groups(score))
    print(
        f"2:4:                   {ours:.3f} s, sorting every group {sort:.3f} s: "
        f"{sort / ours:.1f} times faster"
    )


if __name__ == "__main__":
    main()
