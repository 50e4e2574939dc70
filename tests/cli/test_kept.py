"""`pgmonkey kept`: what it lists, what it forgets, what it removes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import psycopg
import pytest

from pytest_pgmonkey.kept_databases import Kept, describe, entries, new_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(autouse=True)
def registry(tmp_path, monkeypatch) -> Path:
    """A cache in which no other test keeps anything."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pytest-pgmonkey" / "kept"


@pytest.fixture
def keep(pg_server) -> Callable[..., Kept]:
    """A function that enters a database of the suite's own server."""

    def keep(name: str, *, made: str = "2026-03-01T12:00:00+00:00", **changes: object) -> Kept:
        conninfo = pg_server.conninfo(name)
        place = {key: conninfo[key] for key in ("host", "port")}
        facts = {"source": "embedded", "dsn": f"dbname={name}", "psql": f"psql {name}"}
        facts = {"name": name, "test": f"test_a.py::{name}", **facts, "place": place, **changes}
        return Kept(made=made, **facts).save()

    return keep


@pytest.fixture
def exists(pg_server) -> Callable[[str], bool]:
    """Whether a database is on the server."""

    def exists(name: str) -> bool:
        with psycopg.connect(**pg_server.admin_conninfo()) as conn:
            query = "SELECT FROM pg_database WHERE datname = %s"
            return conn.execute(query, [name]).fetchone() is not None

    return exists


def test_nothing_is_kept(pgmonkey, registry):
    """Nothing on stdout but JSON's empty list; nothing is made; no failure."""
    assert pgmonkey("kept").output() == ""
    assert pgmonkey("kept").err == "pgmonkey: no database is kept\n"
    assert pgmonkey("kept", "--remove").output() == ""
    assert pgmonkey("kept", "--json").output() == "[]\n"
    assert not registry.exists()


def test_the_list(pgmonkey, keep, database):
    """What people need to get in."""
    keep(database, note="psql asks")
    assert pgmonkey("kept").output() == (
        f"{database}\n"
        f"  test:   test_a.py::{database}\n"
        "  when:   2026-03-01 12:00:00 UTC\n"
        "  source: embedded\n"
        f"  DSN:    dbname={database}\n"
        f"  psql:   psql {database}\n"
        "  note:   psql asks\n"
    )
    (listed,) = json.loads(pgmonkey("kept", "--json").output())
    assert listed == {
        "name": database,
        "test": f"test_a.py::{database}",
        "when": "2026-03-01T12:00:00+00:00",
        "source": "embedded",
        "dsn": f"dbname={database}",
        "psql": f"psql {database}",
        "note": "psql asks",
        "gone": False,
    }


def test_the_oldest_comes_first(keep):
    """Whatever they are called."""
    keep("a", made="2026-03-02T12:00:00+00:00")
    keep("b", made="2026-03-01T12:00:00+00:00")
    keep("elsewhere", machine="another machine")
    assert [kept.name for kept in entries()] == ["b", "a"]


def test_the_gone_are_told_once(pgmonkey, keep, tmp_path, database):
    """Its server has ended, or somebody has dropped it."""
    keep(database)
    keep("dropped")
    keep("rebooted", place={"host": str(tmp_path), "port": "5432"})
    listed = json.loads(pgmonkey("kept", "--json").output())
    assert {one["name"]: one["gone"] for one in listed} == {
        database: False,
        "dropped": True,
        "rebooted": True,
    }
    assert [kept.name for kept in entries()] == [database]
    keep("dropped")
    out = pgmonkey("kept").output()
    assert "dropped: gone; forgotten now\n" in out
    assert "dropped" not in pgmonkey("kept").output()


def test_removal_by_name(pgmonkey, keep, database, pg_server, exists):
    """Those that are named, with the sessions in them, and no other."""
    keep(database)
    keep("other")
    with psycopg.connect(**pg_server.conninfo(database)):
        assert pgmonkey("kept", "--remove", database).output() == f"{database}: removed\n"
    assert not exists(database)
    assert [kept.name for kept in entries()] == ["other"]


def test_removal_of_all(pgmonkey, keep, database, exists, tmp_path):
    """Those that are gone already are no failure."""
    keep(database)
    keep("rebooted", place={"host": str(tmp_path), "port": "5432"})
    out = pgmonkey("kept", "--remove").output()
    assert sorted(out.splitlines()) == sorted([f"{database}: removed", "rebooted: removed"])
    assert not exists(database)
    assert entries() == []


def test_an_unknown_name(pgmonkey, keep, database):
    """It is said, and nothing is removed."""
    keep(database)
    result = pgmonkey("kept", "--remove", database, "nonsense")
    assert result.error == "nonsense: no database of that name is kept; see `pgmonkey kept`"
    assert [kept.name for kept in entries()] == [database]


def test_two_wishes_at_once(pgmonkey):
    """A list and a removal is wrong usage."""
    result = pgmonkey("kept", "--json", "--remove")
    assert (result.status, result.out) == (2, "")


def test_on_a_configured_server(pgmonkey, keep, database, make_config, exists, monkeypatch):
    """The file is read again, with the options of the run; where it cannot be, the entry stays."""
    password = {"password": {"from_env": "KEPT_PASSWORD"}}
    file = make_config(connection_settings={"dbname": "postgres", **password})
    options = {"resolve_env": True, "allow_sensitive_defaults": False}
    keep("not_reached", source="config", place={"file": "none.yaml", "options": options})
    keep(database, source="config", place={"file": str(file), "options": options})

    assert pgmonkey("kept", "--json").output().count('"gone": false') == 2
    result = pgmonkey("kept", "--remove", database)
    assert result.error.startswith(f"{file}: ")
    assert "KEPT_PASSWORD" in result.error

    monkeypatch.setenv("KEPT_PASSWORD", "hunter2hunter2")
    result = pgmonkey("kept", "--remove")
    assert (result.status, result.out) == (1, f"{database}: removed\n")
    assert "none.yaml" in result.err
    assert not exists(database)
    assert [kept.name for kept in entries()] == ["not_reached"]


def test_damaged_entries(pgmonkey, keep, registry):
    """What is no entry, or of another version, is not in the way."""
    keep("a", place={"host": "/nowhere", "port": "5432"})
    (registry / "b.json").write_text("{")
    (registry / "c.json").write_text('{"name": "c"}')
    assert pgmonkey("kept", "--remove").output() == "a: removed\n"


def test_entries_are_private(keep):
    """Nobody else reads them."""
    file = keep("a").file
    assert file is not None
    assert file.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ("tests/test_a.py::test_transfer", "pgmonkey_kept_test_transfer_"),
        ("tests/test_a.py::TestA::test_it[Größe::x-1]", "pgmonkey_kept_test_it_gr_e_x_1_"),
        (
            "test_a.py::test_" + "long_" * 20,
            "pgmonkey_kept_test_long_long_long_long_long_long_long_",
        ),
        ("test_a.py::ü", "pgmonkey_kept_test_"),
    ],
)
def test_names_tell_the_test(test, expected):
    """In PostgreSQL's 63 bytes, of letters that need no quotes, and never twice."""
    name = new_name(test)
    assert name[:-8] == expected
    assert len(name) <= 63
    assert name != new_name(test)


def test_what_is_told_without_a_note(keep, database):
    """No empty line where there is nothing to say."""
    assert "note" not in describe(keep(database))
