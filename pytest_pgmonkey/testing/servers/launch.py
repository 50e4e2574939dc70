"""Which server a run uses, and its start while the test process still imports what it needs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from ..databases.recipe import recipe_of
from ..databases.schema import resolve_steps
from .server import choose

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ..databases.recipe import Recipe
    from ..options import Options
    from .embedded.workers import Worker
    from .server import Server

__all__ = ["Launch", "launch", "start_server"]


def start_server(
    options: Options, worker: Worker | None = None, recipe: Recipe | None = None
) -> Server:
    """Start or find the server that the options name; raises PGMonkeyError.

    An embedded one has the recipe's template from the start where an earlier run kept it.
    """
    if options.config is not None:
        return _configured(options, options.config, worker)
    choice = choose(options)
    if choice.binaries is None:
        return _contained(options, worker)
    from .embedded.server import EmbeddedServer

    if worker is None:
        return EmbeddedServer.start(choice.binaries, recipe=recipe)
    from .embedded.workers import start_or_join

    return start_or_join(choice.binaries, worker, recipe)


def _contained(options: Options, worker: Worker | None) -> Server:
    from .container.server import ContainerServer, start_or_join

    if worker is None:
        return ContainerServer.start(options.image)
    return start_or_join(options.image, worker)


def _configured(options: Options, file: Path, worker: Worker | None) -> Server:
    from ...config import connection_spec, load_config
    from .configured import ConfiguredServer

    config = load_config(
        file,
        resolve_env=options.resolve_env,
        allow_sensitive_defaults=options.allow_sensitive_defaults,
    )
    spec = connection_spec(config, "normal", origin=str(file))
    return ConfiguredServer(spec, config, str(file), worker)


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
