"""The package as it is installed: its entry points, and what importing it costs."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pytest_pgmonkey

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = Path(pytest_pgmonkey.__file__).parent
TEST_SIDE = ("pytest", "_pytest", "testcontainers", "pytest_pgmonkey.testing")
HEAVY = ("psycopg", "psycopg_pool", "yaml", "asyncio", "pytest_pgmonkey.handles")


def modules_after(code: str, *arguments: str) -> set[str]:
    """Give the modules that a new interpreter has loaded once `code` has run."""
    program = f"{code}\nimport json, sys\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(result.stderr.splitlines()[-1]))


def of(names: tuple[str, ...], modules: set[str]) -> set[str]:
    """Give those modules that are one of these, or beneath one."""
    return {
        module
        for module in modules
        if any(module == name or module.startswith(f"{name}.") for name in names)
    }


# --- what is installed ---


def test_the_entry_points() -> None:
    """pytest finds the plugin as `pgmonkey`, and the shell the command of that name."""
    (plugin,) = entry_points(group="pytest11", name="pgmonkey")
    assert plugin.value == "pytest_pgmonkey.testing.plugin"
    (script,) = entry_points(group="console_scripts", name="pgmonkey")
    assert callable(script.load())


def test_the_version_is_one() -> None:
    """The package and its metadata agree."""
    assert pytest_pgmonkey.__version__ == distribution("pytest-pgmonkey").version


def test_checkers_see_the_types() -> None:
    """The marker file of typed packages is there."""
    assert (PACKAGE / "py.typed").is_file()


def test_the_choice_of_libpq_is_the_users() -> None:
    """Production gets psycopg alone; two extras bring an implementation, and `test` has one."""
    requirements = distribution("pytest-pgmonkey").requires or []
    psycopg = {line for line in requirements if re.match(r"psycopg\b(?!-)", line)}
    assert {line for line in psycopg if "extra ==" not in line} == {"psycopg>=3.3"}
    for extra, implementation in (("binary", "binary"), ("c", "c"), ("test", "binary")):
        assert f"psycopg[{implementation}]>=3.3; extra == '{extra}'" in psycopg


# --- without a libpq ---

NO_LIBPQ = """
import ctypes.util
import sys

sys.modules["psycopg_c"] = sys.modules["psycopg_binary"] = None
ctypes.util.find_library = lambda name: None
"""
ADVICE = (
    "psycopg finds no libpq, PostgreSQL's client library: install "
    '"pytest-pgmonkey[binary]", which brings one, or "pytest-pgmonkey[c]"'
)


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs Python where psycopg finds no libpq."""
    (tmp_path / "sitecustomize.py").write_text(NO_LIBPQ, "utf-8")
    (tmp_path / "c.yaml").write_text("connection_settings: {host: nowhere}\n", "utf-8")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**environ, "PYTHONPATH": str(tmp_path)},
        )

    return run


@pytest.mark.parametrize("use", ["PGConnectionManager", "Handle", "load_config('c.yaml')"])
def test_production_without_a_libpq(python: Any, use: str) -> None:
    """One sentence says what to install, and an application may catch an ImportError."""
    code = f"import pytest_pgmonkey as p\ntry: p.{use}\nexcept ImportError as e: print(e)"
    result = python("-c", code)
    assert result.stdout.startswith(ADVICE)
    assert (result.stdout.count("\n"), result.stderr) == (1, "")


@pytest.mark.parametrize("command", ["pgconfig test", "pgserverconfig", "pgexport --table t"])
def test_the_command_without_a_libpq(python: Any, command: str) -> None:
    """Commands that connect fail with the sentence."""
    result = python("-m", "pytest_pgmonkey", *command.split(), "--connconfig", "c.yaml")
    assert result.stderr.startswith(f"pgmonkey: error: {ADVICE}")
    assert (result.stderr.count("\n"), result.returncode) == (1, 1)


def test_runs_of_pytest_without_a_libpq(python: Any, tmp_path: Path) -> None:
    """A test that wants a database fails with the sentence; the others never notice."""
    plain, database = tmp_path / "test_plain.py", tmp_path / "test_database.py"
    plain.write_text("def test_it(): pass\n", "utf-8")
    database.write_text("def test_it(pgmonkey): pass\n", "utf-8")
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    result = python(*options, str(plain))
    assert (result.returncode, result.stderr) == (0, "")
    result = python(*options, str(database))
    assert f"\npgmonkey: {ADVICE}" in result.stdout
    assert "Traceback" not in result.stdout
    assert result.returncode == 1


# --- what is exported ---


def test_every_exported_name_can_be_had() -> None:
    """The table of contents is sorted, and nothing in it is missing."""
    assert sorted(pytest_pgmonkey.__all__) == pytest_pgmonkey.__all__
    for name in pytest_pgmonkey.__all__:
        assert getattr(pytest_pgmonkey, name) is not None
    assert set(pytest_pgmonkey.__all__) <= set(dir(pytest_pgmonkey))


def test_checkers_and_the_interpreter_see_the_same_names() -> None:
    """What is imported for checkers is what `__getattr__` gives."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert imported | {"__version__"} == set(pytest_pgmonkey.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="no attribute 'PGConectionManager'"):
        pytest_pgmonkey.PGConectionManager  # noqa: B018


# --- what is imported ---


def test_importing_the_package_is_cheap() -> None:
    """Nothing heavy is loaded before a name is used."""
    modules = modules_after("import pytest_pgmonkey")
    assert set() == of((*HEAVY, *TEST_SIDE), modules)


def test_loading_the_plugin_is_cheap() -> None:
    """A test run that does not use the plugin pays for no driver."""
    modules = modules_after("import pytest_pgmonkey.testing.plugin")
    assert set() == of(("psycopg", "psycopg_pool", "yaml", "testcontainers"), modules)


def test_production_never_imports_the_test_side() -> None:
    """All of the package's exports, in use, without pytest."""
    code = "import pytest_pgmonkey as p; [getattr(p, name) for name in p.__all__]"
    assert set() == of(TEST_SIDE, modules_after(code))


@pytest.mark.parametrize(
    "arguments", [["--version"], ["pgconfig", "test", "--connconfig", "no"], ["kept", "--remove"]]
)
def test_the_command_line_never_imports_the_test_side(arguments: list[str]) -> None:
    """Commands of production run where pytest is not installed."""
    code = "import sys; from pytest_pgmonkey.cli import main; main(sys.argv[1:])"
    assert set() == of(TEST_SIDE, modules_after(code, *arguments))
