"""The `pgmonkey` command: results on stdout, messages on stderr; exit 0, 1 failed, 2 wrong usage.

A module of this package holds one command or group of commands; it is imported when its name is
typed, and nothing heavy before it runs, so that `pgmonkey --help` answers at once.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import warnings

from .. import __version__
from .common import CommandError, HelpFormatter, add_command, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


__all__ = ["main"]

#: Modules of the same names have `register(parser)`, which adds what stands behind the name.
COMMANDS = {
    "pgconfig": "write and test configuration files",
    "pgserverconfig": "recommend the server's settings for a configuration",
    "pgimport": "read a CSV file into a table",
    "pgexport": "write a table, view or query as CSV",
    "kept": "list and remove the databases kept of failed tests",
}

#: Set by the shell's side of argcomplete.
_COMPLETING = "_ARGCOMPLETE"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give the exit status; without `argv`, as the command of this process."""
    if argv is not None:
        return _main(argv)
    # A command's garbage is small and ends with its process: to look for it, last of all among
    # the modules when the interpreter ends, takes a fifth of a short command's time.
    gc.disable()
    status = _main(sys.argv[1:])
    gc.freeze()
    return status


def _main(argv: Sequence[str]) -> int:
    parser = _parser(argv)
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


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Make the parser; only the command that is typed has its options."""
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
    # The options before a command take no values.
    typed = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = add_command(commands, name, summary)
        if name == typed or _COMPLETING in os.environ:
            _register(name, command)
    return parser


def _register(name: str, parser: argparse.ArgumentParser) -> None:
    from importlib import import_module

    import_module(f".{name}", __name__).register(parser)


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks for completions, where argcomplete is installed."""
    if _COMPLETING not in os.environ:
        return
    try:
        import argcomplete  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return
    argcomplete.autocomplete(parser)


def _run(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    from .signals import Terminated, terminable

    try:
        with terminable():
            status = run(args)
            sys.stdout.flush()
    except SystemExit as stop:  # Options that contradict each other: the parser has said so.
        return _status(stop)
    except Terminated as signal:
        return 128 + signal.number
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _abandon_stdout()
        return 1
    except CommandError as failure:
        _report(failure.message, failure.cause if args.debug else None, failure.hide)
        return 1
    except ImportError as error:
        return _report_import(error, debug=args.debug)
    return status


def _report_import(error: ImportError, *, debug: bool) -> int:
    from ..libpq import LibpqNotFoundError, require_libpq

    try:
        require_libpq()
    except LibpqNotFoundError as missing:
        _report(str(missing), error if debug else None)
        return 1
    raise error


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
