"""`pgmonkey kept`: the databases of failed tests that were kept, and their removal."""

from __future__ import annotations

import sys

from .common import CommandError, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ..kept_databases import Kept

__all__ = ["register"]

_EXAMPLE = """\
  pgmonkey kept
  pgmonkey kept --remove"""


def register(parser: argparse.ArgumentParser) -> None:
    """Add the options of `kept`."""
    parser.epilog = f"example:\n{_EXAMPLE}"
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="list them as JSON")
    what.add_argument(
        "--remove", nargs="*", metavar="NAME", help="remove those named; all without a name"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from ..kept_databases import entries

    found = entries()
    if args.remove is not None:
        return _remove(found, args.remove)
    gone = {kept.name for kept in found if kept.is_gone()}
    if args.json:
        _print_json(found, gone)
    else:
        _print(found, gone)
    _forget([kept for kept in found if kept.name in gone])
    return 0


def _forget(gone: list[Kept]) -> None:
    from ..kept_databases import KeptError

    try:
        for kept in gone:
            kept.forget()
    except KeptError as error:
        raise CommandError(str(error), error) from None


def _print(found: list[Kept], gone: set[str]) -> None:
    from ..kept_databases import describe

    if not found:
        say("no database is kept")
    # What a terminal's encoding lacks is no reason to fail.
    getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="backslashreplace")
    for kept in found:
        if kept.name in gone:
            sys.stdout.write(f"{kept.name}: gone; forgotten now\n")
            continue
        sys.stdout.write(f"{kept.name}\n")
        for title, value in describe(kept).items():
            sys.stdout.write(f"  {title + ':':<8}{value}\n")


def _print_json(found: list[Kept], gone: set[str]) -> None:
    import json

    listed = [
        {
            "name": kept.name,
            "test": kept.test,
            "when": kept.made,
            "source": kept.source,
            "dsn": kept.dsn,
            "psql": kept.psql,
            "note": kept.note,
            "gone": kept.name in gone,
        }
        for kept in found
    ]
    sys.stdout.write(f"{json.dumps(listed, indent=2)}\n")


def _remove(found: list[Kept], names: list[str]) -> int:
    known = {kept.name: kept for kept in found}
    for name in names:
        if name not in known:
            raise CommandError(f"{name}: no database of that name is kept; see `pgmonkey kept`")
    if not known:
        say("no database is kept")
    # One that cannot be reached is not in the way of the others.
    failures = [failure for name in dict.fromkeys(names or known) if (failure := _try(known[name]))]
    if failures:
        more = f" (and {len(failures) - 1} more)" if failures[1:] else ""
        raise CommandError(f"{failures[0]}{more}", failures[0])
    return 0


def _try(kept: Kept) -> Exception | None:
    from ..kept_databases import KeptError, remove

    try:
        remove(kept)
    except KeptError as error:
        return error
    sys.stdout.write(f"{kept.name}: removed\n")
    return None
