"""The arrows of the house: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llmprune"
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
ALGORITHMS = [p for room in ("pruners", "refiners", "updates", "allocators") for p in sorted((PACKAGE / room).glob("*.py"))]
LIBRARY = {"__future__", "collections.abc", "dataclasses", "typing", "math", "enum", "abc", "fnmatch"}


def imports(path):
    """Every module a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "llmprune")


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_algorithms_import_only_contracts_numerics_and_torch(path):
    for name in imports(path):
        assert name in ("llmprune.contracts", "llmprune.numerics") or name.split(".")[0] == "torch" or name in LIBRARY, name


def test_numerics_import_only_contracts_and_torch():
    names = set(imports(PACKAGE / "numerics.py"))
    assert all(n == "llmprune.contracts" or n.split(".")[0] == "torch" or n in LIBRARY for n in names)


def test_contracts_import_only_torch():
    assert all(n.split(".")[0] == "torch" or n in LIBRARY for n in imports(PACKAGE / "contracts.py"))


@pytest.mark.parametrize("path", sorted((PACKAGE / "evaluation").glob("*.py")), ids=lambda p: p.stem)
def test_evaluation_never_imports_an_algorithm_or_the_corridor(path):
    for name in imports(path):
        assert not name.startswith(("llmprune.pruners", "llmprune.refiners", "llmprune.allocators", "llmprune.run", "llmprune.patterns"))


@pytest.mark.parametrize("room", ["checkpoint", "model", "calibration"])
def test_lower_rooms_do_not_reach_up(room):
    for path in (PACKAGE / room).glob("*.py"):
        for name in imports(path):
            assert not name.startswith(("llmprune.run", "llmprune.api", "llmprune.cli", "llmprune.evaluation", "llmprune.pruners")), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_device_file_says_cuda_and_nothing_unpickles(path):
    tree = ast.parse(path.read_text())
    if path.name != "device.py":
        attributes = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert "cuda" not in attributes, "ask llmprune.device"
    assert not {"pickle", "dill", "joblib", "cloudpickle"} & {n.split(".")[0] for n in imports(path)}
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not calls & {"torch.load", "yaml.load", "eval", "exec"}


def test_hooks_live_in_stats_alone():
    for path in FILES:
        assert "register_forward" not in path.read_text() or path.name == "stats.py", path


def test_the_corridor_is_short():
    assert len((PACKAGE / "run.py").read_text().splitlines()) <= 150


def test_importing_the_package_and_the_command_line_is_light():
    heavy = ("torch", "transformers", "datasets", "lm_eval", "matplotlib")
    code = f"import sys, llmprune, llmprune.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


MAKERS = {"zeros", "ones", "empty", "full", "rand", "randn", "randn_like", "linspace", "eye", "logspace"}


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "train.py"], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_tensors_are_made_in_a_dtype_that_is_named(path):
    """torch's default dtype belongs to the whole process: another thread, or the user, may have set another one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}:
            whole_numbers = ast.unparse(node.func) == "torch.full"  # takes the dtype of its value where that is whole
            assert whole_numbers or any(k.arg in ("dtype", "out") for k in node.keywords), ast.unparse(node)
