"""`llmprune bench`: what is measured, how ratios and bytes come about, what is refused before any work."""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from outputs import everything, weights
from safetensors.torch import load_file
from test_checkpoint_packed import make, prune

import llmprune
from llmprune.api import benching, contestant, perplexities, whole
from llmprune.api.contestant import Contestant
from llmprune.checkpoint.masks import Masks
from llmprune.checkpoint.reader import Checkpoint
from llmprune.cli.bench import default_plot
from llmprune.machine.processor import cache_bytes, processor_name, share_at_work
from llmprune.model.opening import counting_skeleton, read_folder
from llmprune.model.targets import packed_layouts
from llmprune.record import drawing, figures
from llmprune.runtime import bench, glance, speed

QUICK = {"seconds": 0.01, "limit": 2, "eval_seqlen": 32}


@pytest.fixture(scope="module")
def pruned(make_llama, tmp_path_factory):
    """A pruned tiny model, dense."""
    folder = tmp_path_factory.mktemp("bench") / "pruned"
    tokens = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(1))
    llmprune.prune(make_llama(), recipe="wanda", sparsity=0.7, calibration=tokens, output=folder)
    return folder


@pytest.fixture(scope="module")
def measured(pruned, tmp_path_factory):
    """What `bench` says of it, where it drew the plot, and the folder before and after."""
    plot = tmp_path_factory.mktemp("plot") / "bench.png"
    before, temporary = everything(pruned), tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", None)  # it is looked up once
        found = llmprune.bench(pruned, plot=plot, **QUICK)
    assert not list(temporary.glob("llmprune-bench-*"))
    assert everything(pruned) == before
    return found


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))


# What is measured


def test_sizes_are_those_of_the_files(measured, pruned, tmp_path):
    llmprune.convert(pruned, to="packed", output=tmp_path / "packed")
    assert measured["bytes"] == {"dense": size_of(pruned), "packed": size_of(tmp_path / "packed")}
    assert (measured["model"], measured["format"], measured["values"]) == ("pruned", "dense", "same")


def test_products_are_of_every_shape_of_the_model(measured, pruned):
    shapes = [tuple(m["shape"]) for m in json.loads((pruned / "llmprune.json").read_text())["matrices"]]
    listed = {tuple(entry["shape"]): entry for entry in measured["products"]["shapes"]}
    assert {size: entry["count"] for size, entry in listed.items()} == {s: shapes.count(s) for s in shapes}
    assert all(0 < entry["measured"] <= entry["count"] for entry in listed.values())


def test_ratios_are_dense_seconds_over_packed_seconds(measured):
    products = measured["products"]
    entries = [entry for shape in products["shapes"] for entry in shape["tokens"].values()]
    entries += [*products["all"].values(), *measured["whole"]["tokens"].values()]
    assert len(entries) > 12
    for entry in entries:
        assert entry["faster_by"] == entry["dense_seconds"] / entry["packed_seconds"] > 0
    for n, entry in products["all"].items():
        for who in ("dense", "packed"):
            each = [s["count"] * s["tokens"][n][f"{who}_seconds"] for s in products["shapes"]]
            assert math.isclose(entry[f"{who}_seconds"], sum(each))
    assert list(products["all"]) == ["1", "16", "256", "2048"] and set(products["rounds"]) == {
        *products["all"]
    }


def test_the_whole_model_is_measured_up_to_its_limit(measured):
    found = measured["whole"]
    assert [*map(int, found["tokens"]), *found["left_out"]] == [1, 16, 256, 2048]
    assert found["left_out"] == [256, 2048] and found["in_turn"], "the model takes 128 tokens"
    for n, entry in found["tokens"].items():
        for who in ("dense", "packed"):
            assert math.isclose(entry[f"{who}_tokens_per_second"] * entry[f"{who}_seconds"], int(n))
    for who in ("dense", "packed"):
        assert found[who]["load_seconds"] > 0
        assert found[who]["peak_memory_bytes"] > found[who]["empty_process_bytes"] > 50e6


def test_perplexity_stands_beside_and_is_that_of_eval(measured, pruned):
    scores = llmprune.evaluate(pruned, perplexity="builtin", limit=2, eval_seqlen=32)["perplexity"]["builtin"]
    entry = measured["perplexity"]["builtin"]
    assert entry["dense"] == entry["packed"] == scores["value"] and entry["protocol"] == scores["protocol"]
    assert (entry["from"], entry["before_pruning"]) == ("measured", None)


def test_a_packed_folder_is_measured_against_its_dense_form(pruned, tmp_path, typed):
    llmprune.convert(pruned, to="packed", values="int8", output=tmp_path / "packed")
    code, out, err = typed(
        "bench", tmp_path / "packed", "--json", "--seconds", 0.01, "--perplexity", "none", "--plot", "none"
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["format"], found["values"], found["perplexity"]) == ("packed", "int8", {})
    assert found["plot"] is None
    llmprune.convert(tmp_path / "packed", to="dense", output=tmp_path / "dense")
    assert found["bytes"] == {"dense": size_of(tmp_path / "dense"), "packed": size_of(tmp_path / "packed")}
    assert found["whole"]["tokens"]["16"]["packed_seconds"] > 0


def test_products_alone_write_and_load_no_model(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(benching, "convert", lambda *_, **__: pytest.fail("a copy was written"))
    monkeypatch.setattr(whole, "Contestant", lambda *_: pytest.fail("a process was started"))
    found = llmprune.bench(pruned, products_only=True, **QUICK)
    assert found["whole"] is None and found["products"]["all"]["1"]["packed_seconds"] > 0
    monkeypatch.undo()
    llmprune.convert(pruned, to="packed", output=tmp_path / "packed")
    sizes = {"dense": pruned, "packed": tmp_path / "packed"}
    held = {who: sum(t.bytes for t in Checkpoint(folder).tensors.values()) for who, folder in sizes.items()}
    assert found["bytes"] == held
    rounded = llmprune.bench(pruned, products_only=True, values="int4", **QUICK)
    entry = rounded["perplexity"]["builtin"]
    assert entry["packed"] is None and entry["dense"] == found["perplexity"]["builtin"]["dense"]
    assert rounded["bytes"]["packed"] < held["packed"]


def test_rounded_values_have_a_perplexity_of_their_own(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(benching, "Whole", lambda *_: SimpleNamespace(measured=lambda seconds: None))
    found = llmprune.bench(pruned, values="int4", **QUICK)["perplexity"]["builtin"]
    llmprune.convert(pruned, to="packed", values="int4", output=tmp_path / "int4")
    options = {"perplexity": "builtin", "limit": 2, "eval_seqlen": 32}
    assert (
        found["packed"] == llmprune.evaluate(tmp_path / "int4", **options)["perplexity"]["builtin"]["value"]
    )
    assert found["dense"] == llmprune.evaluate(pruned, **options)["perplexity"]["builtin"]["value"]
    assert found["dense"] != found["packed"]


def test_the_perplexity_of_the_record_is_taken_where_it_is_the_same(make_llama, tmp_path, monkeypatch):
    options = {"recipe": "magnitude", "calibration": "builtin", "samples": 4, "seqlen": 32}
    record = llmprune.run_model(
        make_llama(), perplexity="builtin", limit=3, eval_seqlen=32, output=tmp_path / "out", **options
    ).record["evaluation"]["perplexity"]["builtin"]
    real = perplexities.score
    monkeypatch.setattr(perplexities, "score", lambda *_: pytest.fail("scored again"))
    for asked in ({}, {"limit": 3}, {"eval_seqlen": 32, "perplexity": "builtin"}):
        entry = llmprune.bench(tmp_path / "out", products_only=True, seconds=0.01, **asked)["perplexity"]
        assert entry["builtin"] == {
            "dense": record["pruned"],
            "packed": record["pruned"],
            "before_pruning": record["dense"],
            "protocol": record["protocol"],
            "from": "record",
        }
    monkeypatch.setattr(perplexities, "score", real)
    other = llmprune.bench(tmp_path / "out", products_only=True, **QUICK)["perplexity"]["builtin"]
    assert other["from"] == "measured" and other["protocol"]["windows"] == 2


# Arithmetic


def test_medians_drop_the_first_round_and_take_turns():
    calls, taken = [], {"dense": iter([9.0, 1.0, 3.0, 2.0]), "packed": iter([9.0, 4.0, 6.0, 5.0])}

    def measure(who):
        calls.append(who)
        return {"task": [next(taken[who])]}

    now = iter(range(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.time, "monotonic", lambda: next(now))
        found, rounds = bench.medians(4, measure)
    assert (found, rounds) == ({"dense": {"task": 2.0}, "packed": {"task": 5.0}}, 3)
    assert calls == ["dense", "packed", "packed", "dense"] * 2


def test_a_single_round_counts_and_there_are_no_more_than_enough():
    assert bench.medians(1e-9, lambda who: {1: [2.0, 4.0, 9.0]}) == (
        {w: {1: 4.0} for w in bench.CONTESTANTS},
        1,
    )
    assert bench.medians(60, lambda who: {1: [1.0]})[1] == bench.ROUNDS


def test_products_come_from_both_weights(pruned):
    source = read_folder(pruned)[1]
    matrices = bench.Matrices(counting_skeleton(pruned, False, None), source)
    found = matrices.some(matrices.groups, bench.Enough(1 << 40, 1 << 40, 60))
    assert {size: len(pairs) for size, pairs in found.items()} == {
        s: len(g) for s, g in matrices.groups.items()
    }
    for (_, columns), pairs in found.items():
        x = torch.randn(3, columns, dtype=torch.float32)
        for pair in pairs:
            dense, packed = (pair.product(who, x) for who in bench.CONTESTANTS)
            assert torch.allclose(dense, packed, atol=1e-4) and dense.abs().max() > 0
    few = matrices.some(matrices.groups, bench.Enough(0, 0, 60))
    assert all(len(pairs) == 1 for pairs in few.values()) and set(few) == set(found)
    ((size, group),) = matrices.largest().items()
    assert size[0] * size[1] == max(r * c for r, c in matrices.groups) and group == matrices.groups[size]


@pytest.mark.parametrize("kind", ["llama4_text", "mixtral", "gpt_oss", "gpt2"])
def test_the_size_packed_is_that_of_convert(kind, tmp_path):
    prune(make(kind, tmp_path / "in"), tmp_path / "dense")
    llmprune.convert(tmp_path / "dense", to="packed", output=tmp_path / "packed")
    wanted = sum(t.nbytes for path in (tmp_path / "packed").glob("model-*") for t in load_file(path).values())
    source, skeleton = Checkpoint(tmp_path / "dense"), counting_skeleton(tmp_path / "dense", False, None)
    masks = Masks(tmp_path / "dense" / "masks.safetensors")
    assert glance.packed_bytes(source, packed_layouts(skeleton), masks) == wanted
    assert bench.Matrices(skeleton, source).packed_bytes() == wanted
    record = json.loads((tmp_path / "dense" / "llmprune.json").read_text())
    assert record["totals"]["bytes"]["packed"] == wanted


class Model:
    """Stands for a model whose tokens come when it is told."""

    def __init__(self, gaps):
        self.gaps, self.asked = gaps, None

    def get_input_embeddings(self):
        return SimpleNamespace(weight=torch.empty(100, 1, dtype=torch.float32))

    def generate(self, tokens, *, streamer, max_new_tokens, **_):
        self.asked = tokens.shape[1], max_new_tokens
        assert int(tokens.min()) >= 25 and int(tokens.max()) < 50
        for gap in [0.0, *self.gaps[:max_new_tokens]]:
            streamer.at.append((streamer.at[-1] if streamer.at else 0.0) + gap)


def test_a_prompt_counts_to_its_first_token_and_decoding_after_it():
    gaps = [7.0, 1.0, 2.0, 3.0, 4.0, 50.0, 3.0, 3.0, 2.0]
    model = Model(gaps)
    assert speed.seconds_for(model, 256, None) == 7.0 and model.asked == (256, 1)
    assert speed.seconds_for(model, 1, None) == statistics.median(gaps[1:]) and model.asked == (16, 9)
    speed.seconds_for(model, 1, 20)
    assert model.asked == (11, 9), "the model takes no more"


def test_the_cache_and_the_processor_are_read_from_the_system(tmp_path):
    for number, kind, level, size in (
        (0, "Data", 1, "48K"),
        (1, "Instruction", 4, "9M"),
        (2, "Unified", 3, "32M"),
    ):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, text in (("type", kind), ("level", str(level)), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert cache_bytes(tmp_path) == 32 << 20 == cache_bytes(tmp_path / "nothing")
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: Some   CPU 9\nmodel name : other\n")
    assert processor_name(info) == "Some CPU 9" and processor_name(tmp_path / "none")
    assert 0 <= share_at_work(0.01) <= 1


# Processes


def test_a_process_that_cannot_load_says_why_and_is_gone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        ValueError, match=r"the dense model cannot be measured: ValueError: .*safetensors"
    ) as told:
        Contestant("dense", tmp_path, None, False)
    assert "\n" not in str(told.value)


def test_a_process_that_is_killed_speaks_of_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(
        contestant, "_CODE", "import os, signal; os.kill(os.getpid(), signal.SIGKILL) # {path}"
    )
    with pytest.raises(ValueError, match="was killed, as happens where memory runs out; --products-only"):
        Contestant("packed", tmp_path, None, False)


def test_where_memory_holds_one_model_they_come_one_after_the_other(pruned, monkeypatch):
    alive, most = [], []

    class Fake:
        def __init__(self, name, *_):
            self.name, self.loaded = name, {"seconds": 1.0, "before": 2}
            alive.append(name)
            most.append(len(alive))

        def seconds(self, tokens):
            return tokens * (2.0 if self.name == "dense" else 0.5)

        def peak_memory(self):
            return 3

        def close(self):
            alive.remove(self.name)

    monkeypatch.setattr(whole, "Contestant", Fake)
    monkeypatch.setattr(whole.devices, "available_memory", lambda: whole.PROCESS + (1 << 25))
    found = llmprune.bench(pruned, perplexity="none", seconds=0.01)["whole"]
    assert not alive and most == [1, 1] and not found["in_turn"]
    assert found["tokens"]["16"]["faster_by"] == 4.0
    assert found["tokens"]["16"]["packed_tokens_per_second"] == 2.0


# Refusals


REFUSED = [
    ({"values": "int3"}, "values must be one of same, int8, int4, got 'int3'"),
    ({"seconds": 0}, "seconds must be a number above 0, got 0"),
    ({"perplexity": ["none", "builtin"]}, "perplexity none stands alone, got none, builtin"),
    ({"limit": 0}, "limit must be at least 1, got 0"),
    ({"plot": "plot.jpg"}, "the plot is a PNG file, got 'plot.jpg'"),
    ({"plot": "none/plot.png"}, "no such folder for the plot: 'none'"),
    ({"plot": "mine.png"}, "'mine.png' is there and no plot of bench; name another with --plot FILE"),
    ({"perplexity": "no-such-text"}, "no-such-text"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_bad_input_is_refused_in_one_line_before_any_work(options, said, pruned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.png").write_bytes(b"a picture of my own")
    monkeypatch.setattr(bench, "products", lambda *_: pytest.fail("work began"))
    with pytest.raises(ValueError, match=re.escape(said)) as told:
        llmprune.bench(pruned, **options)
    assert "\n" not in str(told.value) and len(str(told.value)) < 300
    assert Path("mine.png").read_bytes() == b"a picture of my own"


def test_a_model_with_nothing_sparse_is_refused(make_llama):
    with pytest.raises(
        ValueError, match=r"has no sparse matrix, .*: prune it first, or .*--values int8 or int4"
    ):
        llmprune.bench(make_llama(), perplexity="none")


def test_rounding_a_packed_folder_is_refused(pruned, tmp_path):
    llmprune.convert(pruned, to="packed", output=tmp_path / "packed")
    with pytest.raises(
        ValueError, match="is packed already; values int8 are for dense folders, leave them out"
    ):
        llmprune.bench(tmp_path / "packed", values="int8")


def test_without_a_tokenizer_there_is_no_perplexity(make_llama, tmp_path):
    tokens = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(1))
    model = make_llama(tokenizer=False)
    llmprune.prune(model, recipe="magnitude", sparsity=0.7, calibration=tokens, output=tmp_path / "out")
    with pytest.raises(ValueError, match=r"has no tokenizer, which perplexity needs; .* --perplexity none"):
        llmprune.bench(tmp_path / "out")
    found = llmprune.bench(tmp_path / "out", perplexity="none", products_only=True, seconds=0.01)
    assert found["perplexity"] == {}


def test_too_little_disk_or_memory_is_told_with_the_way_out(pruned, monkeypatch):
    monkeypatch.setattr(benching.devices, "available_memory", lambda: 1 << 20)
    with pytest.raises(ValueError, match=r"needs about .* of memory, and 1\.0 MB are free; --products-only"):
        llmprune.bench(pruned, **QUICK)
    monkeypatch.setattr(benching.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"which has 0\.0 MB free; set TMPDIR .* or use --products-only"):
        llmprune.bench(pruned, **QUICK)


# What is printed and drawn


def test_the_plot_is_a_png_that_only_bench_replaces(measured):
    path = Path(measured["plot"])
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and b"llmprune bench" in data[:4096]
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width > 1000 and height > 400
    drawing.check_picture(path)
    drawing.draw_bench({**measured, "whole": None}, path)
    assert path.read_bytes() != data


def test_the_plot_stands_in_the_current_folder_but_not_in_the_models(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert default_plot("model") == default_plot("./model/") == Path("model-bench.png")
    assert default_plot("owner/name") == Path("name-bench.png") and default_plot("demo") == Path(
        "demo-bench.png"
    )
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"in the model's own folder .*; name another place with --plot FILE"
    ):
        default_plot(".")


@pytest.mark.parametrize("width", [40, 80, None])
def test_the_screen_says_what_was_measured_at_any_width(width, measured, monkeypatch, capsys):
    from llmprune.terminal.bench import print_bench
    from llmprune.terminal.console import Screen

    monkeypatch.setenv("COLUMNS", str(width)) if width else monkeypatch.delenv("COLUMNS", raising=False)
    print_bench(Screen(), {**measured, "machine": measured["machine"] | {"busy": 0.5, "gpu": True}})
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for line in out.splitlines():
        assert width is None or len(line) <= width or " " not in line.strip().removeprefix("plot  "), line
    text = " ".join(out.split())
    assert "other programs take 50% of the processors" in text and "GPU not measured" in text
    for said in ("Benchmark of pruned", "kernels", "weight files", "memory", "loading", "perplexity builtin"):
        assert said in text, said
    for said in (
        "Whole model, tokens per second",
        "256 and 2048 tokens are more than",
        "Products, packed faster by",
    ):
        assert said in text, said
    assert f"{measured['whole']['tokens']['16']['faster_by']:.2f} x" in text
    assert f"{measured['products']['all']['256']['faster_by']:.2f} x" in text


def test_json_is_one_object_with_everything_else_beside(pruned, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = typed("bench", pruned, "--products-only", "--json", "--seconds", 0.01, "--limit", 2)
    found = json.loads(out)
    assert code == 0 and found["plot"] == "pruned-bench.png" and Path(found["plot"]).is_file()
    assert "Benchmark of pruned" in err and set(found) >= {"machine", "bytes", "products", "perplexity"}
    assert found["machine"]["kernels"] and found["machine"]["threads"] == torch.get_num_threads()
    assert typed("bench", pruned, "--products-only", "--quiet", "--seconds", 0.01, "--limit", 2) == (
        0,
        "",
        "",
    )


# The end of a run


def test_a_run_measures_its_largest_matrices(tmp_path, monkeypatch):
    monkeypatch.setattr(glance, "_LEAST", 1 << 16)
    options = {"recipe": "magnitude", "sparsity": 0.7, "calibration": "builtin", "samples": 2, "seqlen": 16}
    record = llmprune.prune("demo", output=tmp_path / "dense", **options).record
    found = record["speed"]
    assert (found["shape"], found["count"], found["values"]) == ([512, 192], 12, "same")
    said = figures.speed_measured(record)
    if "tokens" in found:  # there is a compiler
        for entry in found["tokens"].values():
            assert entry["faster_by"] == entry["dense_seconds"] / entry["packed_seconds"]
        assert f"packed {found['tokens']['1']['faster_by']:.2f} x the speed of dense at 1 token" in said
    assert found["kernels"] in said
    assert record["totals"]["seconds"]["measure"] > 0
    report, card = ((tmp_path / "dense" / name).read_text() for name in ("report.html", "README.md"))
    assert "x the speed of dense" in report and "x the speed of dense" not in card
    assert "Packed it takes" in card and "neither smaller on disk nor faster" in card
    for values, kept in (("same", True), ("int8", False)):
        llmprune.convert(tmp_path / "dense", to="packed", values=values, output=tmp_path / values)
        other = json.loads((tmp_path / values / "llmprune.json").read_text())
        assert ("speed" in other) == kept
        assert other["totals"]["bytes"]["packed"] == other["totals"]["bytes"]["written"]


def test_tiny_matrices_are_not_measured(pruned):
    record = json.loads((pruned / "llmprune.json").read_text())
    small = record["speed"]["small"]
    assert small == max((row["shape"] for row in record["matrices"]), key=lambda shape: shape[0] * shape[1])
    assert f"not measured: with matrices of at most {small[0]} x {small[1]}" in figures.speed_measured(record)
    assert "measure" not in record["totals"]["seconds"]


def test_without_native_code_the_run_says_so(pruned, monkeypatch):
    monkeypatch.setattr(glance.library, "available", lambda: False)
    monkeypatch.setattr(glance.library, "status", lambda: "no native kernel here: no speed-up (no compiler)")
    matrices = bench.Matrices(counting_skeleton(pruned, False, None), read_folder(pruned)[1])
    found = glance.speed(matrices, 1 << 20, 1 << 30)
    record = json.loads((pruned / "llmprune.json").read_text()) | {"speed": found}
    assert figures.speed_measured(record) == "no native kernel here: no speed-up (no compiler)"


def record_of(dense, written, **more):
    return {"totals": {"bytes": {"dense": dense, "written": written, **more}}}


def test_the_remark_on_size_is_of_the_record():
    dense = figures.size_remark(record_of(10_000_000, 10_000_500, packed=4_000_000))
    assert "neither smaller on disk nor faster" in dense and "4.0 MB instead of 10.0 MB (40%)" in dense
    assert "too few weights are zero" in figures.size_remark(record_of(10, 11, packed=10))
    assert "llmprune bench" in figures.size_remark(record_of(10, 11)), "a record of an early version"
    packed = record_of(10_000_000, 4_000_000, packed=4_000_000) | {"format": {"name": "packed"}}
    assert "the kept values and a bit per weight are stored, 4.0 MB instead of 10.0 MB (40%)" in (
        figures.size_remark(packed)
    )


@pytest.mark.parametrize(
    ("sparsity", "said"),
    [
        (0.5, "of every pruned matrix the kept values, rounded to 4 bits, and a bit per weight are stored"),
        (0.0, "of every matrix all values, rounded to 4 bits, are stored"),
    ],
)
def test_the_remark_says_what_is_stored_of_rounded_matrices(
    tiny_llama, calibration_tokens, tmp_path, sparsity, said
):
    options = {"recipe": "wanda", "sparsity": sparsity, "calibration": calibration_tokens}
    made = llmprune.prune(tiny_llama, format="packed", values="int4", output=tmp_path / "out", **options)
    assert said in figures.size_remark(made.record)
    masks = {name for name in weights(tmp_path / "out") if name.endswith("_mask")}
    assert bool(masks) == (sparsity > 0)
