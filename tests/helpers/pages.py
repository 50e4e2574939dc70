"""Pages of the documentation, and how their code is run.

What a block is, its first line or a comment above it says:

- `# some/file.py` (`-- some/file.sql`) as first line: a file of the page's project. A test file
  is run with pytest right away, in a process of its own.
- a Python block without it: a script. It must end with status 0 and nothing on stderr.
- `$ …` in a console block: a command for the shell, which must end with status 0. Lines beneath it
  are what it must print; `…` in them stands for anything. Commands of `pip` and `uv` are not run.
- YAML without a file name: a configuration, or sections of one.
- `<!-- test: project -->`: a new project begins.
- `<!-- test: needs alembic -->`: the block and those that follow need it; without it they are
  skipped. `<!-- test: needs python3.14 -->`: it needs this Python, or a later one.
- `<!-- test: file people.csv -->`: the block is that file.
- `<!-- test: fails -->`: the block's last command must not end with status 0.
- `<!-- test: skip: it takes an hour -->`: not run, for this reason.

Scripts and commands run in a virtual environment that has what `pip install
"pytest-pgmonkey[binary]"` brings and what the story needs, and nothing else: no pytest, for one.

A block that readers need not see stands in an HTML comment, and is run like the others. Where a
server is asked for by variables, these are `APP_DB_HOST`, `_PORT`, `_NAME`, `_USER`, `_PASSWORD`,
or `DATABASE_URL`.

The tutorial is taken literally. Its reader begins in an empty directory, has the server of the
tutorial's first page, and does what a page shows: files are written, and nothing runs but the
commands in console blocks. So each Python block names its file there, no block is hidden, and
`needs` is for all blocks beneath the same title. Only the server's port is not the reader's: it is
in the variable `PGPORT`.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from helpers.pytest_runs import QUICK
from pytest_pgmonkey import load_config
from pytest_pgmonkey.testing.addresses.urls import url_of
from pytest_pgmonkey.testing.options import OPTIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Iterator

    from helpers.tutorial import TutorialServer

ROOT = Path(__file__).parent.parent.parent
CONFIG = "pgmonkey_config.yaml"
# pytest-asyncio warns of a setting of its own that is absent, which is no business of ours.
STRICT = ("-W", "error", "-W", "ignore::pytest.PytestDeprecationWarning")
# The plugins that come with the extra `test`, and no others of this environment.
PLUGINS_OF_A_READER = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_ADDOPTS": shlex.join(
        ["-p", "pytest_asyncio.plugin", "-p", "pytest_pgmonkey.testing.plugin", *QUICK, *STRICT]
    ),
}

_BLOCK = re.compile(
    r"(?:^<!-- test: (?P<note>.*?) -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_TITLE = re.compile(r"^## (.+)$", re.MULTILINE)
_FILE = re.compile(r"(?:#|--) ([\w./-]+\.(?:py|sql|yaml|toml|ini))\n")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    code: str
    line: int
    note: str = ""
    title: str = ""

    @property
    def file(self) -> str | None:
        """The file that the block is, if it is one."""
        if self.note.startswith("file "):
            return self.note.partition(" ")[2]
        match = _FILE.match(self.code)
        return match[1] if match else None

    @property
    def skipped(self) -> bool:
        """Whether nothing runs the block."""
        return self.note.startswith("skip: ")

    @property
    def needs(self) -> list[str]:
        """The modules that the block needs."""
        word, _, modules = self.note.partition(" ")
        return modules.split(", ") if word == "needs" else []


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        *_, title = ["", *_TITLE.findall(text, 0, match.start())]
        yield Block(match["language"], match["code"], line, match["note"] or "", title)


@dataclass(frozen=True)
class Story:
    """Blocks of a page that belong to one project, and the modules that they need."""

    page: Path
    needs: tuple[str, ...]
    blocks: list[Block]

    def lacking(self) -> str:
        """Say what this Python has not of what the story needs."""
        return ", ".join(name for name in self.needs if not is_there(name))

    def __str__(self) -> str:
        return "-".join([self.page.stem, *self.needs[:1], str(self.blocks[0].line)])


def is_there(name: str) -> bool:
    if name.startswith("python"):
        return sys.version_info >= tuple(map(int, name[len("python") :].split(".")))
    return find_spec(name) is not None


def stories(page: Path) -> Iterator[Story]:
    """Divide a page where it begins a new project."""
    story = Story(page, (), [])
    for block in blocks(page):
        if block.note == "project" or block.needs:
            if story.blocks:
                yield story
            story = Story(page, tuple(block.needs), [])
        story.blocks.append(block)
    if story.blocks:
        yield story


@dataclass(frozen=True)
class Command:
    """One command of a console block, and what it must print, if the page shows it."""

    line: str
    output: str

    @property
    def runs(self) -> bool:
        return self.line.split()[0] not in ("pip", "uv")

    def prints(self, output: str) -> bool:
        pattern = re.escape(self.output.rstrip()).replace("…", ".*")
        return not self.output or re.fullmatch(pattern, output.rstrip(), re.DOTALL) is not None


def commands(code: str) -> Iterator[Command]:
    for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
        line, _, output = part.replace("\\\n", " ").partition("\n")
        yield Command(line, output)


# --- running a page ---


class PageError(Exception):
    """A block does not do what it should; the message shows what it does."""


class Workspace:
    """The directory in which a page's files stand and its commands run.

    `python` runs the scripts and commands; those that are runs of pytest have this test's own.
    """

    def __init__(self, directory: Path, environ: dict[str, str], python: Path | str) -> None:
        self.directory = directory
        self.environ = environ
        self.python = python
        directory.mkdir()
        make_programs(directory.parent / "bin", python)
        make_programs(directory.parent / "test_bin", sys.executable)

    def write(self, name: str, text: str) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def take(self, block: Block) -> None:
        if block.note.startswith("file ") and block.file is not None:
            self.write(block.file, block.code)
        elif block.file is not None:
            self.take_file(block.file, block.code)
        elif block.language == "python":
            self.script(block.code)
        elif block.language == "console":
            self.commands(block)
        elif block.language == "yaml":
            self.judge_config(block.code)
        elif block.language == "toml":
            judge_toml(block.code)
        elif block.language == "ini":
            parser = configparser.ConfigParser()
            parser.read_string(block.code)
            judge_ini(parser["pytest"])
        else:
            assert block.language in ("text", "sql"), f"what is {block.language}?"

    def take_file(self, name: str, code: str) -> None:
        self.write(name, code)
        if name == "pyproject.toml":
            judge_toml(code)
        if name.endswith(".yaml"):
            load_config(self.directory / name)

    def script(self, code: str) -> None:
        raise NotImplementedError

    def commands(self, block: Block) -> None:
        *others, last = commands(block.code)
        for command in others:
            self.command(command)
        self.command(last, fails=block.note == "fails")

    def command(self, command: Command, *, fails: bool = False) -> None:
        if not command.runs:
            return
        if command.line.startswith("export "):
            name, _, value = shlex.split(command.line)[1].partition("=")
            self.environ[name] = value
            return
        result = self.run_in_shell(command.line)
        if fails and not result.returncode:
            raise PageError(f"it ends with status 0: {command.line}")
        if not fails:
            self.judge(result)
        if not command.prints(result.stdout):
            raise PageError(f"{command.line} prints\n{result.stdout}")

    @staticmethod
    def judge(result: subprocess.CompletedProcess[str]) -> None:
        if result.returncode:
            output = result.stdout[-6000:] + (result.stderr or "")[-6000:]
            raise PageError(f"it ends with status {result.returncode}:\n{output}")

    def judge_config(self, code: str) -> None:
        # Sections that are shown alone need the one without which there is no configuration.
        if "connection_settings:" not in code:
            code += "\nconnection_settings: {host: localhost}\n"
        self.write("block.yaml", code)
        load_config(self.directory / "block.yaml")

    def run_in_shell(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a line as a reader does, who sees stdout and stderr as one."""
        programs = self.directory.parent / ("test_bin" if "pytest" in line else "bin")
        path = os.pathsep.join([str(programs), self.environ["PATH"]])
        return subprocess.run(
            line,
            shell=True,
            cwd=self.directory,
            env={**self.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
        )


class Project(Workspace):
    """A directory that has a configuration from the start; scripts and tests run right away."""

    def __init__(
        self, directory: Path, config: dict[str, Any], python: Path | str = sys.executable
    ) -> None:
        environ = environment(directory, config["connection_settings"])
        super().__init__(directory, environ, python)
        self.config = yaml.safe_dump(config)
        (directory / "pytest.ini").write_text("[pytest]\n")
        self.write(CONFIG, self.config)

    def take_file(self, name: str, code: str) -> None:
        super().take_file(name, code)
        if name == "pyproject.toml":
            (self.directory / "pytest.ini").unlink(missing_ok=True)
        if Path(name).name.startswith("test_"):
            self.judge(self.run(sys.executable, "-m", "pytest", *QUICK, *STRICT, name))

    def script(self, code: str) -> None:
        self.write("script.py", code)
        result = self.run(self.python, "-W", "error", "script.py")
        self.judge(result)
        if result.stderr:
            raise PageError(f"it writes to stderr:\n{result.stderr}")

    def command(self, command: Command, *, fails: bool = False) -> None:
        creates = command.line == f"pgmonkey pgconfig create --filepath {CONFIG}"
        if creates:
            (self.directory / CONFIG).unlink()
        super().command(command, fails=fails)
        if creates:
            # What a reader edits in the template is where the server is.
            self.write(CONFIG, self.config)

    def run(self, *command: Path | str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.directory,
            env=self.environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )


class Reader(Workspace):
    """A reader of the tutorial, with an empty directory and the server of its first page."""

    def __init__(self, directory: Path, server: TutorialServer, python: Path | str) -> None:
        super().__init__(directory, environment_of_programs(), python)
        self.environ["PGPORT"] = server.port
        self.environ |= PLUGINS_OF_A_READER
        server.make_docker(directory.parent / "bin")

    def follow(self, page: Path) -> None:
        """Do all that a page shows."""
        for block in blocks(page):
            with naming(f"{page.name}, line {block.line}"):
                self.take(block)

    def script(self, code: str) -> None:
        raise PageError("a reader does not know in which file this belongs")


def environment(directory: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Give the environment of a page's commands: the server, and programs to run."""
    names = {"host": "HOST", "port": "PORT", "dbname": "NAME", "user": "USER"}
    return {
        **environment_of_programs(),
        "PYTHONPATH": os.pathsep.join([str(directory), str(ROOT)]),
        **{f"APP_DB_{name}": str(settings[key]) for key, name in names.items()},
        "APP_DB_PASSWORD": str(settings.get("password", "secret")),
        "DATABASE_URL": url_of({key: str(value) for key, value in settings.items()}),
    }


def environment_of_programs() -> dict[str, str]:
    """Give an environment in which this package is installed."""
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    environ.pop("PYTEST_ADDOPTS", None)
    return environ


def make_programs(directory: Path, executable: Path | str) -> None:
    """Make the programs that pages call: Python, and the command line as this code has it."""
    directory.mkdir(exist_ok=True)
    for name, arguments in (("python", ""), ("pgmonkey", " -m pytest_pgmonkey")):
        if sys.platform == "win32":
            text = f'@"{executable}"{arguments} %*\n'
            (directory / f"{name}.cmd").write_text(text, "utf-8")
        else:
            text = f'#!/bin/sh\nexec "{executable}"{arguments} "$@"\n'
            (directory / name).write_text(text, "utf-8")
            (directory / name).chmod(0o755)


def judge_toml(code: str) -> None:
    table = tomllib.loads(code)["tool"]["pytest"]
    judge_ini(table.get("ini_options", table))


def judge_ini(table: Any) -> None:
    known = {option.ini for option in OPTIONS}
    assert {name for name in table if name.startswith("pgmonkey_")} <= known


def tell(story: Story, project: Project) -> None:
    for block in story.blocks:
        if not block.skipped:
            with naming(f"{story.page.name}, line {block.line}"):
                project.take(block)


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Say which block of the page failed."""
    try:
        yield
    except Exception as error:
        pytest.fail(f"{place}: {type(error).__name__}: {error}", pytrace=False)
