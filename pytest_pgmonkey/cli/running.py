"""A command from its start to its exit status: what it runs in, and what is said when it fails."""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from contextlib import contextmanager, suppress
from importlib import import_module
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, CSVError, LibpqNotFoundError, PGMonkeyError, require_libpq

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from psycopg import Connection

    from ..config import ConnectionSpec
    from ..handles import Handle

# Of arguments, as errors of the functions behind commands name them.
_NAMED = re.compile(
    r"`(table|query|columns|delimiter|quotechar|null|encoding|create_table|infer_types)`"
)
_GIVEN = re.compile(r"\b([a-z_]+)=(True\b ?)?")


class CommandError(Exception):
    """A command failed for a reason that its user can act on."""


class _Terminated(KeyboardInterrupt):
    """A signal asks the command to end; psycopg cancels what runs, as it does on Ctrl-C."""


def say(message: str) -> None:
    """Tell the user something, in one line, apart from the results."""
    sys.stderr.write(f"pgmonkey: {' '.join(message.split())}\n")


def tolerate_any_name() -> None:
    """Write what the terminal's encoding lacks in another form: it is no reason to fail."""
    getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="backslashreplace")


def run(args: argparse.Namespace) -> int:
    """Run the command that was typed and give the exit status; a failure is one line."""
    try:
        with _one_line_warnings(), _terminable():
            module, _, function = args.run.rpartition(".")
            status: int = getattr(import_module(f".{module}", __package__), function)(args)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as interrupt:
        return 128 + (interrupt.args[0] if isinstance(interrupt, _Terminated) else signal.SIGINT)
    except BrokenPipeError:  # The reader of stdout has enough.
        _abandon_stdout()
    except ImportError as error:
        try:
            require_libpq()
        except LibpqNotFoundError as missing:
            _report(args, missing, error)
        else:
            raise
    except _expected_errors() as error:
        _report(args, error, error)
    return 1


def _expected_errors() -> tuple[type[Exception], ...]:
    """Give those that a file, a server or the user is to blame for."""
    # Not every command needs psycopg, which may find no libpq.
    psycopg = sys.modules.get("psycopg")
    return (CommandError, PGMonkeyError, OSError, *([psycopg.Error] if psycopg else []))


def _report(args: argparse.Namespace, error: Exception, cause: Exception) -> None:
    from ..secrets import redact_text

    if isinstance(error, CSVError):
        error = CommandError(as_options(error))
    has_config = "resolve_env" in args
    secrets = _secrets(args) if has_config else ()
    message = str(error) or type(error).__name__
    if has_config and not isinstance(error, CommandError | ConfigError | LibpqNotFoundError):
        message = f"{args.path}: {message}"  # Ours name the file, a driver's do not.
    if args.debug:
        import traceback

        text = "".join(traceback.format_exception(cause))
        sys.stderr.write(redact_text(text, secrets))
    say(f"error: {redact_text(message, secrets)}")


def _secrets(args: argparse.Namespace) -> tuple[str, ...]:
    """Give the secrets of the configuration: drivers may repeat them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return spec_of(args).secrets
    except PGMonkeyError:
        return ()  # Then nothing was sent to a driver, and our own messages hold no secrets.


def as_options(error: CSVError) -> str:
    """Write an error as a command does, in which arguments are options."""
    problem, hint = (_NAMED.sub(_option, text or "") for text in (error.problem, error.hint))
    hint = _GIVEN.sub(lambda found: f"{_option(found)} ", hint)
    return f"{problem}; {hint}" if hint else problem


def _option(found: re.Match[str]) -> str:
    return f"--{found[1].replace('_', '-')}"


# --- what a command runs in ---


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show a warning in one line, and once; that of the old wrapper always."""
    shown = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = " ".join(str(message).split())
        if text not in shown:
            shown.add(text)
            say(f"warning: {text}")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*'postgresql:'", category=DeprecationWarning)
        warnings.showwarning = show
        yield


@contextmanager
def _terminable() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the block as Ctrl-C does: nothing half-written stays behind."""

    def terminate(number: int, _frame: object) -> None:
        raise _Terminated(number)

    numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")]
    # nohup has a command ignore SIGHUP, and a program that calls `main()` may have its own way.
    ours = [number for number in numbers if number and signal.getsignal(number) == signal.SIG_DFL]
    if current_thread() is not main_thread():
        ours = []
    for number in ours:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _abandon_stdout() -> None:
    # The interpreter flushes stdout once more at its end, and would complain.
    with suppress(OSError, ValueError), open(os.devnull, "wb") as devnull:
        os.dup2(devnull.fileno(), sys.stdout.fileno())


# --- the configuration ---


def config_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Give what `load_config` and the manager take by keyword."""
    names = ("resolve_env", "allow_sensitive_defaults", "strict")
    return {name: getattr(args, name) for name in names}


def spec_of(args: argparse.Namespace, type_: str | None = None) -> ConnectionSpec:
    """Read the configuration for a type; without one, for the type that was asked for."""
    from ..config import read_spec

    return read_spec(args.path, type_ or args.connection_type, **config_arguments(args))


@contextmanager
def handle_of(args: argparse.Namespace) -> Iterator[Handle]:
    """Give a handle of type normal."""
    from ..handles import Handle

    _silence_psycopg()
    handle = Handle(spec_of(args, "normal"))
    try:
        yield handle
    finally:
        handle.disconnect()


def _silence_psycopg() -> None:
    """What psycopg logs of a connection that breaks, the command's own error says."""
    import logging

    logging.getLogger("psycopg").addHandler(logging.NullHandler())


@contextmanager
def session(args: argparse.Namespace) -> Iterator[Connection[Any]]:
    """Connect as type normal; in autocommit, so that a command begins its transactions itself."""
    from ..connecting import Connector, drive

    _silence_psycopg()
    conn: Connection[Any] = drive(Connector(spec_of(args, "normal")).connect())
    with conn:
        conn.autocommit = True
        yield conn
