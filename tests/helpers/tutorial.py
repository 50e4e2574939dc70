"""The server that a reader of the tutorial has, and the program `docker` that reaches into it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from psycopg import sql

from helpers.servers import PasswordServer, find_tls_binaries
from pytest_pgmonkey.testing.servers.embedded.binaries import find_binaries

if TYPE_CHECKING:
    from pathlib import Path

_DOCKER = """\
#!{python}
# `docker exec [-i] [-u USER] parcels COMMAND…`, on the server of the test.
import os, shutil, sys

words = sys.argv[1:]
assert words.pop(0) == "exec", "only exec is here"
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
        with self._admin() as conn:
            conn.execute("DROP DATABASE IF EXISTS parcels WITH (FORCE)")
            conn.execute("DROP ROLE IF EXISTS parcels, reporter")
            statement = sql.SQL("CREATE ROLE parcels LOGIN {} PASSWORD {}")
            conn.execute(statement.format(kind, sql.Literal(password)))
            conn.execute("CREATE DATABASE parcels OWNER parcels")
            conn.execute("ALTER SYSTEM RESET ALL")
            conn.execute("SELECT pg_reload_conf()")

    def make_docker(self, directory: Path) -> None:
        """Make the program that a reader runs commands in the container with."""
        file = directory / "docker"
        text = _DOCKER.format(
            python=sys.executable,
            data=str(self.guarded.data),
            socket=str(self.socket_directory),
            bindir=str(self.binaries.bindir),
        )
        file.write_text(text, "utf-8")
        file.chmod(0o755)
