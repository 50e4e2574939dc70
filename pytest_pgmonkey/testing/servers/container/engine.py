"""The container engine of this machine: where it is, and what its client's errors say."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from typing import TYPE_CHECKING

from ..server import ServerStartError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testcontainers.core.docker_client import DockerClient

__all__ = [
    "EngineError",
    "engine_command",
    "engine_errors",
    "engine_problem",
    "find_engine",
    "image_prefix",
]


class EngineError(ServerStartError):
    """No container engine answers, or what speaks with it is not installed."""


def engine_problem() -> str | None:
    """Tell why there can be no container here, `None` where an engine answers."""
    try:
        find_engine().client.close()
    except EngineError as error:
        return error.problem
    return None


def engine_command() -> str:
    """Give the command of the container engine that this machine has."""
    return "podman" if not shutil.which("docker") and shutil.which("podman") else "docker"


def find_engine() -> DockerClient:
    """Find the container engine; raises EngineError."""
    try:
        from docker.errors import DockerException
        from docker.utils import parse_host
        from testcontainers.core.docker_client import DockerClient, get_docker_host
    except ImportError:
        raise EngineError(
            'testcontainers is not installed: `pip install "pytest-pgmonkey[container]"`.'
        ) from None
    address = ""
    try:
        address = parse_host(get_docker_host(), os.name == "nt").replace("http+unix:", "unix:")
        _knock(address)
        return DockerClient()
    except (DockerException, OSError) as error:
        where = address or f"DOCKER_HOST={os.environ.get('DOCKER_HOST')}"
        raise EngineError(
            f"No container engine answers at {where}: {_explain(error)}. Start Docker, or set"
            " DOCKER_HOST to the address of an engine that runs."
        ) from None


def _knock(address: str) -> None:
    """Fail where nobody listens at a Unix socket: the engine's client would leave one open."""
    path = address.removeprefix("unix://")
    if path != address:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)


@contextlib.contextmanager
def engine_errors(problem: str, advice: str = "") -> Iterator[None]:
    """Turn what the engine's client raises into one error of ours."""
    from docker.errors import DockerException

    try:
        yield
    except (DockerException, OSError) as error:
        text = f"{problem}: {_explain(error)}."
        raise ServerStartError(f"{text} {advice}." if advice else text) from None


def image_prefix() -> str:
    """Give the registry that the user has told testcontainers to take all images from."""
    from testcontainers.core.config import testcontainers_config

    # Old versions do not know it.
    return str(getattr(testcontainers_config, "hub_image_name_prefix", ""))


def _explain(error: BaseException) -> str:
    """Say in a line what an error of the engine's client comes from."""
    told: object = getattr(error, "explanation", None)
    cause: BaseException | None = None if told else error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            told = cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(told or error).split()).rstrip(".")
