"""Which task files would run Python, found by looking at them alone: nothing of them is built, imported or loaded.

lm-eval's own tasks are part of an installed package, and llmprune's are its own; files of anyone else run Python only when asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_CODE_KEYS = ("class", "custom_dataset", "unsafe_code", "trust_remote_code", "custom_generate", "hf_evaluate")
_CODE_DATASETS = ("pandas",)  # a format of `datasets` that is read by unpickling
_HARMLESS = {
    "task", "group", "task_alias", "group_alias", "tag", "num_fewshot", "aggregate_metric_list", "include", "task_list", "metadata"
}  # fmt: skip
_STANDARD = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class _Use:
    """A file of a task that is to be run; `changed_by`: the file of a group that changes more of the task than how it is counted."""

    path: Path
    changed_by: Path | None


def check_tasks(names: Iterable[str], index: Mapping[str, Any], trusted: Sequence[Path], metrics: Iterable[str]) -> None:
    """Raise `ValueError` where a task that is asked for would run Python of a file outside the trusted folders, naming file and key.

    Args:
        index: lm-eval's index of all tasks. metrics: those lm-eval computes itself; any other is looked for as code on the hub.
    """
    roots, own = [root.resolve() for root in trusted], set(metrics)
    for use in _uses(names, index):
        shipped = any(use.path.resolve().is_relative_to(root) for root in roots)
        if shipped and (use.changed_by is None or any(use.changed_by.resolve().is_relative_to(root) for root in roots)):
            continue
        where = use.path.name if not shipped or use.changed_by is None else f"{use.changed_by.name} changes {use.path.name}, which"
        if found := next(_code(use.path, own, set()), None):
            raise ValueError(f"{where} holds {found}, and so runs Python code; use --trust-remote-code if you trust it, or do without")


def _uses(names: Iterable[str], index: Mapping[str, Any]) -> Iterator[_Use]:
    """The files behind task names, members of groups and tags included."""
    waiting: list[tuple[str, Path | None]] = [(name, None) for name in names]
    seen = set()
    while waiting:
        name, changed_by = waiting.pop()
        entry = index.get(name)
        if entry is None or (name, changed_by) in seen:
            continue
        seen.add((name, changed_by))
        if entry.yaml_path is not None:
            yield _Use(Path(entry.yaml_path), changed_by)
        if entry.kind.name == "TAG":
            waiting += [(member, changed_by) for member in entry.tags]
        elif entry.kind.name == "GROUP":
            own = Path(entry.yaml_path)
            waiting += [(member, own if changed else changed_by) for member, changed in _members(entry.cfg or {})]


def _members(group: Mapping[str, Any], changed: bool = False, nested: bool = False) -> Iterator[tuple[str, bool]]:
    """The names in a group, and whether it changes what the task does."""
    listed = group.get("task")
    changed = changed or not set(map(str, group)) <= _HARMLESS or (nested and isinstance(listed, str) and "metadata" in group)
    for name in (listed, group.get("group") if nested else None):
        if isinstance(name, str):
            yield name, changed
    for member in listed if isinstance(listed, list) else ():
        if isinstance(member, Mapping):
            yield from _members(member, changed, True)
        elif isinstance(member, str):
            yield member, changed


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
            for value in [node] if isinstance(node, yaml.ScalarNode) else node.value if isinstance(node, yaml.SequenceNode) else []:
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
                waiting += [("", name), (f"metric_list.{named}" if key.startswith("metric_list") else named, value)]


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
