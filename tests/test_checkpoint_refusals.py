"""Damaged weight files and folders without weights are refused in one line, and pickles are never opened."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from damage import INDEX, ONE_FILE, rewrite
from safetensors.torch import load_file, save_file

import llmprune
from llmprune.checkpoint.reader import fingerprint


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_never_opened(refused, llama_copy, tmp_path, name):
    (llama_copy / ONE_FILE).unlink()
    (llama_copy / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused(rf"no safetensors, only {re.escape(name)}, a pickle.*convert.*save_pretrained", llama_copy)
    for call in (llmprune.inspect, llmprune.load, llmprune.evaluate):
        with pytest.raises(ValueError, match=r"a pickle.*convert"):
            call(llama_copy)
    assert not (tmp_path / "exploded").exists()
    pickle.loads((llama_copy / name).read_bytes())
    assert (tmp_path / "exploded").exists(), "the bomb does not work: the test shows nothing"


def test_a_pickle_beside_safetensors_is_left_alone_and_not_copied(llama_copy, calibration_tokens, tmp_path):
    (llama_copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    llmprune.prune(llama_copy, calibration=calibration_tokens, recipe="magnitude", output=tmp_path / "out")
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_an_empty_folder_is_refused(refused, work):
    (work / "model").mkdir()
    refused(r"no config\.json.*checkpoint folder", "model")


def test_a_folder_with_a_config_alone_is_refused(refused, llama_copy):
    (llama_copy / ONE_FILE).unlink()
    refused(r"no model\.safetensors and no model\.safetensors\.index\.json", llama_copy)


def header(path):
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(path, values, data, claimed=None):
    encoded = values if isinstance(values, bytes) else json.dumps(values).encode()
    path.write_bytes((len(encoded) if claimed is None else claimed).to_bytes(8, "little") + encoded + data)


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def only_the_length(path):
    path.write_bytes(path.read_bytes()[:8])


def nothing(path):
    path.write_bytes(b"")


def one_byte_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def bytes_behind_the_end(path):
    path.write_bytes(path.read_bytes() + b"\0" * 16)


def length_beyond_the_file(path):
    with_header(path, *header(path), claimed=2**40)


def largest_length(path):
    with_header(path, *header(path), claimed=2**64 - 1)


def length_too_short(path):
    with_header(path, *header(path), claimed=40)


def header_of_no_json(path):
    with_header(path, b"not json", header(path)[1])


def header_of_a_list(path):
    with_header(path, b"[1, 2]", header(path)[1])


def offsets_beyond_the_end(path):
    values, data = header(path)
    values["model.norm.weight"]["data_offsets"] = [len(data), len(data) + 256]
    with_header(path, values, data)


def offsets_of_another_tensor(path):
    values, data = header(path)
    values["model.layers.0.self_attn.k_proj.weight"]["data_offsets"] = values[
        "model.layers.0.self_attn.v_proj.weight"
    ]["data_offsets"]
    with_header(path, values, data)


def offsets_backwards(path):
    values, data = header(path)
    values["model.norm.weight"]["data_offsets"].reverse()
    with_header(path, values, data)


def shape_larger_than_the_bytes(path):
    values, data = header(path)
    values["model.norm.weight"]["shape"] = [2**40]
    with_header(path, values, data)


def shape_that_overflows(path):
    values, data = header(path)
    values["model.norm.weight"]["shape"] = [2**62, 2**62]
    with_header(path, values, data)


def unknown_dtype(path):
    values, data = header(path)
    values["model.norm.weight"]["dtype"] = "F33"
    with_header(path, values, data)


DAMAGES = [
    half,
    only_the_length,
    nothing,
    one_byte_short,
    bytes_behind_the_end,
    length_beyond_the_file,
    largest_length,
    length_too_short,
    header_of_no_json,
    header_of_a_list,
    offsets_beyond_the_end,
    offsets_of_another_tensor,
    offsets_backwards,
    shape_larger_than_the_bytes,
    shape_that_overflows,
    unknown_dtype,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_safetensors_file_is_refused(refused, llama_copy, damage):
    damage(llama_copy / ONE_FILE)
    refused(r"model\.safetensors is damaged or not safetensors.*download it again", llama_copy)


def index_of(folder):
    return json.loads((folder / INDEX).read_text())


def put_index(folder, **changes):
    (folder / INDEX).write_text(json.dumps({**index_of(folder), **changes}))


def test_an_index_that_names_a_missing_file_is_refused(refused, sharded_copy):
    gone = sorted(sharded_copy.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(rf"names {gone.name}, which is missing; download", sharded_copy)


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/outside.safetensors",
        "a/../../outside.safetensors",
        "..",
        "",
        "a\\b",
        "a\0b",
    ],
)
def test_an_index_may_not_leave_the_folder(refused, sharded_copy, file):
    outside = sharded_copy.parent / "outside.safetensors"
    save_file({"model.norm.weight": torch.ones(64)}, outside)
    put_index(
        sharded_copy,
        weight_map={
            **index_of(sharded_copy)["weight_map"],
            "model.norm.weight": str(outside) if file[:1] == "/" else file,
        },
    )
    refused(
        r"names .* for 'model\.norm\.weight': shards must be plain file names inside the folder", sharded_copy
    )


def test_an_index_that_places_a_tensor_wrongly_is_refused(refused, sharded_copy):
    weight_map = index_of(sharded_copy)["weight_map"]
    other = next(f for f in weight_map.values() if f != weight_map["model.norm.weight"])
    put_index(sharded_copy, weight_map={**weight_map, "model.norm.weight": other})
    refused(rf"places 'model\.norm\.weight' in {other}, which does not hold it", sharded_copy)


@pytest.mark.parametrize("weight_map", [[], {}, None, "model.safetensors", {"model.norm.weight": 3}])
def test_an_index_without_a_usable_map_is_refused(refused, sharded_copy, weight_map):
    put_index(sharded_copy, weight_map=weight_map)
    refused(r"no usable weight_map", sharded_copy)


@pytest.mark.parametrize("written", ["{", "[]", "", "[" * 100_000, "\x00"])
def test_an_index_that_is_no_json_object_is_refused(refused, sharded_copy, written):
    (sharded_copy / INDEX).write_text(written)
    refused(r"model\.safetensors\.index\.json", sharded_copy)


def test_a_tensor_in_two_shards_is_refused(refused, sharded_copy):
    first, second = sorted(sharded_copy.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: load_file(first)[name]}, second)
    refused(rf"'{re.escape(name)}' stands in both", sharded_copy)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_a_weight_that_is_not_finite_is_named(make_llama, refused, tmp_path, name, dtype, value):
    folder = Path(shutil.copytree(make_llama(dtype=dtype), tmp_path / "damaged"))
    weight = load_file(folder / ONE_FILE)[name]
    weight.view(-1)[-1] = value
    rewrite(folder, **{name: weight})
    refused(rf"'{re.escape(name)}' holds 1 NaN or Inf.*damaged", folder)


def test_large_finite_weights_are_not_taken_for_damage():
    class Source:
        def __init__(self):
            self.tensors = {"large": None}

        def load(self, name):
            return torch.full((4, 4), 3e38)

    assert fingerprint(Source()).startswith("sha256:")


def test_a_checkpoint_that_lacks_a_weight_is_refused(refused, llama_copy):
    rewrite(llama_copy, **{"model.layers.1.mlp.up_proj.weight": None})
    refused(r"lacks 1 weights.*'model\.layers\.1\.mlp\.up_proj\.weight'.*incomplete", llama_copy)
