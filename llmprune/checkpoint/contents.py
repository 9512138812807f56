"""What an output folder consists of: the names of its files, and which of a source folder's files go along."""

from __future__ import annotations

import re
from pathlib import Path

RECORD = "llmprune.json"
SCHEMA = 1  # of the record
JOURNAL = "journal.jsonl"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MASKS = "masks.safetensors"
CARD = "README.md"
REPORT = "report.html"
MADE = (RECORD, JOURNAL, INDEX, MASKS, CARD, REPORT)  # what is written beside weights and companions
WRITTEN_LAST = (RECORD, JOURNAL, CARD, REPORT)  # and may be written again
# What a loader or a reader of the licence needs; anything else in the source folder is not ours to publish.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
)
_SHARD = re.compile(r"model-[0-9]{5,}-of-[0-9]{5,}\.safetensors")


def shard_name(number: int, shards: int) -> str:
    """The name of one weight file, counted from 1."""
    return f"model-{number:05d}-of-{shards:05d}.safetensors"


def is_shard(name: str) -> bool:
    """Whether a weight file of ours goes by this name."""
    return _SHARD.fullmatch(name) is not None


def is_companion(name: str, code: bool) -> bool:
    """Whether a file of a source folder goes along with its weights; Python files only with `code`."""
    path = Path(name)
    return any(path.match(pattern) for pattern in COMPANIONS) or (code and path.suffix == ".py")
