"""Reads a checkpoint's tokenizer, and finds out which of its files is damaged if that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmprune.common.messages import first_line, is_failure, shown

_NEEDED = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_OTHERS = ("special_tokens_map.json", "added_tokens.json")


def read_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder; None if it has none. Raises `ValueError` if its files cannot be read."""
    if not any((folder / name).exists() for name in _NEEDED):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except BaseException as error:  # it raises many types, among them panics of a library in Rust
        if not is_failure(error):
            raise
        raise ValueError(f"cannot read the tokenizer of {folder.name}: {_reason(folder, error)}") from error


def _line(error: BaseException) -> str:
    """An error's type and message in one line."""
    return f"{type(error).__name__}: {first_line(error)}"


def _reason(folder: Path, error: BaseException) -> str:
    """Why the tokenizer could not be read and what to do; it names the damaged file if that can be found."""
    present = [name for name in (*_NEEDED, *_OTHERS) if (folder / name).exists()]
    for name in present:
        if name.endswith(".json") and (damage := _damage(folder / name)):
            return f"{name} is damaged ({damage}); download it again or restore the original"
    if "trust_remote_code" in str(error):
        return f"it comes with Python code, which runs only with --trust-remote-code ({_line(error)})"
    if isinstance(error, ImportError) or "pip install" in str(error):
        return f"it needs a package that is not installed ({_line(error)})"
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(present):
        return (
            f"{', '.join(present)} names no vocabulary ({_line(error)}); "
            "add tokenizer.json or tokenizer.model"
        )
    if "tokenizer.json" in present and "tokenizer_config.json" in present:
        return (
            f"tokenizer_config.json is damaged or of another model ({_line(error)}); "
            "download it again or restore the original"
        )
    return (
        f"{', '.join(present)} cannot be read ({_line(error)}); "
        "download them again, or install the package that the line names"
    )


def _damage(path: Path) -> str | None:
    """What is wrong with a JSON file of a tokenizer; None if nothing is found."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        return _line(error)
    if not isinstance(value, dict):
        return f"it holds {shown(value)[:60]} and no JSON object"
    if path.name != "tokenizer.json":
        return None
    if not isinstance(value.get("added_tokens"), list):
        found = shown(value["added_tokens"]) if "added_tokens" in value else "missing"
        return f"'added_tokens' is {found}, not a list"
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(text)
    except BaseException as error:
        if not is_failure(error):
            raise
        return _line(error)
    return None
