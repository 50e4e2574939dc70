"""The pytest plugin: its hooks and fixtures, which pytest finds here.

Every pytest run of every project that has the package installed imports this module: nothing
heavy may be imported here before a test asks for a database.
"""

# ruff: noqa: F401 - pytest looks them up by their names
# Not by `pytest_plugins`: for each name in it pytest reads the entry points of all installed
# distributions, which takes longer than to load the plugin.
from .collection import (
    pytest_collection_modifyitems,
    pytest_generate_tests,
    pytest_runtest_setup,
)
from .configure import pytest_addoption
from .environment import pytest_configure, pytest_load_initial_conftests
from .fixtures import (
    _pgmonkey_kit,
    _pgmonkey_test,
    pgmonkey,
    pgmonkey_async,
    pgmonkey_async_pool,
    pgmonkey_class,
    pgmonkey_connection,
    pgmonkey_database,
    pgmonkey_dsn,
    pgmonkey_manager,
    pgmonkey_module,
    pgmonkey_normal,
    pgmonkey_pool,
    pgmonkey_schema,
    pgmonkey_server,
    pgmonkey_url,
)
from .lifecycle import (
    pytest_configure_node,
    pytest_enter_pdb,
    pytest_report_collectionfinish,
    pytest_report_header,
    pytest_sessionstart,
    pytest_unconfigure,
)
from .second_runs import pytest_collection_finish
from .statements import pytest_configure_node_of_summary
