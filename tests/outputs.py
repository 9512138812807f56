"""What a run puts out: folders made comparable, refusals in one line, a reporter that listens."""

import json
import re

import torch
from safetensors.torch import load_file

TIMES = ("seconds", "peak_memory_bytes", "peak_private_memory_bytes", "peak_device_memory_bytes")
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "llmprune.json",
    "masks.safetensors",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "report.html",
    "tokenizer.json",
    "tokenizer_config.json",
}


def contents(folder):
    """Every file by name; of the record all but times and memory; of the card all but the folder's name; of
    the report nothing.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name == "llmprune.json":
            record = json.loads(path.read_text())
            for key in TIMES:
                record.get("totals", {}).pop(key, None)
            for row in record.get("matrices", []):
                row.pop("seconds")
            found[path.name] = json.dumps(record, sort_keys=True)
        elif path.name == "README.md":
            found[path.name] = re.sub(rb'(from_pretrained|convert)\("[^"]*"', rb"\1(NAME", path.read_bytes())
        elif path.name != "report.html":
            found[path.name] = path.read_bytes()
    return found


def old_output(folder):
    """A folder that passes for the output of an earlier run, with a card that was edited by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"schema": 1, "totals": {"files": {"config.json": 2}}, "matrices": []}
    (folder / "llmprune.json").write_text(json.dumps(record))
    (folder / "README.md").write_text("years of work")
    return folder


def everything(folder):
    """Every byte below a folder, by path; None for a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }


def one_line(error):
    """The message of a refusal, which is a ValueError in one line."""
    message = str(error)
    assert type(error) is ValueError, f"{type(error).__name__}: {message}"
    assert message and "\n" not in message
    return message


def weights(folder):
    """Every tensor of a checkpoint folder."""
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
    return tensors


class Listening:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.told = []

    def plan(self, *_):
        self.told.append("plan")

    def stage(self, title, steps):
        self.told.append(title)

    def step(self):
        pass

    def note(self, text):
        self.told.append(text)


def same_bits(one, other):
    """Whether two sets of tensors are the same in every bit, dtypes and shapes included."""
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(*(t[name].contiguous().view(-1).view(torch.uint8) for t in (one, other)))
        for name in one
    )
