"""The server that a reader of the tutorial has, and the program `docker` that reaches it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql

from helpers.servers import PasswordServer, find_tls_binaries
from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries

if TYPE_CHECKING:
    from pathlib import Path

_DOCKER = """\
#!{python}
# `docker exec [-i] [-u USER] parcels COMMAND…`, on the server of the test. `docker run` makes there
# what the image `postgres` makes in a container: a superuser with a password, and a database.
import os, shutil, sys

words = sys.argv[1:]
if words[0] == "run":
    import psycopg
    from psycopg import sql

    assert words[1:6] == ["--name", "parcels", "-d", "-p", "127.0.0.1:5432:5432"], words
    assert words[-1] == "postgres", words
    given = dict(word.split("=", 1) for word in words if "=" in word)
    user, password = sql.Identifier(given["POSTGRES_USER"]), given["POSTGRES_PASSWORD"]
    with psycopg.connect(**{admin!r}, autocommit=True) as conn:
        role = sql.SQL("CREATE ROLE {{}} LOGIN SUPERUSER PASSWORD {{}}")
        conn.execute(role.format(user, sql.Literal(password)))
        conn.execute(sql.SQL("CREATE DATABASE {{}} OWNER {{}}").format(user, user))
    sys.exit()
assert words.pop(0) == "exec", "only run and exec are here"
while words[0].startswith("-"):
    if words.pop(0) == "-u":
        words.pop(0)
assert words.pop(0) == "parcels", "only the container parcels is here"
data = {data!r}
os.environ |= {{"PGDATA": data, "PGHOST": {socket!r}}}
os.environ["PATH"] = {bindir!r} + ":" + os.environ["PATH"]
program = shutil.which(words[0])
owner = os.stat(data).st_uid
os.chdir("/")
if os.geteuid() != owner:
    os.setuid(owner)
os.execv(program, words)
"""


class TutorialServer(PasswordServer):
    """A server as the tutorial's first page starts it: a database and a role, both `parcels`."""

    @classmethod
    def start_best(cls) -> TutorialServer:
        """Start one that can speak TLS where the machine has such binaries."""
        server = cls.start(find_tls_binaries() or find_binaries())
        assert isinstance(server, cls)
        return server

    def begin_anew(self, password: str, *, superuser: bool) -> None:
        """Give the role an empty database, and undo what another reader has set up."""
        kind = sql.SQL("SUPERUSER" if superuser else "NOSUPERUSER")
        self.guard_the_door()
        self.clear()
        with self._admin() as conn:
            statement = sql.SQL("CREATE ROLE parcels LOGIN {} PASSWORD {}")
            conn.execute(statement.format(kind, sql.Literal(password)))
            conn.execute("CREATE DATABASE parcels OWNER parcels")
            conn.execute("ALTER SYSTEM RESET ALL")
            conn.execute("SELECT pg_reload_conf()")

    def clear(self) -> None:
        """Drop the database and the roles."""
        self.execute(
            "DROP DATABASE IF EXISTS parcels WITH (FORCE)", "DROP ROLE IF EXISTS parcels, reporter"
        )

    def execute(self, *statements: str) -> None:
        """Run statements as the server's administrator."""
        with self._admin() as conn:
            for statement in statements:
                conn.execute(statement)

    def judge_login(self, password: str) -> None:
        """Enter as the tutorial's files do, and no other way."""
        where = {"host": "127.0.0.1", "port": self.port, "dbname": "parcels", "user": "parcels"}
        psycopg.connect(**where, password=password).close()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(**where, password=f"not {password}")

    def make_docker(self, directory: Path) -> None:
        """Make the program that a reader runs commands in the container with."""
        file = directory / "docker"
        text = _DOCKER.format(
            python=sys.executable,
            admin=self.admin_conninfo(),
            data=str(self.guarded.data),
            socket=str(self.socket_directory),
            bindir=str(self.binaries.bindir),
        )
        file.write_text(text, "utf-8")
        file.chmod(0o755)
