"""What Python callers may give: paths, mappings, numbers of numpy and torch; every other type is refused in
one line.
"""

import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from outputs import Listening

import llmprune
from llmprune import api
from llmprune.api import arguments
from llmprune.recipe import loading as recipes

FUNCTIONS = (
    "accelerate",
    "prune",
    "run_model",
    "recover",
    "evaluate",
    "inspect",
    "convert",
    "generate",
    "bench",
    "published",
    "push",
    "load",
    "mask_diff",
    "mask_apply",
    "mask_check",
    "sweep",
)
SEVERAL = ("recipe", "sparsity", "pattern", "pruner")  # of which a sweep takes several in a list
RECIPE = {"pruner": {"name": "wanda"}, "sparsity": 0.25, "calibration": {"samples": 4, "sequence_length": 32}}


def dry(model, **options):
    return llmprune.prune(
        model, dry_run=True, **{"calibration": "builtin", "samples": 4, "seqlen": 32, **options}
    )


# What is taken


def test_a_recipe_may_be_a_path_or_a_mapping(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(yaml.safe_dump(RECIPE))
    by_path, by_name = (dry(tiny_llama, recipe=file).recipe for file in (Path("own.yaml"), "own.yaml"))
    assert by_path == by_name and by_path.name == "own" and by_path.sparsity == 0.25
    fields = dry(tiny_llama, recipe=RECIPE)
    assert fields.recipe.name == "custom" and fields.output.name == "tiny-llama-custom-0.25"
    assert dry(tiny_llama, recipe={**RECIPE, "name": "own"}).recipe == by_path
    assert dry(tiny_llama, recipe=by_path).recipe == by_path
    assert dry(tiny_llama, recipe=by_path.as_dict(), sparsity=0.5).recipe.sparsity == 0.5


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "a recipe needs a pruner"),
        ({"pruner": "wandaa"}, "did you mean 'wanda'"),
        ({"pruner": "wanda", "sparsty": 0.5}, "recipe key 'sparsty': did you mean 'sparsity'"),
        ({"pruner": "wanda", "sparsity": 1.5}, r"sparsity must be in \[0, 1\)"),
        (
            {"pruner": "wanda", "name": "../up"},
            "name must be text that can stand in the name of a folder, got '../up'",
        ),
        ({"pruner": "wanda", "name": 5}, "name must be text .* got 5"),
        ({5: "wanda"}, "recipe must be a name, a YAML file or a mapping of recipe fields"),
        (5, "recipe must be a name, a YAML file or a mapping of recipe fields, got 5"),
        ("", "recipe must be a name"),
        (["wanda"], r"recipe must be a name.* got \['wanda'\]"),
    ],
)
def test_recipe_fields_are_checked_as_those_of_a_file(tiny_llama, fields, said):
    with pytest.raises(ValueError, match=said):
        dry(tiny_llama, recipe=fields)


def test_numbers_of_numpy_and_torch_behave_as_plain_ones(tiny_llama, tmp_path):
    plain = {
        "sparsity": 0.6,
        "samples": 4,
        "seqlen": 32,
        "seed": 3,
        "settings": {"pruner.damp": 0.05},
        "limit": 2,
        "eval_seqlen": 16,
    }
    theirs = {
        "sparsity": np.float64(0.6),
        "samples": np.int64(4),
        "seqlen": torch.tensor(32),
        "seed": np.uint8(3),
        "settings": {"pruner.damp": torch.tensor(0.05)},
        "limit": np.int32(2),
        "eval_seqlen": np.int64(16),
    }
    made = [
        llmprune.run_model(
            tiny_llama, recipe="sparsegpt", perplexity="builtin", output=tmp_path / str(number), **options
        ).record
        for number, options in enumerate((plain, theirs))
    ]
    assert made[0]["recipe"] == made[1]["recipe"] and made[0]["calibration"] == made[1]["calibration"]
    assert json.loads((tmp_path / "1" / "llmprune.json").read_text())["recipe"]["pruner"]["damp"] == 0.05
    masks = [(tmp_path / name / "masks.safetensors").read_bytes() for name in "01"]
    assert masks[0] == masks[1]

    def leaves(value):
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return [value] if inner is None else [leaf for part in inner for leaf in leaves(part)]

    assert {type(leaf) for leaf in leaves(made[1])} <= {str, int, float, bool, type(None)}


@pytest.mark.parametrize(
    "value",
    [
        np.float32(0.7),
        np.float64(0.7),
        torch.tensor(0.7),
        torch.tensor(0.7, dtype=torch.float64),
        np.array(0.7),
    ],
)
def test_single_precision_keeps_the_number_that_was_typed(value):
    assert arguments.plain(value) == 0.7 and type(arguments.plain(value)) is float


def test_a_name_alone_is_one_name(tiny_llama, tmp_path):
    (tmp_path / "own.txt").write_text("The text of a file, long enough for one window of some tokens. " * 30)

    def scored(**names):
        scores = llmprune.evaluate(tiny_llama, limit=1, eval_seqlen=32, **names)
        return {*scores["perplexity"], *scores["tasks"]}

    assert scored(perplexity="builtin") == {"builtin"}
    assert scored(perplexity=tmp_path / "own.txt") == {"own.txt"}
    assert scored(perplexity=["builtin", tmp_path / "own.txt"]) == {"builtin", "own.txt"}
    assert scored(tasks="demo_continuation") == {"demo_continuation"}
    tasks = arguments.CHECKS["tasks"]
    assert tasks("tasks", "boolq, rte") == ("boolq", "rte") == tasks("tasks", ["boolq", "rte"])
    with pytest.raises(ValueError, match="unknown task 'boolqq'"):
        llmprune.evaluate(tiny_llama, tasks="boolqq")


def test_devices_and_dtypes_of_torch_are_taken(tiny_llama):
    made = dry(tiny_llama, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert made.plan.memory == dry(tiny_llama, device="cpu", dtype="bfloat16").plan.memory
    with pytest.raises(ValueError, match=r"dtype must be auto, .* got 'float64'"):
        dry(tiny_llama, dtype=torch.float64)


def test_a_model_in_memory_is_scored_with_its_tokenizer(tiny_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        AutoTokenizer.from_pretrained(tiny_llama),
    )
    options = {"perplexity": "builtin", "limit": 1}
    scores = llmprune.evaluate(tiny_llama, **options)["perplexity"]
    assert llmprune.evaluate(model, tokenizer=tokenizer, **options)["perplexity"] == scores


def test_methods_may_be_mappings(tiny_llama):
    chosen = dry(tiny_llama, pruner={"name": "sparsegpt", "damp": np.float64(0.1)}, update=["obs"]).recipe
    assert chosen.pruner.options["damp"] == 0.1 and chosen.methods == ["sparsegpt", "dsnot", "obs"]


# What is refused


WRONG = {
    "model": [None, 5, b"demo", "", object(), torch.nn.Linear(2, 2), ["demo"]],
    "path": [None, 5, b"demo", "", ["demo"]],
    "paths": [None, 5, b"out", "", [], [5], {"out": 1}],
    "folder": [None, 5, b"out", ""],
    "output": [5, b"out", "", ["out"]],
    "recipe": [5, b"dsnot", "", ["dsnot"]],
    "settings": [["seed=1"], "seed=1", {1: 2}, 5],
    "sparsity": ["0.5", [0.5], True, math.nan, np.array([0.5, 0.6])],
    "samples": [True, "8", 2.5, [8], np.float64(8.5)],
    "chat_template": [5, True, ["on"], "yes"],
    "seqlen": [True, "32", 2.5],
    "seed": [True, "1", 1.5, -1],
    "time_limit": [True, "soon", [1], math.nan],
    "limit": ["x", 2.5, True, [1]],
    "eval_seqlen": ["x", 2.5, True],
    "pattern": [5, ["2:4"], True],
    "pruner": [5, True, ["wanda"]],
    "refiner": [5, True, ["dsnot"]],
    "update": [5, True, [5]],
    "allocator": [5, True, ["owl"]],
    "calibration": [5, True, b"builtin", [5], np.zeros((2, 2))],
    "device": [None, 5, ["cpu"]],
    "dtype": [None, 5, float, torch.float64],
    "offload": [None, 5, "disc", ["ram"]],
    "format": [None, 5, "zip", ["packed"]],
    "to": [None, 5, "gguf", ["packed"]],
    "prompt": [None, 5, b"text"],
    "max_new_tokens": [None, "9", 0, 2.5, True],
    "temperature": [None, "warm", -1.0, math.inf],
    "stream": ["stdout", 5],
    "seconds": [None, "60", 0, -1.0, math.inf, True],
    "products_only": [1, "yes", None],
    "plot": [5, b"a.png", "", "plot.svg", "no-such-folder/plot.png"],
    "values": [4, "int3", ["int8"]],
    "blocks": [5, True, "no.such.list"],
    "dequantize": [1, "yes", None],
    "tokenizer": ["demo", 5],
    "revision": [5, b"main", True],
    "token": [5, b"hf"],
    "repository": [None, 5, b"me/x"],
    "perplexity": [5, b"builtin", [5], {"builtin": 1}, True, [["builtin"]]],
    "tasks": [5, b"boolq", [5], {"boolq": 1}, True],
    "metric": [5, True, ["wikitext2"], b"piqa", "speed"],
    "suite": [5, ["demo"], b"demo", ""],
    "include_tasks": [5, ["dir"], b"dir"],
    "task_data": [5, ["dir"], b"dir"],
    "evaluation": ["builtin", {"perplexity": "builtin"}, 5],
    "reporter": [print, 5, object()],
    "progress": ["yes", 1, 0],
    "a": [5, b"folder", None, ""],
    "b": [5, b"folder", None, ""],
    "masks": [5, b"file", ""],
    "teacher": [5, b"demo", ""],
    "text": [None, 5, True, b"builtin", [5], np.zeros((2, 2))],
    "tokens": [None, "2M", 2.5, True, 0],
    "recover": [5, b"perp", "", ["perp"]],
    "epochs": [None, "2", 1.5, True, 0],
    "overlap": [None, 1, "yes"],
    "score": [None, 1, "yes"],
    "samples_text": [-1, 9, "2", 1.5, True],
    "rows": [0, [], [1.5], "16", [True], None],
    "report": [5, "print"],
    "keep": [None, 5, "some", ["all"]],
    "overwrite": [1, "yes", None],
    "resume": [1, "yes", None],
    "restart": [1, "yes", None],
    "dry_run": [1, "yes", None],
    "private": [1, "yes", None],
    "trust_remote_code": [1, "yes", None],
}


def test_every_argument_of_every_function_is_checked():
    for name in FUNCTIONS:
        for parameter in inspect.signature(getattr(llmprune, name)).parameters.values():
            assert parameter.kind is parameter.VAR_KEYWORD or parameter.name in WRONG, (
                f"{name}({parameter.name})"
            )
    assert set(WRONG) == set(arguments.CHECKS)


def calls():
    for function in FUNCTIONS:
        names = [
            p.name
            for p in inspect.signature(getattr(api, function)).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        ]
        for name in names:
            yield from (
                pytest.param(function, name, value, id=f"{function}-{name}-{number}")
                for number, value in enumerate(WRONG[name])
                if (function, name, value) != ("published", "model", None)  # None: of all models
                if not (function == "sweep" and name in SEVERAL and isinstance(value, (list, np.ndarray)))
            )


@pytest.mark.parametrize(("function", "name", "value"), calls())
def test_a_wrong_type_is_refused_in_one_line(function, name, value, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for work in ("llmprune.run.corridor.prune_blocks", "llmprune.run.recovery.whole_model"):
        monkeypatch.setattr(work, lambda *_: pytest.fail("work began"))
    needed = {
        "accelerate": {"model": torch.nn.Linear(4, 4)},
        "push": {"folder": tiny_llama, "repository": "me/x"},
        "generate": {"path": tiny_llama, "prompt": "text"},
        "convert": {"path": tiny_llama, "to": "packed", "output": "out"},
        "prune": {"model": tiny_llama},
        "recover": {
            **{"path": tiny_llama, "text": "builtin", "tokens": 1000, "seqlen": 32},
            **{"recipe": "gmp", "sparsity": 0.5, "score": False, "output": "out"},
        },
        "run_model": {"model": tiny_llama},
        "sweep": {"model": tiny_llama, "recipe": "wanda", "perplexity": "builtin"},
        "compare": {"paths": "out"},
        "published": {"model": "llama-7b"},
        "mask_diff": {"a": tiny_llama, "b": tiny_llama},
        "mask_apply": {"path": tiny_llama, "masks": "masks.safetensors", "output": "out"},
    }
    given = {**needed.get(function, {"path": tiny_llama}), name: value}
    with pytest.raises(ValueError) as refused:
        getattr(llmprune, function)(**given)
    message = str(refused.value)
    assert type(refused.value) is ValueError and "\n" not in message and len(message) < 400
    assert list(tmp_path.iterdir()) == []


def test_none_means_not_given_where_that_is_the_default(tiny_llama):
    dry(
        tiny_llama,
        recipe=None,
        settings=None,
        output=None,
        tokenizer=None,
        revision=None,
        time_limit=None,
        progress=None,
    )
    llmprune.evaluate(tiny_llama, perplexity="builtin", tasks=None, suite=None, limit=1, include_tasks=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("recipe", [5]), ("sparsity", [0.5, "0.6"]), ("pattern", [None]), ("pruner", [True, "wanda"])],
)
def test_every_value_of_a_list_is_checked(name, value, tiny_llama):
    with pytest.raises(ValueError, match=f"{name} must be"):
        llmprune.sweep(tiny_llama, **{"recipe": "wanda", name: value})


def test_a_grid_takes_numbers_of_numpy(tiny_llama):
    options = {"calibration": "builtin", "samples": 4, "seqlen": 32, "perplexity": "builtin", "dry_run": True}
    for values in (np.array([0.5, 0.6], dtype=np.float32), (np.float32(0.5), torch.tensor(0.6))):
        made = llmprune.sweep(tiny_llama, recipe="wanda", sparsity=values, **options)
        assert [cell.recipe.sparsity for cell in made.cells] == [0.5, 0.6]


# What is printed


def test_the_public_names_are_listed():
    assert set(llmprune.__all__) <= set(dir(llmprune)) and {"prune", "load", "push"} <= set(dir(llmprune))


def test_a_result_prints_a_summary_and_not_the_record(tiny_llama, calibration_tokens, tmp_path):
    options = {"recipe": "wanda", "sparsity": 0.5, "output": tmp_path / "out"}
    result = llmprune.run_model(
        tiny_llama,
        calibration=calibration_tokens,
        perplexity="builtin",
        tasks="demo_continuation",
        limit=2,
        **options,
    )
    for text in (repr(result), str(result)):
        assert len(text.splitlines()) < 15 and "sha256" not in text
        for said in (
            "tiny-llama",
            "wanda",
            "50.00%",
            "perplexity builtin",
            "demo_continuation acc",
            "dense",
            "MB",
            "seconds",
            str(tmp_path / "out"),
        ):
            assert said in text, said
    unscored = llmprune.prune(tiny_llama, calibration=calibration_tokens, overwrite=True, **options)
    assert "pruned without evaluation" in repr(unscored)
    planned = repr(dry(tiny_llama))
    assert len(planned.splitlines()) < 12 and "14 pruned" in planned and "nothing was written" in planned


# Progress


def test_progress_is_drawn_on_stderr_where_asked_for(tiny_llama, tmp_path, capfd, monkeypatch):
    options = {"recipe": "wanda", "samples": 4, "seqlen": 32, "calibration": "builtin"}
    llmprune.prune(tiny_llama, output=tmp_path / "quiet", **options)
    llmprune.prune(tiny_llama, output=tmp_path / "off", progress=False, **options)
    assert capfd.readouterr() == ("", "")
    llmprune.prune(tiny_llama, output=tmp_path / "out", progress=True, **options)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("Plan\n") and "pruning blocks" in err and "Loading weights" not in err
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)
    llmprune.evaluate(tiny_llama, tasks="demo_continuation", limit=1, progress=True)
    err = capfd.readouterr().err
    assert "scoring: demo_continuation" in err and "Loading weights" not in err
    assert logging.is_progress_bar_enabled(), "as the caller had it"


def test_progress_is_on_in_a_notebook(tiny_llama, tmp_path, capfd, monkeypatch):
    import sys
    from types import SimpleNamespace

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    llmprune.evaluate(tiny_llama, perplexity="builtin", limit=1)
    assert "scoring: perplexity on builtin" in capfd.readouterr().out
    llmprune.evaluate(tiny_llama, perplexity="builtin", limit=1, progress=False)
    del shell.kernel  # IPython in a terminal
    llmprune.evaluate(tiny_llama, perplexity="builtin", limit=1)
    assert capfd.readouterr().out == ""


def test_what_nobody_is_told_is_a_python_warning(tiny_llama):
    with pytest.warns(UserWarning, match="is calibrated on program source"):
        llmprune.prune(tiny_llama, samples=4, seqlen=32, dry_run=True)
    with pytest.warns(UserWarning, match="is scored on program source"):
        llmprune.evaluate(tiny_llama, limit=1)


def test_a_reporter_is_told_instead(tiny_llama, capfd):
    listening = Listening()
    dry(tiny_llama, reporter=listening)
    llmprune.evaluate(tiny_llama, perplexity="builtin", limit=1, reporter=listening)
    assert listening.told[0] == "plan" and "scoring: perplexity on builtin" in listening.told
    with pytest.raises(ValueError, match="give a reporter, or progress=True"):
        dry(tiny_llama, reporter=listening, progress=True)
    assert capfd.readouterr() == ("", "")


def test_the_signature_stays_readable():
    assert (
        "sparsity" in inspect.signature(llmprune.prune).parameters
        and "Prune a model" in llmprune.prune.__doc__
    )
    assert recipes.load("wanda").name == "wanda"
