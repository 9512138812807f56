"""The one adapter to transformers' conversion mapping: how parameters are made from stored tensors."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest
import torch
import transformers
from other_models import MODELS, save
from safetensors.torch import load_file

from llmprune.model.opening import open_model, whole

FOUND_IN = "5.0 to 5.23"
USED = {
    "conversion_mapping": ("get_model_conversion_mapping",),
    "core_model_loading": ("WeightConverter", "WeightRenaming", "dot_natural_key", "rename_source_key"),
}


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in USED.items() for n in names])
def test_the_mapping_is_where_it_was(module, name):
    """Without it the plain names would serve, and every mixture of experts be refused: this says why."""
    found = hasattr(importlib.import_module(f"transformers.{module}"), name)
    assert found, f"transformers {transformers.__version__} has moved {module}.{name} (there in {FOUND_IN})"


def test_converters_work_as_they_did():
    from transformers.core_model_loading import WeightConverter

    version = transformers.__version__
    for method, named in (("add_tensor", ("source_pattern",)), ("convert", ("model", "config"))):
        parameters = inspect.signature(getattr(WeightConverter, method)).parameters
        assert set(named) <= set(parameters), f"transformers {version} has changed WeightConverter.{method}"


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_are_made_as_transformers_makes_them(tmp_path, kind):
    model = open_model(save(kind, tmp_path / "in"))
    skeleton, wanted = model.skeleton, whole(model).state_dict()
    names = list(skeleton.group_of)
    skeleton.load(names)
    made = skeleton.model.state_dict()
    assert all(torch.equal(made[name], wanted[name]) for name in names)
    stored = {n for file in (tmp_path / "in").glob("*.safetensors") for n in load_file(file)}
    assert set(skeleton.tensors_of(names)) == stored


def test_experts_of_a_file_are_merged(tmp_path):
    skeleton = open_model(save("mixtral", tmp_path / "in")).skeleton
    group = skeleton.group_of["model.layers.1.mlp.experts.gate_up_proj"]
    stem = "model.layers.1.block_sparse_moe.experts"
    assert set(group.tensors) == {f"{stem}.{e}.{w}.weight" for e in range(4) for w in ("w1", "w3")}


def test_where_a_version_has_no_mapping_the_plain_names_serve(tmp_path, tiny_llama, monkeypatch):
    mixtral = save("mixtral", tmp_path / "in")
    for module in USED:
        monkeypatch.setitem(sys.modules, f"transformers.{module}", None)
    assert open_model(tiny_llama).skeleton.group_of
    with pytest.raises(ValueError, match=r"the checkpoint lacks \d+ weights of MixtralForCausalLM"):
        open_model(mixtral)
