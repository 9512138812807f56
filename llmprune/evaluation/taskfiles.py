"""Finds task files of lm-eval that would run Python code, by reading their YAML without building objects.

The tasks of lm-eval and llmprune are parts of installed packages and are trusted. A task file from anywhere
else may run Python only with `trust_remote_code`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

_CODE_KEYS = ("class", "custom_dataset", "unsafe_code", "trust_remote_code", "custom_generate", "hf_evaluate")
_CODE_DATASETS = ("pandas",)  # formats of `datasets` that are read by unpickling
# Keys of a group that decide which tasks it has and how they are counted, but change nothing in a task.
_HARMLESS = {
    "task",
    "group",
    "task_alias",
    "group_alias",
    "tag",
    "num_fewshot",
    "aggregate_metric_list",
    "include",
    "task_list",
    "metadata",
}
_STANDARD = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class _Use:
    """A task, group or tag that is to be run.

    Attributes:
        name: as in lm-eval's index.
        changed_by: files of groups that override fields of it, beyond how it is counted.
        defined: the group that names it also defines it, so it need not be in the index.
    """

    name: str
    changed_by: frozenset[Path] = frozenset()
    defined: bool = False


def check_tasks(
    names: Iterable[str], index: Mapping[str, Any], trusted: Sequence[Path], metrics: Iterable[str]
) -> None:
    """Raise `ValueError`, naming file and key, where a task would run Python code of an untrusted file.

    Args:
        names: the tasks, groups and tags to be run.
        index: lm-eval's index of all tasks.
        trusted: folders whose files may run Python.
        metrics: the metrics that lm-eval computes itself; it would look for any other as code on the hub.
    """
    roots, own = [root.resolve() for root in trusted], set(metrics)

    def foreign(path: Path) -> bool:
        return not any(path.resolve().is_relative_to(root) for root in roots)

    for use in _reached(names, index):
        path = index[use.name].yaml_path if use.name in index else None
        if path is None:
            continue
        changers = sorted(changer.name for changer in use.changed_by if foreign(changer))
        if (foreign(path) or changers) and (found := next(_code(path, own, set()), None)):
            where = path.name if foreign(path) else f"{changers[0]} changes {path.name}, which"
            raise ValueError(
                f"{where} holds {found}, and so runs Python code; use --trust-remote-code if you trust it, "
                "or do without"
            )


def all_known(names: Iterable[str], index: Mapping[str, Any]) -> bool:
    """Whether an index has every task of these names, including the members of groups."""
    return all(use.defined or use.name in index for use in _reached(names, index))


def _reached(names: Iterable[str], index: Mapping[str, Any]) -> Iterator[_Use]:
    """These names, and the members of the groups and tags among them, at any depth."""
    waiting, seen = [_Use(name) for name in names], set()
    while waiting:
        use = waiting.pop()
        if use in seen:
            continue
        seen.add(use)
        yield use
        entry = index.get(use.name)
        if entry is not None and entry.kind.name == "TAG":
            waiting += [replace(use, name=member) for member in entry.tags]
        elif entry is not None and entry.kind.name == "GROUP":
            waiting += _members(entry.cfg or {}, Path(entry.yaml_path), use.changed_by)


def _members(
    group: Mapping[str, Any], path: Path, changed_by: frozenset[Path], nested: bool = False
) -> Iterator[_Use]:
    """The members of a group. `path` is its file; `nested`: the group is defined inside another one."""
    listed = group.get("task")
    if not set(map(str, group)) <= _HARMLESS or (nested and isinstance(listed, str) and "metadata" in group):
        changed_by |= {path}
    if isinstance(listed, str):
        yield _Use(listed, changed_by, "dataset_path" in group)
    if nested and isinstance(name := group.get("group"), str):
        yield _Use(name, changed_by, listed is not None)
    for member in listed if isinstance(listed, list) else ():
        if isinstance(member, Mapping):
            yield from _members(member, path, changed_by, True)
        elif isinstance(member, str):
            yield _Use(member, changed_by)


def _code(path: Path, metrics: set[str], seen: set[Path]) -> Iterator[str]:
    """Everything in a task file, or in a file it includes, that would run Python code."""
    path = path.expanduser().resolve()
    if path in seen:
        return
    seen.add(path)
    try:
        # With the parser lm-eval uses, both see the same file. `compose` makes nodes, no Python objects.
        root = yaml.compose(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"cannot read task file {path.name}: {' '.join(str(error).split())[:200]}") from None
    for key, node in _entries(root):
        if found := _runs_code(key, node, metrics):
            yield found
        if key == "include":
            for file in _listed(node):
                included = path.parent / file
                yield from (f"{found} (in {included.name})" for found in _code(included, metrics, seen))


def _listed(node: yaml.Node) -> list[str]:
    """The values of a node that holds one value or a list of them."""
    if isinstance(node, yaml.ScalarNode):
        return [str(node.value)]
    return [str(value.value) for value in node.value] if isinstance(node, yaml.SequenceNode) else []


def _entries(root: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    """Every node of a document with its key; a node that several aliases refer to is visited once per key.

    Keys inside `metric_list` are given as `metric_list.KEY`.
    """
    waiting, seen = [("", root)] if root is not None else [], set()
    while waiting:
        key, node = waiting.pop()
        if (key, id(node)) in seen:
            continue
        seen.add((key, id(node)))
        yield key, node
        if isinstance(node, yaml.SequenceNode):
            waiting += [(key, item) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                inner = str(name.value) if isinstance(name, yaml.ScalarNode) else ""
                if key.startswith("metric_list"):
                    inner = f"metric_list.{inner}"
                waiting += [("", name), (inner, value)]


def _runs_code(key: str, node: yaml.Node, metrics: set[str]) -> str | None:
    """What makes a node run Python code, in words; None where nothing does."""
    name = key.rpartition(".")[2]
    if not node.tag.startswith(_STANDARD) or node.tag.startswith(_STANDARD + "python"):
        return f"{node.tag.replace(_STANDARD, '!!')} in {name or 'its keys'!r}"
    value = str(node.value) if isinstance(node, yaml.ScalarNode) else None
    if name in _CODE_KEYS and (value is None or value.lower() not in ("false", "no", "off", "null", "~", "")):
        return f"the key {name!r}"
    if key == "metric_list.metric" and value not in metrics:
        return f"the metric {value!r}, which is none of lm-eval's and would be looked for as code on the hub"
    if key == "dataset_path" and value is not None and (value in _CODE_DATASETS or value.endswith(".py")):
        return f"dataset_path {value!r}"
    return None
