"""The Python functions for training loops of the user's own: `MaskKeeper` and `merge_adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmprune.api.arguments import AnyPath, checked
from llmprune.common.messages import shown
from llmprune.keeping.keeper import MaskKeeper

__all__ = ["MaskKeeper", "merge_adapter"]


def _adapted(name: str, value: Any) -> Any:
    if not (hasattr(value, "peft_config") and hasattr(value, "merge_and_unload")):
        raise ValueError(
            f"{name} must be a PeftModel with a LoRA adapter, got {shown(value)}; peft.get_peft_model and "
            "PeftModel.from_pretrained make one"
        )
    return value


@checked(model=_adapted)
def merge_adapter(model: Any, masks: AnyPath | None = None) -> Any:
    """Merge the active LoRA adapters of a PEFT model into its pruned base model, without filling a zero.

    `V = W + s k * (B A)` in float32, rounded once to the dtype of the weights (PERP, arXiv:2312.15230; SQFT,
    arXiv:2410.03750); PEFT's own `merge_and_unload` fills the zeros. Where `MaskKeeper` has masked the
    adapter in training, the result is the model that was trained, up to rounding. Where not, what the
    adapter changed at pruned weights is dropped, and a warning says how much. A matrix without a mask is
    merged as PEFT does.

    Args:
        model: a `peft.PeftModel` with LoRA on linear layers. Its base model is changed.
        masks: an output folder, dense or packed, or a file of masks; None for those of the `MaskKeeper`,
            without one as `MaskKeeper` finds them.

    Returns:
        The plain transformers model. Its weights are frozen, as PEFT leaves them.

    Raises:
        ValueError: adapters that cannot be merged so (DoRA, on embeddings, with biases, not finite), no masks
            or those of another model. Nothing is merged then.
    """
    from llmprune.keeping.adapters import merge

    return merge(model, None if masks is None else Path(masks).expanduser())
