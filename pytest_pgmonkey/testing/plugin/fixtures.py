"""The fixtures of the plugin, and nothing else.

None of them is async: they work in every event loop, and with every async plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from .collection import current_request, is_async, restarts_sequences
from .configure import OPTIONS
from .lifecycle import begin, kit_of, prepare, settle, show_errors
from .second_runs import watch
from .statements import tell_of_statements
from .teardown import complete_teardowns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from ...handles import AsyncHandle, AsyncPoolHandle, Handle, PoolHandle
    from ...manager import PGConnectionManager
    from ..fixture_value import PGMonkey
    from ..kit import Kit
    from ..prepared import Database
    from ..servers.server import Server


@pytest.fixture(scope="session")
def pgmonkey_schema(pytestconfig: pytest.Config) -> list[Any]:
    """Schema steps of the test database: SQL files, directories, functions. Override it."""
    return list(pytestconfig.stash[OPTIONS].schema)


@pytest.fixture(scope="session")
def pgmonkey_server(pytestconfig: pytest.Config) -> Server:
    """The PostgreSQL server of this run: .source, .version, .conninfo(dbname), .config(dbname)."""
    with show_errors():
        return kit_of(pytestconfig).server


@pytest.fixture(scope="session")
def pgmonkey_database(pytestconfig: pytest.Config, pgmonkey_schema: list[Any]) -> Database:
    """The prepared database of this process: .name, .dsn, .url, .config_path, .unblock()."""
    with show_errors():
        return prepare(pytestconfig, pgmonkey_schema)


@pytest.fixture(scope="session")
def _pgmonkey_kit() -> Kit:
    """The kit with its database prepared."""
    # Not in the signature: pytest walks through all session fixtures of a signature again for
    # each test, which costs as much as a statement.
    request = current_request()
    request.getfixturevalue("pgmonkey_database")
    watch(request.config)
    tell_of_statements(request.config)
    complete_teardowns(request.config)
    return kit_of(request.config)


@pytest.fixture(scope="session")
def pgmonkey_dsn(_pgmonkey_kit: Kit) -> str:
    """DSN for pools and servers that live all session: any client joins the running test."""
    from psycopg.conninfo import make_conninfo

    from ..addresses.purpose import Purpose

    return make_conninfo(**_pgmonkey_kit.gateway.conninfo(Purpose.SESSION))


@pytest.fixture(scope="session")
def pgmonkey_url(_pgmonkey_kit: Kit) -> str:
    """pgmonkey_dsn as a URL: postgresql://user:password@127.0.0.1:port/name."""
    from ..addresses.purpose import Purpose
    from ..addresses.urls import url_of

    return url_of(_pgmonkey_kit.gateway.conninfo_by_tcp(Purpose.SESSION))


@pytest.fixture(scope="module")
def pgmonkey_module(_pgmonkey_kit: Kit) -> Iterator[Connection[Any]]:
    """A sync connection for data that a module's tests share, rolled back at the module's end."""
    with show_errors(), _pgmonkey_kit.share(restarts=restarts_sequences()) as conn:
        yield conn


@pytest.fixture(scope="class")
def pgmonkey_class(_pgmonkey_kit: Kit) -> Iterator[Connection[Any]]:
    """A sync connection for data that a class's tests share, rolled back at the class's end."""
    with show_errors(), _pgmonkey_kit.share(restarts=restarts_sequences()) as conn:
        yield conn


@pytest.fixture
def _pgmonkey_test(_pgmonkey_kit: Kit) -> Iterator[None]:
    """The sandbox for a test that names no fixture, only the marker."""
    begin(_pgmonkey_kit)
    yield
    settle(_pgmonkey_kit)


@pytest.fixture
def pgmonkey(_pgmonkey_kit: Kit) -> Iterator[PGMonkey]:
    """The test's database, rolled back: .normal, .pool, .async_, .async_pool, .execute(…)."""
    from ..fixture_value import PGMonkey

    begin(_pgmonkey_kit)
    yield PGMonkey(_pgmonkey_kit)
    settle(_pgmonkey_kit)


@pytest.fixture
def pgmonkey_manager(_pgmonkey_kit: Kit) -> Iterator[PGConnectionManager]:
    """A PGConnectionManager. Any path or dictionary you give it leads to the test's database."""
    begin(_pgmonkey_kit)
    yield _pgmonkey_kit.handles.manager()
    settle(_pgmonkey_kit)


@pytest.fixture
def pgmonkey_normal(_pgmonkey_kit: Kit) -> Iterator[Handle]:
    """A handle of type 'normal' in the rolled-back test: with pgmonkey_normal as conn."""
    begin(_pgmonkey_kit)
    yield _pgmonkey_kit.handles.make("normal")
    settle(_pgmonkey_kit)


@pytest.fixture
def pgmonkey_pool(_pgmonkey_kit: Kit) -> Iterator[PoolHandle]:
    """A handle of type 'pool' in the rolled-back test: with pgmonkey_pool as conn."""
    begin(_pgmonkey_kit)
    yield _pgmonkey_kit.handles.make("pool")
    settle(_pgmonkey_kit)


@pytest.fixture
def pgmonkey_async(_pgmonkey_kit: Kit) -> Iterator[AsyncHandle]:
    """A handle of type 'async' in the rolled-back test: async with pgmonkey_async as conn."""
    begin(_pgmonkey_kit)
    yield _pgmonkey_kit.handles.make("async")
    settle(_pgmonkey_kit)


@pytest.fixture
def pgmonkey_async_pool(_pgmonkey_kit: Kit) -> Iterator[AsyncPoolHandle]:
    """A handle of type 'async_pool' in the rolled-back test: async with … as conn."""
    begin(_pgmonkey_kit)
    yield _pgmonkey_kit.handles.make("async_pool")
    settle(_pgmonkey_kit)


@pytest.fixture
def pgmonkey_connection(_pgmonkey_kit: Kit, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A handle; the test runs once per connection type of its kind, sync or async."""
    from ..other_kind import view

    begin(_pgmonkey_kit)
    with view(
        _pgmonkey_kit.handles.make(request.param), for_async=is_async(request.function)
    ) as handle:
        yield handle
    settle(_pgmonkey_kit)
