"""The projects in `examples` pass their own tests, each in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from helpers.pytest_runs import QUICK

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDED = {
    "django_app": ("django", "pytest_django"),
    "flask_app": ("flask",),
    "fastapi_app": ("fastapi", "httpx"),
    "sqlalchemy_app": ("asyncpg", "fastapi", "greenlet", "httpx", "sqlalchemy"),
}
BY_GATEWAY = ("django_app", "sqlalchemy_app")
PROJECTS = sorted(path.parent for path in EXAMPLES.glob("*/pyproject.toml"))
# pytest-asyncio warns of a setting of its own that is absent, which is no business of ours.
STRICT = ("-W", "error", "-W", "ignore::pytest.PytestDeprecationWarning")
CONFIGS = sorted(EXAMPLES.glob("*/*/database.yaml"))


def run_tests(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a project's tests from the outside, warnings being errors."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-B", "-m", "pytest", *QUICK, *STRICT]
    return subprocess.run(
        [sys.executable, *options, str(project), *arguments],
        cwd=EXAMPLES.parent,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def outcomes(output: str) -> dict[str, int]:
    """Read pytest's last line: `{"passed": 7}`."""
    return {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", last_line(output))}


def last_line(output: str) -> str:
    return output.rstrip().rpartition("\n")[2].partition(" in ")[0]


def test_every_example_is_known() -> None:
    """The seven projects of the README are there."""
    names = [path.name for path in PROJECTS]
    known = ["django_app", "fastapi_app", "flask_app", "library", "quickstart", "sqlalchemy_app"]
    assert names == [*known, "worker"]


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.name)
def test_an_example_passes_its_own_tests(project: Path) -> None:
    """All its tests pass; none is skipped, and nothing warns."""
    lacking = [name for name in NEEDED.get(project.name, ()) if find_spec(name) is None]
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}: install the extra 'dev'")
    if project.name in BY_GATEWAY and sys.platform == "win32":
        pytest.skip("the gateway needs Unix sockets")
    result = run_tests(project)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {"passed"} == set(outcomes(result.stdout)), result.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_the_server_of_an_example_does_not_exist(path: Path) -> None:
    """What its tests talk to can only be the test's database: `.example` names never resolve."""
    config = yaml.safe_load(path.read_text("utf-8"))
    assert config["connection_settings"]["host"].endswith(".example")


def test_the_tests_of_an_example_can_fail(tmp_path: Path) -> None:
    """With an application that writes nothing, the quickstart's tests fail."""
    project = tmp_path / "quickstart"
    shutil.copytree(EXAMPLES / "quickstart", project)
    module = project / "notes" / "repository.py"
    code = module.read_text("utf-8")
    broken = code.replace("INSERT INTO note (body) VALUES (%s) RETURNING id", "SELECT length(%s)")
    assert broken != code
    module.write_text(broken, "utf-8")
    result = run_tests(project)
    assert result.returncode == 1
    assert outcomes(result.stdout)["failed"] >= 5
