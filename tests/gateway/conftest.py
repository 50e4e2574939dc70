"""The gateway that the tests of this directory share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gateway.clients import Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer


@pytest.fixture(scope="session")
def stage(pg_server: EmbeddedServer) -> Iterator[Stage]:
    """One gateway and its databases, for the whole session."""
    stage = Stage(pg_server)
    yield stage
    stage.close()
