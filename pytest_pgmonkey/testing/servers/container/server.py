"""A private PostgreSQL server for one test run, in a container, gone with the run.

testcontainers says where the engine is and how its containers are reached. Waiting and cleaning up
are our own: its wait does not notice a container that has died, and its reaper is one more image.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from ....kept_databases import names_in
from ....processes import is_dead, process_name
from ....secrets import redact_text
from ..guard import Guard
from ..server import ADMIN, ROLE, THROWAWAY, OwnServer, ServerStartError, arguments
from . import guardian
from .engine import engine_command, engine_errors, find_engine, image_prefix

if TYPE_CHECKING:
    from docker.models.containers import Container
    from docker.models.images import Image
    from typing_extensions import LiteralString

    from ....kept_databases import Kept
    from ..server import Worker

__all__ = ["ContainerServer", "start_container"]

OWNER: Final = "pytest-pgmonkey.owner"
GUARDIAN: Final = "pytest-pgmonkey.guardian"
START_LIMIT: Final = 60.0
REACH_LIMIT: Final = 10.0
JOIN_LIMIT: Final = 600.0
JOIN_POLL: Final = 0.1
CONNECT_LIMIT: Final = 2
POLL: Final = 0.02
LOG_POLL: Final = 1.0
LOG_LINES: Final = 15
_PORT: Final = 5432
_HOME: Final = "/pgmonkey"
_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_CONFLICT: Final = 409
_PUBLISHED: Final = "published by pytest-pgmonkey"
_IS_PUBLISHED: Final = f"""\
SELECT FROM pg_catalog.pg_roles WHERE rolname = '{ROLE}'
AND pg_catalog.shobj_description(oid, 'pg_authid') = '{_PUBLISHED}'
"""

# In a container's shared memory there is room for 64 MB only.
SETTINGS: Final = {**THROWAWAY, "dynamic_shared_memory_type": "mmap"}


class ContainerServer(OwnServer):
    """A server in a container of its own, on data in memory, with passwords that nobody knows.

    The container of a run of workers has a name that only the run knows, so that making it
    decides which worker starts the server; the others wait until it is published.
    """

    source = "container"

    def __init__(self, image: str, worker: Worker | None = None) -> None:
        self._client = find_engine()
        self.image = image_prefix() + image
        super().__init__(worker, self.image)
        self._secret = worker.run if worker else secrets.token_hex(16)
        self.name = f"pgmonkey-{self._derive('name')[:16]}"
        self._attempt = secrets.token_hex(16)
        self._undecided = False
        self._guard: Guard | None = None
        self._address = ("", _PORT)

    def bring_up(self) -> None:
        """Make the container, wait for its server, make the tests' role."""
        image = self._find_image()
        self._guard = Guard(guardian, self._attempt, path=sys.path)
        with engine_errors(f"The container of {self.image} does not start"):
            container = self._make(image)
            self._guard.tell("made", self.name)
            container.start()
            self._sweep()  # while its server starts
            self._await_answer(container)
        self._make_role(self._derive(ROLE))
        self._client.client.close()  # its idle connections; it opens new ones when asked again

    def stop(self) -> None:
        """Remove the container; does nothing in a fork, a second time, or if others share it."""
        guard, self._guard = self._guard, None
        try:
            if guard is None:
                return
            shared = self._worker is not None and not self._alone
            if guard.is_foreign or shared or names_in(self.name) or not self._remove():
                guard.leave()  # it goes on trying
            else:
                guard.tell("done")
                guard.end()
        finally:
            self._client.client.close()

    def kept_as(self, name: str, test: str) -> Kept:
        """Tell how a database is reached: people know none of the passwords."""
        with engine_errors(f"The container {self.name} of this run cannot be had"):
            labels = self._client.client.containers.get(self.name).labels
            self._client.client.close()
        conninfo = self.admin_conninfo(name)
        del conninfo["password"]
        run = f"{engine_command()} exec"
        place = {key: conninfo[key] for key in ("host", "port")}
        place.update(container=self.name, guardian=labels.get(GUARDIAN, ""))
        return self._kept(
            name,
            test,
            conninfo,
            place,
            psql=f"{run} -it {self.name} psql -U {ROLE} -d {name}",
            note=f"{ADMIN}'s password: {run} {self.name} sh -c 'echo $POSTGRES_PASSWORD'",
        )

    def join(self) -> bool:
        """Wait until another worker has published the container; tells whether it is still there.

        Raises ServerStartError.
        """
        from docker.errors import NotFound

        deadline = time.monotonic() + JOIN_LIMIT
        problem = f"The container {self.name} of this run cannot be had"
        with engine_errors(problem):
            try:
                while not self._is_published(self._client.client.containers.get(self.name)):
                    if time.monotonic() > deadline:
                        raise ServerStartError(
                            f"{problem}: no worker has prepared its server within"
                            f" {JOIN_LIMIT:.0f} s."
                        )
                    time.sleep(JOIN_POLL)
            except NotFound:
                return False
        self._client.client.close()
        self._alone = False
        return True

    def _is_published(self, container: Container) -> bool:
        return container.status == "running" and not self._ask(container, _IS_PUBLISHED)

    def _publish_to(self, worker: Worker) -> None:
        from psycopg import sql

        if self._guard is not None:
            self._guard.tell("publish", worker.controller)
        statement = sql.SQL("COMMENT ON ROLE {} IS {}").format(sql.Identifier(ROLE), _PUBLISHED)
        with self._admin() as conn:
            conn.execute(statement)

    def _derive(self, what: str) -> str:
        """Give a name or a password that every worker of the run knows, and nobody else."""
        return hmac.new(self._secret.encode(), what.encode(), hashlib.sha256).hexdigest()[:32]

    def _conninfo(self, user: str, dbname: str) -> dict[str, str]:
        host, port = self._address
        return {
            "host": host,
            "port": str(port),
            "user": user,
            "password": self._derive(user),
            "dbname": dbname,
            "sslmode": "prefer",  # whatever PGSSLMODE says of another server
        }

    def _find_image(self) -> Image:
        from docker.errors import ImageNotFound

        images = self._client.client.images
        with engine_errors(
            f"The container image {self.image} is not on this machine and cannot be pulled",
            "Pull or build it, or name another one with --pgmonkey-image",
        ):
            try:
                return images.get(self.image)
            except ImageNotFound:
                return images.pull(self.image)

    def _make(self, image: Image) -> Container:
        from docker.errors import APIError

        self._undecided = True  # until the engine says whether there is a container
        try:
            container = self._create(image)
        except APIError as error:
            self._undecided = False
            if self._worker is not None and error.status_code == _CONFLICT:
                text = f"The container {self.name} is there already."
                raise ServerStartError(text, taken=True) from None
            raise
        self._undecided = False
        return container

    def _create(self, image: Image) -> Container:
        # Not removed by the engine when it ends: its log says why it did.
        volumes = image.attrs["Config"].get("Volumes") or ()
        return self._client.client.containers.create(
            self.image,
            ["postgres", *arguments(SETTINGS)],
            name=self.name,
            environment={
                "POSTGRES_USER": ADMIN,
                "POSTGRES_PASSWORD": self._derive(ADMIN),
                "POSTGRES_INITDB_ARGS": "--no-sync --wal-segsize=4",
                "PGDATA": f"{_HOME}/data",
            },
            tmpfs={_HOME: "", **dict.fromkeys(volumes, "")},
            labels={
                guardian.ATTEMPT: self._attempt,
                OWNER: process_name(self._worker.controller if self._worker else os.getpid()),
                GUARDIAN: process_name(self._guard.pid) if self._guard else "",
            },
            **self._network(),
        )

    def _network(self) -> dict[str, Any]:
        """Say where the server's port is to be found: beyond this machine only if it has to be."""
        mode = self._client.get_connection_mode()
        if not mode.use_mapped_port:
            return {"network": self._client.find_host_network()}
        is_local = mode.name == "docker_host" and self._client.host() in _LOCAL
        return {"ports": {f"{_PORT}/tcp": ("127.0.0.1",) if is_local else None}}

    def _find_address(self, container: Container) -> tuple[str, int] | None:
        """Find host and port; gives `None` while the engine does not tell them."""
        mode = self._client.get_connection_mode()
        if not mode.use_mapped_port:
            return self._client.bridge_ip(str(container.id)), _PORT
        if mode.name == "gateway_ip":
            host = self._client.gateway_ip(str(container.id))
        else:
            host = self._client.host()
        # As localhost may first lead to ::1, where the port can be another container's.
        host = "127.0.0.1" if host in _LOCAL else host
        for mapping in self._client.client.api.port(container.id, _PORT) or ():
            if ":" not in mapping["HostIp"] or ":" in host:
                return host, int(mapping["HostPort"])
        return None

    def _await_answer(self, container: Container) -> None:
        """Wait until a query is answered; raises ServerStartError, at once if there is no hope."""
        begin = time.monotonic()
        next_look = begin + LOG_POLL
        deadline, why = begin + START_LIMIT, f"{START_LIMIT:.0f} s have passed"
        while problem := self._ask(container):
            self._require_running(container)
            now = time.monotonic()
            if now > next_look:
                next_look = now + LOG_POLL
                if says_ready(self._log(container, None)):
                    deadline, why = now + REACH_LIMIT, "it says that it is ready"
                    next_look = math.inf
            if now > deadline:
                host, port = self._address
                raise ServerStartError(
                    f"The server in the container of {self.image} cannot be reached at"
                    f" {host}:{port}, though {why}: {problem.strip()}",
                    log=self._log(container),
                )
            time.sleep(POLL)

    def _ask(self, container: Container, query: LiteralString = "SELECT 1") -> str:
        """Send a query; say what is wrong, nothing where it was answered by a row."""
        import psycopg

        from ...databases.commands import connect

        if (address := self._find_address(container)) is None:
            return "the engine publishes no port"
        self._address = address
        try:
            with connect({**self.admin_conninfo(), "connect_timeout": CONNECT_LIMIT}) as conn:
                return "no row" if conn.execute(query).fetchone() is None else ""
        except psycopg.OperationalError as error:
            return redact_text(str(error), [self._derive(ADMIN)]) or "no answer"

    def _require_running(self, container: Container) -> None:
        from docker.errors import NotFound

        try:
            container.reload()
        except NotFound:
            raise ServerStartError(f"The container of {self.image} was removed.") from None
        if container.status in ("exited", "dead"):
            code = container.attrs["State"]["ExitCode"]
            raise ServerStartError(
                f"The container of {self.image} ended with exit code {code} instead of starting a"
                " server.",
                log=self._log(container),
            )

    def _log(self, container: Container, lines: int | None = LOG_LINES) -> str:
        from docker.errors import DockerException

        try:
            text = container.logs(tail=lines or "all").decode("utf-8", "replace").strip()
        except (DockerException, OSError):
            return ""
        return redact_text(text, [self._derive(ADMIN)])

    def _remove(self) -> bool:
        """Remove the container; tell whether it is sure that there is none any more."""
        from docker.errors import DockerException

        try:
            guardian.remove(self._client.client.api, self._attempt)
        except (DockerException, OSError):
            return False
        return not self._undecided

    def _sweep(self) -> None:
        """Remove the containers of runs on this machine that died together with their guardian."""
        api = self._client.client.api
        for found in api.containers(all=True, filters={"label": OWNER}):
            if all(is_dead(found["Labels"].get(label, "")) for label in (OWNER, GUARDIAN)):
                guardian.remove_container(api, found["Id"])


def start_container(image: str, worker: Worker | None) -> ContainerServer:
    """Start a container; that of a worker's run, or wait for another worker that does."""
    while True:
        try:
            return ContainerServer.start(image, worker)
        except ServerStartError as error:
            if not error.taken:
                raise
            server = ContainerServer(image, worker)
            if server.join():
                return server


def says_ready(log: str) -> bool:
    """Whether a server wrote that it is ready on the network; an image's first one is not."""
    _, listening, rest = log.rpartition("listening on IPv")
    return bool(listening) and "ready to accept connections" in rest
