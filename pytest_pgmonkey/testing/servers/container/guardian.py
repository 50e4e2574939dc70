"""A small process that removes a run's container once pytest is gone, however it went.

It is run as a script by `watcher.py`, isolated. Each line that it reads is a JSON array:
`["path", directories]` says where to import from, `["made", name]` that the container exists,
`["run", pid]` that it shall live as long as that process, the controller of a run whose workers
share it, and `["done"]` that pytest has removed it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from typing import Any

ATTEMPT = "pytest-pgmonkey.attempt"
SUPERUSER = "postgres"
PARENT_POLL = 0.25
STAY_POLL = 1.0
REMOVE_POLL = 0.2
REMOVE_LIMIT = 60.0
LATE_LIMIT = 15.0


class Watch:
    """What pytest has said, and whether it is still there."""

    def __init__(self, parent: int) -> None:
        self.parent = parent
        self.run = 0
        self.made = ""
        self.done = False
        self._closed = threading.Event()

    def listen(self) -> None:
        """Read until pytest closes the pipe, or the end of the process does."""
        with contextlib.suppress(ValueError):
            for line in sys.stdin:
                verb, *arguments = json.loads(line)
                getattr(self, f"do_{verb}")(*arguments)
        self._closed.set()

    def do_path(self, directories: list[str]) -> None:
        sys.path[:] = directories

    def do_made(self, name: str) -> None:
        self.made = name

    def do_run(self, pid: int) -> None:
        self.run = pid

    def do_done(self) -> None:
        self.done = True

    def wait(self) -> None:
        """Wait for the end of pytest, also where a fork of it holds the pipe open."""
        while not self.run and not self._closed.wait(PARENT_POLL):
            if os.getppid() != self.parent:
                return
        if self.run:
            self._wait_for_run()

    def _wait_for_run(self) -> None:
        from pytest_pgmonkey.testing.servers.embedded.guardian import is_alive

        while is_alive(self.run):
            time.sleep(PARENT_POLL)

    def stay(self) -> None:
        """Wait as long as a database of a failed test is kept in the container."""
        try:
            from testcontainers.core import docker_client  # noqa: F401 - it may be uninstalled

            from pytest_pgmonkey.kept_databases import names_in
        except ImportError:
            return
        names = names_in(self.made)
        while names:
            time.sleep(STAY_POLL)
            left = names_in(self.made)
            for name in names - left if left else ():
                drop(self.made, name)
            names = left


def drop(container: str, name: str) -> None:
    """Drop a database in a container where others are still kept, as well as it goes."""
    from testcontainers.core.docker_client import DockerClient

    statement = f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'
    with contextlib.suppress(Exception):  # it goes with the container
        client = DockerClient().client
        try:
            found = client.containers.get(container)
            found.exec_run(["psql", "-U", SUPERUSER, "-c", statement])
        finally:
            client.close()


def remove_for_long(attempt: str, *, made: bool) -> None:
    """Remove a container, also one that an engine is only about to make; tries for a while."""
    deadline = time.monotonic() + REMOVE_LIMIT
    late = time.monotonic() + (0 if made else LATE_LIMIT)
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):  # an engine that restarts: there is no one to tell
            if _connect_and_remove(attempt) or time.monotonic() > late:
                return
        time.sleep(REMOVE_POLL)


def _connect_and_remove(attempt: str) -> bool:
    from testcontainers.core.docker_client import DockerClient

    client = DockerClient().client
    try:
        return remove(client.api, attempt)
    finally:
        client.close()


def remove(api: Any, attempt: str) -> bool:
    """Remove the container that an attempt has made; tell whether there was one.

    Its name does not tell that: all workers of a run try to make a container of one name.
    """
    found = api.containers(all=True, filters={"label": f"{ATTEMPT}={attempt}"})
    for container in found:
        remove_container(api, container["Id"])
    return bool(found)


def remove_container(api: Any, container: str) -> None:
    """Remove a container unless somebody else just does."""
    from docker.errors import APIError

    try:
        api.remove_container(container, force=True, v=True)
    except APIError as error:
        if error.status_code not in (404, 409):
            raise


def set_signals(handler: Any) -> None:
    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def main(parent: str, attempt: str) -> None:
    watch = Watch(int(parent))
    set_signals(lambda *_: sys.exit(0))
    try:
        threading.Thread(target=watch.listen, daemon=True).start()
        watch.wait()
        if watch.made and not watch.done:
            watch.stay()
    finally:
        set_signals(signal.SIG_IGN)
        if not watch.done:
            remove_for_long(attempt, made=bool(watch.made))
        os._exit(0)  # the thread may hold stdin, for which the interpreter would wait


if __name__ == "__main__":
    main(*sys.argv[1:])
