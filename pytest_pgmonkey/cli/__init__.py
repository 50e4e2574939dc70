"""The `pgmonkey` command: results on stdout, messages on stderr; exit 0, 1 failed, 2 wrong usage.

Nothing heavy is imported before a command runs, so that `pgmonkey --help` answers at once.
"""

from __future__ import annotations

import gc
import os
import sys

from .options import COMMANDS, COMPLETING, make_parser

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]


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
    parser = make_parser(argv)
    if COMPLETING in os.environ:
        _complete(parser)
    try:
        args = parser.parse_args(argv)
        if "run" not in args:
            args.parser.print_help(sys.stderr)
            return 2
        from .running import run

        return run(args)
    except SystemExit as stop:  # The parser has said what is wrong, or has shown the help.
        return int(stop.code or 0)


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks for completions, where argcomplete is installed."""
    try:
        import argcomplete  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return
    argcomplete.autocomplete(parser)
