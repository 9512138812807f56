"""Rows sampled from the model itself (self-calibration, Williams and Aletras 2024), with transformers' generate and its cache.

B rows of a batch, T tokens, V token ids.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune.checkpoint.reader import fingerprint
from llmprune.common.messages import size_text
from llmprune.contracts import Reporter
from llmprune.machine import device as devices

if TYPE_CHECKING:
    from llmprune.model.opening import Model

TEMPERATURE = 1.0
TOP_P = 0.95
_BATCH = 32  # rows sampled together where memory allows: one pass over the weights serves them all
_SHARE = 0.8  # of the free memory that may be planned for
_REMEDY = "use another source, for example --calibration c4, builtin or a text file"


@dataclass(frozen=True)
class Sampler:
    """Samples rows from one model. `temperature` divides the logits; `top_p`: share of the probability that stays in the draw."""

    model: Model
    progress: Reporter
    temperature: float = TEMPERATURE
    top_p: float = TOP_P

    def check(self, length: int) -> None:
        """Raise `ValueError` where the model cannot write, or is too large for this machine's memory to be held whole."""
        model = self.model.skeleton.model
        if not (callable(getattr(model, "can_generate", None)) and model.can_generate()):
            raise ValueError(
                f"{type(model).__name__} has no text generation in transformers, so it cannot sample its own text; {_REMEDY}"
            )
        self._batch(length)

    def key(self) -> tuple[object, ...]:
        """What the rows depend on, beside their number, their length and the seed."""
        config = {k: v for k, v in self.model.skeleton.model.config.to_dict().items() if k != "_name_or_path"}
        described = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
        ends = self._first_token(), sorted(self._end_tokens()), self._known()
        return (
            fingerprint(self.model.source),
            described,
            ends,
            self.temperature,
            self.top_p,
            str(self.model.skeleton.dtype),
        )

    @torch.no_grad()
    def sample(self, samples: int, length: int, seed: int) -> Tensor:
        """Rows int64 [N, T]. Each row has uniform numbers of its own, so the size of a batch changes no more than rounding does."""
        from llmprune.model.opening import whole

        batch = self._batch(length)
        generator = torch.Generator().manual_seed(seed)
        first, known = self._first_token(), self._known()
        starts = (
            torch.full((samples, 1), first)
            if first is not None
            else torch.randint(known, (samples, 1), generator=generator)
        )
        uniform = torch.rand(samples, length, generator=generator, dtype=torch.float64)
        self.progress.stage("sampling calibration text", -(-samples // batch) * (length - 1))
        model = whole(self.model)
        try:
            with devices.exact_matmul():
                parts = zip(starts.split(batch), uniform.split(batch), strict=True)
                return torch.cat([self._continued(model, rows, numbers) for rows, numbers in parts])
        finally:
            del model
            gc.collect()
            devices.free_cached_memory(self.model.skeleton.device)

    def _continued(self, model: Any, starts: Tensor, uniform: Tensor) -> Tensor:
        """Rows [B, T] from their first tokens [B, 1] and a uniform number per token [B, T]."""
        from transformers import GenerationConfig, LogitsProcessorList

        device, length = self.model.skeleton.device, uniform.shape[1]
        model.generation_config = (
            GenerationConfig()
        )  # else what the checkpoint's own sets (top-k, penalties) would be used beside ours
        choose = _Choice(
            self,
            uniform.to(device),
            self._first_token(),
            self._end_tokens(),
            self._known(),
            self.progress.step,
        )
        config = GenerationConfig(do_sample=False, max_new_tokens=length - 1, use_cache=True)
        starts = starts.to(device)
        rows: Tensor = model.generate(
            starts,
            attention_mask=torch.ones_like(starts),
            generation_config=config,
            logits_processor=LogitsProcessorList([choose]),
        )
        assert rows.shape == uniform.shape
        return rows.cpu()

    def _batch(self, length: int) -> int:
        """Rows that are sampled together: the largest power of two up to 32 whose cache fits beside the model."""
        skeleton = self.model.skeleton
        weights = (
            sum(self.model.source.tensors[name].elements for name in set(skeleton.stored.values()))
            * skeleton.dtype.itemsize
        )
        row = self._row_bytes(length)
        host = devices.available_memory()
        # On a GPU the model passes through the host's memory first.
        free = int(_SHARE * devices.free_memory(skeleton.device)) if weights <= host else 0
        batch = _BATCH
        while batch > 1 and weights + batch * row > free:
            batch //= 2
        if weights + batch * row > free:
            have = min(host, devices.free_memory(skeleton.device))
            raise ValueError(
                f"sampling text needs the whole model in memory, about {size_text(weights + row)} with its cache, and only "
                f"{_SHARE:.0%} of the {size_text(have)} free may be used; {_REMEDY}"
            )
        return batch

    def _row_bytes(self, length: int) -> int:
        """Bytes of a row: keys and values of every block, and the logits with what choosing from them takes."""
        config = self.model.skeleton.model.config.get_text_config()
        heads = config.num_attention_heads
        width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * (
            getattr(config, "num_key_value_heads", None) or heads
        )
        keys_and_values: int = (
            2 * len(self.model.skeleton.blocks) * width * length * self.model.skeleton.dtype.itemsize
        )
        return keys_and_values + 32 * int(config.vocab_size)

    def _first_token(self) -> int | None:
        """The token a document begins with, None where there is none: the tokenizer's, or without a tokenizer the config's."""
        tokenizer, config = self.model.tokenizer, self.model.skeleton.model.config.get_text_config()
        first = tokenizer.bos_token_id if tokenizer is not None else getattr(config, "bos_token_id", None)
        return first if isinstance(first, int) and 0 <= first < self._known() else None

    def _end_tokens(self) -> set[int]:
        """The tokens that end a document."""
        model = self.model.skeleton.model
        owners = (
            model.config.get_text_config(),
            getattr(model, "generation_config", None),
            self.model.tokenizer,
        )
        given = [getattr(owner, "eos_token_id", None) for owner in owners]
        ends = {end for value in given for end in (value if isinstance(value, (list, tuple)) else [value])}
        return {end for end in ends if isinstance(end, int) and 0 <= end < self._known()}

    def _known(self) -> int:
        """Token ids that stand for something: embeddings are often padded beyond them."""
        rows: int = self.model.skeleton.model.get_input_embeddings().weight.shape[0]
        return min(rows, len(self.model.tokenizer)) if self.model.tokenizer is not None else rows


class _Choice:
    """A logits processor that draws the next token of every row and leaves only that one for generate's argmax.

    After an end of text a new document begins: with the first token, where the model has one. Empty documents are not drawn.
    """

    def __init__(
        self,
        sampler: Sampler,
        uniform: Tensor,
        first: int | None,
        ends: set[int],
        known: int,
        step: Callable[[], None],
    ) -> None:
        self._sampler, self._uniform, self._known, self._step = sampler, uniform, known, step
        self._first = None if first in ends else first  # a token that both begins and ends is written once
        self._ends = torch.tensor(sorted(ends), dtype=torch.int64, device=uniform.device)
        self._starts = self._ends if self._first is None else self._ends.new_tensor([self._first])

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Scores [B, V] of rows so far [B, t]: 0 for the chosen token, minus infinity for the others."""
        last, logits = tokens[:, -1], logits.float().clone()
        if logits.isnan().any():
            raise ValueError(
                "the model's own text cannot be sampled: its logits are NaN; use --dtype float32, or check the checkpoint"
            )
        logits[:, self._known :] = -torch.inf
        begins = torch.isin(last, self._starts)
        if len(self._ends) < self._known:
            logits[:, self._ends] = logits[:, self._ends].masked_fill(begins[:, None], -torch.inf)
        chosen = draw(
            logits, self._uniform[:, tokens.shape[1]], self._sampler.temperature, self._sampler.top_p
        )
        if self._first is not None:
            chosen = chosen.masked_fill(torch.isin(last, self._ends), self._first)
        self._step()
        return torch.full_like(logits, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """A token id per row, int64 [B], from logits [B, V] and uniform numbers [B] in [0, 1).

    Drawn from the fewest tokens whose probabilities reach `top_p`, by where the uniform number falls in their cumulated probabilities.
    """
    probabilities, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulated = probabilities.double().cumsum(dim=-1)
    kept = ((cumulated - probabilities) < top_p).sum(dim=-1, keepdim=True)
    kept = kept.clamp_max(
        (probabilities > 0).sum(dim=-1, keepdim=True)
    )  # what was ruled out stays out, also where rounding leaves room
    place = (
        (cumulated <= uniform[:, None] * cumulated.gather(-1, kept - 1))
        .sum(dim=-1, keepdim=True)
        .minimum(kept - 1)
    )
    return order.gather(-1, place)[:, 0]
