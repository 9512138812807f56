"""The prunable matrices of a model, as [R, C] (out_features, in_features) however they are stored.

"As stored" means in the layout of the checkpoint, which is [C, R] for `Conv1D` and for some experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from llmprune.model.activations import BlockInputs
from llmprune.model.conversion import Group, Piece, Stored, Tracer
from llmprune.model.products import Products, Seen
from llmprune.model.skeleton import Skeleton

_PROBE = 32  # tokens of two sequences that pass a block to see how it uses its stacked parameters
_SMALL = 1 << 21  # weights of a parameter that the probe draws


@dataclass(frozen=True, eq=False)
class Target:
    """One prunable matrix: where it is stored, and where the model has it.

    Attributes:
        name: of its module, or of the stored matrix where it is no module's own.
        key: its name in the record and among the masks: the tensor's, for a stack with the matrix's number.
        tensor: the name of the tensor in the checkpoint.
        index: which matrix of the tensor, where that stacks several; else None.
        transposed: whether it is stored as [C, R].
        shape: (R, C).
        pieces: where its rows are in the parameters of the model.
        owners: for each of those parameters its module and its name there.
        turned: the parameters that hold their matrices as [C, R].
        module: a linear layer whose weight is this matrix and nothing else; None for others.
        routed: whether it belongs to an expert, which sees only some of the tokens.
    """

    name: str
    key: str
    tensor: str
    index: int | None
    transposed: bool
    shape: tuple[int, int]
    pieces: tuple[Piece, ...]
    owners: Mapping[str, tuple[nn.Module, str]] = field(repr=False)
    turned: frozenset[str] = frozenset()
    module: nn.Module | None = field(default=None, repr=False)
    routed: bool = False

    @property
    def weight_name(self) -> str:
        """The name of its weight, by which everything random about it is seeded."""
        return f"{self.name}.weight"

    @property
    def layer(self) -> nn.Module | None:
        """The linear layer that computes with it or its first rows; None where it is in a stack."""
        return None if self.pieces[0].expert is not None else self.owners[self.parameter][0]

    @property
    def place(self) -> tuple[str, int | None]:
        """The parameter that holds its first rows, and which matrix of that parameter."""
        return self.parameter, self.pieces[0].expert

    @property
    def parameter(self) -> str:
        """The name of the first parameter that holds rows of it."""
        return self.pieces[0].parameter

    def loaded(self, parameter: str | None = None) -> Tensor:
        """A parameter that holds rows of it, the first one if none is named."""
        owner, leaf = self.owners[parameter or self.parameter]
        return owner._parameters[leaf].detach()  # type: ignore[union-attr]

    def _place(self, loaded: Tensor, piece: Piece) -> Tensor:
        """The rows of a piece in a loaded parameter, a view [n, C] where `rows` is a slice."""
        matrix = loaded if piece.expert is None else loaded[piece.expert]
        matrix = matrix.T if piece.parameter in self.turned else matrix
        return matrix[piece.rows]

    def gather(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The matrix [R, C] from the parameters that hold it, by name."""
        first = self.pieces[0]
        if len(self.pieces) == 1 and first.stored == slice(0, self.shape[0]):
            return self._place(parameters[first.parameter], first)
        whole = parameters[first.parameter].new_empty(self.shape)
        for piece in self.pieces:
            whole[piece.stored] = self._place(parameters[piece.parameter], piece)
        return whole

    def scatter(self, weight: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Write a matrix [R, C] into the parameters that hold it, in place."""
        for piece in self.pieces:
            matrix = parameters[piece.parameter]
            matrix = matrix if piece.expert is None else matrix[piece.expert]
            matrix = matrix.T if piece.parameter in self.turned else matrix
            matrix[piece.rows] = weight[piece.stored].to(matrix.device, matrix.dtype)

    @property
    def device(self) -> torch.device:
        """Where the model has it."""
        return self.loaded().device

    def part(self, stored: Tensor) -> Tensor:
        """The matrix as stored, a view of its tensor."""
        return stored if self.index is None else stored[self.index]

    def oriented(self, part: Tensor) -> Tensor:
        """A [R, C] view of a matrix as stored."""
        return part.T if self.transposed else part

    def read(self, stored: Tensor) -> Tensor:
        """The weight as [R, C] in float32 on the model's device; a copy only if necessary.

        `stored` is its tensor from the checkpoint. It is used if the model's weight is not float32, since
        then it may have been rounded when it was loaded.
        """
        loaded = self.loaded()
        if loaded.dtype == torch.float32 and self.module is not None:
            return self._place(loaded, self.pieces[0]).contiguous()
        return self.view(stored)

    def view(self, stored: Tensor) -> Tensor:
        """The matrix of a stored tensor as [R, C] in float32, on the model's device."""
        return self.oriented(self.part(stored)).to(self.device, torch.float32).contiguous()

    def stored(self, weight: Tensor) -> Tensor:
        """A weight [R, C] in the layout in which it is stored."""
        return (weight.T if self.transposed else weight).contiguous()

    def shared(self, stored: Tensor) -> Tensor | None:
        """The tensor of the checkpoint as a view of the parameter that was made from it, to hold it once.

        None where that is not possible: it is converted in another way, or has another dtype or device.
        """
        first = self.pieces[0]
        loaded = self.loaded()
        alike = loaded.dtype == stored.dtype and loaded.device == stored.device
        if first.expert is None or self.index is not None or len(self.pieces) > 1 or not alike:
            return None
        view = self._place(loaded, first)
        view = view.T if self.transposed else view
        return view if view.is_contiguous() and view.data_ptr() != stored.data_ptr() else None

    @torch.no_grad()
    def assign(self, part: Tensor) -> None:
        """Put a matrix as stored into the model, on its device and in its dtype.

        A parameter that is this matrix alone is replaced, any other is written to.
        """
        if self.module is not None:
            old: Tensor = self.module.weight  # type: ignore[assignment]
            self.module.weight = nn.Parameter(part.to(old.device, old.dtype), requires_grad=False)
        else:
            self.scatter(self.oriented(part), {name: self.loaded(name) for name in self.owners})


def targets_of(skeleton: Skeleton, block: str) -> list[Target]:
    """Every linear matrix of a block, in the order of its modules, those of experts included.

    Routers, gates of shared experts, convolutions and vectors are none.
    """
    if not skeleton.targets:
        skeleton.targets.update(_all_targets(skeleton))
    return skeleton.targets[block]


def all_targets(skeleton: Skeleton) -> list[Target]:
    """The targets of all blocks, in order."""
    return [target for block in skeleton.blocks for target in targets_of(skeleton, block)]


def _all_targets(skeleton: Skeleton) -> dict[str, list[Target]]:
    stacks = {name: _stacks(name, block) for name, block in skeleton.blocks.items()}
    turned = skeleton.turned = _turned(skeleton, stacks)
    tracer = Tracer(skeleton.model)
    found: dict[str, list[Target]] = {}
    for name, block in skeleton.blocks.items():
        targets = {t.key: t for t in _of_block(skeleton, name, block, turned, tracer)}
        found[name] = [t for t in targets.values() if t.tensor not in skeleton.shared]
    return found


def _stacks(name: str, block: nn.Module) -> list[str]:
    """Names of the parameters of a block that may stack the matrices of experts."""
    found = []
    for path, module in block.named_modules():
        if isinstance(module, _ConvNd):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1:
                found.append(".".join(part for part in (name, path, leaf) if part))
    return found


def _turned(skeleton: Skeleton, stacks: Mapping[str, list[str]]) -> dict[str, bool]:
    """Which stacked parameters enter matrix products, and whether as [C, R].

    One block of each kind is run on a few tokens to see it, with weights that take no memory.
    """
    if not any(stacks.values()):
        return {}
    vocabulary = int(skeleton.model.get_input_embeddings().weight.shape[0])
    tokens = torch.arange(2 * _PROBE).view(2, _PROBE) % vocabulary
    inputs = BlockInputs(skeleton, tokens, skeleton.device)
    known: dict[object, dict[str, bool]] = {}  # by kind of block: names in it
    turned: dict[str, bool] = {}
    for number, (block, module) in enumerate(skeleton.blocks.items()):
        if not stacks[block]:
            continue
        kind = type(module), tuple((n, tuple(p.shape)) for n, p in module.named_parameters())
        if kind not in known:
            known[kind] = _probed(skeleton, inputs, number, block)
        turned |= {f"{block}.{name}": way for name, way in known[kind].items()}
    return turned


@torch.no_grad()
def _probed(skeleton: Skeleton, inputs: BlockInputs, number: int, block: str) -> dict[str, bool]:
    """The stacked parameters that one block uses in matrix products, by name in it."""
    module, seen = skeleton.blocks[block], {}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in module.named_parameters():
        # Of large parameters one number, seen as often as needed: they take no memory, whatever their size.
        # Small ones, such as routers, are random, so that tokens go to different experts.
        shape = parameter.shape if parameter.numel() <= _SMALL else (1,) * parameter.ndim
        drawn = 0.02 * (1 + torch.randn(shape, generator=generator, dtype=torch.float32))
        weights[name] = drawn.to(skeleton.device, parameter.dtype).expand(parameter.shape)

    def note(product: Seen) -> None:
        seen[product.parameter] = product.transposed

    with Products({n: w for n, w in weights.items() if w.ndim == 3}, note):
        inputs.run(number, [0], weights)
    return seen


def _of_block(
    skeleton: Skeleton, name: str, block: nn.Module, turned: Mapping[str, bool], tracer: Tracer
) -> Iterator[Target]:
    from transformers.pytorch_utils import Conv1D

    experts = _expert_counts(name, block, turned)
    for path, module in block.named_modules():
        where = ".".join(part for part in (name, path) if part)
        if isinstance(module, (nn.Linear, Conv1D)):
            weight = f"{where}.weight"
            if not _is_router(where, module, experts) and weight in skeleton.group_of:
                routed = _in_list(block, path)
                for target in _of_parameter(skeleton, weight, isinstance(module, Conv1D), module, tracer):
                    yield replace(target, routed=routed)
        else:
            for leaf, _ in module.named_parameters(recurse=False):
                if f"{where}.{leaf}" in turned:
                    full = f"{where}.{leaf}"
                    for target in _of_parameter(skeleton, full, turned[full], None, tracer):
                        yield replace(target, routed=True)


def _in_list(block: nn.Module, path: str) -> bool:
    """Whether a module is one of several alike in a list, as the experts of older classes are."""
    parts = path.split(".")
    outer = (block.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))
    return any(isinstance(m, nn.ModuleList) and len(m) > 1 and len({type(c) for c in m}) == 1 for m in outer)


def _expert_counts(name: str, block: nn.Module, turned: Mapping[str, bool]) -> dict[str, int]:
    """How many experts there are in each module that holds some."""
    counts: dict[str, int] = {}
    for path, module in block.named_modules():
        where = ".".join(part for part in (name, path) if part)
        for leaf, parameter in module.named_parameters(recurse=False):
            if f"{where}.{leaf}" in turned:
                counts[where.rpartition(".")[0]] = len(parameter)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and "expert" in where.rpartition(".")[2]:
            counts[where.rpartition(".")[0]] = len(module)
    return counts


def _is_router(where: str, module: nn.Module, experts: Mapping[str, int]) -> bool:
    """Whether a linear layer chooses among the experts beside it, or weighs the shared one."""
    rows = int(module.weight.shape[0])  # type: ignore[index]
    return rows == 1 or any(
        where.startswith(f"{parent}.") and rows == count for parent, count in experts.items()
    )


def _of_parameter(
    skeleton: Skeleton, parameter: str, turned: bool, module: nn.Module | None, tracer: Tracer
) -> Iterator[Target]:
    """The stored matrices that a parameter is made from."""
    group = skeleton.group_of[parameter]
    if group.converter is not None:
        yield from _converted(skeleton, group, tracer)
        return
    owner, leaf = skeleton.owner(parameter)
    owners, tensor = {parameter: (owner, leaf)}, group.tensors[0]
    shape = tuple(owner.get_parameter(leaf).shape)
    matrices = range(shape[0]) if len(shape) == 3 else (None,)
    a, b = shape[-2:]
    size = (b, a) if turned else (a, b)
    name = parameter if module is None else parameter.rpartition(".")[0]
    for expert in matrices:
        suffix = "" if expert is None else f".{expert}"
        yield Target(
            name + suffix,
            tensor + suffix,
            tensor,
            expert,
            turned,
            size,
            (Piece(parameter, expert, slice(0, size[0]), slice(0, size[0])),),
            owners,
            frozenset((parameter,) if turned else ()),
            module,
        )


def _converted(skeleton: Skeleton, group: Group, tracer: Tracer) -> Iterator[Target]:
    shapes = {name: skeleton.source.tensors[name].shape for name in group.tensors}
    from transformers.pytorch_utils import Conv1D

    used: dict[str, bool] = {}
    for parameter in group.parameters:
        owner, leaf = skeleton.owner(parameter)
        if isinstance(owner, (nn.Linear, Conv1D)) and leaf == "weight":
            used[parameter] = isinstance(owner, Conv1D)
        elif parameter in skeleton.turned:
            used[parameter] = skeleton.turned[parameter]
    for stored in tracer.matrices(group, shapes, used):
        yield _target_of(skeleton, stored, used)


def _target_of(skeleton: Skeleton, stored: Stored, used: Mapping[str, bool]) -> Target:
    suffix = "" if stored.number is None else f".{stored.number}"
    parameters = dict.fromkeys(piece.parameter for piece in stored.pieces)
    owners = {name: skeleton.owner(name) for name in parameters}
    first = stored.pieces[0]
    alone = len(stored.pieces) == 1 and first.expert is None and first.rows == slice(0, stored.shape[0])
    whole = (
        alone
        and owners[first.parameter][0].get_parameter("weight").numel() == stored.shape[0] * stored.shape[1]
    )
    same = whole and stored.transposed == used[first.parameter]
    return Target(
        stored.tensor.removesuffix(".weight") + suffix,
        stored.tensor + suffix,
        stored.tensor,
        stored.number,
        stored.transposed,
        stored.shape,
        stored.pieces,
        owners,
        frozenset(name for name in parameters if used[name]),
        owners[first.parameter][0] if same else None,
    )


def left_dense(skeleton: Skeleton) -> tuple[str, ...]:
    """What is never a target: parts beside the language model, matrices around its blocks, and within them
    convolutions, routers and the like.
    """
    notes = []
    for name, tower in skeleton.towers().items():
        count = sum(p.numel() for p in tower.parameters())
        notes.append(f"{name} ({type(tower).__name__}, {count:,} weights), beside the language model")
    matrices = {n for n, p in skeleton.model.named_parameters() if p.ndim > 1 and min(p.shape) > 1}
    ends = (skeleton.model.get_input_embeddings(), skeleton.model.get_output_embeddings())
    known = {id(p) for module in ends if module is not None for p in module.parameters()}
    beside = tuple(f"{name}." for name in skeleton.towers())
    around = [n for n in skeleton.outside_blocks() if n in matrices and not n.startswith(beside)]
    around = [n for n in around if id(skeleton.model.get_parameter(n)) not in known]
    if around:
        notes.append(f"around the blocks: {_listed(around)}")
    pruned = {name for target in all_targets(skeleton) for name in target.owners}
    inside = dict.fromkeys(
        name.removeprefix(f"{block}.")
        for block in skeleton.blocks
        for name in skeleton.parameters_of(block)
        if name in matrices and name not in pruned
    )
    if inside:
        notes.append(f"in the blocks: {_listed(list(inside))}")
    return tuple(notes)


def _listed(names: list[str], most: int = 6) -> str:
    shown = ", ".join(name.removesuffix(".weight") for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
