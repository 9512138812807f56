"""Checkpoints damaged on purpose."""

import json
import math

import torch
from safetensors.torch import load_file, save_file

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def rewrite(folder, **changed):
    """Exchange tensors of a checkpoint of one file; None leaves one out."""
    tensors = {**load_file(folder / ONE_FILE), **changed}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / ONE_FILE, metadata={"format": "pt"})


def spoilt(folder, where):
    """The tiny model with a number in it that makes NaN or Inf come up."""
    if where == "epsilon":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": math.nan}))
    else:
        names = [f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("up", "gate")]
        rewrite(folder, **{name: torch.full((96, 64), 1e30) for name in names})
