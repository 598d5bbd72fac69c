"""What the distribution holds, as its configuration says; `.ci/wheel` builds, installs and runs it."""

import importlib
import tomllib
from fnmatch import fnmatch
from importlib.metadata import entry_points

import yaml

import logitmix
from tests.helpers.paths import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_data_file_of_the_package_is_in_the_wheel():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["logitmix"]
    package = ROOT / "logitmix"
    files = [p.relative_to(package) for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert {path.suffix for path in files} == {".html", ".json", ".typed", ".yaml"}
    missing = [str(path) for path in files if not any(_matches(str(path), pattern) for pattern in patterns)]
    assert missing == []


def _matches(path: str, pattern: str) -> bool:
    return fnmatch(path, pattern) or fnmatch(path, pattern.replace("**/", ""))


def test_every_room_is_a_package():
    folders = {path.parent for path in (ROOT / "logitmix").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_entry_points_lead_to_functions():
    declared = PYPROJECT["project"]["scripts"] | PYPROJECT["project"]["entry-points"]["vllm.general_plugins"]
    for target in declared.values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    assert [point.value for point in entry_points(group="vllm.general_plugins", name="logitmix")] == [
        PYPROJECT["project"]["entry-points"]["vllm.general_plugins"]["logitmix"]
    ]


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PYPROJECT["project"]["version"] == logitmix.__version__


def test_workflows_and_issue_templates_are_yaml():
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", *(ROOT / "configs").rglob("*.yaml")]
    assert len(files) > 7
    for path in files:
        assert yaml.safe_load(path.read_text()), path


def test_every_public_object_is_in_the_reference():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    for name in logitmix.__all__:
        assert any(line.endswith(f".{name}") for line in pages.splitlines() if line.startswith("::: ")), name
