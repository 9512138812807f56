"""Tasks on files you already have: `llmprune eval ... --tasks rte_local --task-data DIR`, with DIR/rte and
DIR/blimp as below.
"""

import gzip
import json
from pathlib import Path


def _rows(folder, pattern):
    files = sorted(Path(folder).glob(pattern))
    if not files:
        raise ValueError(f"no files {pattern} in {folder}; name their folder with --task-data DIR")
    for file in files:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as handle:
            yield file, [json.loads(line) for line in handle if line.strip()]


def rte(data=".", **_):
    """RTE-1 to RTE-3 development pairs: `rte/*_dev.jsonl` with premise, hypothesis, label (0: entailment)."""
    import datasets

    pairs = [
        {k: r[k] for k in ("premise", "hypothesis", "label")}
        for _, rows in _rows(data, "rte/*_dev.jsonl")
        for r in rows
    ]
    return {"test": datasets.Dataset.from_list(pairs)}


def blimp(data=".", **_):
    """BLiMP minimal pairs: `blimp/*.jsonl.gz`.

    Paradigms take turns, so the first 67 n documents hold n of each.
    """
    import datasets

    paradigms = [rows for _, rows in _rows(data, "blimp/*.jsonl.gz")]
    pairs = [
        {
            "sentence_good": rows[i]["sentence_good"],
            "sentence_bad": rows[i]["sentence_bad"],
            "paradigm": rows[i]["UID"],
        }
        for i in range(max(map(len, paradigms)))
        for rows in paradigms
        if i < len(rows)
    ]
    return {"test": datasets.Dataset.from_list(pairs)}
