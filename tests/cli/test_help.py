"""Help of every command, completion, and what neither may cost."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pytest_pgmonkey import cli

COMMANDS = [
    ["pgconfig", "create"],
    ["pgconfig", "test"],
    ["pgconfig", "generate-code"],
    ["pgserverconfig"],
    ["pgimport"],
    ["pgexport"],
    ["kept"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("columns", [None, "40", "200"])
def test_help_shows_an_example(pgmonkey, command, columns, monkeypatch):
    """Each command's help ends with an example of it, on any terminal."""
    if columns:
        monkeypatch.setenv("COLUMNS", columns)

    text = pgmonkey(*command, "--help").output()

    assert f"pgmonkey {' '.join(command)} " in text.split("example:\n")[1]


def test_all_commands_are_listed(pgmonkey):
    """The help names every command, and none is without a module."""
    text = pgmonkey("--help").output()

    assert set(cli.COMMANDS) == {command[0] for command in COMMANDS}
    assert all(f"    {name} " in text or f"    {name}\n" in text for name in cli.COMMANDS)


def test_options_that_every_reader_has(pgmonkey):
    """Whatever reads a configuration takes the same names and resolves references."""
    for command in COMMANDS[1:-1]:
        text = pgmonkey(*command, "--help").output()

        for option in ("--connconfig", "--filepath", "--resolve-env", "--allow-sensitive-defaults"):
            assert option in text, command


@pytest.mark.parametrize("command", ["pgimport", "pgexport", "pgserverconfig"])
def test_missing_options(pgmonkey, command):
    """A command without its options is wrong usage, in two parts: usage and reason."""
    result = pgmonkey(command)

    assert (result.status, result.out) == (2, "")
    assert f"usage: pgmonkey {command}" in result.err


def test_secrets_are_hidden(pgmonkey, tmp_path):
    """No command shows a password, with the traceback either."""
    path = tmp_path / "c.yaml"
    path.write_text("connection_settings: {host: 127.0.0.1, port: 1, password: hunter2hunter2}")
    file = tmp_path / "x.csv"
    file.write_text("a\n1\n")
    for command in (
        ["pgserverconfig", "--audit"],
        ["pgimport", "--table", "t", "--import_file", file],
        ["pgexport", "--query", "SELECT 1"],
    ):
        result = pgmonkey(*command, "--connconfig", path, "--debug")

        assert result.status == 1
        assert "Traceback" in result.err
        assert "hunter2" not in result.out + result.err


def test_completion():
    """With argcomplete the shell completes commands, options and choices."""
    pytest.importorskip("argcomplete")
    for line, expected in (
        ("pgmonkey pgserver", "pgserverconfig"),
        ("pgmonkey pgimport --create-t", "--create-table"),
        ("pgmonkey pgconfig test --connection-type async_", "async_pool"),
    ):
        environ = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
        command = [sys.executable, "-m", "pytest_pgmonkey"]
        result = subprocess.run(
            ["bash", "-c", f"{' '.join(command)} 8>&1 9>/dev/null >/dev/null 2>&1"],
            capture_output=True,
            text=True,
            env={**os.environ, **environ, "_ARGCOMPLETE_IFS": "\n"},
            check=False,
        )

        assert expected in result.stdout.split()
