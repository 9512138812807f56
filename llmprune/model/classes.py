"""Which class of transformers a checkpoint is, and which `Auto` class loads it."""

from __future__ import annotations

from typing import Any

from llmprune.common.messages import shown

CAUSAL, IMAGE_TEXT = "AutoModelForCausalLM", "AutoModelForImageTextToText"
_GENERATING = ("ForCausalLM", "ForConditionalGeneration")


def class_of(config: Any, trust_remote_code: bool = False) -> tuple[str, Any]:
    """The name of the class of transformers that loads a model of a config, and the model's class.

    The second is None where it is the checkpoint's own. Of a causal language model and a wrapper with image
    or audio parts the one that the config names is taken: the folder is loaded again as what it came as.

    Raises:
        ValueError: none of these classes of transformers loads it.
    """
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class

    if trust_remote_code and CAUSAL in (getattr(config, "auto_map", None) or {}):
        return CAUSAL, None
    found = []
    for name in (CAUSAL, IMAGE_TEXT):
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            found.append((name, _get_model_class(config, mapping)))
    wanted = getattr(config, "architectures", None) or []
    named = (pair for pair in found if pair[1].__name__ in wanted)
    if not found:  # some parts of wrappers are mapped by no `Auto` class and load by their own name
        own = [name for name in wanted if name.endswith(_GENERATING) and hasattr(transformers, name)]
        if not own:
            raise ValueError(
                f"no class of {CAUSAL} or {IMAGE_TEXT} is for a {type(config).__name__} (architectures: "
                f"{shown(wanted)}); supported are models that go on with a text"
            )
        return own[0], getattr(transformers, own[0])
    return next(named, found[0])
