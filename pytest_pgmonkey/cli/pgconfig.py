"""`pgmonkey pgconfig`: write a configuration file, and try one on its server."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from .running import CommandError, say, spec_of, tolerate_any_name

if TYPE_CHECKING:
    import argparse
    from collections.abc import Coroutine

    from ..handles import AsyncHandle, ServerFacts


# --- create ---


def create(args: argparse.Namespace) -> int:
    """Write the template; a file that exists is left as it is."""
    from importlib.resources import files

    template = files(__package__).joinpath("template.yaml").read_bytes()
    path = os.path.expanduser(args.path)
    try:
        _write_new(path, template)
    except FileExistsError as error:
        raise CommandError(f"{path}: exists already, and is left as it is") from error
    except OSError as error:
        raise CommandError(f"{path}: cannot be written: {error.strerror}") from error
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


def test(args: argparse.Namespace) -> int:
    """Connect as production does, and print what the server says."""
    import logging
    from time import perf_counter

    # The pool's workers log failures that the error reports already.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
    if sys.stderr.isatty():
        say(f"{args.path}: connecting ...")
    start = perf_counter()
    type_, facts = _try_connection(args)
    found = {
        "connection type": type_,
        "server version": f"PostgreSQL {facts.server_version}",
        "database": facts.database,
        "user": facts.user,
        "TLS": facts.tls or "no",
        "time": f"{(perf_counter() - start) * 1000:.0f} ms",
    }
    tolerate_any_name()
    for title, value in found.items():
        sys.stdout.write(f"{title + ':':<17}{value}\n")
    return 0


def _try_connection(args: argparse.Namespace) -> tuple[str, ServerFacts]:
    from ..handles import Handle, make_handle

    handle = make_handle(spec_of(args))
    type_ = str(handle.connection_type)
    if not isinstance(handle, Handle):
        return type_, _run_async(_try_async(handle))
    try:
        return type_, handle.test_connection()
    finally:
        handle.disconnect()


async def _try_async(handle: AsyncHandle) -> ServerFacts:
    try:
        return await handle.test_connection()
    finally:
        await handle.disconnect()


def _run_async(main: Coroutine[Any, Any, ServerFacts]) -> ServerFacts:
    import asyncio

    if sys.platform != "win32":
        return asyncio.run(main)
    # psycopg's async side cannot use Windows' default loop.
    if sys.version_info >= (3, 12):
        return asyncio.run(main, loop_factory=asyncio.SelectorEventLoop)
    asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
    return asyncio.run(main)
