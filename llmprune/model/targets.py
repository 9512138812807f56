"""Which matrices of a model are pruned, and which stay dense."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from llmprune.checkpoint.packed_tensor import PACKED_DTYPES, Layout
from llmprune.model.activations import BlockInputs
from llmprune.model.conversion import Group, Piece, Stored, Tracer
from llmprune.model.products import Products, Seen
from llmprune.model.skeleton import Skeleton
from llmprune.model.target import Target

_PROBE = 32  # tokens of two sequences that pass a block to see how it uses its stacked parameters
_SMALL = 1 << 21  # weights of a parameter that the probe draws


def targets_of(skeleton: Skeleton, block: str) -> list[Target]:
    """Every linear matrix of a block, in the order of its modules, those of experts included.

    Routers, gates of shared experts, convolutions and vectors are none.
    """
    if not skeleton.targets:
        skeleton.targets.update(_Finder(skeleton).targets())
    return skeleton.targets[block]


def all_targets(skeleton: Skeleton) -> list[Target]:
    """The targets of all blocks, in order."""
    return [target for block in skeleton.blocks for target in targets_of(skeleton, block)]


class _Finder:
    """Finds the targets of a model: linear layers, and the stacked parameters of experts."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton, self._tracer = skeleton, Tracer(skeleton.model)
        stacks = {name: _stacks(name, block) for name, block in skeleton.blocks.items()}
        # Stacked parameter that enters matrix products -> whether it holds its matrices as [C, R].
        self._turned = _turned(skeleton, stacks)

    def targets(self) -> dict[str, list[Target]]:
        """The targets by block."""
        found: dict[str, list[Target]] = {}
        for name, block in self._skeleton.blocks.items():
            targets = {t.key: t for t in self._of_block(name, block)}
            found[name] = [t for t in targets.values() if t.tensor not in self._skeleton.shared]
        return found

    def _of_block(self, name: str, block: nn.Module) -> Iterator[Target]:
        from transformers.pytorch_utils import Conv1D

        experts = _expert_counts(name, block, self._turned)
        for path, module in block.named_modules():
            where = ".".join(part for part in (name, path) if part)
            if isinstance(module, (nn.Linear, Conv1D)):
                weight = f"{where}.weight"
                if not _is_router(where, module, experts) and weight in self._skeleton.group_of:
                    routed = _in_list(block, path)
                    for target in self._of_parameter(weight, isinstance(module, Conv1D), module):
                        yield replace(target, routed=routed)
            else:
                for leaf, _ in module.named_parameters(recurse=False):
                    parameter = f"{where}.{leaf}"
                    if parameter in self._turned:
                        for target in self._of_parameter(parameter, self._turned[parameter], None):
                            yield replace(target, routed=True)

    def _of_parameter(self, parameter: str, turned: bool, module: nn.Module | None) -> Iterator[Target]:
        """The stored matrices that a parameter is made from."""
        group = self._skeleton.group_of[parameter]
        if group.converter is not None:
            yield from self._converted(group)
            return
        owner, leaf = self._skeleton.owner(parameter)
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

    def _converted(self, group: Group) -> Iterator[Target]:
        """The stored matrices that parameters made together are made from."""
        from transformers.pytorch_utils import Conv1D

        shapes = {name: self._skeleton.source.tensors[name].shape for name in group.tensors}
        used: dict[str, bool] = {}
        for parameter in group.parameters:
            owner, leaf = self._skeleton.owner(parameter)
            if isinstance(owner, (nn.Linear, Conv1D)) and leaf == "weight":
                used[parameter] = isinstance(owner, Conv1D)
            elif parameter in self._turned:
                used[parameter] = self._turned[parameter]
        for stored in self._tracer.matrices(group, shapes, used):
            yield self._target_of(stored, used)

    def _target_of(self, stored: Stored, used: Mapping[str, bool]) -> Target:
        suffix = "" if stored.number is None else f".{stored.number}"
        parameters = dict.fromkeys(piece.parameter for piece in stored.pieces)
        owners = {name: self._skeleton.owner(name) for name in parameters}
        first = stored.pieces[0]
        module = None
        if len(stored.pieces) == 1 and first.expert is None and first.rows == slice(0, stored.shape[0]):
            owner = owners[first.parameter][0]
            whole = owner.get_parameter("weight").numel() == stored.shape[0] * stored.shape[1]
            module = owner if whole and stored.transposed == used[first.parameter] else None
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
            module,
        )


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
    tokens = torch.arange(2 * _PROBE).view(2, _PROBE) % skeleton.vocabulary
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


def left_dense(skeleton: Skeleton) -> tuple[str, ...]:
    """What is never a target: parts beside the language model, matrices around its blocks, and within them
    convolutions, routers and the like.
    """
    notes = []
    for name, tower in skeleton.towers().items():
        count = sum(p.numel() for p in tower.parameters())
        notes.append(f"{name} ({type(tower).__name__}, {count:,} weights), beside the language model")
    matrices = {n for n, p in skeleton.model.named_parameters() if p.ndim > 1 and min(p.shape) > 1}
    ends = (skeleton.embeddings, skeleton.model.get_output_embeddings())
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


def packed_layouts(skeleton: Skeleton) -> dict[str, Layout]:
    """How each tensor of the checkpoint that holds targets would be packed, by name."""
    layouts = {}
    for target in all_targets(skeleton):
        tensor = skeleton.source.tensors[target.tensor]
        stacked = 0 if target.index is None else tensor.shape[0]
        rows, columns = target.shape
        if tensor.dtype in PACKED_DTYPES:
            layouts[target.tensor] = Layout(
                rows * max(1, stacked), columns, tensor.dtype, stacked, target.transposed
            )
    return layouts
