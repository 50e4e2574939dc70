"""The two databases that the sandbox's tests compare."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import pytest
from sandbox.twins import Twins

from pytest_pgmonkey import ConnectionType
from pytest_pgmonkey.testing.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer


@pytest.fixture(scope="session")
def twins(pg_server: EmbeddedServer) -> Iterator[Twins]:
    names = [f"twin_{secrets.token_hex(6)}" for _ in range(2)]
    for name in names:
        pg_server.create_database(name)
    twins = Twins(pg_server, *names)
    yield twins
    twins.close()
    for name in names:
        pg_server.drop_database(name)


@pytest.fixture(params=[str(type_) for type_ in ConnectionType])
def type_(request: pytest.FixtureRequest) -> str:
    """Each of the four connection types in turn."""
    name: str = request.param
    return name


@pytest.fixture
def own(twins: Twins) -> Iterator[Twins]:
    """The twins with a sandbox that the test may spoil."""
    before, twins.sandbox = twins.sandbox, Sandbox(twins.sandbox.conninfo, wait_timeout=0.5)
    with twins.intercepting():
        yield twins
    twins.sandbox.close()
    twins.sandbox = before
    for table in ("late", "soon", "t"):
        twins.admins[False].execute(f"DELETE FROM {table}")
