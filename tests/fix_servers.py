"""The servers and databases that the project's own tests run on."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
from helpers.missing import miss
from helpers.servers import RestartableServer, TLSServer, config_writer, find_tls_binaries

from pytest_pgmonkey.testing.servers.embedded.binaries import Binaries, find_binaries
from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def pg_server() -> Iterator[EmbeddedServer]:
    """A private server from the best binaries of this machine."""
    server = EmbeddedServer.start(find_binaries())
    yield server
    server.stop()


@pytest.fixture
def database(pg_server: EmbeddedServer) -> Iterator[str]:
    """The name of an empty database on `pg_server`, dropped after the test."""
    name = f"test_{secrets.token_hex(6)}"
    pg_server.create_database(name)
    yield name
    pg_server.drop_database(name)


@pytest.fixture
def make_config(tmp_path: Path, pg_server: EmbeddedServer, database: str) -> Callable[..., Path]:
    """A function that writes a YAML file for `database` and gives its path.

    `make_config("pool", pool_settings={"max_size": 3}, connection_settings={"autocommit": True})`:
    the type, if any, then sections; connection settings are added to those of the database.
    """
    return config_writer(tmp_path, lambda: pg_server.config(database))


@pytest.fixture
def restartable_server() -> Iterator[RestartableServer]:
    """A server of the test's own: `halt()`, `halt(crash=True)`, `resume()`, `restart()`."""
    server = RestartableServer.start(find_binaries())
    yield server
    server.stop()


@pytest.fixture(scope="session")
def tls_binaries() -> Binaries:
    """Server binaries that were built with TLS."""
    return find_tls_binaries() or miss("a PostgreSQL server with TLS (Debian: postgresql)")


@pytest.fixture(scope="session")
def tls_server(
    tls_binaries: Binaries, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TLSServer]:
    """A server with a good certificate, for passwords and client certificates."""
    server = TLSServer.start(tls_binaries, tmp_path_factory.mktemp("tls"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def expired_tls_server(
    tls_binaries: Binaries, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TLSServer]:
    """A server whose certificate has expired."""
    server = TLSServer.start(tls_binaries, tmp_path_factory.mktemp("expired"), days=-1)
    yield server
    server.stop()
