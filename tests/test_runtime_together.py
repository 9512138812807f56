"""Packed layers that share the product of one input: when they do, and that nothing else changes by it."""

import copy
import pickle
import threading

import pytest
import torch
from packed_matrices import Case, pattern, rows_of_x
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmprune.checkpoint.packed_tensor import Layout
from llmprune.kernels import library, products
from llmprune.runtime.layers import PackedLinear, together

COLUMNS = 192
NATIVE = pytest.mark.skipif(not library.available(), reason="no C compiler here")


def layer(rows, values=torch.bfloat16, seed=0, bias=False):
    """A packed layer, and its parts."""
    case = Case((rows, COLUMNS), values, pattern((rows, COLUMNS), "some", seed), seed)
    layout = Layout(rows, COLUMNS, torch.bfloat16, bits=case.bits, whole=case.mask is None)
    made = PackedLinear(
        layout, len(case.values), nn.Parameter(torch.randn(rows).bfloat16()) if bias else None
    )
    for part, tensor in zip(("", "_mask", "_rows", "_scale"), case.parts, strict=True):
        if tensor is not None:
            made._buffers[f"weight{part}"] = tensor
    made.check("x")
    return made.requires_grad_(False)


class Block(nn.Module):
    """Three layers of one input, as q, k and v."""

    def __init__(self, *layers):
        super().__init__()
        self.a, self.b, self.c = layers
        together(layers)

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x)


def block(values=(torch.bfloat16,) * 3, **more):
    return Block(*(layer(rows, v, rows, **more) for rows, v in zip((5, 8, 3), values, strict=True)))


def alone(module, x):
    """What the layers give without one another."""
    found = []
    for each in (module.a, module.b, module.c):
        y = products.packed_linear(x, *each.packed())
        found.append(y if each.bias is None else y + each.bias)
    return found


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def calls(monkeypatch):
    """How many matrices each native product had."""
    seen, real = [], products._Native.__call__

    def noted(self, *rest):
        seen.append(self._count)
        return real(self, *rest)

    monkeypatch.setattr(products._Native, "__call__", noted)
    return seen


@NATIVE
@pytest.mark.parametrize(
    "values", [torch.bfloat16, torch.float32, "int8", "int4", "int8 whole", "int4 whole"]
)
@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_one_input_share_a_product(values, bias, calls):
    module = block((values,) * 3, bias=bias)
    with torch.no_grad():
        for rows in (1, 3, 32, 1):
            x = rows_of_x(rows, COLUMNS, torch.bfloat16, rows).view(1, rows, COLUMNS)
            wanted = alone(module, x)
            calls.clear()
            assert same(module(x), wanted)
        assert calls == [3]
        many = rows_of_x(40, COLUMNS, torch.bfloat16)
        assert same(module(many), alone(module, many))


@NATIVE
def test_an_input_that_changed_is_noticed(calls):
    module, x = block(), rows_of_x(1, COLUMNS, torch.bfloat16)
    with torch.no_grad():
        module(x), module(x)
        before = alone(module, x)
        calls.clear()
        a = module.a(x)
        assert calls == [3]
        x.add_(1)
        b = module.b(x)
        assert torch.equal(a, before[0]) and not torch.equal(b, before[1])
        assert torch.equal(b, alone(module, x)[1]) and torch.equal(module.c(x), alone(module, x)[2])
        assert torch.equal(module.b(x.clone()), b)


@NATIVE
def test_in_inference_mode_nothing_is_shared(calls):
    module = block()
    with torch.inference_mode():
        x = rows_of_x(1, COLUMNS, torch.bfloat16)
        for _ in range(3):
            calls.clear()
            a = module.a(x)
            x += 1
            assert torch.equal(module.b(x), alone(module, x)[1]) and not torch.equal(a, alone(module, x)[0])
            assert max(calls) == 1


@NATIVE
def test_a_result_that_nobody_wanted_is_not_made_again(calls):
    module, x = block(), rows_of_x(1, COLUMNS, torch.bfloat16)
    with torch.no_grad():
        module(x), module(x)
        other = x * 2
        for _ in range(2):  # b has an input of its own now, as in attention to another text
            y = x.clone()
            found = module.a(y), module.b(other), module.c(y)
            assert torch.equal(found[1], alone(module, other)[1])
            assert torch.equal(found[0], alone(module, y)[0]) and torch.equal(found[2], alone(module, y)[2])
        calls.clear()
        module.a(y), module.b(other)
        assert 3 not in calls
        for _ in range(3):
            z = x.clone()
            assert same(module(z), alone(module, z))


@NATIVE
def test_matrices_of_several_kinds_and_dense_ones_are_left_apart(calls):
    module = block((torch.bfloat16, "int8", torch.bfloat16))
    module.dense = nn.Linear(COLUMNS, 4, bias=False).bfloat16()
    x = rows_of_x(1, COLUMNS, torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            wanted = alone(module, x)
            calls.clear()
            assert same(
                (*module(x), module.dense(x)), (*wanted, nn.functional.linear(x, module.dense.weight))
            )
        assert calls == [2, 1]  # the first and the last, then the one of bytes


@NATIVE
def test_new_weights_are_used_at_once():
    module, x = block(), rows_of_x(1, COLUMNS, torch.bfloat16)
    with torch.no_grad():
        module(x), module(x)
        module.b._buffers["weight"].mul_(2)
        assert same(module(x), alone(module, x))
        for name, tensor in module.c._buffers.items():
            module.c._buffers[name] = tensor.clone()
        module.c._buffers["weight"] *= 3
        assert same(module(x), alone(module, x))


@NATIVE
def test_copies_and_pickles_learn_anew(calls):
    module, x = block(), rows_of_x(1, COLUMNS, torch.bfloat16)
    with torch.no_grad():
        module(x), module(x)
        wanted, keys = alone(module, x), list(module.state_dict())
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.a.together is other.b.together is not module.a.together
            assert list(other.state_dict()) == keys
            for _ in range(3):
                calls.clear()
                assert same(other(x), wanted)
            assert calls == [3]


@NATIVE
def test_threads_do_not_take_results_of_one_another():
    module, wrong = block(), []

    def work(seed):
        for number in range(200):
            x = rows_of_x(1, COLUMNS, torch.bfloat16, 1000 * seed + number)
            with torch.no_grad():
                if not same(module(x), alone(module, x)):
                    wrong.append((seed, number))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_compiles_and_is_seen_where_somebody_looks():
    module, x = block(), rows_of_x(2, COLUMNS, torch.bfloat16)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        module(x)
        for _ in range(2):
            assert same(compiled(x), module(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert [y.shape for y in module(mode.from_tensor(x))] == [(2, 5), (2, 8), (2, 3)]
    assert [y.shape for y in copy.deepcopy(module).to("meta")(x.to("meta"))] == [(2, 5), (2, 8), (2, 3)]
    assert not module.a.prepared().takes(x.clone().requires_grad_())


def test_the_operator_of_several_matrices():
    cases = [Case((rows, 192), "int8", pattern((rows, 192), "some", rows), rows) for rows in (4, 7)]
    packed = [case.checked() for case in cases]
    for n in (0, 1, 16, 20, 40):
        x = rows_of_x(n, 192, torch.float32)
        wanted = [products.packed_linear(x, *each) for each in packed]
        assert same(products.packed_linears(x, packed), wanted)
    values, masks, rows, scales = ([each[part] for each in packed] for part in range(4))
    torch.library.opcheck(
        torch.ops.llmprune.packed_linears.default,
        (x, values, masks, rows, scales, 192, 8, False),
        test_utils=("test_schema", "test_faketensor"),
    )
    with pytest.raises(ValueError, match="one to 8 matrices of one kind"):
        products.packed_linears(x, packed * 5)
    with pytest.raises(ValueError, match="one to 8 matrices of one kind"):
        whole = Case((4, 192), "int8 whole", None).checked()
        products.packed_linears(x, [packed[0], whole])
