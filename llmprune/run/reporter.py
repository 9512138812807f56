"""The interface through which a run reports its plan and its progress."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from llmprune.contracts import CalibrationSet, Reporter
from llmprune.model.opening import Model
from llmprune.planning.plan import Plan
from llmprune.recipe.types import Recipe


class RunReporter(Reporter, Protocol):
    """Is told how a run goes, its plan included. `terminal.screen.Terminal` is one that prints."""

    def plan(
        self, model: Model, recipe: Recipe, plan: Plan, calibration: CalibrationSet, output: Path
    ) -> None:
        """The plan, before the work."""


class Silent:
    """Reports nothing."""

    def plan(
        self, model: Model, recipe: Recipe, plan: Plan, calibration: CalibrationSet, output: Path
    ) -> None:
        """Nothing."""

    def stage(self, title: str, steps: int) -> None:
        """Nothing."""

    def step(self) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
