"""Packed matrices for tests, made by the oracle alone, and memory that ends where it must not be read on."""

import ctypes
import mmap

import numpy as np
import oracles
import torch

from llmprune.kernels import packing, products

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SAME = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def pattern(shape, kind, seed=0):
    """bool [R, C]: what is kept."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=generator) < 0.4
    if kind == "empty":
        keep[:] = False
    elif kind == "full":
        keep[:] = True
    elif kind == "2:4":
        order = torch.rand((shape[0], shape[1] // 4, 4), generator=generator).argsort(dim=-1)
        keep = (order < 2).reshape(shape)
    elif kind == "rows":  # empty rows first, in the middle and last; a full one
        keep[[0, len(keep) // 2, -1]] = False
        keep[1] = True
    return keep


class Case:
    """A matrix: its parts as in a file, and what it stands for. "int8 whole", "int4 whole": no mask."""

    def __init__(self, shape, values, keep, seed=0):
        generator = torch.Generator().manual_seed(seed)
        whole = str(values).endswith(" whole")
        if whole:
            values, keep = values.removesuffix(" whole"), torch.ones(shape, dtype=torch.bool)
        self.shape, self.keep = shape, keep
        self.bits = {"int8": 8, "int4": 4}.get(values, 16)
        self.scale = None
        if self.bits == 16:
            self.dense = torch.randn(shape, generator=generator).to(values)
            raw = self.dense.view(SAME[self.dense.element_size()])
        else:
            most = 2 ** (self.bits - 1)
            self.dense = raw = torch.randint(-most, most, shape, generator=generator).to(torch.int8)
            groups = -(-shape[1] // 128)
            self.scale = (torch.rand((shape[0], groups), generator=generator) + 0.1).bfloat16()
        bits, mask, rows = oracles.packed_parts(raw.numpy(), keep.numpy(), self.bits)
        self.values = torch.from_numpy(bits)
        if self.bits == 16:
            self.values = self.values.view(values)
        self.mask, self.rows = torch.from_numpy(mask), torch.from_numpy(rows).int()
        if whole:
            self.mask = self.rows = None

    @property
    def parts(self):
        return self.values, self.mask, self.rows, self.scale

    def checked(self):
        return products.checked(*self.parts, self.shape, self.bits)

    def product(self, x):
        scale = None if self.scale is None else self.scale.double().numpy()
        dense = self.dense.double().numpy()
        return torch.from_numpy(oracles.packed_product(x.double().numpy(), dense, self.keep.numpy(), scale))

    def rounding(self, x):
        """What x in bytes may move y [n, R]: half a step of each group of 128 columns, times its weights."""
        wide = (0, -self.shape[1] % 128)
        step = torch.nn.functional.pad(x.double(), wide).abs().unflatten(1, (-1, 128)).amax(-1) / 127
        weights = torch.nn.functional.pad((self.dense * self.keep).double().abs(), wide).unflatten(
            1, (-1, 128)
        )
        return step / 2 @ (weights.sum(-1) * self.scale.double()).t()


def rows_of_x(n, columns, dtype, seed=1):
    return torch.randn((n, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(y, wanted):
    """The relative error of y, by norm."""
    size = float(wanted.norm())
    return float((y.double() - wanted).norm()) / (size or 1.0)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Guarded:
    """Copies of tensors that end at, or begin after, a page that must not be touched."""

    def __init__(self):
        self._maps = []

    def copy(self, tensor, front=False):
        size = tensor.numel() * tensor.element_size()
        page = mmap.PAGESIZE
        room = -(-max(size, 1) // page) * page
        private, nobody, anyhow = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0, mmap.PROT_READ | mmap.PROT_WRITE
        start = _libc.mmap(None, room + 2 * page, anyhow, private, -1, 0)
        assert _libc.mprotect(start, page, nobody) == 0
        assert _libc.mprotect(start + page + room, page, nobody) == 0
        self._maps.append((start, room + 2 * page))
        if size == 0:
            return tensor
        at = start + page + (0 if front else room - size)
        buffer = (ctypes.c_uint8 * size).from_address(at)
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
        np.frombuffer(buffer, np.uint8)[:] = raw
        return torch.frombuffer(buffer, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)

    def packed(self, packed, front=False):
        return packing.Packed(*(self.copy(p, front) if isinstance(p, torch.Tensor) else p for p in packed))

    def close(self):
        for start, size in self._maps:
            _libc.munmap(start, size)
