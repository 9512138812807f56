"""What `accelerate` decides. There is no GPU here: seconds are given, and what a GPU alone computes is
replaced by its dense counterpart; all else is the real thing.
"""

import copy
import functools
import importlib.util

import pytest
import torch
import transformers
from packed_matrices import Case, pattern
from test_checkpoint_packed import make, prune
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import llmprune
from llmprune.checkpoint.packed_tensor import Layout
from llmprune.kernels import gpu, products, ways
from llmprune.runtime import accelerate, semi_structured
from llmprune.runtime.layers import PackedLinear
from llmprune.runtime.semi_structured import TwoOfFourLinear
from llmprune.runtime.standins import PackedStack

ROWS = (1, 16, 256)


class Sparse(torch.Tensor):
    """Stands for a semi-structured tensor: a tensor of another type."""


class Clock:
    """Seconds that were decided beforehand: 1 for a dense product, else by way and rows of x."""

    def __init__(self, seconds):
        self.seconds, self.calls = seconds, []

    def __call__(self, call, device):
        call()
        x, weight = call.args[:2]
        if call.func is ways.multiply:
            way = call.args[3].name
        else:
            way = "sparse" if isinstance(weight, Sparse) else "dense"
        self.calls.append((way, len(x)))
        return 1.0 if way == "dense" else self.seconds(way, len(x))


@pytest.fixture
def gpu_here(monkeypatch):
    """As if the CPU were a GPU of NVIDIA, with one backend."""
    monkeypatch.setattr(accelerate.devices, "on_nvidia", lambda tensor: True)
    monkeypatch.setattr(semi_structured, "backends", lambda: ("cutlass",))
    monkeypatch.setattr(
        semi_structured, "converted", lambda weight, backend: weight.detach().as_subclass(Sparse)
    )


def two_of_four(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * pattern(shape, "2:4", seed)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(two_of_four((96, 64)))
        self.to(torch.bfloat16)


def by_name(model, clock, rows=ROWS):
    return {layer.name: layer for layer in accelerate.measured(model, rows, clock)}


def test_a_layer_that_wins_everywhere_is_converted(gpu_here):
    model = Small()
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    wanted = model.up(x)
    found = by_name(model, Clock(lambda way, n: 0.5))
    assert isinstance(model.up.weight, nn.Parameter) and type(model.up) is nn.Linear
    assert found["up"].ratios == dict.fromkeys(ROWS, 2.0) and not found["up"].left
    assert found["up"].ways == dict.fromkeys(ROWS, "cutlass")
    assert torch.equal(model.up(x), wanted)
    assert found["down"].left == "its weight does not hold 2:4" and not found["down"].ratios
    assert "up [96, 64] 2:4, 1: 2.00 (cutlass), 16: 2.00 (cutlass)" in found["up"].line()


def test_a_layer_that_wins_for_many_rows_keeps_both(gpu_here, monkeypatch):
    model = Small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = by_name(model, Clock(lambda way, n: 0.8 if n >= 256 else 1.3))["up"]
    assert found.ways == {1: "dense", 16: "dense", 256: "cutlass"} and found.ratios[256] == 1.25
    assert isinstance(model.up, TwoOfFourLinear)
    taken = []
    monkeypatch.setattr(
        nn.functional, "linear", lambda x, weight, bias: taken.append(isinstance(weight, Sparse)) or x
    )
    for n in (1, 16, 17, 256, 257, 4000):
        model.up(torch.zeros(n, 64, dtype=torch.bfloat16))
    model.up(torch.zeros(4, 8, 64, dtype=torch.bfloat16))
    assert taken == [False, False, True, True, True, True, True]
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert by_name(model, Clock(lambda way, n: 0.1))["up"].left == "done before"
    model.up.to("cpu")
    assert model.up.sparse is not None
    model.up.to("meta")
    assert model.up.sparse is None


@pytest.mark.parametrize("seconds", [1.0, 0.97, 3.0])
def test_a_layer_that_does_not_win_is_left(gpu_here, seconds):
    model = Small()
    weight = model.up.weight
    found = by_name(model, Clock(lambda way, n: seconds))["up"]
    assert model.up.weight is weight and type(model.up) is nn.Linear
    assert found.left == "2:4 is not faster" and set(found.ways.values()) == {"dense"}


@pytest.mark.parametrize("wrong", [lambda w: w * 1.1, lambda w: w * torch.nan, lambda w: w.roll(1, 0)])
def test_a_wrong_result_is_never_taken(gpu_here, monkeypatch, wrong):
    monkeypatch.setattr(semi_structured, "backends", lambda: ("cusparselt", "cutlass"))
    monkeypatch.setattr(
        semi_structured,
        "converted",
        lambda w, backend: (wrong(w.detach()) if backend == "cusparselt" else w.detach()).as_subclass(Sparse),
    )
    model = Small()
    found = by_name(model, Clock(lambda way, n: 0.5))["up"]
    assert found.ways == dict.fromkeys(ROWS, "cutlass")
    assert "its result differs from the dense product" in found.refused["cusparselt"]
    monkeypatch.setattr(semi_structured, "backends", lambda: ("cusparselt",))
    model = Small()
    found = by_name(model, Clock(lambda way, n: 0.5))["up"]
    assert found.left == "no backend takes it" and type(model.up.weight) is nn.Parameter
    assert "its result differs" in found.line()


def test_the_faster_backend_for_most_rows_is_taken(gpu_here, monkeypatch):
    monkeypatch.setattr(semi_structured, "backends", lambda: ("cusparselt", "cutlass"))
    made = []
    real = semi_structured.converted

    def converted(weight, backend):
        made.append(real(weight, backend))
        return made[-1]

    monkeypatch.setattr(semi_structured, "converted", converted)
    clock = Clock(lambda way, n: 0.5)
    seconds = {0: 0.9, 1: 0.6}
    real_call = clock.__call__

    def by_backend(call, device):
        for number, tensor in enumerate(made):
            if call.args[1] is tensor:
                return seconds[number]
        return real_call(call, device)

    assert by_name(Small(), by_backend)["up"].ways[256] == "cutlass"


def test_what_torch_refuses_is_named():
    """The real conversion, which wants a GPU."""
    model = Small()
    patched = pytest.MonkeyPatch()
    with patched.context() as context:
        context.setattr(accelerate.devices, "on_nvidia", lambda tensor: True)
        found = by_name(model, Clock(lambda way, n: 0.5))["up"]
    assert found.left == "no backend takes it" and "CUDA" in found.refused["cutlass"]


def test_layers_that_cannot_be_tried_are_left_and_named(gpu_here):
    model = Small()
    model.single = nn.Linear(64, 96)
    model.own = type("Own", (nn.Linear,), {})(64, 64)
    model.moved = nn.Linear(64, 64)
    model.moved._hf_hook = object()
    model.one, model.other = nn.Linear(64, 64), nn.Linear(64, 64)
    model.other.weight = model.one.weight
    found = by_name(model, Clock(lambda way, n: 0.1))
    assert found["single"].left == "its weight is float32; bfloat16 or float16 is wanted"
    assert "it is a Own of its own" in found["own"].left
    assert "load the model on one GPU" in found["moved"].left
    assert found["one"].left == found["other"].left == "it shares its weight with another layer"


def test_two_of_four_is_what_torch_can_keep():
    weight = two_of_four((32, 64)).bfloat16()
    assert semi_structured.holds_two_of_four(weight)
    packed = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*packed), weight)
    weight[5, 8:11] = 1
    assert not semi_structured.holds_two_of_four(weight)
    assert not semi_structured.holds_two_of_four(torch.zeros(8, 6))
    assert semi_structured.holds_two_of_four(torch.zeros(8, 8))


# Packed layers


def packed_layer(values=torch.bfloat16, shape=(48, 130)):
    case = Case(shape, values, pattern(shape, "some"))
    layout = Layout(*shape, values if case.bits == 16 else torch.bfloat16, bits=case.bits)
    layer = PackedLinear(layout, len(case.values), None)
    for part, tensor in zip(("", "_mask", "_rows", "_scale"), case.parts, strict=True):
        if tensor is not None:
            layer._buffers[f"weight{part}"] = tensor
    layer.check("layer")
    return layer, case


@pytest.fixture
def triton_here(gpu_here, monkeypatch):
    """As if Triton were here: its products are computed on the CPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(
        torch.ops.llmprune,
        "packed_linear_triton",
        lambda x, *rest: products.packed_linear(x, *rest[:6]),
    )


@pytest.mark.parametrize("values", [torch.bfloat16, "int8", "int4"], ids=str)
def test_a_packed_layer_takes_the_fastest_way_for_each_row_count(triton_here, values):
    layer, case = packed_layer(values)
    model = nn.ModuleDict({"layer": layer})
    best = {("fused 8x4", 1): 0.5, ("fused 16x8", 16): 0.8, ("triton", 256): 1.2}
    clock = Clock(lambda way, n: best.get((way, n), 2.0))
    found = by_name(model, clock)["layer"]
    assert found.ways == {1: "fused 8x4", 16: "fused 16x8", 256: "triton"} and not found.left
    assert found.ratios == {1: 2.0, 16: 1.25, 256: 1 / 1.2}
    assert [way for _, way in layer.plan.steps] == [
        ways.Way("fused", (8, 4)),
        ways.Way("fused", (16, 8)),
        ways.TRITON,
    ]
    assert ("fused 4x4", 16) not in clock.calls and ("fused 16x4", 256) not in clock.calls
    x = torch.randn(2, 3, 130, dtype=torch.bfloat16)
    assert torch.equal(layer(x), products.packed_linear(x, *case.checked()))
    assert by_name(model, Clock(lambda way, n: 1.0 if way == "torch" else 2.0))["layer"].left


def test_kernels_that_fail_or_are_wrong_are_named_and_not_taken(triton_here, monkeypatch):
    layer, _ = packed_layer()

    def call(x, *rest):
        if rest[-1] == (4, 4):
            raise OSError("no C compiler\nat line 5")
        right = products.packed_linear(x, *rest[:6])
        return right * 1.5 if rest[-1] == (8, 4) else right

    monkeypatch.setattr(torch.ops.llmprune, "packed_linear_triton", call)
    clock = Clock(lambda way, n: {"fused 16x8": 0.5}.get(way, 2.0))
    found = by_name(nn.ModuleDict({"layer": layer}), clock)["layer"]
    assert found.refused["fused 4x4"] == "no C compiler"
    assert "differs from the dense product by 0.5" in found.refused["fused 8x4"]
    assert found.ways[1] == "fused 16x8"


def test_without_triton_memory_is_saved_and_no_more(gpu_here, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    layer, _ = packed_layer()
    found = by_name(nn.ModuleDict({"layer": layer}), Clock(lambda way, n: 4.0))["layer"]
    assert layer.plan is None and found.left == "nothing is faster than unpacking with torch"
    assert found.ratios == dict.fromkeys(ROWS, 0.25)


def test_a_packed_layer_that_is_wrong_everywhere_stops_it(gpu_here, monkeypatch):
    monkeypatch.setattr(ways, "multiply", lambda x, *rest: x.new_zeros(len(x), 48))
    with pytest.raises(ValueError, match="no product with layer is right"):
        by_name(nn.ModuleDict({"layer": packed_layer()[0]}), Clock(lambda way, n: 1.0))


# Moving


def test_what_was_measured_does_not_move(triton_here):
    layer, _ = packed_layer()
    by_name(nn.ModuleDict({"layer": layer}), Clock(lambda way, n: 2.0 if way == "torch" else 0.5))
    plan = layer.plan
    layer.to("cpu")
    assert layer.plan is plan is not None
    assert layer.packed().rows.device == torch.device("cpu")
    layer.to("meta")
    assert layer.plan is None and layer.packed().rows.device == torch.device("meta")
    assert layer.weight.device == torch.device("meta")


def test_stacks_of_experts_move_with_their_model(tmp_path):
    prune(make("mixtral", tmp_path / "in"), tmp_path / "packed", format="packed")
    model = llmprune.load(tmp_path / "packed")
    moved = copy.deepcopy(model).to("meta")
    for one, device in ((model, "cpu"), (moved, "meta")):
        stacks = [v for m in one.modules() for v in vars(m).values() if isinstance(v, PackedStack)]
        parts = [t for s in stacks for pieces in s._matrices for p in pieces for t in p.parts.values()]
        assert stacks and {str(s.device) for s in stacks} == {str(t.device) for t in parts} == {device}
    with torch.no_grad():
        assert model(torch.arange(6)[None]).logits.isfinite().all()


def test_packed_parts_off_the_cpu_go_the_way_of_torch(monkeypatch):
    """The operator for GPUs, called on the CPU; and nothing native is asked for."""
    for values in (torch.bfloat16, "int8", "int4"):
        layer, case = packed_layer(values)
        x = torch.randn(2, 20, 130, generator=torch.Generator().manual_seed(0)).bfloat16()
        packed = layer.packed()
        with monkeypatch.context() as context:
            context.setattr("llmprune.kernels.library.loaded", lambda: pytest.fail("native code"))
            y = products._packed_linear_on_gpu(x, *packed, False)
        wanted = case.product(x.view(40, 130)).view(2, 20, 48)
        assert float((y.double() - wanted).norm() / wanted.norm()) < 4e-3


# The function


def test_it_wants_a_model_on_a_gpu():
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
        )
    )
    with pytest.raises(ValueError, match=r"the model is on cpu; move it with model\.to\('cuda'\)$"):
        llmprune.accelerate(model)
    with pytest.raises(ValueError, match=r"model must be a transformers model in memory, got 'out'"):
        llmprune.accelerate("out")
    for rows in ([], 0, [1, 0], [1.5], "16", [True]):
        with pytest.raises(ValueError, match="rows must be a whole number from 1, or a list of them"):
            llmprune.accelerate(model, rows=rows)
    with pytest.raises(ValueError, match="report must be a function that takes text"):
        llmprune.accelerate(model, report=5)


def test_it_reports_and_returns_every_layer(gpu_here, monkeypatch):
    clock, said = Clock(lambda way, n: 0.5), []
    monkeypatch.setattr(accelerate, "measured", functools.partial(accelerate.measured, clock=clock))
    monkeypatch.setattr("llmprune.api.acceleration.devices.on_nvidia", lambda tensor: True)
    done = llmprune.accelerate(Small(), rows=[16, 1, 16], report=said.append)
    assert done["rows"] == [1, 16] and done["changed"] == 1 and len(said) == len(done["layers"]) == 2
    assert done["layers"][0]["ways"] == {1: "cutlass", 16: "cutlass"}
    assert "left: its weight does not hold 2:4" in said[1]


def test_a_layer_with_a_plan_compiles():
    layer, case = packed_layer()
    steps = ((1, ways.Way("fused", (8, 4))), (16, ways.TORCH))
    layer.plan = ways.Plan(*gpu.prepared(layer.packed()), steps)
    x = torch.randn(5, 130, dtype=torch.bfloat16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), products.packed_linear(x, *case.checked()))
    fake = torch.ops.llmprune.packed_linear_triton(
        *(t.to("meta") if isinstance(t, torch.Tensor) else t for t in (x, *layer.packed())),
        layer.plan.starts.to("meta"),
        layer.plan.bases.to("meta"),
        [8, 4],
    )
    assert fake.shape == (5, 48) and fake.dtype == x.dtype


def test_torchs_own_tensors_are_parameters_and_not_converted_twice(gpu_here):
    model = Small()
    packed, meta = sparse_semi_structured_from_dense_cutlass(model.up.weight.detach())
    made = SparseSemiStructuredTensorCUTLASS(model.up.weight.shape, packed, meta, None, None, None)
    model.up.weight = nn.Parameter(made, requires_grad=False)
    assert by_name(model, Clock(lambda way, n: 0.1))["up"].left == "done before"
    assert type(model.up.weight) is SparseSemiStructuredTensorCUTLASS


def test_seconds_are_the_median_of_what_was_called():
    calls = []
    seconds = accelerate.devices.seconds_of(lambda: calls.append(1), torch.device("cpu"), times=5)
    assert len(calls) == 3 + 5 and 0 <= seconds < 1
