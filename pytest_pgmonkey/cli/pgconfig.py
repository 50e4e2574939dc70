"""`pgmonkey pgconfig`: write a configuration file, and try one on its server."""

from __future__ import annotations

import os
import sys

from . import generate
from .common import (
    CommandError,
    add_command,
    add_config_options,
    add_connection_type,
    add_file_option,
    add_strict_option,
    config_arguments,
    say,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Coroutine, Mapping
    from typing import Any

    from ..handles import ServerFacts

__all__ = ["register"]


def register(group: argparse.ArgumentParser) -> None:
    """Add the commands of `pgconfig`."""
    actions = group.add_subparsers(title="commands", metavar="COMMAND")

    create = add_command(
        actions,
        "create",
        "write a commented template",
        "  pgmonkey pgconfig create --filepath pgmonkey_config.yaml",
    )
    add_file_option(create, "the file to write; it must not exist yet")
    create.add_argument("--type", choices=["pg"], default="pg", help="the kind of database")
    create.set_defaults(run=_create)

    test = add_command(
        actions,
        "test",
        "connect, as production does",
        "  pgmonkey pgconfig test --connconfig pgmonkey_config.yaml --connection-type pool",
    )
    add_config_options(test)
    add_connection_type(test)
    add_strict_option(test)
    test.set_defaults(run=_test)

    generate.register(actions)


# --- create ---


def _create(args: argparse.Namespace) -> int:
    from importlib.resources import files

    template = files(__package__).joinpath("template.yaml").read_bytes()
    path = os.path.expanduser(args.path)
    try:
        _write_new(path, template)
    except FileExistsError as error:
        raise CommandError(f"{path}: exists already, and is left as it is", error) from None
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {error.strerror}", error) from None
    say(f"{path}: written; edit it, then try it with `pgmonkey pgconfig test --connconfig {path}`")
    return 0


def _write_new(path: str, content: bytes) -> None:
    # 0600 from the first moment on: it is going to hold a password.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except BaseException:
        os.unlink(path)
        raise


# --- test ---


def _test(args: argparse.Namespace) -> int:
    import logging
    from time import perf_counter

    from .failures import failures

    # The pool's workers log failures that the error reports already.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    if sys.stderr.isatty():
        say(f"{args.path}: connecting ...")
    start = perf_counter()
    with failures(args):
        type_, facts = _try_connection(args)
    elapsed = perf_counter() - start
    _print_table(
        {
            "connection type": type_,
            "server version": f"PostgreSQL {facts.server_version}",
            "database": facts.database,
            "user": facts.user,
            "TLS": facts.tls or "no",
            "time": f"{elapsed * 1000:.0f} ms",
        }
    )
    return 0


def _try_connection(args: argparse.Namespace) -> tuple[str, ServerFacts]:
    from ..config import read_spec

    type_ = read_spec(args.path, args.connection_type, **config_arguments(args)).type
    if type_.is_async:
        return str(type_), _run_async(_facts_async(args, str(type_)))
    return str(type_), _facts(args, str(type_))


def _facts(args: argparse.Namespace, type_: str) -> ServerFacts:
    from ..handles import Handle
    from ..manager import PGConnectionManager

    with PGConnectionManager() as manager:
        handle = manager.get_database_connection(args.path, type_, **config_arguments(args))
        assert isinstance(handle, Handle)
        return handle.test_connection()


async def _facts_async(args: argparse.Namespace, type_: str) -> ServerFacts:
    from ..handles import Handle
    from ..manager import PGConnectionManager

    async with PGConnectionManager() as manager:
        pending = manager.get_database_connection(args.path, type_, **config_arguments(args))
        assert not isinstance(pending, Handle)
        handle = await pending
        return await handle.test_connection()


def _run_async(main: Coroutine[Any, Any, ServerFacts]) -> ServerFacts:
    import asyncio

    if sys.platform != "win32":
        return asyncio.run(main)
    # psycopg's async side cannot use Windows' default loop.
    if sys.version_info >= (3, 12):
        return asyncio.run(main, loop_factory=asyncio.SelectorEventLoop)
    asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
    return asyncio.run(main)


def _print_table(rows: Mapping[str, str]) -> None:
    # A name that the terminal's encoding lacks is no reason to fail.
    getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="backslashreplace")
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        sys.stdout.write(f"{name + ':':<{width}}{value}\n")
