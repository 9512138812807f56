"""Block inputs beside those of the pruned model: the dense model's, and those of held-out text."""

from __future__ import annotations

from llmprune.model.activations import BlockInputs
from llmprune.run.block import Block, Companion
from llmprune.run.shared import Run


class DenseStream(Companion):
    """The block inputs of the dense model, for algorithms that compare the pruned model with it."""

    def __init__(self, run: Run) -> None:
        self.inputs = BlockInputs(run.skeleton, run.tokens, run.skeleton.device, run.store)
        self._kept = run.dense_inputs

    def needs_dense(self, block: Block) -> bool:
        """Always: pruned weights would not give the dense model's block inputs."""
        return True

    def enter(self, block: Block) -> None:
        """Keep the dense weights: those in the module are replaced one after the other."""
        block.originals = block.parameters()

    def leave(self, block: Block) -> None:
        """Move on through the dense block, or to what it put out in a run before."""
        known = self._kept.outputs(block.number) if self._kept else None
        if known is not None:
            self.inputs.everything.copy_(known)
        else:
            self.inputs.forward(block.number, block.originals)
        if self._kept and known is None:
            self._kept.keep_outputs(block.number, self.inputs)
        block.originals = {}


class HeldOutStream(Companion):
    """Block inputs of held-out text: after the last block, the pruned model's loss is computed from them."""

    def __init__(self, inputs: BlockInputs) -> None:
        self.inputs = inputs

    def leave(self, block: Block) -> None:
        """Move on through the pruned block."""
        self.inputs.forward(block.number)
