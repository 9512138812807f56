"""What a whole run shares, in one object: recipe, plan, model, calibration rows, processes, reporter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llmprune.contracts import CalibrationSet
from llmprune.machine.processes import Team
from llmprune.model.activations import in_memory, on_disk
from llmprune.model.arguments import Store
from llmprune.model.masking import Masking
from llmprune.model.opening import Model
from llmprune.model.skeleton import Skeleton
from llmprune.planning.plan import Plan
from llmprune.recipe.types import Recipe
from llmprune.run.reporter import RunReporter
from llmprune.run.sharing import DenseInputs, Shared
from llmprune.statistics.sums import sample_positions


@dataclass(frozen=True)
class Run:
    """A run, ready to start.

    `folder` takes block inputs that do not fit into memory. `masks`: those it starts from, where it is given
    some. `shared`: what it shares with other runs of a sweep; None for a run by itself.
    """

    recipe: Recipe
    plan: Plan
    model: Model
    calibration: CalibrationSet
    team: Team
    reporter: RunReporter
    folder: Path
    masks: Masking | None = None
    shared: Shared | None = None

    @property
    def skeleton(self) -> Skeleton:
        """The model without weights."""
        return self.model.skeleton

    @property
    def sequences(self) -> int:
        """How many calibration sequences all processes have together."""
        return len(self.calibration.tokens)

    @property
    def share(self) -> slice:
        """The calibration sequences of this process."""
        return self.team.share(self.sequences)

    @property
    def tokens(self) -> Tensor:
        """The calibration tokens of this process, int64 [n, T]."""
        return self.calibration.tokens[self.share]

    @property
    def positions(self) -> Tensor:
        """The sampled tokens, the same on every process; see `sample_positions`."""
        sequences, tokens = self.calibration.tokens.shape
        return sample_positions(sequences, tokens, self.recipe.seed)

    @property
    def dense_inputs(self) -> DenseInputs | None:
        """Where inputs in the dense model are kept for other runs; None where this run's own ones differ."""
        # A permuted block sums in another order, so even its dense outputs differ in the last digits.
        return None if self.shared is None or self.recipe.permute else self.shared.inputs

    @property
    def store(self) -> Store:
        """Makes room for block inputs: in memory, or in a file where the plan says so."""
        return on_disk(self.folder) if self.plan.offload == "disk" else in_memory
