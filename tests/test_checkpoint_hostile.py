"""Whatever a stranger's file holds: it is read, or refused in one clear line.

Ten cases of a kind in `make test`, 500 in all in
`make test-all`, `LLMPRUNE_FUZZ_CASES=20000` by hand.

Each case starts from a valid file and damages it: bytes flipped, cut, inserted; or its JSON or YAML changed
at a random place to something nasty. While a case runs the process may not take more than 512 MB more memory
than it has, nor 20 seconds.
"""

from __future__ import annotations

import gzip
import json
import shutil
from datetime import timedelta
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from hostile import CASES, bytes_only, damaged, damaged_safetensors, damages, read_or_refused, snapshot
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file

import llmprune
from llmprune import calibration
from llmprune.api.checkpoints import inspect
from llmprune.checkpoint.masks import read_masks
from llmprune.checkpoint.reader import Checkpoint
from llmprune.checkpoint.writer import CheckpointWriter
from llmprune.common.shipped import shipped
from llmprune.model.opening import open_model
from llmprune.recipe import loading as recipe
from llmprune.record.licence import read_licence

KINDS = (
    "safetensors",
    "index",
    "config",
    "recipe",
    "masks",
    "record",
    "tokens",
    "txt",
    "gzip",
    "jsonl",
    "chat",
    "parquet",
    "journal",
    "card",
    "tokenizer",
)


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory, tiny_llama):
    """A pruned folder, and what else a run reads, all valid."""
    root = tmp_path_factory.mktemp("hostile")
    tokens = torch.randint(0, 2048, (4, 16), generator=torch.Generator().manual_seed(0))
    llmprune.prune(tiny_llama, calibration=tokens, recipe="magnitude", output=root / "out")
    save_file({"tokens": tokens}, root / "tokens.safetensors")
    lines = [json.dumps({"text": f"a sentence of a file, number {n}, and more of it"}) for n in range(40)]
    (root / "text.jsonl").write_text("\n".join(lines))
    (root / "text.txt").write_text("\n".join(lines))
    (root / "text.txt.gz").write_bytes(gzip.compress((root / "text.txt").read_bytes()))
    chats = [
        json.dumps({"messages": [{"role": "user", "content": line}, {"from": "gpt", "value": line}]})
        for line in lines
    ]
    (root / "chat.jsonl").write_text("\n".join(chats))
    table = pyarrow.table({"text": [json.loads(line)["text"] for line in lines]})
    pyarrow.parquet.write_table(table, root / "text.parquet")
    recipe_text = (
        shipped("recipes", "dsnot.yaml").read_text() + "rules: [{match: '*.q_proj', sparsity: 0.4}]\n"
    )
    (root / "recipe.yaml").write_text(recipe_text)
    (root / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\n---\n# x\n")
    entry = {"block": 1, "file": "a", "bytes": 1, "sha256": "0", "rows": [], "seconds": {}}
    (root / "journal.jsonl").write_text('{"identity": {"model": "x"}}\n' + json.dumps(entry) + "\n")
    return root, open_model(root / "out").tokenizer


def reader_of(kind, root, tokenizer, trial):
    """(the valid file, how it is damaged, what reads it) of a kind; `trial` is a folder that holds a copy of
    the pruned model.
    """
    shard = "model-00001-of-00003.safetensors"

    def calibrate(name):
        samples, length = (None, None) if name.startswith("tokens") else (2, 16)
        path = str(trial / name)
        return lambda: calibration.build(
            path,
            tokenizer,
            calibration.CalibrationRequest(samples=samples, length=length, limit=64, vocabulary=2048, seed=0),
        )

    def speak():
        texts = ["a sentence with numbers 12 and \u00e9, more of it"] * 40
        calibration.build(
            texts,
            open_model(trial).tokenizer,
            calibration.CalibrationRequest(samples=2, length=16, limit=64, vocabulary=2048, seed=0),
        )

    def load_all():
        source = Checkpoint(trial)
        for name in source.tensors:
            source.load(name)

    def resume():
        (trial / ".o.partial").mkdir()
        shutil.move(trial / "journal.jsonl", trial / ".o.partial" / "journal.jsonl")
        writer = CheckpointWriter(trial / "o", resume=True)
        try:
            writer.begin({"model": "x"}, 3, {})
        finally:
            writer.close()

    return {
        "safetensors": (trial / shard, damaged_safetensors, load_all),
        "index": (trial / "model.safetensors.index.json", damaged, load_all),
        "config": (trial / "config.json", damaged, lambda: open_model(trial)),
        "recipe": (
            root / "recipe.yaml",
            lambda d, t: damaged(d, t, yaml.safe_load, True),
            lambda: recipe.load(str(trial / "recipe.yaml")),
        ),
        "masks": (
            trial / "masks.safetensors",
            damaged_safetensors,
            lambda: read_masks(trial / "masks.safetensors"),
        ),
        "record": (trial / "llmprune.json", damaged, lambda: inspect(trial)),
        "tokens": (root / "tokens.safetensors", damaged_safetensors, calibrate("tokens.safetensors")),
        "txt": (root / "text.txt", bytes_only, calibrate("text.txt")),
        "gzip": (root / "text.txt.gz", bytes_only, calibrate("text.txt.gz")),
        "jsonl": (
            root / "text.jsonl",
            lambda d, t: b"\n".join(damaged(x, t) for x in d.split(b"\n")[:3]) + d,
            calibrate("text.jsonl"),
        ),
        "chat": (
            root / "chat.jsonl",
            lambda d, t: b"\n".join(damaged(x, t) for x in d.split(b"\n")[:3]) + d,
            calibrate("chat.jsonl"),
        ),
        "parquet": (root / "text.parquet", lambda d, t: bytes_only(d, t), calibrate("text.parquet")),
        "journal": (
            root / "journal.jsonl",
            lambda d, t: b"\n".join(damaged(x, t) for x in d.split(b"\n") if x) + b"\n",
            resume,
        ),
        "card": (root / "README.md", bytes_only, lambda: read_licence(trial)),
        "tokenizer": (trial / "tokenizer.json", lambda d, t: damaged(d, t), speak),
    }[kind]


@pytest.mark.parametrize("cases", [10, pytest.param(CASES // len(KINDS), marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_or_refused_in_one_line(fuzz, tmp_path, kind, cases):
    root, tokenizer = fuzz

    @settings(
        max_examples=max(1, cases),
        deadline=timedelta(seconds=20),
        derandomize=CASES <= 500,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(todo=damages)
    def one(todo):
        trial = tmp_path / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(root / "out", trial)
        valid, damage, read = reader_of(kind, root, tokenizer, trial)
        (trial / valid.name).write_bytes(damage(valid.read_bytes(), todo))
        before = snapshot(tmp_path) if kind != "journal" else None
        read_or_refused(read)
        if before is not None:
            assert snapshot(tmp_path) == before, "something was written"

    one()


def test_code_in_a_checkpoint_folder_runs_only_when_asked_for(tmp_path, tiny_llama, monkeypatch):
    folder, marker = Path(shutil.copytree(tiny_llama, tmp_path / "model")), tmp_path / "it-ran"
    code = (
        f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'own'\nclass M(LlamaForCausalLM):\n    config_class = C\n"
    )
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": "own.T"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match=r"is of model type 'own'.*add --trust-remote-code$"):
        llmprune.prune(folder, calibration=tokens, recipe="magnitude", output=tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"is of model type 'own'.*add --trust-remote-code$"):
        llmprune.inspect(folder)
    assert not marker.exists()


def test_a_recipe_cannot_name_python_objects(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text(f"name: x\npruner: !!python/object/apply:os.system ['touch {tmp_path}/it-ran']\n")
    with pytest.raises(ValueError, match=r"evil\.yaml"):
        recipe.load(str(path))
    assert not (tmp_path / "it-ran").exists()
