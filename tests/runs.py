"""Runs that are ready to start, that are cut off, and the logits of a model block by block."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llmprune.checkpoint.writer import CheckpointWriter
from llmprune.contracts import CalibrationSet
from llmprune.machine.processes import ALONE
from llmprune.model.activations import BlockInputs
from llmprune.planning.plan import make_plan
from llmprune.run.reporter import Silent
from llmprune.run.shared import Run


def ready(model, recipe, tokens):
    """A run of a recipe on an opened model, calibrated on tokens [N, T], in this process alone."""
    plan = make_plan(recipe, model.skeleton, *tokens.shape)
    rows = CalibrationSet(tokens=tokens, source="test", seed=recipe.seed, digest="")
    return Run(recipe, plan, model, rows, ALONE, Silent(), Path())


@contextmanager
def cut_off(block=2):
    """Inside the `with`, a run is interrupted when it would write the block with this number, from 1."""
    real = CheckpointWriter.block

    def cut(self, number, *args):
        if number == block:
            raise KeyboardInterrupt
        return real(self, number, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointWriter, "block", cut)
        yield


def logits_by_block(skeleton, tokens):
    """The logits [N, T, V] of a model for tokens [N, T], with the weights of one block in memory."""
    inputs = BlockInputs(skeleton, tokens, torch.device("cpu"))
    for number, block in enumerate(skeleton.blocks):
        names = skeleton.parameters_of(block)
        skeleton.load(names)
        inputs.forward(number)
        skeleton.free(names)
    return torch.cat([logits for _, logits in inputs.logits()])
