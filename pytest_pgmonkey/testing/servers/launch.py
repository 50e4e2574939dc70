"""Which server a run uses, and its start while the test process still imports what it needs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..databases.recipe import recipe_of
from ..databases.schema import resolve_steps
from .server import ROLE, ServerStartError, scratch_name

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Future
    from pathlib import Path

    from ..databases.recipe import Recipe
    from ..options import Options
    from .embedded.binaries import Binaries
    from .server import Server, Worker

__all__ = ["Choice", "choose", "launch", "start_server"]

DEFAULT_IMAGE: Final = "postgres:18"


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
    if options.source == "container" or (options.source == "auto" and options.image is not None):
        why = given["source" if options.source == "container" else "image"]
        return Choice("container", why, name=options.image or DEFAULT_IMAGE)
    from .embedded.binaries import BinariesNotFoundError, find_binaries

    why = given.get("bindir") or given.get("source") or "no config given"
    try:
        found = find_binaries(options.bindir, options.extensions)
        if options.bindir is None and options.extensions and found != find_binaries():
            why = f"has {', '.join(options.extensions)}"
        return Choice("embedded", why, found)
    except BinariesNotFoundError as missing:
        if options.source == "embedded" or options.bindir or options.data_directory:
            raise
        from .container.engine import engine_problem

        if problem := engine_problem():
            raise ServerStartError(
                "There is no PostgreSQL server for the tests.\n"
                "config: none was given. Name a YAML file with --pgmonkey-config.\n"
                f"embedded: {missing}\n"
                f"container: {problem}"
            ) from None
        return Choice("container", "no config given, no server binaries found", name=DEFAULT_IMAGE)


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
        from .container.server import start_container

        return start_container(choice.name, worker)
    from .embedded.server import start_embedded

    return start_embedded(choice.binaries, recipe, worker, data=options.data_directory)


def expected(options: Options, worker: str = "") -> tuple[str, str]:
    """Tell, before there is a server, which user and database the tests will have on it.

    A scratch database of a configured server goes by the name that the file has.
    """
    if options.config is None:
        return ROLE, scratch_name("tests", worker)
    server = _configured(options, options.config, None)
    return server.user, str(server.existing)


def _configured(options: Options, file: Path, worker: Worker | None) -> Server:
    from ...config import connection_spec, load_config
    from ...judge import refuse_connection_strings
    from .configured import ConfiguredServer

    read_with = {
        "resolve_env": options.resolve_env,
        "allow_sensitive_defaults": options.allow_sensitive_defaults,
    }
    config = load_config(file, **read_with)
    named = connection_spec(config, "normal", origin=str(file)).conninfo_dict
    missing = {key: value for key, value in options.libpq.items() if key not in named}
    settings = {**config["connection_settings"], **missing}
    config = {**config, "connection_settings": settings}
    spec = connection_spec(config, "normal", origin=str(file))
    refuse_connection_strings(spec.conninfo_dict, spec.origin)
    return ConfiguredServer(spec, config, worker, read_with)


def launch(options: Options, worker: Worker | None, steps: Iterable[Any]) -> Future[Server] | None:
    """Start the server that has these schema steps, in a thread: it mostly waits for processes.

    Gives `None` where there is none to start; raises SchemaError.
    """
    if options.config is not None:
        return None
    recipe = recipe_of(resolve_steps(steps, options.rootdir), options.extensions, options.rootdir)
    thread = ThreadPoolExecutor(1, "pgmonkey-launch")
    try:
        return thread.submit(start_server, options, worker, recipe)
    finally:
        thread.shutdown(wait=False)
