"""`pgmonkey kept`: the databases of failed tests that were kept, and their removal."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from ..kept_databases import KeptError, describe, entries, remove
from .running import CommandError, say, tolerate_any_name

if TYPE_CHECKING:
    import argparse

    from ..kept_databases import Kept


def run(args: argparse.Namespace) -> int:
    """List the databases, or remove some."""
    found = {kept.name: kept for kept in entries()}
    if args.remove is not None:
        _remove(found, args.remove)
        return 0
    gone = [kept for kept in found.values() if kept.is_gone()]
    if args.json:
        listed = [_as_json(kept, kept in gone) for kept in found.values()]
        sys.stdout.write(f"{json.dumps(listed, indent=2)}\n")
    else:
        _print(found, gone)
    for kept in gone:
        kept.forget()
    return 0


def _print(found: dict[str, Kept], gone: list[Kept]) -> None:
    if not found:
        say("no database is kept")
    tolerate_any_name()
    for name, kept in found.items():
        if kept in gone:
            sys.stdout.write(f"{name}: gone; forgotten now\n")
            continue
        sys.stdout.write(f"{name}\n")
        for title, value in describe(kept).items():
            sys.stdout.write(f"  {title + ':':<8}{value}\n")


def _as_json(kept: Kept, gone: bool) -> dict[str, object]:
    return {
        "name": kept.name,
        "test": kept.test,
        "when": kept.made,
        "source": kept.source,
        "dsn": kept.dsn,
        "psql": kept.psql,
        "note": kept.note,
        "gone": gone,
    }


def _remove(found: dict[str, Kept], names: list[str]) -> None:
    for name in names:
        if name not in found:
            raise CommandError(f"{name}: no database of that name is kept; see `pgmonkey kept`")
    if not found:
        say("no database is kept")
    failures = []
    for name in dict.fromkeys(names or found):
        # One that cannot be reached is not in the way of the others.
        try:
            remove(found[name])
        except KeptError as error:
            failures.append(error)
        else:
            sys.stdout.write(f"{name}: removed\n")
    if failures:
        more = f" (and {len(failures) - 1} more)" if failures[1:] else ""
        raise CommandError(f"{failures[0]}{more}") from failures[0]
