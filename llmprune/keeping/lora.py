"""A LoRA layer of PEFT whose change is masked. R outputs, C inputs, r rank."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmprune.keeping.kept import Kept


class MaskedLinear(Linear):  # type: ignore[misc]
    """`y = x (W + s k * (B A))^T`: LoRA that leaves zeros where the keep mask k prunes.

    PERP, arXiv:2312.15230 (MaskLoRA); SQFT, arXiv:2410.03750 (SparsePEFT). Where an adapter has dropout, it
    acts on the input of the change, as in PEFT. A layer of PEFT becomes one by `MaskedLinear.of`.
    """

    kept: Kept
    among: Any

    @classmethod
    def of(cls, layer: Linear, kept: Kept, among: Any) -> None:
        """Mask a layer in place, with the mask of its weight; `among` are all LoRA layers of the model."""
        layer.__class__ = cls
        layer.kept, layer.among = kept, among

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`s k * (B A)` in the layout of the weight: [R, C], or [C, R] of a `Conv1D`."""
        return super().get_delta_weight(adapter) * self.kept.keep  # type: ignore[no-any-return]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Of inputs [..., C] the outputs [..., R].

        Raises:
            ValueError: other adapters for other rows of the batch.
        """
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names per row cannot be masked; use set_adapter for the whole batch")
        y = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        for adapter in self._active():
            x = self._cast_input_dtype(x, self.lora_A[adapter].weight.dtype)
            y = y + self._change(adapter, self.lora_dropout[adapter](x))
        return y.to(dtype)  # type: ignore[no-any-return]

    def _change(self, adapter: str, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self._product(adapter, x)
        # Made anew in the backward pass: else autograd holds a change [R, C] of every layer.
        return checkpoint(self._product, adapter, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def _product(self, adapter: str, x: Tensor) -> Tensor:
        change = self.get_delta_weight(adapter)
        return nn.functional.linear(x, change.T if self.fan_in_fan_out else change)

    def _active(self, names: list[str] | None = None) -> list[str]:
        chosen = self.active_adapters if names is None else names
        return [name for name in chosen if name in self.lora_A]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the weight: summed in float32, rounded once; zeros stay +0.

        Args:
            safe_merge: taken for PEFT's sake; values that are not finite are refused in any case.
            adapter_names: the active ones if None.

        Raises:
            ValueError: NaN or Inf in what would be merged.
        """
        names = self._active(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        weight = self.get_base_layer().weight
        merged = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        for name in names:
            merged = merged + self.get_delta_weight(name).to(merged.dtype)
        merged = merged.to(weight.dtype)
        if not bool(merged.isfinite().all()):
            raise ValueError(f"the adapter on {self.kept.name} gives NaN or Inf; nothing of it was merged")
        weight.data.copy_(merged)
        self.merged_adapters.extend(names)
