"""Bad input ends in one line that says what was received and what to do, and leaves the output folder as it was."""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from outputs import old_output
from safetensors.torch import load_file, save_file

import llmprune
from llmprune import __main__ as program
from llmprune.checkpoint import writer
from llmprune.checkpoint.reader import fingerprint
from llmprune.cli import commands as cli
from llmprune.evaluation import scores
from llmprune.hub import download as hub
from llmprune.recipe import loading as recipe
from llmprune.recipe.loading import load as load_recipe
from llmprune.run import corridor as run
from llmprune.text import files as text

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }


def one_line(error) -> str:
    message = str(error)
    assert type(error) is ValueError, f"{type(error).__name__}: {message}"
    assert message and "\n" not in message
    return message


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current directory, which bad input must leave as it was."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(tiny_llama, calibration_tokens, work):
    """`refused(pattern, ...)`: pruning so raises one line that matches, and changes nothing in the current directory."""

    def check(said, model=None, call=None, **options):
        before = contents(work)
        values = {"calibration": calibration_tokens, "sparsity": 0.5, "output": "out", **options}
        with pytest.raises(Exception, match=said) as caught:
            (call or llmprune.prune)(
                model or tiny_llama, **{k: v for k, v in values.items() if v is not None}
            )
        one_line(caught.value)
        assert contents(work) == before

    return check


@pytest.fixture
def typed(typed, work):
    """Typed in the empty working folder."""
    return typed


def assert_one_line(done, said):
    code, out, err = done
    assert code == 1, err
    assert len(err.splitlines()) == 1, err
    assert re.search(said, err), err
    assert "Traceback" not in err
    return out


# Names


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


def test_an_unknown_suite_is_answered_with_the_nearest(refused):
    refused(r"suite 'papr'.*did you mean 'paper'", call=llmprune.run_model, suite="papr")


def test_an_unknown_task_is_answered_with_the_nearest(refused):
    refused(r"task 'boolqq'.*did you mean 'boolq'", call=llmprune.run_model, tasks=["boolqq"])


def test_a_misspelt_flag_or_command_is_wrong_usage(typed):
    for args in (
        ("prune", "demo", "--sparsty", "0.5"),
        ("prun", "demo"),
        ("prune",),
        ("prune", "demo", "--samples", "many"),
    ):
        code, out, err = typed(*args)
        assert (code, out) == (2, ""), args
        assert "Traceback" not in err
    assert "--sparsity" in typed("prune", "demo", "--sparsty", "0.5")[2]


# Values


@pytest.mark.parametrize("sparsity", [1.0, 1, -0.1, 1.5, 70, math.nan, math.inf, -math.inf, True])
def test_sparsity_outside_its_range_is_refused(refused, sparsity):
    refused(rf"sparsity must be in \[0, 1\).*got {sparsity!r}", sparsity=sparsity)


@pytest.mark.parametrize("sparsity", ["half", [0.5], {}])
def test_sparsity_of_another_type_is_refused(refused, sparsity):
    refused(r"sparsity must be in \[0, 1\)", sparsity=None, settings={"sparsity": sparsity})


def test_sparsity_may_not_contradict_the_pattern(refused):
    refused(r"sparsity 0\.6 contradicts pattern 2:4, which is 0\.5", pattern="2:4", sparsity=0.6)
    assert load_recipe("wanda", {"pattern": "2:4", "sparsity": 0.5}).sparsity == 0.5


def test_a_pattern_that_does_not_divide_the_columns_names_the_matrix(refused):
    refused(
        r"q_proj \(and \d+ more .*\) has in_features 64, not divisible by 5.*3:5.*skip: true",
        pattern="3:5",
        sparsity=None,
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibration": "builtin", "samples": 0}, r"samples must be a whole number from 1, got 0"),
        ({"calibration": "builtin", "samples": -3}, r"samples must be a whole number from 1, got -3"),
        ({"calibration": "builtin", "samples": 2.5}, r"samples must be a whole number from 1, got 2\.5"),
        ({"calibration": "builtin", "seqlen": 0}, r"sequence_length must be a whole number from 2, got 0"),
        ({"calibration": "builtin", "seqlen": 1}, r"sequence_length must be a whole number from 2, got 1"),
        (
            {"calibration": "builtin", "seqlen": 65},
            r"sequence length 65 is over the model's limit of 64; use --seqlen 64",
        ),
        ({"seed": -1}, r"seed must be a whole number from 0, got -1"),
        ({"seed": 2**70}, r"seed.*got 1180591620717411303424"),
        ({"settings": {"pruner.damp": "high"}, "pruner": "sparsegpt"}, r"option 'damp'.*got 'high'"),
        ({"settings": {"pruner.damp": -1.0}, "pruner": "sparsegpt"}, r"damp.*-1"),
        ({"settings": {"pruner.damp": math.nan}, "pruner": "sparsegpt"}, r"damp.*nan"),
        ({"settings": {"pruner.block": 0}, "pruner": "sparsegpt"}, r"block.*0"),
        ({"settings": {"refiner.max_cycles": -1}}, r"max_cycles.*-1"),
        ({"settings": {"refiner.variance": "between"}}, r"variance.*'between'"),
        ({"settings": {"refiner.targets": []}}, r"targets of 'dsnot'.*\[\]"),
        ({"settings": {"pruner.targets": ["*q*"]}}, r"only a refiner or an update takes targets; use rules"),
        ({"settings": {"pruner": None}}, r"needs a pruner"),
        ({"settings": {"pruner": 3}}, r"pruner.*3"),
        ({"settings": {"sparsity.deep": 1}}, r"cannot set 'sparsity\.deep'"),
        ({"settings": {"calibration": "c4"}}, r"'calibration' must be dict, got 'c4'"),
        ({"settings": {"description": 3}}, r"'description' must be str, got 3"),
        ({"recipe": "wanda", "settings": {"refiner.max_cycles": 3}}, r"refiner needs a name: one of dsnot"),
        ({"settings": {"rules": "all"}}, r"'rules' must be list, got 'all'"),
        ({"settings": {"rules": [{"skip": True}]}}, r"every rule needs 'match'"),
        ({"settings": {"rules": [{"match": 3}]}}, r"every rule needs 'match'"),
        ({"settings": {"rules": [{"match": "*", "sparsity": 1.2}]}}, r"sparsity must be in \[0, 1\).*1\.2"),
        ({"settings": {"rules": [{"match": "*", "pattern": "4:2"}]}}, r"4:2"),
        (
            {"settings": {"rules": [{"match": "*", "skip": True, "sparsity": 0.1}]}},
            r"rule '\*' both skips and sets",
        ),
        ({"settings": {"rules": [{"match": "*", "skip": True}]}}, r"skip every matrix"),
        (
            {"settings": {"rules": [{"match": "*.qproj", "skip": True}]}},
            r"rule '\*\.qproj'.*named like 'model\.layers\.0",
        ),
    ],
)
def test_values_out_of_range_are_refused(refused, options, said):
    refused(said, **options)


def test_a_setting_of_null_is_not_ignored():
    assert load_recipe("dsnot", {"refiner": "none"}).refiner is None
    assert recipe.load("dsnot", dict([recipe.parse_assignment("refiner=null")])).refiner is None


def test_null_in_the_settings_of_a_run_is_not_ignored(tiny_llama, calibration_tokens, work):
    dry = llmprune.prune(tiny_llama, calibration=calibration_tokens, settings={"refiner": None}, dry_run=True)
    assert dry.recipe.refiner is None


def test_a_rule_behind_another_that_matches_all_of_it_is_refused(refused):
    rules = [{"match": "*", "sparsity": 0.3}, {"match": "*.q_proj", "sparsity": 0.1}]
    refused(r"rule '\*\.q_proj' is the first match of no matrix", settings={"rules": rules})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 0}, r"limit must be at least 1, got 0"),
        ({"eval_seqlen": 1}, r"window must be at least 2 tokens, got 1"),
        (
            {"eval_seqlen": 65, "perplexity": ["builtin"]},
            r"window 65 is over the model's limit of 64; use --eval-seqlen 64",
        ),
        ({"perplexity": ["wikitxt2"]}, r"text source 'wikitxt2'.*did you mean 'wikitext2'"),
        ({"perplexity": ["fineweb-edu"]}, r"'fineweb-edu' has no evaluation split; use wikitext2"),
        ({"perplexity": ["none.txt"]}, r"no such text file: none\.txt"),
        (
            {"tasks": ["demo_continuation"], "include_tasks": "nowhere"},
            r"--include-tasks nowhere is not a folder",
        ),
        ({"tasks": ["rte_local"], "task_data": "nowhere"}, r"--task-data nowhere is not a folder"),
        ({"tasks": ["rte_local"]}, r"rte_local.*--task-data DIR"),
        ({"suite": "none.yaml"}, r"none\.yaml"),
    ],
)
def test_evaluation_values_are_checked_before_work(refused, monkeypatch, options, said):
    monkeypatch.setattr(run, "prune_blocks", lambda *args: pytest.fail("work began"))
    refused(said, call=llmprune.run_model, **options)


def test_evaluation_text_shorter_than_a_window_is_refused(refused, work):
    (work / "short.txt").write_text("Only this.")
    refused(
        r"short\.txt has \d+ tokens, less than one window of 64.*--eval-seqlen",
        call=llmprune.run_model,
        perplexity=["short.txt"],
    )


def test_evaluation_text_that_is_empty_is_refused(refused, work):
    (work / "empty.txt").write_text("  \n")
    refused(r"empty\.txt holds no text", call=llmprune.run_model, perplexity=["empty.txt"])


def test_two_texts_of_the_same_file_name_are_not_mixed_up(tiny_llama, work):
    for folder in ("one", "two"):
        (work / folder).mkdir()
        (work / folder / "text.txt").write_text(f"the text of folder {folder}, " * 200)
    paths = ["one/text.txt", "two/text.txt"]
    try:
        found = llmprune.evaluate(tiny_llama, perplexity=paths, limit=1)["perplexity"]
    except ValueError as error:
        assert "text.txt" in one_line(error)
    else:
        assert len(found) == 2


def test_a_perplexity_beyond_all_numbers_is_no_crash_and_strict_json(typed, tiny_llama, monkeypatch):
    from llmprune.evaluation import perplexity

    def constant(name):
        raise AssertionError(f"{name} is not JSON")

    for losses in ([1e4], [math.nan]):
        monkeypatch.setattr(perplexity, "_window_losses", lambda *args, losses=losses: losses)
        code, out, err = typed(
            "eval", tiny_llama, "--perplexity", "builtin", "--limit", 1, "--json", "--quiet"
        )
        assert (code == 0 and json.loads(out, parse_constant=constant)) or (
            code == 1 and len(err.splitlines()) == 1
        )


def test_a_suite_with_an_unknown_key_or_a_bare_name_is_refused(work):
    (work / "one.yaml").write_text("perplexityy: [builtin]")
    (work / "two.yaml").write_text("tasks: boolq")
    with pytest.raises(ValueError, match=r"suite key 'perplexityy'.*did you mean 'perplexity'"):
        scores.read_suite("one.yaml")
    with pytest.raises(ValueError, match=r"tasks must be a list of names, got 'boolq'"):
        scores.read_suite("two.yaml")


def test_float16_on_a_cpu_is_refused(refused):
    refused(r"float16.*CPU.*float32 or bfloat16", device="cpu", dtype="float16")


@pytest.mark.parametrize("assignment", ["sparsity", "=0.5", " = 3", ""])
def test_a_setting_without_key_or_value_is_refused(assignment):
    with pytest.raises(ValueError, match=r"--set takes dotted\.key=value") as caught:
        recipe.parse_assignment(assignment)
    assert repr(assignment) in one_line(caught.value)


@pytest.mark.parametrize("value", ["[1", "{a: ", "!!python/object/apply:os.getcwd []"])
def test_a_setting_that_is_not_plain_yaml_is_refused(value):
    with pytest.raises(ValueError, match=r"--set pruner\.damp: the value .* is not valid YAML"):
        recipe.parse_assignment(f"pruner.damp={value}")


# Recipe files


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("pruner: [wanda\n", r"cannot read own\.yaml"),
        ("pruner: wanda\n\tsparsity: 0.5\n", r"cannot read own\.yaml"),
        ("- pruner\n- wanda\n", r"own\.yaml must hold a YAML mapping, got list"),
        ("", r"own\.yaml must hold a YAML mapping, got NoneType"),
        ("sparsity: 0.5\n", r"needs a pruner"),
        ("pruner: wanda\n3: 4\n", r"recipe key"),
        ("pruner: wanda\nname: [x]\nseed: one\n", r"seed must be a whole number from 0, got 'one'"),
        ("pruner: wanda\npattern: 24\n", r"'pattern' must be str, got 24"),
    ],
)
def test_a_recipe_file_that_makes_no_sense_is_refused(refused, work, written, said):
    (work / "own.yaml").write_text(written)
    refused(said, recipe="own.yaml")


def test_a_recipe_file_that_is_not_text_is_refused(refused, work):
    (work / "own.yaml").write_bytes(b"\xff\xfe\x00\x01")
    refused(r"cannot read own\.yaml", recipe="own.yaml")


def test_a_recipe_file_runs_no_code(refused, work):
    call = (
        yaml.dump({"pruner": "wanda"}) + "description: !!python/object/apply:os.system ['touch executed']\n"
    )
    (work / "own.yaml").write_text(call)
    refused(r"cannot read own\.yaml.*python/object", recipe="own.yaml")
    assert not (work / "executed").exists()


# Checkpoints


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


def rewrite(folder, **changed):
    tensors = {**load_file(folder / ONE_FILE), **changed}
    save_file(
        {n: t for n, t in tensors.items() if t is not None}, folder / ONE_FILE, metadata={"format": "pt"}
    )


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


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "sparsity_config"])
def test_a_quantised_checkpoint_is_refused(refused, llama_copy, key):
    values = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(json.dumps({**values, key: {"quant_method": "gptq", "bits": 4}}))
    refused(rf"quantised or compressed \({key}: gptq\).*original checkpoint", llama_copy)


def test_weights_of_an_integer_type_are_refused(refused, llama_copy):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(llama_copy, **{name: torch.ones(96, 64, dtype=torch.int8)})
    refused(rf"{re.escape(name)} is stored in an integer or 8-bit type", llama_copy)


def test_a_quantised_model_in_memory_is_refused(refused, tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    refused(r"model in memory is quantised", model)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", r"config\.json"),
        ("[]", r"config\.json must hold a JSON object, got list"),
        ("{}", r"config"),
        ('{"model_type": "llamma"}', r"'llamma'"),
        ('{"model_type": "bert", "vocab_size": 2048}', r"weights|architecture|blocks|config"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(refused, llama_copy, written, said):
    (llama_copy / "config.json").write_text(written)
    refused(said, llama_copy)


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 128}, {"intermediate_size": 97}, {"vocab_size": 4096}, {"num_hidden_layers": 3}],
)
def test_a_config_of_another_model_is_refused(refused, llama_copy, change):
    values = json.loads((llama_copy / "config.json").read_text())
    (llama_copy / "config.json").write_text(json.dumps({**values, **change}))
    refused(r"do not match|the checkpoint lacks", llama_copy)


def test_a_checkpoint_that_lacks_a_weight_is_refused(refused, llama_copy):
    rewrite(llama_copy, **{"model.layers.1.mlp.up_proj.weight": None})
    refused(r"lacks 1 weights.*'model\.layers\.1\.mlp\.up_proj\.weight'.*incomplete", llama_copy)


# Output folder


@pytest.fixture
def occupied(work):
    """A folder with what is not ours."""
    folder = work / "out"
    (folder / "below").mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    (folder / "below" / "more.txt").write_text("more")
    return folder


@pytest.fixture
def old(work):
    """The output of an earlier run."""
    return old_output(work / "out")


def test_an_output_folder_that_is_not_empty_is_refused(refused, old, monkeypatch):
    monkeypatch.setattr(run, "prune_blocks", lambda *args: pytest.fail("work began"))
    refused(r"output folder out is not empty.*--output.*--overwrite")


@pytest.mark.parametrize(
    "flags",
    [{}, {"overwrite": True}, {"restart": True}, {"resume": True}, {"overwrite": True, "resume": True}],
)
def test_a_folder_with_anything_else_is_refused_whatever_the_flags(refused, occupied, monkeypatch, flags):
    monkeypatch.setattr(run, "prune_blocks", lambda *args: pytest.fail("work began"))
    refused(
        r"output folder out holds 'below' and 1 more, which llmprune has not written.*choose another --output",
        **flags,
    )
    refused(r"output folder out holds 'below' and 1 more", dry_run=True, **flags)


@pytest.mark.parametrize(
    "made",
    ["dense model", "record of something else", "more beside it", "a folder beside it", "an unlisted file"],
)
def test_what_only_resembles_an_output_is_refused(refused, tiny_llama, old, made):
    if made == "dense model":
        shutil.rmtree(old)
        shutil.copytree(tiny_llama, old)
    elif made == "record of something else":
        (old / "llmprune.json").write_text('{"theme": "dark"}')
    elif made == "more beside it":
        (old / "notes.md").write_text("mine")
    elif made == "a folder beside it":
        (old / "tokenizer_data").mkdir()
    else:
        (old / "tokenizer.model").write_text("not listed in the record")
    refused(r"output folder out holds '.*which llmprune has not written", overwrite=True)


def test_a_link_to_a_folder_is_looked_through(
    refused, tiny_llama, calibration_tokens, occupied, work, tmp_path
):
    (work / "link").symlink_to(occupied, target_is_directory=True)
    refused(r"output folder link holds 'below'", output="link", overwrite=True)
    home = tmp_path / "elsewhere"
    (work / "other").symlink_to(old_output(home), target_is_directory=True)
    llmprune.prune(
        tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="other", overwrite=True
    )
    assert (work / "other").is_symlink() and (home / "model.safetensors.index.json").is_file()


def never(tmp_path, work, source):
    """Folders that no output may take, and what the refusal names."""
    (tmp_path / "link").symlink_to(source.parent, target_is_directory=True)
    return {
        "the model": (source, "holds the model"),
        "above the model": (source.parent, "holds the model"),
        "above it, through a link": (tmp_path / "link", "holds the model"),
        "in the model": (source / "pruned", "lies in the folder of the model"),
        "root": ("/", "is the root"),
        "home": (Path.home(), "(holds a home folder|is a folder of the system)"),
        "current": (".", "holds the working directory"),
        "above the current": (tmp_path / "work", "holds the working directory"),
        "system": ("/usr", "is a folder of the system"),
        "below a system folder": ("/etc/llmprune-output", "is a folder of the system"),
        "home folders": ("/home", "(is a folder of the system|holds)"),
        "mount point": ("/dev/shm", "(is a folder of the system|mount point)"),
    }


def test_some_folders_are_never_an_output(tiny_llama, calibration_tokens, work, tmp_path, monkeypatch):
    source = Path(shutil.copytree(tiny_llama, tmp_path / "models" / "source"))
    (work / "below").mkdir()
    monkeypatch.chdir(work / "below")
    before = contents(tmp_path)
    for what, (folder, said) in never(tmp_path, work, source).items():
        for flags in ({}, {"overwrite": True}, {"resume": True}, {"restart": True}):
            with pytest.raises(
                ValueError, match=rf"output folder .*{said}.*never replaced; choose another"
            ) as raised:
                llmprune.prune(source, calibration=calibration_tokens, output=folder, **flags)
            assert one_line(raised.value), what
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("what", "name", "options"),
    [
        ("the recipe", "recipe.yaml", {"recipe": "FILE"}),
        ("the calibration file", "text.txt", {"calibration": "FILE"}),
        ("the calibration file", "tokens.safetensors", {"calibration": "builtin=0.5+FILE=0.5"}),
        ("the calibration file", "calibrated.yaml", {"recipe": "elsewhere.yaml"}),
        ("the perplexity text", "text.txt", {"perplexity": ["FILE"]}),
        ("the suite", "suite.yaml", {"suite": "FILE"}),
        ("the tasks", "tasks", {"include_tasks": "FILE", "perplexity": ["builtin"]}),
        ("the task data", "tasks", {"task_data": "FILE", "perplexity": ["builtin"]}),
    ],
)
@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_that_holds_an_input_is_never_replaced(tiny_llama, work, what, name, options, linked):
    folder = old_output(work / "out")
    texts = {"recipe.yaml": "pruner: magnitude", "suite.yaml": "perplexity: [builtin]", "calibrated.yaml": ""}
    place = work / name if linked else folder / name
    if name == "tasks":
        place.mkdir()
    elif name == "tokens.safetensors":
        save_file({"tokens": torch.zeros(4, 16, dtype=torch.int64)}, place)
    else:
        place.write_text(texts.get(name, "words and words " * 500))
    if linked:  # the input lies elsewhere, and the link to it would be lost
        (folder / name).symlink_to(place)
    if name == "calibrated.yaml":
        (work / "elsewhere.yaml").write_text(
            f"pruner: magnitude\ncalibration: {{source: '{folder / 'text.txt'}'}}\n"
        )
        (folder / "text.txt").write_text("words")
    said = json.dumps(options).replace("FILE", str(folder / name))
    before = contents(work)
    with pytest.raises(ValueError, match=rf"output folder .* holds {what}, which is never replaced"):
        llmprune.run_model(tiny_llama, output=folder, overwrite=True, limit=2, **json.loads(said))
    assert contents(work) == before


def test_an_empty_output_folder_is_used(tiny_llama, calibration_tokens, work):
    (work / "out").mkdir()
    llmprune.prune(tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out")
    assert (work / "out" / "llmprune.json").is_file()


def test_overwrite_replaces_the_whole_folder(tiny_llama, calibration_tokens, old, work):
    (old / "README.md.tmp").write_text("of a run that was killed")
    (old / "config.json").write_text("{}")
    llmprune.prune(
        tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out", overwrite=True
    )
    record = json.loads((old / "llmprune.json").read_text())
    pages = ("README.md", "llmprune.json", "report.html")
    assert record["totals"]["files"] == {
        p.name: p.stat().st_size for p in sorted(old.iterdir()) if p.name not in pages
    }
    assert [p.name for p in work.iterdir()] == ["out"]


def test_an_output_that_is_a_file_is_refused(refused, work):
    (work / "out").write_text("a file")
    refused(r"output out is a file; name a folder")
    refused(r"output out is a file; name a folder", overwrite=True)


def test_an_output_below_a_file_is_refused_before_work(refused, work, monkeypatch):
    monkeypatch.setattr(run, "prune_blocks", lambda *args: pytest.fail("work began"))
    (work / "file").write_text("a file")
    refused(r"file.*(not a folder|is a file)", output="file/out")


@pytest.mark.parametrize("above", [False, True])
def test_the_source_is_never_overwritten(refused, tiny_llama, tmp_path, above):
    source = Path(shutil.copytree(tiny_llama, tmp_path / "models" / "source"))
    before = contents(source)
    refused(r"holds the model", source, output=source.parent if above else source, overwrite=True)
    assert contents(source) == before


def test_an_output_that_is_a_link_is_written_through(tiny_llama, calibration_tokens, work, tmp_path):
    (tmp_path / "disk").mkdir()
    (work / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    llmprune.prune(tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out")
    assert (work / "out").is_symlink()
    assert (tmp_path / "disk" / "llmprune.json").is_file()


@pytest.mark.parametrize(
    "failure", [RuntimeError("broken"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("where", ["second matrix", "first masks"])
def test_a_run_that_fails_before_a_block_is_finished_leaves_nothing(
    tiny_llama, calibration_tokens, old, work, monkeypatch, where, failure
):
    from llmprune.checkpoint.masks import MaskFile

    place = {"second matrix": (run, "prune_matrix"), "first masks": (MaskFile, "write")}[where]
    real, calls = getattr(*place), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1 or where == "first masks":
            raise failure
        return real(*args, **kwargs)

    monkeypatch.setattr(*place, failing)
    before = contents(work)
    with pytest.raises(type(failure)):
        llmprune.prune(
            tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out", overwrite=True
        )
    assert contents(work) == before


def test_the_old_output_stands_until_the_new_one_is_whole(tiny_llama, calibration_tokens, old, monkeypatch):
    real, seen = writer.CheckpointWriter.finish, []

    def finish(self):
        whole = (self.folder / INDEX).is_file() and (self.folder / "llmprune.json").is_file()
        seen.append(whole and (old / "README.md").read_text() == "years of work")
        real(self)

    monkeypatch.setattr(writer.CheckpointWriter, "finish", finish)
    llmprune.prune(
        tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out", overwrite=True
    )
    assert seen == [True]


def test_the_old_output_stands_when_the_new_one_cannot_be_moved_into_place(
    tiny_llama, calibration_tokens, old, monkeypatch
):
    real = os.replace

    def replace(source, target):
        if Path(target).name == "out" and (Path(source) / INDEX).is_file():
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(writer.os, "replace", replace)
    before = contents(old)
    with pytest.raises(RuntimeError, match=r"cannot be moved to .*Input/output.*it lies whole in"):
        llmprune.prune(
            tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out", overwrite=True
        )
    assert contents(old) == before
    assert llmprune.inspect(old.with_name(".out.partial"))["record_agrees"] is True, (
        "the finished work is not thrown away"
    )


def test_what_is_put_into_the_output_during_the_run_is_not_replaced(
    tiny_llama, calibration_tokens, old, monkeypatch
):
    real = writer.CheckpointWriter.finish

    def finish(self):
        (old / "thesis.txt").write_text("written meanwhile")
        real(self)

    monkeypatch.setattr(writer.CheckpointWriter, "finish", finish)
    with pytest.raises(RuntimeError, match=r"cannot be moved to .*holds 'thesis.txt'.*it lies whole in"):
        llmprune.prune(
            tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out", overwrite=True
        )
    assert (old / "thesis.txt").read_text() == "written meanwhile" and (
        old / "README.md"
    ).read_text() == "years of work"
    assert llmprune.inspect(old.with_name(".out.partial"))["record_agrees"] is True


@pytest.mark.parametrize("flags", [{}, {"restart": True}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
def test_folders_beside_the_output_are_not_thrown_away_either(refused, work, name, flags):
    (work / name).mkdir()
    (work / name / "thesis.txt").write_text("years of work")
    refused(rf"{name} holds 'thesis.txt', which llmprune has not written", **flags)
    shutil.rmtree(work / name)
    (work / "notes").mkdir()
    (work / name).symlink_to(work / "notes", target_is_directory=True)
    refused(rf"{name} is no folder of llmprune's", **flags)


def test_a_file_in_place_of_the_lock_is_not_emptied(refused, work):
    (work / ".out.lock").write_text("years of work")
    refused(r"\.out\.lock is no lock of llmprune.*move it away")


def test_a_partial_folder_of_a_killed_run_is_replaced(tiny_llama, calibration_tokens, work):
    (work / ".out.partial").mkdir()
    (work / ".out.partial" / "journal.jsonl").write_text('{"identity": {"model": "x"}, "files": []}\n')
    (work / ".out.partial" / "model-00001-of-00003.safetensors.tmp").write_bytes(b"half")
    llmprune.prune(tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out")
    assert [p.name for p in work.iterdir()] == ["out"]


def test_a_full_disk_is_noticed_before_work(refused, monkeypatch):
    monkeypatch.setattr(run, "prune_blocks", lambda *args: pytest.fail("work began"))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    )
    refused(r"the output needs \d+\.\d MB and .* has 0\.0 MB free; make room or choose another --output")


# Calibration


def test_a_folder_without_tokenizer_prunes_with_tokens_only(
    make_llama, refused, calibration_tokens, tmp_path
):
    folder = make_llama(tokenizer=False)
    refused(r"no tokenizer.*tokenizer files.*TOKENS\.safetensors", folder, calibration="builtin")
    refused(r"no tokenizer.*cannot be scored.*prune instead of run", folder, call=llmprune.run_model)
    with pytest.raises(ValueError, match=r"no tokenizer"):
        llmprune.evaluate(folder)
    llmprune.prune(folder, calibration=calibration_tokens, recipe="magnitude", output=tmp_path / "out")


def in_json(name, **changes):
    """Damage: values of a JSON file exchanged; None leaves one out."""

    def damage(folder):
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return damage


def in_file(name, written):
    return lambda folder: (folder / name).write_bytes(written)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            in_file("tokenizer.json", b"{"),
            r"tokenizer\.json is damaged \(JSONDecodeError: .*\); download it again or restore the original$",
        ),
        (in_file("tokenizer.json", b""), r"tokenizer\.json is damaged \(JSONDecodeError: "),
        (in_file("tokenizer.json", b"\x80\x04\x00"), r"tokenizer\.json is damaged \(UnicodeDecodeError: "),
        (
            in_file("tokenizer.json", b"[]"),
            r"tokenizer\.json is damaged \(it holds \[\] and no JSON object\)",
        ),
        (
            in_file("tokenizer.json", b"{}"),
            r"tokenizer\.json is damaged \('added_tokens' is missing, not a list\)",
        ),
        (in_file("tokenizer.json", b"[" * 100_000), r"tokenizer\.json is damaged \(RecursionError: "),
        (
            in_json("tokenizer.json", added_tokens=5),
            r"tokenizer\.json is damaged \('added_tokens' is 5, not a list\)",
        ),
        (
            in_json("tokenizer.json", added_tokens=[{"id": 0}]),
            r"tokenizer\.json is damaged \(Exception: missing field `content`",
        ),
        (in_json("tokenizer.json", model=None), r"tokenizer\.json is damaged \(Exception: Model missing"),
        (
            in_json("tokenizer.json", model={"type": "BPE", "vocab": []}),
            r"tokenizer\.json is damaged \(Exception: .*(sequence|vocab)",
        ),
        (
            in_json("tokenizer.json", pre_tokenizer={"type": "Own"}),
            r"tokenizer\.json is damaged \(Exception: data did not match",
        ),
        (in_file("tokenizer_config.json", b"{"), r"tokenizer_config\.json is damaged \(JSONDecodeError: "),
        (
            in_file("tokenizer_config.json", b"[]"),
            r"tokenizer_config\.json is damaged \(it holds \[\] and no JSON object\)",
        ),
        (
            in_json("tokenizer_config.json", bos_token=5),
            r"tokenizer_config\.json is damaged or of another model \(TypeError: Special token",
        ),
        (
            in_json("tokenizer_config.json", added_tokens_decoder=5),
            r"tokenizer_config\.json is damaged or of another model \(AttributeError: ",
        ),
        (
            in_file("special_tokens_map.json", b"{"),
            r"special_tokens_map\.json is damaged \(JSONDecodeError: ",
        ),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            r"tokenizer_config\.json names no vocabulary \(.*add tokenizer\.json",
        ),
    ],
)
def test_a_damaged_tokenizer_is_refused(refused, llama_copy, damage, said):
    damage(llama_copy)
    refused(r"^cannot read the tokenizer of damaged: " + said, llama_copy, calibration="builtin")


def test_a_tokenizer_whose_library_panics_is_refused(refused, llama_copy, monkeypatch):
    class PanicException(BaseException):
        """What the library below raises."""

    def panic(*args, **options):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    refused(
        r"^cannot read the tokenizer of damaged: .*\(PanicException: index out of bounds\)",
        llama_copy,
        calibration="builtin",
    )
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained",
        lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        llmprune.prune(llama_copy, calibration="builtin", output="out")


def test_a_vocabulary_without_words_is_refused(refused, llama_copy):
    in_json("tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []})(llama_copy)
    refused(
        r"^the tokenizer makes no tokens of calibration source 'builtin'", llama_copy, calibration="builtin"
    )
    refused(
        r"^the tokenizer makes no tokens of builtin",
        llama_copy,
        call=llmprune.run_model,
        perplexity=["builtin"],
    )


def test_tokens_beyond_the_model_s_vocabulary_are_refused(refused, make_llama):
    folder = make_llama(vocab_size=300)
    said = r"range from \d+ to \d+, the model knows 0 to 299; use its own tokenizer"
    refused("^calibration tokens of builtin " + said, folder, calibration="builtin")
    refused("^tokens of builtin " + said, folder, call=llmprune.run_model, perplexity=["builtin"])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"tokens": torch.ones(4, 8, dtype=torch.int32)}, r"must be int64 \[N, T\].*got int32 \[4, 8\]"),
        ({"tokens": torch.ones(4, 8)}, r"must be int64 \[N, T\].*got float32 \[4, 8\]"),
        ({"tokens": torch.ones(8, dtype=torch.int64)}, r"must be int64 \[N, T\].*got int64 \[8\]"),
        ({"tokens": torch.ones(0, 8, dtype=torch.int64)}, r"must be int64 \[N, T\].*got int64 \[0, 8\]"),
        (
            {"tokens": torch.ones(4, 1, dtype=torch.int64)},
            r"must be int64 \[N, T\] with T >= 2, got int64 \[4, 1\]",
        ),
        ({"input_ids": torch.ones(4, 8, dtype=torch.int64)}, r"no tensor 'tokens' \(it has: input_ids\)"),
        ({"tokens": torch.full((4, 8), 2048)}, r"range from 2048 to 2048, the model knows 0 to 2047"),
        ({"tokens": torch.full((4, 8), -1)}, r"range from -1 to -1, the model knows 0 to 2047"),
        (
            {"tokens": torch.ones(4, 65, dtype=torch.int64)},
            r"sequence length 65, over the model's limit of 64",
        ),
    ],
)
def test_a_wrong_token_file_is_refused(refused, work, tensors, said):
    save_file(tensors, work / "tokens.safetensors")
    refused(said, calibration="tokens.safetensors")


def test_a_damaged_or_missing_token_file_is_refused(refused, work):
    refused(r"no such token file: tokens\.safetensors", calibration="tokens.safetensors")
    (work / "tokens.safetensors").write_bytes(b"\xff" * 40)
    refused(r"tokens\.safetensors is damaged", calibration="tokens.safetensors")


@pytest.mark.parametrize(("option", "asked"), [("samples", 4), ("seqlen", 16)])
def test_ready_made_tokens_are_not_cut(refused, option, asked):
    refused(rf"exactly as it is.*got {option} {asked}; leave the option out", **{option: asked})


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (torch.ones(4, 8), r"got float32 \[4, 8\] from tokens in memory"),
        (torch.full((4, 8), 9999), r"range from 9999 to 9999"),
        ([], r"holds no text"),
        (["", "  "], r"holds no text"),
        (["too short"], r"holds \d+ tokens, 0 rows of 64"),
        ([["a", "list"]], r"must be strings, got list"),
        ([b"bytes"], r"must be strings, got bytes"),
        ([1, 2], r"must be strings, got int"),
    ],
)
def test_wrong_calibration_in_memory_is_refused(refused, tokens, said):
    refused(said, calibration=tokens)


def test_calibration_of_another_type_is_refused(refused):
    refused(r"calibration.*int", calibration=3)


SENTENCE = "The calibration text of a file has to be long enough for every row that is asked for. "


@pytest.mark.parametrize(
    ("name", "written", "said"),
    [
        (
            "a.txt",
            SENTENCE,
            r"'a\.txt' holds \d+ tokens, 0 rows of 32, and 8 are wanted; give more text or shorter rows \(--seqlen\)",
        ),
        (
            "a.txt",
            SENTENCE * 4,
            r"'a\.txt' holds \d+ tokens, [1-7] rows of 32, and 8 are wanted; .*--samples [1-7]\)",
        ),
        ("a.txt", "", r"'a\.txt' holds no text; name another with --calibration"),
        ("a.txt", "\n \n", r"'a\.txt' holds no text"),
        ("a.txt", b"\xff\xfe\xfa", r"cannot read a\.txt"),
        ("a.jsonl", "", r"'a\.jsonl' holds no text"),
        (
            "a.jsonl",
            '{"body": "x"}\n',
            r"a\.jsonl, line 1 has no text column 'text' \(it has: body\); name it as SOURCE:column",
        ),
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y"\n', r"a\.jsonl, line 3 is not JSON"),
        (
            "a.jsonl",
            '{"text": 3}\n',
            r"line 1 has an int in column 'text' instead of text: 3; mend or remove the row, or name",
        ),
        (
            "a.jsonl",
            '{"text": {"en": "x"}}\n',
            r"line 1 has a dict in column 'text' instead of text: \{'en': 'x'\}",
        ),
        ("a.jsonl", '{"text": ["x"]}\n', r"line 1, message 1 is no \{role, content\}"),
        ("a.jsonl", '{"text": true}\n', r"line 1 has a bool in column 'text' instead of text: True"),
        ("a.jsonl", '{"text": null}\n', r"line 1 is empty \(null\) in column 'text'"),
        ("a.jsonl", '["text"]\n', r"line 1 has no text column 'text' \(it has: list\)"),
        ("a.jsonl", "[" * 100_000, r"line 1 is not JSON"),
        ("a.parquet", b"PAR1 this is none", r"cannot read a\.parquet"),
        ("a.txt.gz", b"not gzip", r"cannot read a\.txt\.gz"),
        ("a.txt.gz", gzip.compress(SENTENCE.encode() * 500)[:-30], r"cannot read a\.txt\.gz"),
    ],
)
def test_a_calibration_file_without_enough_text_is_refused(refused, work, name, written, said):
    (work / name).write_bytes(written if isinstance(written, bytes) else written.encode())
    refused(said, calibration=name, samples=8, seqlen=32)


def test_a_parquet_file_without_the_column_is_refused(refused, work):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"body": [SENTENCE] * 200, "count": list(range(200)), "holes": [None] * 200})
    pyarrow.parquet.write_table(table, work / "a.parquet")
    refused(
        r"a\.parquet has no text column 'text' \(it has: body, count, holes\); name it as SOURCE:column",
        calibration="a.parquet",
    )
    refused(
        r"a\.parquet, row 1 has an int in column 'count' instead of text: 0", calibration="a.parquet:count"
    )
    refused(r"a\.parquet, row 1 is empty \(null\) in column 'holes'", calibration="a.parquet:holes")
    assert len(list(text.file_documents("a.parquet:body"))) == 200


@pytest.mark.parametrize(
    "name", ["none.txt", "none.jsonl", "none.parquet", "none.jsonl.gz", "none.jsonl:body"]
)
def test_a_missing_calibration_file_is_refused(refused, name):
    refused(rf"no such text file: {re.escape(name.removesuffix(':body'))}", calibration=name)


def test_a_path_is_a_calibration_source(tiny_llama, work):
    (work / "a.txt").write_text(SENTENCE * 100)
    options = {"samples": 4, "seqlen": 32, "recipe": "magnitude"}
    one = llmprune.prune(tiny_llama, calibration="a.txt", output="one", **options)
    two = llmprune.prune(tiny_llama, calibration=Path("a.txt"), output="two", **options)
    assert one.record["calibration"] == two.record["calibration"]


@pytest.mark.parametrize("source", ["c4", "owner/notes:text"])
def test_hub_text_without_network_is_refused_soon(refused, source, capfd):
    started = time.monotonic()
    refused(rf"cannot load '{source}' from the hub.*without network.*builtin.*\.txt", calibration=source)
    assert time.monotonic() - started < 10
    assert capfd.readouterr().err == ""


def test_a_task_without_network_is_refused_with_a_way_out(refused, work, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/questions' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    (work / "tasks").mkdir()
    task = {
        "task": "questions",
        "dataset_path": "owner/questions",
        "output_type": "multiple_choice",
        "test_split": "test",
    }
    (work / "tasks" / "questions.yaml").write_text(
        yaml.dump({**task, "doc_to_text": "a", "doc_to_choice": ["b", "c"], "doc_to_target": 0})
    )
    said = r"questions.*owner/questions.*without network.*(demo|local|builtin)"
    refused(said, call=llmprune.run_model, tasks=["questions"], include_tasks="tasks")


def test_a_download_that_fails_leaves_no_cached_tokens(refused, own_caches, work):
    (work / "a.txt").write_text(SENTENCE)
    refused(r"holds \d+ tokens", calibration="a.txt", samples=8, seqlen=32)
    assert list((own_caches / "cache").rglob("*.*")) == []


# The program


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("prune", "demoo"), r"'demoo'.*'demo'"),
        (("prune", "MODEL", "--recipe", "wandaa"), r"'wandaa'.*'wanda'"),
        (("prune", "MODEL", "--pruner", "wnda"), r"'wnda'.*'wanda'"),
        (("prune", "MODEL", "--sparsity", "1.5"), r"\[0, 1\).*1\.5"),
        (("prune", "MODEL", "--sparsity", "nan"), r"\[0, 1\).*nan"),
        (("prune", "MODEL", "--pattern", "2:4", "--sparsity", "0.7"), r"0\.7 contradicts pattern 2:4"),
        (("prune", "MODEL", "--set", "sparsity"), r"--set takes dotted\.key=value, got 'sparsity'"),
        (("prune", "MODEL", "--set", "pruner.damp=[1"), r"--set pruner\.damp.*not valid YAML"),
        (("prune", "MODEL", "--set", "spars=1"), r"recipe key 'spars'.*did you mean 'sparsity'"),
        (("prune", "MODEL", "--seqlen", "65"), r"65.*limit of 64.*--seqlen 64"),
        (("prune", "MODEL", "--samples", "0"), r"samples.*got 0"),
        (("prune", "MODEL", "--dtype", "float16", "--device", "cpu"), r"float16"),
        (("prune", "MODEL", "--device", "cuda:99"), r"'cuda:99' is not available"),
        (("prune", "MODEL", "--calibration", "none.txt"), r"no such text file: none\.txt"),
        (("prune", "MODEL", "--json", "--calibration", "none.txt"), r"no such text file: none\.txt"),
        (("prune", "MODEL", "--quiet", "--calibration", "none.txt"), r"no such text file: none\.txt"),
        (("run", "MODEL", "--limit", "0"), r"limit must be at least 1, got 0"),
        (("run", "MODEL", "--suite", "papr"), r"'papr'.*'paper'"),
        (("run", "MODEL", "--eval-seqlen", "65"), r"65.*limit of 64.*--eval-seqlen 64"),
        (("eval", "MODEL", "--limit", "-1"), r"limit must be at least 1, got -1"),
        (("eval", "demoo"), r"'demoo'.*'demo'"),
        (("inspect", "demoo"), r"'demoo'.*'demo'"),
        (("inspect", "./nowhere"), r"no such folder: \./nowhere"),
    ],
)
def test_the_program_says_it_in_one_line(typed, tiny_llama, work, args, said):
    out = assert_one_line(typed(*(tiny_llama if a == "MODEL" else a for a in args)), said)
    assert out == ""
    assert contents(work) == {}


@pytest.mark.parametrize(
    "error",
    [
        KeyError("q"),
        RuntimeError("line one\nline two"),
        MemoryError(),
        OSError(28, "No space left on device"),
    ],
)
def test_the_program_survives_failures_of_any_kind(typed, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "locate", fail)
    monkeypatch.setattr("llmprune.model.opening.locate", fail)
    assert_one_line(typed("prune", "demo"), r"llmprune: \S")


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_debug", False)
    monkeypatch.setattr(sys, "argv", ["llmprune", "--debug", "inspect", "demoo"])
    with pytest.raises(ValueError, match="demoo"):
        program.main()


def test_a_damaged_weight_ends_the_program_in_one_line(cli, llama_copy, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(llama_copy, **{name: torch.full((96, 64), math.nan)})
    done = cli(
        "prune",
        llama_copy,
        "--calibration",
        "builtin",
        "--samples",
        2,
        "--seqlen",
        32,
        "--quiet",
        "--output",
        "out",
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert name in done.stderr and "NaN" in done.stderr
    assert not list(tmp_path.glob("*out*"))


def test_no_network_ends_the_program_in_one_line_soon(cli, tiny_llama, tmp_path):
    started = time.monotonic()
    done = cli("prune", tiny_llama, "--calibration", "c4", "--output", "out")
    assert time.monotonic() - started < 20
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "cannot load 'c4'" in done.stderr and "builtin" in done.stderr
    assert not list(tmp_path.glob("*out*"))


def test_an_occupied_output_ends_the_program_in_one_line(cli, tiny_llama, tmp_path):
    before = contents(old_output(tmp_path / "out"))
    done = cli("run", tiny_llama, "--output", "out")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "llmprune: output folder out is not empty; choose another with --output or replace it with --overwrite"
    ]
    assert contents(tmp_path / "out") == before


def spoilt(folder, where):
    """The tiny model with a number in it that makes NaN or Inf come up."""
    if where == "epsilon":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": math.nan}))
    else:
        names = [f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("up", "gate")]
        rewrite(folder, **{name: torch.full((96, 64), 1e30) for name in names})


@pytest.mark.parametrize("recipe", ["magnitude", "wanda", "sparsegpt", "dsnot", "best"])
def test_the_first_matrix_that_reads_numbers_that_are_not_finite_is_named(refused, llama_copy, recipe):
    spoilt(llama_copy, "epsilon")
    refused(
        r"inputs of model\.layers\.0\.self_attn\.q_proj hold the first NaN or Inf.*epsilon",
        llama_copy,
        recipe=recipe,
    )


@pytest.mark.parametrize("recipe", ["magnitude", "wanda", "sparsegpt", "dsnot"])
def test_the_first_number_that_is_not_finite_is_named(llama_copy, calibration_tokens, work, recipe):
    spoilt(llama_copy, "weights")
    with pytest.raises(
        ValueError, match=r"inputs of model\.layers\.1\.mlp\.down_proj hold the first NaN or Inf"
    ) as raised:
        llmprune.prune(llama_copy, calibration=calibration_tokens, output="out", recipe=recipe)
    assert one_line(raised.value) and raised.value.kept == "1 of 2 blocks are finished and kept"


def test_scoring_names_the_block_that_is_not_finite_too(llama_copy):
    spoilt(llama_copy, "weights")
    with pytest.raises(
        ValueError,
        match=r"block 2 of 2 \(model\.layers\.1\) put out the first NaN or Inf, in float32; most likely",
    ):
        llmprune.evaluate(llama_copy, perplexity=["builtin"], limit=2)


def test_a_block_more_than_the_config_asks_for_is_mentioned(typed, make_llama, tmp_path):
    folder = Path(shutil.copytree(make_llama(layers=4), tmp_path / "more"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    code, out, _ = typed(
        "prune", folder, "--samples", 2, "--seqlen", 16, "--recipe", "wanda", "--output", "out"
    )
    assert code == 0
    assert re.search(
        r"asks for 3 blocks and the checkpoint holds 1 more; 9 tensors .* pass unchanged, the first is 'model\.layers\.3\.",
        out,
    )
    record = json.loads(Path("out/llmprune.json").read_text())
    assert len(record["model"]["unused_tensors"]) == 9
    before, after = load_file(folder / ONE_FILE), load_file("out/model-00004-of-00004.safetensors")
    assert torch.equal(
        before["model.layers.3.mlp.up_proj.weight"], after["model.layers.3.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("pattern", ["２:４", "2:４", "²:4", " 2:4", "2:4\n", "2 :4"])
def test_a_pattern_is_written_in_plain_digits(refused, pattern):
    refused(r"pattern must be 'unstructured' or 'N:M'", pattern=pattern, sparsity=None)


def test_minus_zero_is_zero():
    assert str(load_recipe("wanda", {"sparsity": -0.0}).sparsity) == "0.0"


@pytest.mark.parametrize("value", ["9" * 6000, "0." + "3" * 6000 + "e9999", "{a: 1, a: 2}", "[" * 5000])
def test_a_value_no_number_can_hold_is_refused(typed, value):
    code, _, err = typed("prune", "demo", "--set", f"sparsity={value}")
    assert code == 1 and len(err.splitlines()) == 1 and len(err) < 600, err
    assert "sparsity" in err


@pytest.mark.parametrize(
    "text", ["pruner: wanda\npruner: magnitude\n", "pruner: {name: alps, damp: 0.1, damp: 0.2}\n"]
)
def test_a_key_that_stands_twice_is_refused(refused, work, text):
    (work / "twice.yaml").write_text(text)
    refused(
        r"cannot read twice\.yaml: key '(pruner|damp)' stands twice \(line 1\); keep one", recipe="twice.yaml"
    )


@pytest.mark.parametrize(
    ("schema", "said"),
    [(99, r"schema 99.*reads schema 1; update"), (None, "not a record"), (True, "not a record")],
)
def test_a_record_of_another_schema_is_not_believed(
    tiny_llama, calibration_tokens, work, schema, said, monkeypatch
):
    result = llmprune.prune(tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out")
    (work / "out" / "llmprune.json").write_text(json.dumps({**result.record, "schema": schema}))
    before = contents(work)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    for call in (
        lambda: llmprune.inspect("out"),
        lambda: llmprune.push("out", "me/model"),
        lambda: llmprune.prune(
            tiny_llama, calibration=calibration_tokens, recipe="magnitude", output="out", resume=True
        ),
    ):
        with pytest.raises(ValueError, match=said) as raised:
            call()
        one_line(raised.value)
    assert contents(work) == before
