"""Damage done to files at random, and what reading them may end in: a result, or a refusal in one line."""

from __future__ import annotations

import copy
import json
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import yaml
from hypothesis import strategies as st

CASES = int(os.environ.get("LLMPRUNE_FUZZ_CASES", "500"))
NASTY = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x" * 5000,
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "\0",
    "\ud7ff\u202e",
    "a\ud800b",
    [],
    {},
    [[]],
    [1, -1],
    [2**40, 2**40],
    {"": {}},
    "model.safetensors",
    "F32",
    "BF16",
    "I64",
    "nan",
    [None],
]

RENAMED = ["", "../x", "x" * 300, "__metadata__", "\0", "model.norm.weight"]

damages = st.lists(
    st.one_of(
        st.tuples(st.just("value"), st.integers(0, 10**6), st.sampled_from(NASTY)),
        st.tuples(st.just("delete"), st.integers(0, 10**6), st.none()),
        st.tuples(st.just("rename"), st.integers(0, 10**6), st.sampled_from(RENAMED)),
        st.tuples(st.just("nest"), st.integers(0, 10**6), st.integers(1, 3000)),
        st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.none()),
        st.tuples(st.just("insert"), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=20)),
    ),
    min_size=1,
    max_size=4,
)


def places(value):
    """Every (container, key) of a JSON value."""
    found, waiting = [], [value]
    while waiting:
        here = waiting.pop()
        pairs = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, inner in pairs:
            found.append((here, key))
            waiting.append(inner)
    return found


def change(value, damage):
    """A JSON value changed in place, as one damage says."""
    kind, where, what = damage
    found = places(value)
    if not found or kind not in ("value", "delete", "rename", "nest"):
        return
    container, key = found[where % len(found)]
    if kind == "value":
        container[key] = copy.deepcopy(what)  # shared, it could come to hold itself
    elif kind == "delete":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[what] = container.pop(key)
    elif kind == "nest":
        for _ in range(what):
            container[key] = [container[key]]


def mangle(data, damage):
    """Bytes changed as one damage says."""
    kind, where, what = damage
    at = int(where * len(data)) if isinstance(where, float) else 0
    if kind == "flip" and data:
        return data[:at] + bytes([data[at] ^ what]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    return data[:at] + what + data[at:] if kind == "insert" else data


def dumped(value, as_yaml=False):
    try:
        return (yaml.safe_dump(value) if as_yaml else json.dumps(value)).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 5000


def damaged(data, todo, load=json.loads, as_yaml=False):
    """A JSON or YAML document after every damage."""
    value = load(data)
    for damage in todo:
        change(value, damage)
    data = dumped(value, as_yaml)
    for damage in todo:
        data = mangle(data, damage)
    return data


def damaged_safetensors(data, todo):
    length = int.from_bytes(data[:8], "little")
    if any(d[0] in ("value", "delete", "rename", "nest") for d in todo):
        head = damaged(
            data[8 : 8 + length], [d for d in todo if d[0] in ("value", "delete", "rename", "nest")]
        )
        data = len(head).to_bytes(8, "little") + head + data[8 + length :]
    for damage in todo:
        data = mangle(data, damage)
    return data


@contextmanager
def contained():
    """No more than 512 MB beyond what the process has."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(status["VmSize"].split()[0]) * 1024 + (512 << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read_or_refused(work):
    with contained():
        try:
            work()
        except ValueError as error:
            line = " ".join(str(error).split())
            assert 10 < len(line) < 1000, line
            assert not isinstance(error, UnicodeError), line


def snapshot(root):
    return {str(p.relative_to(root)): p.stat().st_size for p in root.rglob("*")}


def bytes_only(data, todo):
    for damage in todo:
        data = mangle(data, damage)
    return data
