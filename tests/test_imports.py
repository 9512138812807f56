"""Who may import whom: the table of CONTRIBUTING.md, held against the code. And what no file may do."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmprune"
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
ALGORITHMS = [
    p
    for room in ("pruners", "refiners", "updates", "allocators")
    for p in sorted((PACKAGE / room).glob("*.py"))
]
LIBRARY = {"__future__", "collections.abc", "dataclasses", "typing", "math", "enum", "abc", "fnmatch"}
MOST_PARAMETERS = 6


def table():
    """The rooms each room may import, by its name, from CONTRIBUTING.md."""
    rows = re.findall(r"^\| (`[^|]+) \|[^|]*\|([^|]*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)
    return {
        room.strip("`/"): set(filter(None, allowed.replace(" ", "").split(",")))
        for rooms, allowed in rows
        for room in rooms.split(", ")
    }


def imports(path):
    """Every module a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "llmprune")


def room_of(path):
    first, *rest = path.relative_to(PACKAGE).parts
    return first if rest else path.stem


def imported_rooms(path):
    """The rooms that a file imports."""
    named = {name.split(".")[1] for name in imports(path) if name.startswith("llmprune.")}
    return named - {room_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_what_the_table_allows(path):
    assert imported_rooms(path) <= table()[room_of(path)]


def test_the_table_names_every_room_and_every_import_once():
    assert set(table()) == {room_of(path) for path in FILES}
    for room, allowed in table().items():
        used = set().union(*(imported_rooms(path) for path in FILES if room_of(path) == room))
        assert allowed <= used | {"contracts", "numerics", "common"}, (
            f"{room} does not import {allowed - used}"
        )


def test_rooms_do_not_import_one_another_in_a_circle():
    left = table()
    while left:
        free = [room for room, allowed in left.items() if not allowed & set(left)]
        assert free, f"these import one another in a circle: {sorted(left)}"
        for room in free:
            del left[room]


def test_files_of_tests_are_named_after_rooms():
    rooms = {*table(), "contract", "imports", "docs"}
    parts = [path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")]
    assert [part for part in parts if part.partition("_")[0] not in rooms] == []


def test_the_hall_stays_empty():
    assert {p.stem for p in PACKAGE.glob("*.py")} == {
        "__init__",
        "__main__",
        "contracts",
        "patterns",
        "registry",
    }


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_algorithms_import_only_contracts_numerics_and_torch(path):
    for name in imports(path):
        ours = name == "llmprune.contracts" or name.startswith(("llmprune.numerics", "llmprune.recovery"))
        assert ours or name.split(".")[0] == "torch" or name in LIBRARY, name


def test_contracts_import_only_torch():
    assert all(n.split(".")[0] == "torch" or n in LIBRARY for n in imports(PACKAGE / "contracts.py"))


def functions(path):
    """Every function of a file, methods and inner ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@pytest.mark.parametrize(
    "path", [p for p in FILES if room_of(p) not in ("api", "cli")], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_no_function_outside_the_api_takes_many_parameters(path):
    """What a whole run shares travels as one `Run`; what belongs together, as one dataclass."""
    for node in functions(path):
        if any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list):
            continue  # a GPU's kernel takes addresses and sizes one by one
        named = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        named = [name for name in named if name not in ("self", "cls")]
        assert len(named) <= MOST_PARAMETERS, f"{node.name} takes {len(named)}: {', '.join(named)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_signatures_are_not_pressed_into_fewer_lines(path):
    assert not re.search(r"# fmt: *(skip|off)", path.read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_device_file_says_cuda_and_nothing_unpickles(path):
    tree = ast.parse(path.read_text())
    if path.name != "device.py":
        attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert "cuda" not in attributes, "ask llmprune.machine.device"
    assert not {"pickle", "dill", "joblib", "cloudpickle"} & {n.split(".")[0] for n in imports(path)}
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not calls & {"torch.load", "yaml.load", "eval", "exec"}


def test_hooks_live_in_stats_alone():
    for path in FILES:
        assert "register_forward" not in path.read_text() or path.parent.name == "statistics", path


def test_importing_the_package_and_the_command_line_is_light():
    heavy = ("torch", "transformers", "datasets", "lm_eval", "matplotlib")
    code = f"import sys, llmprune, llmprune.cli.commands; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


MAKERS = {"zeros", "ones", "empty", "full", "rand", "randn", "randn_like", "linspace", "eye", "logspace"}


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name != "train.py"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_tensors_are_made_in_a_dtype_that_is_named(path):
    """torch's default dtype belongs to the whole process: another thread, or the user, may have set another
    one.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}:
            whole_numbers = (
                ast.unparse(node.func) == "torch.full"
            )  # takes the dtype of its value where that is whole
            assert whole_numbers or any(k.arg in ("dtype", "out") for k in node.keywords), ast.unparse(node)
