"""The files of an output folder: their names, and which files of the source folder are copied into it."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG = "config.json"
RECORD = "llmprune.json"
SCHEMA = 1  # version of the record's format
JOURNAL = "journal.jsonl"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MASKS = "masks.safetensors"
CARD = "README.md"
REPORT = "report.html"
MATRIX_PLOT, TRAINING_PLOT = "report-matrices.png", "report-training.png"
PLOTS = (MATRIX_PLOT, TRAINING_PLOT)
PAGES = (RECORD, CARD, REPORT, *PLOTS)
MADE = (*PAGES, JOURNAL, INDEX, MASKS)  # what a run writes besides weights and companions
SWEEP = "sweep.json"  # the record of a sweep
SWEEP_MADE = (SWEEP, "table.md", "table.csv", "sweep.png", REPORT)  # what a sweep writes beside its cells
TRAINING, BEST_STEP = "training.safetensors", "best-step.safetensors"  # only of an unfinished recovery
WRITTEN_LAST = (*PAGES, JOURNAL)  # those of them that may be written again later
TEMPORARY = ".tmp"  # what the name of a file ends with while it is being written
# Files copied from the source folder ("companions"): what is needed to load the model, and its licence. Other
# files of the folder are not ours to publish.
COMPANIONS = (
    CONFIG,
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
    """The file name of shard `number` (from 1) of `shards`."""
    return f"model-{number:05d}-of-{shards:05d}.safetensors"


def exact_name(number: int) -> str:
    """The file, only of an unfinished run, with the float32 results of block `number` (from 1)."""
    return f"exact-{number:05d}.safetensors"


def is_shard(name: str) -> bool:
    """Whether a file name is one that `shard_name` gives."""
    return _SHARD.fullmatch(name) is not None


def is_exact(name: str) -> bool:
    """Whether a file name is one that `exact_name` gives."""
    return re.fullmatch(r"exact-[0-9]{5,}\.safetensors", name) is not None


def is_companion(name: str, code: bool) -> bool:
    """Whether a file of the source folder is copied into the output; Python files only with `code`."""
    path = Path(name)
    return any(path.match(pattern) for pattern in COMPANIONS) or (code and path.suffix == ".py")
