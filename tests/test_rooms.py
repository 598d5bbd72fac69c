"""The structure of the package: nine rooms, imports that run downwards, and patches that are named so.

DESIGN: docs/architecture.md. The tests read the source of `logitmix/` and run none of it.
"""

import ast
import graphlib
import importlib
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "logitmix"
FLOORS = {
    "tasks": 1,
    "mixture": 2,
    "loss_head": 3,
    "serving": 3,
    "training": 4,
    "runs": 5,
    "evaluation": 6,
    "paper": 7,
    "cli": 8,
}
MODULES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    return module.split(".")[1]


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and dotted name of each import from the package; a name imported from a package may be its module."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "logitmix"]


# Only names for users, from the rooms: no room imports it
PUBLIC = ["__init__.py", "presets.py"]


def test_there_is_no_loose_module():
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == PUBLIC
    for name in PUBLIC[1:]:
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in MODULES[PACKAGE / name].body)
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FLOORS)


def upward(sources: dict[str, str]) -> list[str]:
    """The imports of modules, by name and source, that lead to a room on the same floor or above."""
    arrows = []
    for module, source in sources.items():
        for line, name in imports(ast.parse(source)):
            parts = name.split(".")
            is_room = len(parts) > 1 and parts[1] in FLOORS
            if not is_room:
                arrows.append(f"{module}:{line} imports {name}, which is in no room")
            elif room(name) != room(module) and FLOORS[room(name)] >= FLOORS[room(module)]:
                arrows.append(f"{module}:{line} imports {name}, which is not below it")
    return arrows


def test_imports_run_downwards():
    sources = {dotted(path): path.read_text() for path in MODULES if path.parent != PACKAGE}
    assert upward(sources) == []


@pytest.mark.parametrize(
    "line",
    [
        "from logitmix.cli.train import run",
        "import logitmix.serving.http",
        "from logitmix import LogitMixConfig",
    ],
)
def test_an_import_upwards_sideways_or_of_the_package_is_found(line):
    assert len(upward({"logitmix.loss_head.chunking": f"def f():\n    {line}\n"})) == 1


def test_no_modules_import_each_other_in_a_circle():
    names = {dotted(path) for path in MODULES}
    graph: dict[str, set[str]] = {}
    for path, tree in MODULES.items():
        targets = {name for _, name in imports(tree)}
        found = {name if name in names else name.rpartition(".")[0] for name in targets}
        graph[dotted(path)] = {name for name in found if name in names} - {dotted(path)}
    order = graphlib.TopologicalSorter(graph)
    try:
        order.prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.Module) -> set[str]:
    """Names that a module defines: functions, classes, variables, and attributes of `self`."""
    names = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            is_of_self = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
            names |= {node.id} if isinstance(node, ast.Name) else {node.attr} if is_of_self else set()
    return names


def foreign_private_names(tree: ast.Module, own: set[str]) -> list[tuple[int, str]]:
    """Private attributes that the package does not define, and private names imported from libraries."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("logitmix"):
            found += [(node.lineno, alias.name) for alias in node.names if is_private(alias.name)]
    return found


PLAIN = {path: tree for path, tree in MODULES.items() if not path.name.endswith("_patches.py")}


def test_private_names_of_libraries_are_read_in_patches_files_only():
    own = set().union(*(defined(tree) for tree in PLAIN.values()))
    found = [
        f"{relative(path)}:{line} uses {name}"
        for path, tree in PLAIN.items()
        for line, name in foreign_private_names(tree, own)
    ]
    assert found == []


@pytest.mark.parametrize("line", ["trainer._metrics", "from torch import _C", "self._step"])
def test_a_private_name_of_a_library_is_found(line):
    assert foreign_private_names(ast.parse(f"class A:\n    def f(self, trainer):\n        {line}\n"), set())


# What transformers documents for authors of models
FOR_MODEL_AUTHORS = {
    "_can_compile_fullgraph", "_init_weights", "_no_split_modules", "_reorder_cache", "_tied_weights_keys",
}  # fmt: skip


def overridden_private_names(path: Path) -> list[str]:
    """Private names of library classes that the module's classes replace."""
    try:
        module = importlib.import_module(dotted(path))
    except ImportError:  # vLLM is not installed
        return []
    found = []
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__:
            bases = [base for base in value.__mro__[1:] if not base.__module__.startswith("logitmix")]
            names = {name for name in vars(value) if is_private(name)} - FOR_MODEL_AUTHORS
            names = {name for name in names if not name.startswith(("_supports_", "_abc_", "_backward_cls"))}
            found += [f"{value.__name__}.{n} ({b.__name__}'s)" for n in names for b in bases if n in vars(b)]
    return found


def test_private_methods_of_libraries_are_replaced_in_patches_files_only():
    found = [f"{relative(path)}: {name}" for path in PLAIN for name in overridden_private_names(path)]
    assert found == []


def test_files_stay_short():
    too_long = {relative(path): n for path in MODULES if (n := len(path.read_text().splitlines())) > 330}
    assert too_long == {}
