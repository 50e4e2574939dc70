"""The pytest plugin: its hooks, by which pytest finds them here, and its fixtures.

Every pytest run of every project that has the package installed imports this module: nothing
heavy may be imported here before a test asks for a database.
"""

from .collection import pytest_collection_modifyitems, pytest_generate_tests
from .configure import pytest_addoption, pytest_configure, pytest_load_initial_conftests
from .lifecycle import pytest_configure_node, pytest_unconfigure
from .marker import pytest_runtest_setup
from .report import pytest_report_collectionfinish, pytest_report_header, pytest_sessionstart

__all__ = [
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_configure_node",
    "pytest_generate_tests",
    "pytest_load_initial_conftests",
    "pytest_report_collectionfinish",
    "pytest_report_header",
    "pytest_runtest_setup",
    "pytest_sessionstart",
    "pytest_unconfigure",
]

pytest_plugins = ["pytest_pgmonkey.testing.plugin.fixtures"]
