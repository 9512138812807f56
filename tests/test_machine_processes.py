"""Several processes on one run, over gloo on loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from other_models import save
from outputs import contents, same_bits, weights
from safetensors.torch import save_file

import llmprune
from llmprune.checkpoint.masks import read_masks
from llmprune.checkpoint.packed_tensor import PARTS
from llmprune.checkpoint.stored_masks import masks_at
from llmprune.machine.processes import Team, share_out
from llmprune.model.opening import open_model

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")


@pytest.fixture
def tokens(tmp_path, calibration_tokens):
    """`tokens.safetensors` in the test's folder."""
    save_file({"tokens": calibration_tokens}, tmp_path / "tokens.safetensors")
    return tmp_path / "tokens.safetensors"


@pytest.fixture
def ranks(tmp_path, tokens, forked):
    """The program in so many processes in the test's folder, forked instead of launched: (exit code, what
    they say).
    """

    stores = []

    def call(processes, *arguments, wait=True):
        # As with torchrun the store is not rank 0's, and outlives it.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stores.append(store)
        world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        world |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        team = [
            forked.start(arguments, tmp_path, {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(processes)
        ]
        return together(team) if wait else team

    return call


def together(team):
    """What a launcher would tell of these processes: the first exit code that is not 0, all that they say."""
    texts = [process.communicate(timeout=240) for process in team]
    codes = [process.returncode for process in team if process.returncode]
    return codes[0] if codes else 0, "".join(out for out, _ in texts), "".join(err for _, err in texts)


@pytest.fixture
def launch(tmp_path, tokens):
    """The program in so many processes that a launcher starts, in the test's folder."""

    def call(processes, *arguments, launcher=TORCHRUN, wait=True):
        rendezvous = (
            ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0") if launcher is TORCHRUN else ()
        )
        command = [*launcher, str(processes), *rendezvous, "-m", "llmprune", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if not wait:
            return process
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

    return call


def said(err):
    """What the program itself said of a failure: the launcher has much to say of its own."""
    return [line for line in err.splitlines() if line.startswith("llmprune: ")]


def test_shares_are_whole_contiguous_and_even():
    for size in (1, 2, 3, 4, 7):
        parts = [Team(rank, size).share(16) for rank in range(size)]
        assert [n for p in parts for n in range(16)[p]] == list(range(16))
        assert max(p.stop - p.start for p in parts) - min(p.stop - p.start for p in parts) <= 1


def test_matrices_go_to_the_rank_with_the_least_to_do():
    costs = {"q": 4, "k": 4, "v": 4, "o": 4, "gate": 11, "up": 11, "down": 11}
    owner = share_out(costs, 2)
    loads = [sum(c for n, c in costs.items() if owner[n] == r) for r in (0, 1)]
    assert set(owner) == set(costs) and max(loads) <= 27
    assert set(share_out(costs, 1).values()) == {0}


def agreement(a, b):
    """Share of equal entries over all masks, of dense folders or packed ones."""
    a, b = (masks_at(folder) for folder in (a, b))
    assert a.shapes == b.shapes
    equal = sum(int((a.load(name) == b.load(name)).sum()) for name in a.shapes)
    return equal / sum(rows * columns for rows, columns in a.shapes.values())


def comparable(folder):
    """The record without what depends on how many processes there were: times, memory, rounding."""
    record = json.loads(json.loads(json.dumps(contents(folder)["llmprune.json"])))
    errors = [row.pop("relative_error") for row in record["matrices"]]
    del record["environment"]["processes"], record["environment"]["device"]  # which tells the threads
    return record, errors


@pytest.mark.parametrize(
    ("processes", "recipe"), [(2, "dsnot"), (4, "dsnot"), (2, "sparsegpt"), (2, "sparsegpt-paper")]
)
def test_several_processes_give_the_masks_and_the_record_of_one(
    ranks, make_llama, tmp_path, calibration_tokens, processes, recipe
):
    model = make_llama(layers=3, dtype=torch.bfloat16 if recipe == "sparsegpt-paper" else torch.float32)
    llmprune.prune(
        model,
        recipe=recipe,
        sparsity=0.6,
        calibration=tmp_path / "tokens.safetensors",
        output=tmp_path / "one",
    )
    options = ("--recipe", recipe, "--sparsity", "0.6", "--calibration", "tokens.safetensors")
    code, out, err = ranks(processes, "prune", model, *options, "--output", "many", "--json")
    assert code == 0, err
    assert json.loads(out)["environment"]["processes"] == processes, "rank 0 alone prints the summary"
    assert agreement(tmp_path / "one", tmp_path / "many") >= 0.9999
    (one, errors), (many, others) = comparable(tmp_path / "one"), comparable(tmp_path / "many")
    assert one == many
    assert errors == pytest.approx(others, rel=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many", "one", "tokens.safetensors"]


@pytest.mark.parametrize("rows", [1, 8])
def test_several_processes_share_the_sparsity_out_like_one(ranks, tiny_llama, tmp_path, rows):
    options = {"calibration": tmp_path / "tokens.safetensors", "sparsity": 0.6}
    options["settings"] = {"allocator.name": "fisher", "allocator.samples": rows}
    one = llmprune.prune(tiny_llama, recipe="wanda", output=tmp_path / "one", **options).record
    options = ("--recipe", "wanda", "--sparsity", "0.6", "--calibration", "tokens.safetensors")
    options += ("--set", "allocator.name=fisher", "--set", f"allocator.samples={rows}")
    code, _, err = ranks(2, "prune", tiny_llama, *options, "--output", "many")
    assert code == 0, err
    many = json.loads(contents(tmp_path / "many")["llmprune.json"])
    for block, curves in one["allocation"]["measure"].items():
        for name, curve in curves.items():
            assert many["allocation"]["measure"][block][name] == pytest.approx(curve, abs=0.002)
    shares = [[row["target_sparsity"] for row in record["matrices"]] for record in (one, many)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-3) and len(set(shares[0])) > 1


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("mixtral", "wanda"), ("mixtral", "sparsegpt"), ("qwen3_next", "wanda"), ("gemma3", "sparsegpt")],
)
def test_two_processes_prune_other_families_as_one_does(ranks, tmp_path, calibration_tokens, kind, recipe):
    experts = {"num_local_experts": 8} if kind == "mixtral" else {}
    save(kind, tmp_path / "in", max_position_embeddings=128, vocab_size=2048, **experts)
    tokens = tmp_path / "tokens.safetensors"
    llmprune.prune(tmp_path / "in", recipe=recipe, sparsity=0.5, calibration=tokens, output=tmp_path / "one")
    options = ("--recipe", recipe, "--sparsity", "0.5", "--calibration", "tokens.safetensors")
    code, _, err = ranks(2, "prune", "in", *options, "--output", "many", "--json")
    assert code == 0, err
    assert agreement(tmp_path / "one", tmp_path / "many") >= 0.999
    one, many = (
        {row["name"]: row.get("tokens", 0) for row in comparable(tmp_path / name)[0]["matrices"]}
        for name in ("one", "many")
    )
    # Rounding may send a token that stands between two experts to the other one.
    assert one.keys() == many.keys() and all(abs(one[name] - many[name]) <= 3 for name in one)


@pytest.mark.parametrize("values", ["same", "int4"])
def test_two_processes_pack_the_demo_as_one_does(ranks, tmp_path, values):
    # int4 is made up for by the other weights, with sums over the tokens of both processes.
    recipe = "dsnot" if values == "same" else "wanda"
    options = {"recipe": recipe, "sparsity": 0.7, "format": "packed", "values": values}
    tokens = tmp_path / "tokens.safetensors"
    one = llmprune.prune("demo", calibration=tokens, output=tmp_path / "one", **options).record
    flags = [word for key, value in options.items() for word in (f"--{key}", value)]
    code, out, err = ranks(2, "prune", "demo", *flags, "--calibration", tokens, "--output", "many", "--json")
    assert code == 0, err
    assert json.loads(out)["environment"]["processes"] == 2
    assert json.loads(out)["format"] == one["format"] == {"name": "packed", "values": values}
    # A value between two steps of its grid may go to the other one, which later blocks see.
    least = 0.9999 if values == "same" else 0.999
    assert agreement(tmp_path / "one", tmp_path / "many") >= least
    first, second = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert first.keys() == second.keys()
    masks = {name for name in first if name.endswith("_mask")}
    alike = {name.removesuffix("_mask") for name in masks if torch.equal(first[name], second[name])}
    assert len(alike) >= (0.9 if values == "same" else 0.5) * len(masks) > 0
    for name in alike:
        rows, others = first[f"{name}_rows"], second[f"{name}_rows"]
        assert torch.equal(rows, others) and first[name].shape == second[name].shape
        if values == "same":
            assert same_bits({name: first[name]}, {name: second[name]})
        else:  # a sum that differs by rounding may move a weight by one step, which later blocks see
            assert (first[name] == second[name]).float().mean() >= 0.99
            assert torch.allclose(first[f"{name}_scale"].float(), second[f"{name}_scale"].float(), rtol=0.01)
    untouched = {name for name in first if not name.endswith(PARTS[1:]) and f"{name}_mask" not in first}
    assert untouched and all(same_bits({n: first[n]}, {n: second[n]}) for n in untouched)


def test_two_processes_pack_what_they_would_write_dense(ranks, tmp_path):
    options = ("--recipe", "sparsegpt", "--sparsity", "0.7", "--calibration", "tokens.safetensors")
    for output, more in (("dense", ()), ("packed", ("--format", "packed"))):
        code, _, err = ranks(2, "prune", "demo", *options, *more, "--output", output)
        assert code == 0, err
    source = open_model(tmp_path / "packed").source
    assert same_bits({name: source.load(name) for name in source.tensors}, weights(tmp_path / "dense"))
    assert agreement(tmp_path / "packed", tmp_path / "dense") == 1
    assert llmprune.inspect(tmp_path / "packed")["record_agrees"] is True


def test_two_processes_tune_a_block_as_one_does(ranks, make_llama, tmp_path):
    model = make_llama(layers=3)
    # With the sparsities of `fisher` ADMM carries differences in rounding on in the first block already.
    settings = {"update.steps": 12, "update.batch": 3, "allocator": "uniform"}
    tokens = tmp_path / "tokens.safetensors"
    one = llmprune.prune(
        model, recipe="best", sparsity=0.6, calibration=tokens, settings=settings, output=tmp_path / "one"
    ).record
    options = ("--recipe", "best", "--sparsity", "0.6", "--calibration", "tokens.safetensors")
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    code, out, err = ranks(2, "prune", model, *options, *changes, "--output", "many", "--json")
    assert code == 0, err
    # The first block sees the same sums; later ones see weights tuned from gradients that differ by rounding,
    # which ADMM carries on.
    first, second = (
        {n: m for n, m in read_masks(tmp_path / f / "masks.safetensors").items() if ".layers.0." in n}
        for f in ("one", "many")
    )
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert agreement(tmp_path / "one", tmp_path / "many") >= 0.95
    for mine, other in zip(one["matrices"], json.loads(out)["matrices"], strict=True):
        assert mine["name"] == other["name"] and mine["steps"] == other["steps"] == ["block-tune"]
        assert mine["tune"]["held_out_after"] == pytest.approx(other["tune"]["held_out_after"], rel=0.05)


def test_two_processes_measure_as_one_does(ranks, make_llama, tmp_path):
    model, tokens = make_llama(layers=3), tmp_path / "tokens.safetensors"
    options = {"recipe": "wanda", "allocator": "owl", "sparsity": 0.6, "calibration": tokens}
    one = llmprune.prune(model, output=tmp_path / "one", **options).record
    flags = "--recipe wanda --allocator owl --sparsity 0.6 --calibration tokens.safetensors".split()
    code, out, err = ranks(2, "prune", model, *flags, "--output", "many", "--json")
    assert code == 0, err
    assert [m["target_sparsity"] for m in one["matrices"]] == [
        m["target_sparsity"] for m in json.loads(out)["matrices"]
    ]
    assert agreement(tmp_path / "one", tmp_path / "many") >= 0.9999


LEAVING = """
import atexit, os, sys
def threads():
    return [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
atexit.register(lambda: print("left", *threads()))  # runs after what is registered later
from llmprune.machine import processes
team = processes.current()
import transformers.modeling_utils
assert team.tell(team.rank) == 0 and any("gloo" in name for name in threads())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads the names of threads from /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    # One that does aborts a finished process now and then: `terminate called without an active exception`.
    (tmp_path / "leaving.py").write_text(LEAVING)
    out = subprocess.run(
        [*TORCHRUN, "2", tmp_path / "leaving.py"], check=True, capture_output=True, text=True, timeout=240
    ).stdout
    assert out.count("left") == 2 and "gloo" not in out


def test_the_whole_job_under_accelerate_launch(launch, tiny_llama, tmp_path):
    # `--multi_gpu` is how accelerate starts several processes of a program on one machine, with GPUs or
    # without.
    launcher = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "--num_processes",
    )
    options = "--calibration tokens.safetensors --perplexity builtin --eval-seqlen 32 --limit 5".split()
    code, out, err = launch(2, "run", tiny_llama, *options, "--output", "out", "--json", launcher=launcher)
    assert code == 0, err
    summary = json.loads(out)
    assert summary["environment"]["processes"] == 2
    alone = llmprune.evaluate(tmp_path / "out", perplexity=["builtin"], eval_seqlen=32, limit=5)[
        "perplexity"
    ]["builtin"]["value"]
    assert summary["evaluation"]["perplexity"]["builtin"]["pruned"] == pytest.approx(alone, rel=1e-6)


def killed(team, victim):
    """One of the processes, or of those that a launcher started, is gone from one moment to the next."""
    if isinstance(team, list):
        team[victim].kill()
        return together(team)
    started = psutil.Process(team.pid).children(recursive=True)
    next(p for p in started if p.environ().get("RANK") == str(victim)).send_signal(signal.SIGKILL)
    out, err = team.communicate(timeout=120)
    return team.returncode, out, err


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("by", ["fork", pytest.param("torchrun", marks=pytest.mark.exhaustive)])
def test_a_killed_rank_ends_all_with_one_line_and_the_run_goes_on(
    launch, ranks, make_llama, tmp_path, victim, by
):
    model = make_llama(layers=60)
    options = ("--recipe", "sparsegpt", "--calibration", "tokens.safetensors", "--output", "out")
    team = (launch if by == "torchrun" else ranks)(2, "prune", model, *options, wait=False)
    journal, deadline = tmp_path / ".out.partial" / "journal.jsonl", time.monotonic() + 120
    while not (journal.is_file() and journal.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.005)
    code, _, err = killed(team, victim)
    lines = said(err)
    assert code != 0 and len(lines) == 1, err
    assert re.search(r"another process of this run ended|interrupted", lines[0]), lines
    if victim == 1:
        assert re.search(
            r"\d+ of 60 blocks are finished and kept; continue with the same command and --resume$", lines[0]
        )
    assert not (tmp_path / "out").exists()
    code, out, err = ranks(2, "prune", model, *options, "--resume")
    assert code == 0, err
    assert re.search(r"\d+ of 60 blocks are finished; their outputs are computed again", out)
    assert llmprune.inspect(tmp_path / "out")["record_agrees"] is True


def test_text_sampled_from_the_model_is_that_of_one_process(ranks, tiny_llama, tmp_path, monkeypatch):
    options = "--recipe wanda --calibration self=0.5+tokens.safetensors=0.5 --samples 8".split()
    code, out, err = ranks(2, "prune", tiny_llama, *options, "--output", "many", "--json")
    assert code == 0, err
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "empty"))
    source = {"self": 0.5, str(tmp_path / "tokens.safetensors"): 0.5}
    alone = llmprune.prune(tiny_llama, recipe="wanda", calibration=source, samples=8, output=tmp_path / "one")
    assert json.loads(out)["calibration"] == alone.record["calibration"]
    assert agreement(tmp_path / "one", tmp_path / "many") >= 0.9999


def test_bad_input_is_told_once(ranks, tiny_llama, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    code, _, err = ranks(2, "prune", tiny_llama, "--calibration", "nowhere.txt", "--output", "out")
    assert code != 0 and len(said(err)) == 1, err
    assert "nowhere.txt" in said(err)[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_more_processes_than_samples_are_refused(ranks, tiny_llama, tmp_path):
    save_file({"tokens": torch.zeros(1, 32, dtype=torch.int64)}, tmp_path / "one.safetensors")
    code, _, err = ranks(2, "prune", tiny_llama, "--calibration", "one.safetensors")
    assert code != 0 and said(err) == ["llmprune: 2 processes share 1 calibration samples; start at most 1"]


@pytest.mark.parametrize("recipe", ["masked-finetuning", "rigl", "ebft"])
def test_two_processes_train_as_one_does(ranks, tiny_llama, tmp_path, recipe):
    """The same masks and the same curve but for rounding; masks are decided by the first process."""
    text = tmp_path / "tokens.safetensors"
    llmprune.prune(tiny_llama, recipe="wanda", calibration=text, output=tmp_path / "in")
    given = ["--recipe", recipe, "--text", "tokens.safetensors", "--tokens", "2000", "--no-score"]
    given += ["--epochs", "11"]
    given += ["--teacher", str(tiny_llama), "--dtype", "float32", "--set", "rates=[]", "--set", "batch=4"]
    given += ["--set", "held_out=0.2"]
    for processes in (1, 2):
        done = ranks(processes, "recover", "in", *given, "--output", f"by-{processes}")
        assert done[0] == 0, done[2]
    one, two = (json.loads((tmp_path / f"by-{n}" / "llmprune.json").read_text()) for n in (1, 2))
    assert agreement(tmp_path / "by-1", tmp_path / "by-2") > 0.999
    for a, b in zip(one["recovery"].get("curve", []), two["recovery"].get("curve", []), strict=True):
        assert a["step"] == b["step"] and a["held_out_loss"] == pytest.approx(b["held_out_loss"], rel=1e-3)
    assert two["environment"]["processes"] == 2


def test_two_processes_choose_the_same_recipe(ranks, tiny_llama, tmp_path):
    """Without the dense model the usual recipe cannot be followed, which each process finds out by itself."""
    text = tmp_path / "tokens.safetensors"
    llmprune.prune(tiny_llama, recipe="magnitude", calibration=text, output=tmp_path / "in")
    given = ["--text", "tokens.safetensors", "--tokens", "1000", "--epochs", "6", "--no-score"]
    code, _, err = ranks(2, "recover", "in", *given, "--set", "rates=[]", "--output", "out")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "llmprune.json").read_text())
    assert record["recovery"]["recipe"]["name"] == "masked-finetuning"
    more = ["--recipe", "ebft", "--teacher", str(tiny_llama), "--output", "other"]
    save_file({"tokens": torch.zeros(2, 32, dtype=torch.int64)}, tmp_path / "two.safetensors")
    code, _, err = ranks(
        3,
        "recover",
        "in",
        "--text",
        "two.safetensors",
        "--tokens",
        "64",
        "--epochs",
        "2",
        "--no-score",
        *more,
    )
    assert code != 0 and said(err) == ["llmprune: 3 processes share 2 sequences of text; start at most 2"]
