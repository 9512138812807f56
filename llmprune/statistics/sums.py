"""Sums over tokens that input statistics are made of, one set per input group.

Batches and processes merge by addition. C input features, N sequences, T tokens, S sampled tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.contracts import InputStats, Need
from llmprune.machine.processes import Team
from llmprune.numerics.counts import all_finite

SAMPLE_TOKENS = 1024


def sample_positions(sequences: int, tokens: int, seed: int, size: int = SAMPLE_TOKENS) -> Tensor:
    """Which tokens make up a sample: int64 [S, 2] of (sequence, position), drawn evenly over the sequences, seeded."""
    size = min(size, sequences * tokens)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in range(sequences):
        share = (n + 1) * size // sequences - n * size // sequences
        places = torch.randperm(tokens, generator=generator)[:share].sort().values
        rows.append(torch.stack([torch.full_like(places, n), places], dim=1))
    return torch.cat(rows)


class StatsSums:
    """Sums over tokens for one input group. Vectors in float64, the Gram matrix in float32 (one [C, C] buffer)."""

    def __init__(self, needs: Need, positions: Tensor) -> None:
        self.needs, self._positions = needs, positions
        self.count, self.tokens = 0, 0
        self._sums: dict[str, Tensor] = {}
        self._samples: list[Tensor] = []
        self._beside: Tensor | None = None  # the inputs the dense model's are to be held against

    def add(self, inputs: Tensor, first: int) -> None:
        """Take in the inputs [N, T, C] of the sequences from number `first` on."""
        inputs = inputs.detach()
        self.count += inputs.shape[0] * inputs.shape[1]
        self.tokens = inputs.shape[1]
        x = inputs.float()
        flat = x.reshape(-1, x.shape[-1])
        varies = bool(self.needs & (Need.VARIANCE | Need.WITHIN_VARIANCE))
        if varies or Need.MEAN in self.needs:
            means = x.mean(dim=1)  # [N, C]
            self._plus("sum", means.double().sum(dim=0) * self.tokens)
        if varies:
            # Per sequence and centred: the difference of two large sums would cancel.
            self._plus("within", (x - means[:, None]).square_().sum(dim=1).double().sum(dim=0))
            self._plus("means", means.double().square().sum(dim=0) * self.tokens)
        elif Need.SECOND_MOMENT in self.needs:  # else it is the sum of those two
            self._plus("squares", flat.square().sum(dim=0).double())
        if self.needs & Need.GRAM:
            if "gram" not in self._sums:
                self._sums["gram"] = torch.zeros(
                    x.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device
                )
            self._sums["gram"].addmm_(flat.T, flat)
        if self.needs & Need.CROSS:
            self._beside = flat
        if self.needs & Need.SAMPLE:
            here = (self._positions[:, 0] >= first) & (self._positions[:, 0] < first + len(x))
            places = self._positions[here].to(x.device)
            self._samples.append(x[places[:, 0] - first, places[:, 1]])

    def add_dense(self, inputs: Tensor) -> None:
        """Take in the dense model's inputs [N, T, C] at the same place for the sequences of the last `add`."""
        assert self._beside is not None
        flat = inputs.detach().float().reshape(-1, inputs.shape[-1])
        if "cross" not in self._sums:
            self._sums["cross"] = torch.zeros(
                flat.shape[-1], flat.shape[-1], dtype=torch.float32, device=flat.device
            )
        self._sums["cross"].addmm_(flat.T, self._beside)
        self._beside = None

    def _plus(self, name: str, value: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += value
        else:
            self._sums[name] = value

    def merge(self, team: Team, counts: list[int]) -> None:
        """Add up the sums of all processes; process r holds counts[r] of the sampled tokens."""
        if team.alone:
            return
        total = torch.tensor(float(self.count), dtype=torch.float64)
        team.add(total, *(self._sums[name] for name in sorted(self._sums)))
        self.count = int(total)
        if self._samples:
            self._samples = [team.join_rows(torch.cat(self._samples), counts)]

    @property
    def finite(self) -> bool:
        """Whether every sum is: one input that is not finite makes them so."""
        return all(all_finite(tensor) for tensor in (*self._sums.values(), *self._samples))

    def result(self) -> InputStats:
        """The statistics per token."""
        n, sums, values = self.count, self._sums, {}
        if Need.MEAN in self.needs:
            values[Need.MEAN] = (sums["sum"] / n).float()
        if Need.SECOND_MOMENT in self.needs:
            squares = sums["squares"] if "squares" in sums else sums["within"] + sums["means"]
            values[Need.SECOND_MOMENT] = (squares / n).float()
        if Need.WITHIN_VARIANCE in self.needs:
            values[Need.WITHIN_VARIANCE] = (sums["within"] / n).float()
        if Need.VARIANCE in self.needs:
            between = sums["means"] / n - (sums["sum"] / n).square()
            values[Need.VARIANCE] = (sums["within"] / n + between.clamp_min(0)).float()
        if Need.GRAM in self.needs:
            values[Need.GRAM] = sums["gram"] / n
        if Need.CROSS in self.needs:
            values[Need.CROSS] = sums["cross"] / n
        if Need.SAMPLE in self.needs:
            values[Need.SAMPLE] = torch.cat(self._samples)
        return InputStats(n, self.tokens, values)


def relative_error(weight: Tensor, pruned: Tensor, stats: InputStats) -> float:
    """`||X (W - W')^T||^2 / ||X W^T||^2`: exact with the Gram matrix where it was collected, else on the sampled inputs.

    Of the sample every fourth token counts: the sum runs over all outputs, so it is known to a percent or so all the same.
    """
    difference = weight - pruned
    if Need.GRAM in stats.needs:
        lost, whole = ((d @ stats.gram).mul_(d).sum().item() for d in (difference, weight))
    else:
        sample = stats.sample[::4]
        lost, whole = ((sample @ d.T).square().sum().item() for d in (difference, weight))
    return lost / whole if whole > 0 else 0.0
