"""Reads the config of a checkpoint folder, and refuses folders that are no dense model of a known type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.checkpoint.contents import RECORD, SWEEP
from llmprune.checkpoint.packed_entry import packing_entry
from llmprune.checkpoint.reader import read_json
from llmprune.common.messages import first_line, shown
from llmprune.model.quantised import (
    check_dense,
    check_files,
    dequantising,
    in_bitmasks,
)

_ADAPTER = "adapter_config.json"
_NOT_MERGED = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT")


def read_config(folder: Path, trust_remote_code: bool = False, dequantize: bool = False) -> Any:
    """The transformers config of a folder; with `dequantize` as if its weights were not quantised,
    and of a folder that is packed or in bitmasks as of a dense one.

    Raises:
        ValueError: it is missing, unknown to transformers, or of an adapter or a quantised checkpoint.
    """
    from transformers import AutoConfig

    raw = check_folder(folder, str(folder), trust_remote_code, dequantize)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many types here
        newer = _newer(raw)
        told = f"; it was written by transformers {newer}, update to that or later" if newer else ""
        raise ValueError(
            f"transformers cannot use the config of {folder} "
            f"(model_type {shown(raw.get('model_type'))}): {first_line(error, 300)}{told}"
        ) from error
    other = dequantize or packing_entry(raw) is not None or in_bitmasks(raw)
    for part in (config, config.get_text_config()) if other else ():
        part.__dict__.pop("quantization_config", None)
    return config


def token_limit(config: Any) -> int | None:
    """The longest sequence that a model was made for, in tokens; None if its config does not say."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_folder(
    folder: Path, where: str, trust_remote_code: bool, dequantize: bool = False
) -> dict[str, Any]:
    """The values of a folder's config.json, once its small files say that the model can be pruned.

    Of a model of the hub this is asked before its weights are downloaded. `where` names it in messages. With
    `dequantize` its weights must be quantised in a way that can be undone.

    Raises:
        ValueError: it is an adapter or quantised, or transformers does not know its type.
    """
    _check_adapter(folder, where)
    check_files(folder, where)
    if not (folder / "config.json").is_file():
        raise ValueError(_no_model(folder, where))
    raw = read_json(folder / "config.json")
    if dequantize:
        dequantising(raw, where)
    else:
        check_dense(raw, where, folder)
    _check_type(raw, where, trust_remote_code)
    return raw


def _no_model(folder: Path, where: str) -> str:
    """Why a folder without config.json is no model, and which one is meant."""
    if (folder / SWEEP).is_file():
        return f"{where} is a sweep; name one of its cells: {where}/cells/NAME"
    if (folder / RECORD).is_file():
        return (
            f"{where} has a record and no weights: it is a cell of a sweep that kept those of others "
            "(--keep best or none); name one that kept its own"
        )
    return f"{where} has no config.json; expected a Hugging Face checkpoint folder"


def check_whole(model: Any) -> None:
    """Raise `ValueError` for a model in memory that has an adapter or is quantised."""
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model in memory has a PEFT adapter; merge it first: PeftModel's merge_and_unload() returns "
            "the merged model"
        )
    check_dense(model.config.to_dict(), "the model in memory")


def _check_adapter(folder: Path, where: str) -> None:
    """Raise `ValueError` for a PEFT adapter, which transformers would load together with its base model."""
    if not (folder / _ADAPTER).is_file():
        return
    try:
        values = read_json(folder / _ADAPTER)
    except ValueError:  # it is an adapter all the same
        values = {}
    base = values.get("base_model_name_or_path")
    base = shown(base) if isinstance(base, str) and base else None
    if values.get("peft_type") in _NOT_MERGED:
        raise ValueError(
            f"{where} is a PEFT adapter ({_ADAPTER}) of soft prompts, which cannot be merged; prune its base "
            f"model {base or '(the file does not name it)'} instead"
        )
    raise ValueError(
        f"{where} is a PEFT adapter ({_ADAPTER}); merge it into its base model {base or ''}".rstrip()
        + f" first: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base or 'BASE'}, "
        "dtype='auto'), ADAPTER).merge_and_unload().save_pretrained(NEW_FOLDER), and save its tokenizer there"
    )


def _check_type(raw: Mapping[str, Any], where: str, trust_remote_code: bool) -> None:
    """Raise `ValueError` for a model type that the installed transformers does not know."""
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, own = raw.get("model_type"), raw.get("auto_map")
    own_code = isinstance(own, dict) and "AutoConfig" in own
    if (isinstance(kind, str) and kind in CONFIG_MAPPING) or (own_code and trust_remote_code):
        return
    if not isinstance(kind, str) or not kind:  # transformers would guess it from the name of the folder
        raise ValueError(
            f"config.json of {where} has no usable model_type (got {shown(kind)}; its architectures: "
            f"{shown(raw.get('architectures'))}); restore the original file"
        )
    newer = _newer(raw)
    remedy = (
        f"its config was written by transformers {newer}: update to that or later"
        if newer
        else "update transformers, or correct model_type in config.json"
    )
    code = "; or, if you trust the Python code that comes with it, add --trust-remote-code"
    raise ValueError(
        f"{where} is of model type {shown(kind)}, which the installed transformers {__version__} does not "
        f"know; {remedy}{code if own_code else ''}"
    )


def _newer(raw: Mapping[str, Any]) -> str | None:
    """The version of transformers that wrote a config, where it is newer than the installed one."""
    from packaging.version import InvalidVersion, Version
    from transformers import __version__

    written = raw.get("transformers_version")
    if not isinstance(written, str) or len(written) > 40:
        return None
    try:
        return str(Version(written)) if Version(written) > Version(__version__) else None
    except InvalidVersion:
        return None
