"""What the commands share: the options of a configuration file, and their failure.

Neither typing nor contextlib here: `pgmonkey --help` would wait for them.
"""

from __future__ import annotations

import argparse
import os
import sys

from ..connection_type import CONNECTION_TYPES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = [
    "CommandError",
    "HelpFormatter",
    "add_command",
    "add_config_options",
    "add_connection_type",
    "add_debug_option",
    "add_file_option",
    "add_strict_option",
    "config_arguments",
    "say",
]


class CommandError(Exception):
    """A command failed for a reason that its user can act on."""

    def __init__(
        self,
        message: str,
        cause: BaseException | None = None,
        hide: Callable[[str], str] = str,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.hide = hide


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples; does without shutil and textwrap, which help would wait for."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"width": _width() - 2, **kwargs})

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines = [""]
        for word in text.split():
            if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
                lines.append(word)
            else:
                lines[-1] = f"{lines[-1]} {word}".lstrip()
        return lines


def _width() -> int:
    try:
        return int(os.environ["COLUMNS"]) or 80
    except (KeyError, ValueError):
        pass
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help: str,  # noqa: A002 - argparse's word
    example: str = "",
) -> argparse.ArgumentParser:
    """Add a command whose help ends with an example."""
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n{example}" if example else None,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_debug_option(parser)
    parser.set_defaults(parser=parser)
    return parser


def add_file_option(parser: argparse.ArgumentParser, help: str) -> None:  # noqa: A002 - argparse's word
    """Add the option that names the configuration file: it has both names everywhere."""
    parser.add_argument(
        "--connconfig", "--filepath", dest="path", metavar="FILE", required=True, help=help
    )


def add_debug_option(parser: argparse.ArgumentParser) -> None:
    """Take `--debug` after the command too."""
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that reads a configuration."""
    add_file_option(parser, "the configuration file")
    parser.add_argument(
        "--resolve-env",
        action="store_true",
        help="replace ${VAR}, from_env and from_file in the file",
    )
    parser.add_argument(
        "--allow-sensitive-defaults",
        action="store_true",
        help="let ${VAR:-default} stand for passwords and the like, too",
    )
    parser.set_defaults(connection_type=None, strict=False)


def add_connection_type(parser: argparse.ArgumentParser) -> None:
    """Add the choice of the connection type."""
    parser.add_argument(
        "--connection-type",
        choices=CONNECTION_TYPES,
        help="how to connect (default: what the file says, else normal)",
    )


def add_strict_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that refuses empty variables."""
    parser.add_argument(
        "--strict", action="store_true", help="take a variable that is set but empty as missing"
    )


def config_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Give what `load_config` and the manager take by keyword."""
    return {
        "resolve_env": args.resolve_env,
        "allow_sensitive_defaults": args.allow_sensitive_defaults,
        "strict": args.strict,
    }


def say(message: str) -> None:
    """Tell the user something, in one line, apart from the results."""
    sys.stderr.write(f"pgmonkey: {' '.join(message.split())}\n")
