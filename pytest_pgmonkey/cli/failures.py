"""What a configuration or a server refuses becomes one line, with secrets hidden."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg

from ..config import read_spec
from ..errors import ConfigError, PGMonkeyError
from ..secrets import redact_text
from .common import CommandError, config_arguments

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

__all__ = ["failures", "hider"]


@contextmanager
def failures(args: argparse.Namespace) -> Iterator[None]:
    """Turn what the configuration or the server refuses into a `CommandError`."""
    try:
        yield
    except BrokenPipeError:
        raise  # The reader of stdout has enough: no failure.
    except (PGMonkeyError, psycopg.Error, OSError) as error:
        hide = hider(args)
        message = str(error) or type(error).__name__
        if not isinstance(error, ConfigError):
            message = f"{args.path}: {message}"  # Ours name the file, a driver's do not.
        raise CommandError(hide(message), error, hide) from None


def hider(args: argparse.Namespace) -> Callable[[str], str]:
    """Make a function that hides the secrets of the configuration: drivers may repeat them."""
    secrets: tuple[str, ...] = ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec = read_spec(args.path, args.connection_type, **config_arguments(args))
            secrets = spec.secrets
    except ConfigError:
        pass  # Then nothing was sent to a driver, and our own messages hold no secrets.
    return lambda text: redact_text(text, secrets)
