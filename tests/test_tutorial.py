"""The tutorial, taken literally: each part runs alone, and all of them in order."""

from __future__ import annotations

import re
import shutil
import sys
from typing import TYPE_CHECKING

import pytest
from helpers.missing import miss
from helpers.pages import ROOT, Reader, blocks
from helpers.servers import find_tls_binaries
from helpers.tutorial import TutorialServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TUTORIAL = ROOT / "docs" / "tutorial"
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
def readers_python(
    production_python: Callable[[tuple[str, ...]], Path | str],
) -> Path | str:
    """The Python of production, with nothing that is for tests."""
    return production_python(())


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


_TUTORIAL_NOTE = re.compile(r" test: (fails|file \S+|needs [\w, ]+) ")


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
def test_each_way_to_the_server_works(reader: Reader, tutorial_server: TutorialServer) -> None:
    """The container's command and the administrator's SQL give the role and the database."""
    container, by_hand = blocks(INDEX)
    tutorial_server.clear()
    reader.take(container)
    tutorial_server.judge_login(password_of_the_tutorial())
    tutorial_server.clear()
    tutorial_server.execute(*by_hand.code.strip().splitlines())
    tutorial_server.judge_login(password_of_the_tutorial())


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
