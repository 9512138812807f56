"""Samples calibration rows from the model itself (self-calibration, Williams and Aletras 2024).

Uses `generate` of transformers with its key-value cache. B rows of a batch, T tokens per row, V token ids.
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
_BATCH = 32  # rows sampled together where memory allows: each pass over the weights serves all of them
_SHARE = 0.8  # share of the free memory that may be used
_REMEDY = "use another source, for example --calibration c4, builtin or a text file"


@dataclass(frozen=True)
class Sampler:
    """Samples rows of tokens from one model.

    Attributes:
        temperature: the logits are divided by it.
        top_p: a token is drawn from the most likely ones that together have this probability.
    """

    model: Model
    progress: Reporter
    temperature: float = TEMPERATURE
    top_p: float = TOP_P

    def check(self, length: int) -> None:
        """Raise `ValueError` where the model cannot generate text, or does not fit into memory as a whole."""
        model = self.model.skeleton.model
        if not (callable(getattr(model, "can_generate", None)) and model.can_generate()):
            raise ValueError(
                f"{type(model).__name__} has no text generation in transformers, so it cannot sample its own "
                f"text; {_REMEDY}"
            )
        self._batch(length)

    def key(self) -> tuple[object, ...]:
        """What the rows depend on besides their number, their length and the seed; the key of the cache."""
        config = {k: v for k, v in self.model.skeleton.model.config.to_dict().items() if k != "_name_or_path"}
        described = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
        special = self._first_token(), sorted(self._end_tokens()), self._known()
        weights, dtype = fingerprint(self.model.source), str(self.model.skeleton.dtype)
        return weights, described, special, self.temperature, self.top_p, dtype

    @torch.no_grad()
    def sample(self, samples: int, length: int, seed: int) -> Tensor:
        """Rows int64 [N, T].

        The random numbers of a row do not depend on the batch it is in, so another size of batch changes the
        rows only through rounding.
        """
        from llmprune.model.opening import whole

        batch = self._batch(length)
        generator = torch.Generator().manual_seed(seed)
        first = self._first_token()
        if first is None:
            starts = torch.randint(self._known(), (samples, 1), generator=generator)
        else:
            starts = torch.full((samples, 1), first)
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
        """Rows [B, T] from their first tokens [B, 1] and a uniform random number per token [B, T]."""
        from transformers import GenerationConfig, LogitsProcessorList

        device, length = self.model.skeleton.device, uniform.shape[1]
        # Without this, settings of the checkpoint's own (top-k, penalties) would be applied as well.
        model.generation_config = GenerationConfig()
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
        """How many rows are sampled together: the largest power of two up to 32 that fits beside the model.

        Raises:
            ValueError: not even one row does.
        """
        skeleton = self.model.skeleton
        weights = skeleton.elements * skeleton.dtype.itemsize
        row = self._row_bytes(length)
        host = devices.available_memory()
        # Also for a GPU the model is first assembled in the memory of the host.
        free = int(_SHARE * devices.free_memory(skeleton.device)) if weights <= host else 0
        batch = _BATCH
        while batch > 1 and weights + batch * row > free:
            batch //= 2
        if weights + batch * row > free:
            have = min(host, devices.free_memory(skeleton.device))
            raise ValueError(
                f"sampling text needs the whole model in memory, about {size_text(weights + row)} with its "
                f"cache, and only {_SHARE:.0%} of the {size_text(have)} free may be used; {_REMEDY}"
            )
        return batch

    def _row_bytes(self, length: int) -> int:
        """Bytes a row takes: keys and values of every block, its logits, and the working memory of `draw`."""
        skeleton = self.model.skeleton
        config = skeleton.model.config.get_text_config()
        heads = config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        width = head_width * (getattr(config, "num_key_value_heads", None) or heads)
        keys_and_values: int = 2 * len(skeleton.blocks) * width * length * skeleton.dtype.itemsize
        return keys_and_values + 32 * int(config.vocab_size)

    def _first_token(self) -> int | None:
        """The token a document begins with, if any: the tokenizer's, or without a tokenizer the config's."""
        tokenizer, config = self.model.tokenizer, self.model.skeleton.model.config.get_text_config()
        first = tokenizer.bos_token_id if tokenizer is not None else getattr(config, "bos_token_id", None)
        return first if isinstance(first, int) and 0 <= first < self._known() else None

    def _end_tokens(self) -> set[int]:
        """The tokens that end a document."""
        model = self.model.skeleton.model
        generation = getattr(model, "generation_config", None)
        owners = (model.config.get_text_config(), generation, self.model.tokenizer)
        given = [getattr(owner, "eos_token_id", None) for owner in owners]
        ends = {end for value in given for end in (value if isinstance(value, (list, tuple)) else [value])}
        return {end for end in ends if isinstance(end, int) and 0 <= end < self._known()}

    def _known(self) -> int:
        """The number of token ids that mean something: embeddings are often padded with unused rows."""
        rows: int = self.model.skeleton.model.get_input_embeddings().weight.shape[0]
        return min(rows, len(self.model.tokenizer)) if self.model.tokenizer is not None else rows


class _Choice:
    """A logits processor that draws the next token of every row, and rules out all others.

    `generate`, which runs without sampling, then takes that token. After an end token a new document begins,
    with the first token where the model has one. A document never ends before it has a token of text.
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
        self._first = None if first in ends else first  # one token for both is not written twice
        self._ends = torch.tensor(sorted(ends), dtype=torch.int64, device=uniform.device)
        self._starts = self._ends if self._first is None else self._ends.new_tensor([self._first])

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Scores [B, V] of the next token, given the rows so far [B, t]: 0 for the one drawn, else -inf."""
        last, logits = tokens[:, -1], logits.float().clone()
        if logits.isnan().any():
            raise ValueError(
                "the model's own text cannot be sampled: its logits are NaN; use --dtype float32, or check "
                "the checkpoint"
            )
        logits[:, self._known :] = -torch.inf
        begins = torch.isin(last, self._starts)
        if len(self._ends) < self._known:
            logits[:, self._ends] = logits[:, self._ends].masked_fill(begins[:, None], -torch.inf)
        uniform = self._uniform[:, tokens.shape[1]]
        chosen = draw(logits, uniform, self._sampler.temperature, self._sampler.top_p)
        if self._first is not None:
            chosen = chosen.masked_fill(torch.isin(last, self._ends), self._first)
        self._step()
        return torch.full_like(logits, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token id per row, int64 [B], from logits [B, V] and uniform random numbers [B] in [0, 1).

    The candidates are the fewest tokens whose probabilities add up to `top_p`. Of them, the one is drawn in
    whose part of the cumulated probabilities the random number falls.
    """
    probabilities, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulated = probabilities.double().cumsum(dim=-1)
    kept = ((cumulated - probabilities) < top_p).sum(dim=-1, keepdim=True)
    # Rounding may leave room below top_p for tokens that were ruled out (probability 0): they stay out.
    kept = kept.clamp_max((probabilities > 0).sum(dim=-1, keepdim=True))
    threshold = uniform[:, None] * cumulated.gather(-1, kept - 1)
    place = (cumulated <= threshold).sum(dim=-1, keepdim=True).minimum(kept - 1)
    return order.gather(-1, place)[:, 0]
