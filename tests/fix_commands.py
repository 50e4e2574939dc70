"""The command in this process, on a database of the test's own."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from pytest_pgmonkey import cli

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass(frozen=True)
class Result:
    """What a command left: its status and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a failed command, without its beginning."""
        assert (self.status, self.out) == (1, "")
        (line,) = [line for line in self.err.splitlines() if "settings taken" not in line]
        return line.removeprefix("pgmonkey: error: ")

    def output(self) -> str:
        """What a command that went well wrote."""
        assert self.status == 0, self.err
        return self.out


class Stdin(io.TextIOWrapper):
    """Standard input that holds some bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))


@pytest.fixture
def pgmonkey(capsysbinary, monkeypatch) -> Callable[..., Result]:
    """A function that runs the command in this process."""

    def run(*arguments: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", Stdin(stdin))
        status = cli.main([str(argument) for argument in arguments])
        out, err = capsysbinary.readouterr()
        return Result(status, out.decode("utf-8", "surrogateescape"), err.decode())

    return run


@pytest.fixture
def conn(pg_server, database) -> Iterator[psycopg.Connection[Any]]:
    """A connection to the test's database, in autocommit."""
    with psycopg.connect(**pg_server.conninfo(database), autocommit=True) as conn:
        yield conn


@pytest.fixture
def config_path(make_config) -> Path:
    return make_config()


@pytest.fixture
def load(pgmonkey, config_path, tmp_path) -> Callable[..., Result]:
    """A function that writes a CSV file and imports it into a table."""

    def load(table: str, data: str | bytes, *options: object, name: str = "in.csv") -> Result:
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        arguments = ["--table", table, "--connconfig", config_path, "--import_file", path]
        return pgmonkey("pgimport", *arguments, *options)

    return load


@pytest.fixture
def dump(pgmonkey, config_path) -> Callable[..., str]:
    """A function that exports a table to standard output and gives the text."""

    def dump(table: str, *options: object) -> str:
        arguments = ["--table", table, "--connconfig", config_path, "--export_file", "-"]
        return pgmonkey("pgexport", *arguments, *options).output()

    return dump
