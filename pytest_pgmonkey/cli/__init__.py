"""The `pgmonkey` command: results on stdout, messages on stderr; exit 0, 1 failed, 2 wrong usage.

A module of this package holds one group of commands; nothing heavy is imported before a command
runs, so that `pgmonkey --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

from .. import __version__
from . import pgconfig, pgexport, pgimport, pgserverconfig
from .common import CommandError, HelpFormatter, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


__all__ = ["main"]

#: Each has `register(commands)`, which adds its commands to the parser.
GROUPS = (pgconfig, pgserverconfig, pgimport, pgexport)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give the exit status."""
    parser = _parser()
    _complete(parser)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return _status(stop)
    run: Callable[[argparse.Namespace], int] | None = getattr(args, "run", None)
    if run is None:
        args.parser.print_help(sys.stderr)
        return 2
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*'postgresql:'", category=DeprecationWarning)
        warnings.showwarning = _one_line_warnings()
        return _run(run, args)


def _status(stop: SystemExit) -> int:
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgmonkey",
        description="PostgreSQL connections from one YAML file.",
        epilog="example:\n  pgmonkey pgconfig create --connconfig pgmonkey_config.yaml",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pgmonkey {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for group in GROUPS:
        group.register(commands)
    return parser


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks for completions, where argcomplete is installed."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return
    argcomplete.autocomplete(parser)


def _run(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    try:
        status = run(args)
        sys.stdout.flush()
    except SystemExit as stop:  # Options that contradict each other: the parser has said so.
        return _status(stop)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _abandon_stdout()
        return 1
    except CommandError as failure:
        _report(failure.message, failure.cause if args.debug else None, failure.hide)
        return 1
    return status


def _report(
    message: str, cause: BaseException | None = None, hide: Callable[[str], str] = str
) -> None:
    if cause is not None:
        import traceback

        sys.stderr.write(hide("".join(traceback.format_exception(cause))))
    say(f"error: {message}")


def _abandon_stdout() -> None:
    # The interpreter flushes stdout once more at its end, and would complain.
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, sys.stdout.fileno())
    except (OSError, ValueError):
        pass
    finally:
        os.close(devnull)


def _one_line_warnings() -> Callable[..., None]:
    """Make a stand-in for `warnings.showwarning` that shows a warning in one line, and once."""
    shown = set()

    def show(message: Warning | str, *_: object) -> None:
        text = " ".join(str(message).split())
        if text not in shown:
            shown.add(text)
            say(f"warning: {text}")

    return show
