"""Memory: where block inputs lie, what happens when it runs out, what is planned and measured."""

import json
import os
import re

import pytest
import torch
from outputs import contents
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

import llmprune
from llmprune.evaluation.perplexity import perplexity
from llmprune.machine import device as devices
from llmprune.model import activations
from llmprune.model.opening import open_model
from llmprune.planning.plan import with_scoring
from llmprune.statistics.collecting import Halted


class Notes:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.notes = []

    def plan(self, *args):
        self.made = args[2]

    def stage(self, *args):
        pass

    def step(self):
        pass

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def prune(tiny_llama, calibration_tokens, tmp_path):
    def call(name, **more):
        options = {"recipe": "sparsegpt", "sparsity": 0.5, "calibration": calibration_tokens} | more
        llmprune.prune(tiny_llama, output=tmp_path / name, **options)
        return contents(tmp_path / name)

    return call


def test_block_inputs_on_disk_change_nothing_and_leave_nothing(prune, tmp_path):
    assert prune("disk", offload="disk") == prune("ram", offload="ram")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "ram"]


def test_block_inputs_go_to_disk_by_themselves_where_memory_is_short(prune, monkeypatch):
    reporter = Notes()
    monkeypatch.setattr(devices, "available_memory", lambda: 10**6)
    prune("out", reporter=reporter)
    assert reporter.made.offload == "disk" and reporter.made.memory > reporter.made.available
    monkeypatch.setattr(devices, "available_memory", lambda: 10**12)
    prune("more", reporter=reporter)
    assert reporter.made.offload == "ram"


def test_a_disk_too_full_for_block_inputs_is_told_in_one_line(prune, monkeypatch, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"block inputs need \d+\.\d MB on the disk .*No space left"):
        prune("out", offload="disk")


def test_an_unknown_offload_is_refused(prune):
    with pytest.raises(ValueError, match=r"offload must be one of auto, ram, disk, got 'tape'"):
        prune("out", offload="tape")


@pytest.fixture
def little_memory(monkeypatch):
    """A device on which more than so many sequences do not fit, failing late in the block: after some hooks
    have run.
    """

    def limit(sequences, error=torch.cuda.OutOfMemoryError):
        real = LlamaMLP.forward

        def forward(self, x):
            if x.shape[0] > sequences:
                self.gate_proj(x)
                raise error(
                    "CUDA out of memory"
                    if error is torch.cuda.OutOfMemoryError
                    else "DefaultCPUAllocator: can't allocate memory"
                )
            return real(self, x)

        monkeypatch.setattr(LlamaMLP, "forward", forward)

    return limit


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_the_micro_batch_and_goes_on(prune, little_memory, monkeypatch, tmp_path, error):
    monkeypatch.setitem(activations._TOKENS, "cpu", 2 * 32)
    whole = prune("two")
    monkeypatch.setitem(activations._TOKENS, "cpu", 8 * 32)
    little_memory(2, error)
    reporter = Notes()
    assert prune("halved", reporter=reporter) == whole, "statistics are counted once, whatever was tried"
    tried = [n for n in reporter.notes if "out of memory" in n]
    assert tried == [f"out of memory with {n} sequences at once; going on with {n // 2}" for n in (8, 4)]


def test_out_of_memory_in_a_halted_pass_computes_again(prune, little_memory, monkeypatch):
    monkeypatch.setitem(activations._TOKENS, "cpu", 2 * 32)
    order = {"settings": {"order": "group"}}
    whole = prune("two", **order)
    monkeypatch.setitem(activations._TOKENS, "cpu", 8 * 32)
    little_memory(2)
    reporter = Notes()
    # What came before the failure was computed with larger micro-batches: rounding may differ, masks do not.
    assert prune("halved", reporter=reporter, **order)["masks.safetensors"] == whole["masks.safetensors"]
    assert reporter.made.pausing and [n for n in reporter.notes if "out of memory with 8" in n]


def test_halted_passes_that_do_not_fit_are_given_up_for_the_run(prune, monkeypatch):
    monkeypatch.setitem(
        activations._TOKENS, "cpu", 32
    )  # one sequence at a time: no smaller micro-batch is left
    order = {"settings": {"order": "group"}}
    whole, real, asked = prune("whole", **order), Halted.go_on, []

    def go_on(self, group):
        asked.append(group)
        if len(asked) == 12:  # in the second group of the first block
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(self, group)

    monkeypatch.setattr(Halted, "go_on", go_on)
    reporter = Notes()
    assert prune("given up", reporter=reporter, **order) == whole
    assert len(asked) == 12 and [n for n in reporter.notes if "halted passes" in n] != []


def test_passes_halt_only_where_memory_is_left_for_them(prune, monkeypatch):
    reporter = Notes()
    prune("out", reporter=reporter, settings={"order": "group"})
    needed, free = reporter.made.memory, reporter.made.available
    monkeypatch.setattr(devices, "available_memory", lambda: needed - 1)
    prune("less", reporter=reporter, settings={"order": "group"})
    assert not reporter.made.pausing and reporter.made.memory < needed and free > needed
    prune("block", reporter=reporter)
    assert not reporter.made.pausing


def test_memory_that_no_halving_helps_ends_the_run(prune, little_memory):
    little_memory(0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        prune("out")


def test_scoring_halves_too(tiny_llama, little_memory):
    rows = torch.randint(0, 2048, (8, 32), generator=torch.Generator().manual_seed(1))
    skeleton = open_model(tiny_llama).skeleton
    whole = perplexity(skeleton, rows)
    little_memory(2)
    notes = []
    assert perplexity(skeleton, rows, note=notes.append) == pytest.approx(whole, rel=1e-6)
    assert notes


def test_the_plan_says_what_the_run_will_need(tiny_llama, calibration_tokens, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = typed("prune", tiny_llama, "--samples", "4", "--seqlen", "32", "--dry-run")
    assert code == 0
    assert re.search(
        r"memory +about \d+\.\d MB at the peak of pruning; \d+\.\d\d GB free; block inputs in RAM", out
    )
    assert re.search(r"disk +\d+\.\d MB in", out)
    assert re.search(r"model\.layers\.1\.mlp\.down_proj +64 x 96 +unstructured +0\.5 +uniform", out)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_says_what_scoring_will_need(tiny_llama, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = (
        "run",
        tiny_llama,
        "--samples",
        "4",
        "--seqlen",
        "32",
        "--perplexity",
        "builtin",
        "--limit",
        "2",
        "--dry-run",
    )
    planned = {}
    for tasks in ((), ("--tasks", "demo_continuation")):
        code, out, err = typed(*options, *tasks, "--json")
        assert code == 0, err
        planned[bool(tasks)] = json.loads(out)["scoring_memory_bytes"]
    assert planned[True] > planned[False] > 0
    monkeypatch.setattr(devices, "available_memory", lambda: planned[True] - 1)
    code, out, _ = typed(*options, "--tasks", "demo_continuation")
    assert code == 0
    assert re.search(r"at the peak of pruning, \d+\.\d MB while scoring; ", out)
    assert "THIS MAY NOT FIT" in out and "leave tasks out" in out


def test_the_plan_counts_the_tokens_of_long_texts(prune, tiny_llama):
    reporter, opened = Notes(), open_model(tiny_llama)
    prune("out", reporter=reporter)
    few, many = (
        with_scoring(reporter.made, opened.skeleton, [(windows, 64)], False) for windows in (10**6, 2 * 10**6)
    )
    assert many.memory - few.memory == many.scoring - few.scoring == 8 * 64 * 10**6


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="the system does not tell private pages apart"
)
def test_private_memory_sees_what_was_allocated_between():
    with devices.PrivateMemory() as memory:
        before = memory.peak
        taken = torch.ones(60_000_000)
        sum(range(3_000_000))  # some time for a sample
        del taken
    assert memory.peak - before > 0.9 * 240_000_000


def test_a_checkpoint_that_shrinks_under_the_run_is_one_line_and_no_crash(llama_copy):
    opened = open_model(llama_copy)
    path = llama_copy / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"changed during the run"):
        for name in opened.source.tensors:
            opened.source.load(name)


def test_written_shards_are_what_the_library_reads(prune, tmp_path, tiny_llama):
    prune("out")
    dense = load_file(tiny_llama / "model.safetensors")
    read = {
        n: t for p in sorted((tmp_path / "out").glob("model-*.safetensors")) for n, t in load_file(p).items()
    }
    assert read.keys() == dense.keys()
    assert all(torch.equal(read[n], dense[n]) for n in dense if "proj" not in n)
