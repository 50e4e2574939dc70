"""Fixtures for the tests that run the code of pages."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from helpers.production_venv import make_production_venv

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def server_config(make_config: Callable[..., Path]) -> dict[str, Any]:
    """The configuration of a real server, with pools as in the template."""
    sizes = {"min_size": 5, "max_size": 20}
    path = make_config(pool_settings=sizes, async_pool_settings=sizes)
    config: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return config


@pytest.fixture(scope="session")
def production_python(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[tuple[str, ...]], Path | str]:
    """A function that gives the Python of production, to which some modules were added."""

    @cache
    def make(needs: tuple[str, ...]) -> Path | str:
        if sys.platform == "win32":
            return sys.executable  # Not everybody may make links there.
        return make_production_venv(tmp_path_factory.mktemp("venv"), needs)

    return make
