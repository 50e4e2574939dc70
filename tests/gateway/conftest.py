"""The gateway that the tests of this directory share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from helpers.waiting import wait_until

from gateway.clients import Stage
from gateway.process import Process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_pgmonkey.testing.servers.embedded.server import EmbeddedServer


@pytest.fixture(scope="session")
def stage(pg_server: EmbeddedServer) -> Iterator[Stage]:
    """One gateway and its databases, for the whole session."""
    stage = Stage(pg_server)
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Process]]:
    """The one process of the module's tests; another, where a test has spoiled it."""
    made: list[Process] = []
    yield made
    for process in made:
        process.close()


@pytest.fixture
def process(
    processes: list[Process], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    """The process, in which nothing may be left: neither in the database nor for another test."""
    if not processes:
        processes.append(Process(tmp_path_factory.mktemp("process")))
    process = processes.pop()
    try:
        with process.stack:
            yield process
        assert wait_until(lambda: not process.kit._rollback.has_wider, 10)
        assert process.real() == process.at_first
        assert process.numbers() == []
    except BaseException:
        process.close()
        raise
    processes.append(process)
