"""Names that nobody knows are answered with the nearest, and bad input leaves the working directory as it
was.
"""

from __future__ import annotations

import time

import pytest
from damage import ONE_FILE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "wandaa"}, r"recipe 'wandaa'.*did you mean 'wanda'.*sparsegpt"),
        ({"recipe": "nowhere.yaml"}, r"no such recipe file: nowhere\.yaml"),
        ({"pruner": "wnda"}, r"pruner 'wnda'.*did you mean 'wanda'.*available:.*magnitude"),
        ({"refiner": "dsnott"}, r"refiner 'dsnott'.*did you mean 'dsnot'"),
        ({"allocator": "unifrm"}, r"allocator 'unifrm'.*did you mean 'uniform'"),
        ({"pattern": "2-4"}, r"N:M.*got '2-4'"),
        ({"pattern": "4:2"}, r"4:2"),
        ({"pattern": "0:4"}, r"0:4"),
        (
            {"settings": {"pruner.dampp": 0.1}, "pruner": "sparsegpt"},
            r"'sparsegpt' 'dampp'.*did you mean 'damp'",
        ),
        ({"settings": {"refiner.max_cycle": 5}}, r"'dsnot' 'max_cycle'.*did you mean 'max_cycles'"),
        ({"settings": {"sparsityy": 0.5}}, r"recipe key 'sparsityy'.*did you mean 'sparsity'"),
        ({"settings": {"scope": "rows"}}, r"scope must be one of row, matrix.*got 'rows'"),
        ({"settings": {"calibration.sample": 3}}, r"calibration key 'sample'.*did you mean 'samples'"),
        (
            {"settings": {"rules": [{"match": "*", "sparsety": 0.1}]}},
            r"rule key 'sparsety'.*did you mean 'sparsity'",
        ),
        ({"calibration": "wikitxt2"}, r"text source 'wikitxt2'.*did you mean 'wikitext2'.*FILE\.txt"),
        ({"device": "gpu"}, r"device.*auto, cpu, cuda.*'gpu'"),
        ({"device": "mps"}, r"device.*auto, cpu, cuda.*'mps'"),
        ({"device": "cuda:99"}, r"'cuda:99' is not available.*--device cpu"),
        ({"dtype": "float23"}, r"dtype must be auto.*bfloat16.*'float23'"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(refused, options, said):
    refused(said, **options)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("demoo", r"model 'demoo'.*did you mean 'demo'"),
        ("lama-2-7b", r"model 'lama-2-7b'.*'llama-2-7b'"),
        ("./no/such/folder", r"no such folder: \./no/such/folder"),
        ("/no/such/folder", r"no such folder: /no/such/folder"),
        ("owner/name/more", r"no such folder: owner/name/more"),
        ("owner/unreachable", r"cannot download owner/unreachable.*local folder or demo"),
    ],
)
def test_an_unknown_model_is_refused(refused, model, said):
    refused(said, model)


def test_a_file_is_not_a_model(refused, tiny_llama):
    refused(r"is a file; name the checkpoint's folder", tiny_llama / ONE_FILE)


def test_float16_on_a_cpu_is_refused(refused):
    refused(r"float16.*CPU.*float32 or bfloat16", device="cpu", dtype="float16")


@pytest.mark.parametrize("source", ["c4", "owner/notes:text"])
def test_hub_text_without_network_is_refused_soon(refused, source, capfd):
    started = time.monotonic()
    refused(rf"cannot load '{source}' from the hub.*without network.*builtin.*\.txt", calibration=source)
    assert time.monotonic() - started < 10
    assert capfd.readouterr().err == ""
