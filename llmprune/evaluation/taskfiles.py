"""Which task files would run Python, found by looking at them alone: nothing of them is built, imported or loaded.

lm-eval's own tasks are part of an installed package, and llmprune's are its own; files of anyone else run Python only when asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

_CODE_KEYS = ("class", "custom_dataset", "unsafe_code", "trust_remote_code", "custom_generate", "hf_evaluate")
_CODE_DATASETS = ("pandas",)  # a format of `datasets` that is read by unpickling
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

    `changed_by`: the files of groups that change more of it than how it is counted. `defined`: the group that names it says all of it.
    """

    name: str
    changed_by: frozenset[Path] = frozenset()
    defined: bool = False


def check_tasks(
    names: Iterable[str], index: Mapping[str, Any], trusted: Sequence[Path], metrics: Iterable[str]
) -> None:
    """Raise `ValueError` where a task that is asked for would run Python of a file outside the trusted folders, naming file and key.

    Args:
        index: lm-eval's index of all tasks. metrics: those lm-eval computes itself; any other is looked for as code on the hub.
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
                f"{where} holds {found}, and so runs Python code; use --trust-remote-code if you trust it, or do without"
            )


def all_known(names: Iterable[str], index: Mapping[str, Any]) -> bool:
    """Whether an index has every task of these names, members of groups included."""
    return all(use.defined or use.name in index for use in _reached(names, index))


def _reached(names: Iterable[str], index: Mapping[str, Any]) -> Iterator[_Use]:
    """These names and those of the members of groups and tags."""
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
    """What a group names. `path`: its file; `nested`: it stands within another."""
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
    """What in a task file, or in one it includes, makes Python run."""
    path = path.expanduser().resolve()
    if path in seen:
        return
    seen.add(path)
    try:
        # The parser lm-eval uses, so that both see the same file; nodes alone, nothing is constructed.
        root = yaml.compose(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"cannot read task file {path.name}: {' '.join(str(error).split())[:200]}") from None
    for key, node in _entries(root):
        if found := _runs_code(key, node, metrics):
            yield found
        if key == "include":
            for value in (
                [node]
                if isinstance(node, yaml.ScalarNode)
                else node.value
                if isinstance(node, yaml.SequenceNode)
                else []
            ):
                included = path.parent / str(value.value)
                yield from (f"{found} (in {included.name})" for found in _code(included, metrics, seen))


def _entries(root: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    """Every node of a document with the key it stands under; what is aliased is seen once."""
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
                named = str(name.value) if isinstance(name, yaml.ScalarNode) else ""
                waiting += [
                    ("", name),
                    (f"metric_list.{named}" if key.startswith("metric_list") else named, value),
                ]


def _runs_code(key: str, node: yaml.Node, metrics: set[str]) -> str | None:
    """How a node makes Python run, None where it does not."""
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
