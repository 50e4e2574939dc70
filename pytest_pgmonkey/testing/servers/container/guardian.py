"""The guardian of a container: removes it once pytest is gone, however it went."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from ....kept_databases import names_in
from .. import guardian

ATTEMPT = "pytest-pgmonkey.attempt"
SUPERUSER = "postgres"
REMOVE_POLL = 0.2
REMOVE_LIMIT = 60.0
LATE_LIMIT = 15.0


class Guardian(guardian.Guardian):
    """What pytest has said of the container, and whether it is to be removed."""

    def __init__(self, parent: str, attempt: str) -> None:
        super().__init__(parent)
        self._attempt = attempt
        self._made = ""
        self._done = False
        self._kept: set[str] = set()

    def do_made(self, name: str) -> None:
        """Note that the container exists."""
        self._made = name

    def do_done(self) -> None:
        """Note that pytest has removed it."""
        self._done = True

    def is_kept(self) -> bool:
        """Tell whether databases are kept in it; those that no longer are are dropped."""
        if self._done or not self._made:
            return False
        try:
            from testcontainers.core import docker_client  # noqa: F401 - it may be uninstalled
        except ImportError:
            return False
        left = names_in(self._made)
        for name in self._kept - left if left else ():
            drop(self._made, name)
        self._kept = left
        return bool(left)

    def clean_up(self) -> None:
        if not self._done:
            remove_for_long(self._attempt, made=bool(self._made))


def drop(container: str, name: str) -> None:
    """Drop a database in a container where others are still kept, as well as it goes."""
    statement = f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'
    with contextlib.suppress(Exception), _connect() as client:  # it goes with the container
        found = client.containers.get(container)
        found.exec_run(["psql", "-U", SUPERUSER, "-c", statement])


def remove_for_long(attempt: str, *, made: bool) -> None:
    """Remove a container, also one that an engine is only about to make; tries for a while."""
    deadline = time.monotonic() + REMOVE_LIMIT
    late = time.monotonic() + (0 if made else LATE_LIMIT)
    while time.monotonic() < deadline:
        # There is no one to tell that an engine restarts.
        with contextlib.suppress(Exception), _connect() as client:
            if remove(client.api, attempt) or time.monotonic() > late:
                return
        time.sleep(REMOVE_POLL)


def _connect() -> contextlib.closing[Any]:
    from testcontainers.core.docker_client import DockerClient

    return contextlib.closing(DockerClient().client)


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
