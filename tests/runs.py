"""A run that is ready to start, for tests of what goes on inside one."""

from pathlib import Path

from llmprune.contracts import CalibrationSet
from llmprune.machine.processes import ALONE
from llmprune.planning.plan import make_plan
from llmprune.run.reporter import Silent
from llmprune.run.shared import Run


def ready(model, recipe, tokens):
    """A run of a recipe on an opened model, calibrated on tokens [N, T], in this process alone."""
    plan = make_plan(recipe, model.skeleton, *tokens.shape)
    rows = CalibrationSet(tokens=tokens, source="test", seed=recipe.seed, digest="")
    return Run(recipe, plan, model, rows, ALONE, Silent(), Path())
