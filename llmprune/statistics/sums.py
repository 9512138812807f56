"""The sums over tokens from which input statistics are computed.

Batches and processes are merged by adding their sums.
C input features, N sequences, T tokens, S sampled tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.contracts import InputStats, Need
from llmprune.machine.processes import Team
from llmprune.numerics.counts import all_finite

SAMPLE_TOKENS = 1024
EXPERT_BYTES = 1 << 29  # of the Gram matrices of experts that are in memory together


def sample_positions(sequences: int, tokens: int, seed: int, size: int = SAMPLE_TOKENS) -> Tensor:
    """The tokens of a sample, int64 [S, 2] of (sequence, position), equally many from each sequence."""
    size = min(size, sequences * tokens)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in range(sequences):
        share = (n + 1) * size // sequences - n * size // sequences
        places = torch.randperm(tokens, generator=generator)[:share].sort().values
        rows.append(torch.stack([torch.full_like(places, n), places], dim=1))
    return torch.cat(rows)


class StatsSums:
    """Sums over tokens of one input; vectors [C] in float64, Gram and cross matrices [C, C] in float32.

    Args:
        needs: the statistics that will be computed from them.
        positions: the sampled tokens, int64 [S, 2] of (sequence, position).
    """

    def __init__(self, needs: Need, positions: Tensor) -> None:
        self.needs, self._positions = needs, positions
        self.count, self.tokens = 0, 0
        self._sums: dict[str, Tensor] = {}
        self._samples: list[Tensor] = []
        self._pruned_inputs: Tensor | None = None  # of the last `add`, for `add_dense`

    def add(self, inputs: Tensor, first: int) -> None:
        """Add the inputs [N, T, C] of some sequences, the first of which has number `first`."""
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
            # Centred per sequence: the mean square minus the squared mean would lose digits by cancellation.
            self._plus("within", (x - means[:, None]).square_().sum(dim=1).double().sum(dim=0))
            self._plus("means", means.double().square().sum(dim=0) * self.tokens)
        elif Need.SECOND_MOMENT in self.needs:  # with variances, it is the sum of the two sums above
            self._plus("squares", flat.square().sum(dim=0).double())
        if self.needs & Need.GRAM:
            self._matrix("gram", flat).addmm_(flat.T, flat)
        if self.needs & Need.CROSS:
            self._pruned_inputs = flat
        if self.needs & Need.SAMPLE:
            here = (self._positions[:, 0] >= first) & (self._positions[:, 0] < first + len(x))
            places = self._positions[here].to(x.device)
            self._samples.append(x[places[:, 0] - first, places[:, 1]])

    def add_some(self, inputs: Tensor, sampled: int, length: int) -> None:
        """Add the inputs [n, C] of some tokens, as an expert sees them: `sampled` of them for the sample.

        `length`: tokens of a sequence.

        Which sequences they belong to is not known: variances within a sequence are those within the tokens
        added together.
        """
        if not len(inputs):
            return
        needs, self.needs = self.needs, self.needs & ~(Need.SAMPLE | Need.CROSS)
        self.add(inputs[None], 0)
        self.tokens, self.needs = length, needs
        if self.needs & Need.SAMPLE:
            count = max(1, min(sampled, len(inputs)))  # of sequences without a sampled token one, too
            places = torch.arange(count, device=inputs.device) * len(inputs) // count
            self._samples.append(inputs.detach().float()[places])

    def add_none(self, columns: int) -> None:
        """Take part in a merge without having seen a token; the inputs have so many columns."""
        self.add(torch.zeros(1, 1, columns, dtype=torch.float32), 0)
        self.count = 0
        self._samples = []
        if self.needs & Need.SAMPLE:
            self._samples.append(torch.zeros(0, columns, dtype=torch.float32))

    def add_dense(self, inputs: Tensor) -> None:
        """Add the inputs [N, T, C] of the same matrix in the dense model, for the sequences last added."""
        assert self._pruned_inputs is not None
        flat = inputs.detach().float().reshape(-1, inputs.shape[-1])
        self._matrix("cross", flat).addmm_(flat.T, self._pruned_inputs)
        self._pruned_inputs = None

    def _matrix(self, name: str, inputs: Tensor) -> Tensor:
        """The sum [C, C] of this name, which begins with zeros on the device of the inputs [N T, C]."""
        if name not in self._sums:
            size = inputs.shape[-1]
            self._sums[name] = torch.zeros(size, size, dtype=torch.float32, device=inputs.device)
        return self._sums[name]

    def _plus(self, name: str, value: Tensor) -> None:
        """Add a vector to the sum of this name."""
        if name in self._sums:
            self._sums[name] += value
        else:
            self._sums[name] = value

    def merge(self, team: Team) -> None:
        """Replace the sums by those over all processes."""
        if team.alone:
            return
        counts = torch.zeros(team.size, dtype=torch.float64)
        counts[team.rank] = sum(map(len, self._samples))
        total = torch.tensor(float(self.count), dtype=torch.float64)
        team.add(counts)
        team.add(total, *(self._sums[name] for name in sorted(self._sums)))
        self.count = int(total)
        if self._samples:
            self._samples = [team.join_rows(torch.cat(self._samples), counts.long().tolist())]

    @property
    def finite(self) -> bool:
        """Whether all sums are finite; they are not if one input is not."""
        return all(all_finite(tensor) for tensor in (*self._sums.values(), *self._samples))

    def result(self) -> InputStats:
        """The statistics, averaged over the tokens. Nothing can be added afterwards."""
        return InputStats(self.count, self.tokens, self._values())

    def _values(self) -> dict[Need, Tensor]:
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
            values[Need.GRAM] = sums["gram"].div_(n)  # in place: it may be the largest tensor there is
        if Need.CROSS in self.needs:
            values[Need.CROSS] = sums["cross"].div_(n)
        if Need.SAMPLE in self.needs:
            values[Need.SAMPLE] = torch.cat(self._samples)
        return values


class PublishedSums(StatsSums):
    """The same statistics with the rounding of the published code of SparseGPT, Wanda and DSnoT.

    That code keeps running means over the sequences in float32 and updates them sequence by sequence, in this
    order of operations (arXiv 2301.00774, 2306.11695, 2310.08915). Rounding decides which of two nearly equal
    weights is pruned, and later blocks amplify the difference. Other statistics are those of `StatsSums`. The
    means of several processes are merged by their numbers of sequences.
    """

    KINDS = Need.MEAN | Need.SECOND_MOMENT | Need.WITHIN_VARIANCE | Need.GRAM

    def __init__(self, needs: Need, positions: Tensor) -> None:
        super().__init__(needs & ~self.KINDS, positions)
        self._published = needs & self.KINDS
        self._sequences = 0
        self._means: dict[str, Tensor] = {}

    def add(self, inputs: Tensor, first: int) -> None:
        super().add(inputs, first)
        for x in inputs.detach().float():
            self._add_sequence(x.t())

    def _add_sequence(self, columns: Tensor) -> None:
        """Add the inputs of one sequence, [C, T]."""
        before, length = self._sequences, columns.shape[1]
        self._sequences = number = before + 1
        shrink, means = before / number, self._means
        if Need.MEAN in self._published:
            means["mean"] = self._mean("mean", columns) * shrink + columns.sum(dim=1) / number
        if Need.SECOND_MOMENT in self._published:
            squares = torch.norm(columns, p=2, dim=1) ** 2 / number
            means["squares"] = self._mean("squares", columns) * shrink + squares
        if Need.WITHIN_VARIANCE in self._published:
            own, seen = torch.var(columns, dim=1, unbiased=False) * length, before * length
            means["variance"] = (own + self._mean("variance", columns) * seen) / (length + seen)
        if Need.GRAM in self._published:
            scaled = (2 / number) ** 0.5 * columns
            if "gram" not in means:
                size = len(columns), len(columns)
                means["gram"] = torch.zeros(size, dtype=torch.float32, device=columns.device)
            means["gram"].mul_(shrink).add_(scaled.matmul(scaled.t()))

    def _mean(self, name: str, columns: Tensor) -> Tensor:
        """A running mean [C], at first zero."""
        zero = torch.zeros(len(columns), dtype=torch.float32, device=columns.device)
        return self._means.get(name, zero)

    def merge(self, team: Team) -> None:
        super().merge(team)
        if team.alone:
            return
        total = torch.tensor(float(self._sequences), dtype=torch.float64)
        for mean in self._means.values():
            mean.mul_(self._sequences)
        team.add(total, *(self._means[name] for name in sorted(self._means)))
        self._sequences = int(total)
        for mean in self._means.values():
            mean.div_(self._sequences)

    @property
    def finite(self) -> bool:
        return super().finite and all(all_finite(mean) for mean in self._means.values())

    def _values(self) -> dict[Need, Tensor]:
        # The published sums are means over sequences of sums over tokens, and the Gram matrix is doubled. It
        # stays so: only its proportions matter, and a scaled one would be factorised with other rounding.
        per_token = {
            "mean": (Need.MEAN, self.tokens),
            "squares": (Need.SECOND_MOMENT, self.tokens),
            "variance": (Need.WITHIN_VARIANCE, 1),
            "gram": (Need.GRAM, 1),
        }
        values = super()._values()
        for name, mean in self._means.items():
            need, scale = per_token[name]
            values[need] = mean / scale
        return values


KINDS: dict[str, type[StatsSums]] = {"exact": StatsSums, "published": PublishedSums}  # by a recipe's `sums`


def relative_error(weight: Tensor, pruned: Tensor, stats: InputStats) -> float:
    """The relative output error `||X (W - W')^T||^2 / ||X W^T||^2` of a pruned matrix W' [R, C].

    It is exact if the Gram matrix was collected. Otherwise it is estimated on every fourth sampled input, to
    about a percent, since it is a sum over all outputs.
    """
    difference = weight - pruned
    if Need.GRAM in stats.needs:
        error, total = ((d @ stats.gram).mul_(d).sum().item() for d in (difference, weight))
    else:
        sample = stats.sample[::4]
        error, total = ((sample @ d.T).square().sum().item() for d in (difference, weight))
    return error / total if total > 0 else 0.0
