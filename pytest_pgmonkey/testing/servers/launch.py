"""Which server a run uses, and its start while the test process still imports what it needs."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..databases.recipe import recipe_of
from ..databases.schema import resolve_steps
from .server import ServerStartError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ..databases.recipe import Recipe
    from ..options import Options
    from .embedded.binaries import Binaries
    from .server import Server
    from .worker import Worker

__all__ = ["Choice", "Launch", "choose", "launch", "start_server"]

# --- the choice ---


@dataclass(frozen=True)
class Choice:
    """A source of servers and why it was chosen: a file, binaries, or a container image."""

    source: str
    why: str
    binaries: Binaries | None = None
    name: str = ""

    @property
    def description(self) -> str:
        """What the report header says of it; may run a program that tells its version."""
        if self.binaries is None:
            return f"{self.source} {self.name}"
        return f"PostgreSQL {self.binaries.version}, {self.source} ({self.binaries.origin})"


def choose(options: Options) -> Choice:
    """Choose among the sources; starts nothing, raises PGMonkeyError where there is none."""
    given = options.given
    if options.config is not None:
        return Choice("config", given["config"], name=str(options.config))
    if options.source == "container":
        return _container(options, given["source"])
    if options.source == "auto" and options.image is not None:
        return _container(options, given["image"])
    from .embedded.binaries import BinariesNotFoundError, find_binaries

    why = given.get("bindir") or given.get("source") or "no config given"
    try:
        return Choice("embedded", why, find_binaries(options.bindir))
    except BinariesNotFoundError as missing:
        if options.source == "embedded" or options.bindir is not None:
            raise
        return _last_resort(options, str(missing))


def _last_resort(options: Options, missing: str) -> Choice:
    from .container.engine import engine_problem

    if problem := engine_problem():
        raise ServerStartError(
            "There is no PostgreSQL server for the tests.\n"
            "config: none was given. Name a YAML file with --pgmonkey-config.\n"
            f"embedded: {missing}\n"
            f"container: {problem}"
        )
    return _container(options, "no config given, no server binaries found")


def _container(options: Options, why: str) -> Choice:
    from .container.server import DEFAULT_IMAGE

    return Choice("container", why, name=options.image or DEFAULT_IMAGE)


# --- the start ---


def start_server(
    options: Options, worker: Worker | None = None, recipe: Recipe | None = None
) -> Server:
    """Start or find the server that the options name; raises PGMonkeyError.

    An embedded one has the recipe's template from the start where an earlier run saved it.
    """
    if options.config is not None:
        return _configured(options, options.config, worker)
    choice = choose(options)
    if choice.binaries is None:
        return _contained(options, worker)
    from .embedded.server import EmbeddedServer

    if worker is None:
        return EmbeddedServer.start(choice.binaries, recipe=recipe)
    from .embedded.workers import start_or_join_server

    return start_or_join_server(choice.binaries, worker, recipe)


def _contained(options: Options, worker: Worker | None) -> Server:
    from .container.server import ContainerServer, start_or_join_container

    if worker is None:
        return ContainerServer.start(options.image)
    return start_or_join_container(options.image, worker)


def _configured(options: Options, file: Path, worker: Worker | None) -> Server:
    from ...config import connection_spec, load_config
    from ...judge import refuse_connection_strings
    from .configured import ConfiguredServer

    read_with = {
        "resolve_env": options.resolve_env,
        "allow_sensitive_defaults": options.allow_sensitive_defaults,
    }
    config = load_config(file, **read_with)
    spec = connection_spec(config, "normal", origin=str(file))
    refuse_connection_strings(spec.conninfo_dict, spec.origin)
    return ConfiguredServer(spec, config, str(file), worker, read_with)


def launch(options: Options, worker: Worker | None, steps: Iterable[Any]) -> Launch | None:
    """Begin to start the server that has these schema steps; `None` where there is none to start.

    Raises SchemaError.
    """
    if options.config is not None:
        return None
    recipe = recipe_of(resolve_steps(steps, options.rootdir), options.extensions, options.rootdir)
    return Launch(options, worker, recipe)


class Launch:
    """A server that is being started in a thread, which mostly waits for other processes."""

    def __init__(self, options: Options, worker: Worker | None, recipe: Recipe | None) -> None:
        self._facts = options, worker, recipe
        self._server: Server | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pgmonkey-launch")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._server = start_server(*self._facts)
        except BaseException as error:
            self._error = error

    def server(self) -> Server:
        """Wait for the server; raises what went wrong."""
        self._thread.join()
        if self._server is None:
            assert self._error is not None
            raise self._error
        return self._server

    def stop(self) -> None:
        """Stop the server as soon as it is there."""
        self._thread.join()
        if self._server is not None:
            self._server.stop()
