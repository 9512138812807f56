"""Squared gradients block by block against those of the whole model."""

import pytest
import torch
from other_models import make

from llmprune.model.gradients import NoWayBack, next_token_loss, squared_gradients
from llmprune.model.opening import OpenOptions, open_model

TOKENS = torch.randint(0, 120, (3, 16), generator=torch.Generator().manual_seed(0))
CPU = OpenOptions(device="cpu", dtype="float32")


def whole(folder, kind, tokens):
    """The same with all weights in memory."""
    model = kind.from_pretrained(folder, dtype=torch.float32)
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in tokens:
        model.zero_grad()
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        taken = logits.log_softmax(-1)[torch.arange(len(row) - 1), row[1:]]
        (-taken.sum()).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name] += parameter.grad**2
    return squares


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt2", "gpt_neox", "gemma3", "qwen3_next"])
def test_they_are_those_of_the_whole_model(kind, tmp_path):
    skeleton = open_model(make(kind, tmp_path / "model"), CPU).skeleton
    steps = []
    found, order = {}, []
    for number, squares, _ in squared_gradients(skeleton, TOKENS, step=lambda: steps.append(1)):
        order.append(number)
        found |= {name: square.clone() for name, square in squares.items()}
    assert order == [1, 0] and len(steps) == 4
    reference = whole(tmp_path / "model", type(skeleton.model), TOKENS)
    assert found
    for name, square in found.items():
        torch.testing.assert_close(square, reference[name], rtol=1e-3, atol=1e-6 * float(square.max()))


def test_blocks_that_hand_on_more_have_no_way_back(tiny_llama, monkeypatch):
    from llmprune.model.activations import BlockInputs

    monkeypatch.setattr(BlockInputs, "stateless", property(lambda self: False))
    skeleton = open_model(tiny_llama, CPU).skeleton
    with pytest.raises(NoWayBack, match="more than hidden states"):
        next(squared_gradients(skeleton, TOKENS))


def test_the_loss_is_that_of_the_next_tokens():
    logits = torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([3, 1, 6, 0])
    taken = [logits[0, t].softmax(0)[tokens[t + 1]].log() for t in range(3)]
    assert float(next_token_loss(tokens, logits)) == pytest.approx(-float(sum(taken)), rel=1e-5)
