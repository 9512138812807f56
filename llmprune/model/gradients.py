"""Squared gradients of the model's loss by the weights of its blocks, one block in memory at a time.

Forward through the blocks, whose inputs are kept; then back from the last block to the first.
N sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from llmprune.checkpoint.reader import read_ahead
from llmprune.model.activations import BlockInputs, in_memory
from llmprune.model.arguments import Store
from llmprune.model.skeleton import Skeleton
from llmprune.model.targets import targets_of
from llmprune.numerics.counts import all_finite

Passed = tuple[int, Mapping[str, Tensor], Mapping[str, Tensor]]


class NoWayBack(ValueError):
    """Blocks that hand on more than hidden states, so that none can be passed back by itself."""


def next_token_loss(tokens: Tensor, logits: Tensor) -> Tensor:
    """The loss of the next tokens, summed over a sequence; tokens int64 [T], logits [1, T, V]."""
    return nn.functional.cross_entropy(logits[0, :-1].float(), tokens[1:].to(logits.device), reduction="sum")


def squared_gradients(
    skeleton: Skeleton,
    tokens: Tensor,
    store: Store = in_memory,
    step: Callable[[], None] = lambda: None,
) -> Iterator[Passed]:
    """Number, squared gradients and stored tensors of each block, from the last to the first.

    Of every parameter that holds a prunable matrix. The squares are summed over the sequences, float32, by
    the name of the parameter in the model; the loss is `next_token_loss`. While a block is out, its weights
    are loaded.

    Args:
        skeleton: the model.
        tokens: int64 [N, T].
        store: allocates the inputs of all blocks.
        step: called when a block has been passed, forward and back.

    Raises:
        NoWayBack: see there.
        ValueError: a gradient is NaN or Inf.
    """
    names = list(skeleton.blocks)
    inputs = BlockInputs(skeleton, tokens, skeleton.device, store)
    entered: list[Tensor] = []  # the inputs of each block
    for number, shard in enumerate(read_ahead(skeleton.source, skeleton.block_tensors())):
        parameters = skeleton.parameters_of(names[number])
        skeleton.fill(parameters, shard)
        entered.append(store(tuple(inputs.everything.shape), inputs.everything.dtype))
        entered[-1].copy_(inputs.everything)
        inputs.forward(number)
        skeleton.free(parameters)
        step()
    if not inputs.stateless:
        raise NoWayBack("its blocks hand on more than hidden states")
    # The gradients by the outputs of the block that is next on the way back.
    pulls = inputs.pull(lambda row, logits: next_token_loss(tokens[row], logits))
    for back, shard in enumerate(read_ahead(skeleton.source, skeleton.block_tensors()[::-1]), 1):
        number = len(names) - back
        parameters = skeleton.parameters_of(names[number])
        skeleton.fill(parameters, shard)
        owners = dict.fromkeys(name for t in targets_of(skeleton, names[number]) for name in t.owners)
        leaves = {name: skeleton.model.get_parameter(name).detach().requires_grad_() for name in owners}
        squares = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
        inputs.everything.copy_(entered.pop())
        weights = {name.removeprefix(f"{names[number]}."): leaf for name, leaf in leaves.items()}
        _pass_back(inputs, number, weights, pulls, list(squares.values()))
        if not all(map(all_finite, squares.values())):
            raise ValueError(
                f"a gradient became NaN or Inf at block {number + 1} of {len(names)}; try --dtype float32"
            )
        yield number, squares, shard
        skeleton.free(parameters)
        step()


def _pass_back(
    inputs: BlockInputs,
    number: int,
    weights: Mapping[str, Tensor],
    pulls: list[Tensor],
    squares: list[Tensor],
) -> None:
    """Add the squared gradients of a block's weights, by name in the block, to `squares` in the same order.

    `pulls` become the gradients by its inputs, sequence by sequence.
    """
    for row, pull in enumerate(pulls):
        hidden = inputs.hidden([row]).requires_grad_()
        with torch.enable_grad():
            # A copy: some blocks add to what they get in place.
            outputs = inputs.run(number, [row], weights, hidden.clone())
        found = torch.autograd.grad(outputs, [hidden, *weights.values()], pull, allow_unused=True)
        pulls[row] = torch.zeros_like(pull) if found[0] is None else found[0]
        for square, gradient in zip(squares, found[1:], strict=True):
            if gradient is not None:
                square += gradient.float().square_()
        del found, outputs
