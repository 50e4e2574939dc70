"""The one connection of a command: opened as production opens it, closed when it ends."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..config import read_spec
from ..connecting import Connector, drive
from .common import config_arguments

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from psycopg import Connection

__all__ = ["session"]


@contextmanager
def session(args: argparse.Namespace) -> Iterator[Connection[Any]]:
    """Connect as type normal; in autocommit, so that a command begins its transactions itself."""
    # What psycopg logs of a connection that breaks, the command's own error says.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    spec = read_spec(args.path, "normal", **config_arguments(args))
    conn: Connection[Any] = drive(Connector(spec).connect())
    with conn:
        conn.autocommit = True
        yield conn
