"""The options: one table, three places, and clear words for what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_pgmonkey.testing.options import OPTIONS, OptionError, Options, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path("/root-dir")
HERE = Path("/called/from")


def decide(
    cli: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    ini: dict[str, Any] | None = None,
) -> Options:
    return resolve(
        lambda option: (cli or {}).get(option.name),
        lambda option: (ini or {}).get(option.name),
        env or {},
        rootdir=ROOT,
        called_from=HERE,
    )


def test_command_line_beats_environment_beats_ini() -> None:
    """The nearest place to the user wins."""
    ini, env, cli = {"config": "i.yaml"}, {"PGMONKEY_CONFIG": "e.yaml"}, {"config": "c.yaml"}
    assert decide(ini=ini).config == ROOT / "i.yaml"
    assert decide(ini=ini, env=env).config == HERE / "e.yaml"
    assert decide(ini=ini, env=env, cli=cli).config == HERE / "c.yaml"


def test_nothing_given_gives_the_defaults() -> None:
    """Every option has its documented default."""
    options = decide()
    assert options.given == {}
    assert (options.source, options.isolation, options.types) == ("auto", "auto", ("native",))
    assert options.wait_timeout == 5.0


def test_schema_adds_up_and_paths_are_anchored() -> None:
    """Several schema options are several steps; functions are not paths."""
    options = decide(cli={"schema": ["a.sql", "pkg.mod:build"]})
    assert options.schema == (str(HERE / "a.sql"), "pkg.mod:build")
    assert decide(ini={"schema": ["a.sql"]}).schema == (str(ROOT / "a.sql"),)


def test_map_is_read() -> None:
    """`map` lines name databases that are the test database too."""
    assert decide(ini={"map": ["reporting = primary"]}).map == {"reporting": "primary"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": "docker"}, "'docker' is not one of auto, config, embedded, container"),
        ({"isolation": "none"}, "'none' is not one of auto, rollback, clone"),
        ({"types": "native,pool"}, "cannot be combined"),
        ({"types": "threads"}, "'threads' is not one of"),
        ({"types": ","}, "names no type"),
        ({"intercept": "maybe"}, "'maybe' is not one of auto, true, false"),
        ({"wait-timeout": "soon"}, "'soon' is not a number of seconds"),
        ({"wait-timeout": "0"}, "'0' is not a number of seconds"),
        ({"wait-timeout": "1e10"}, "'1e10' is not a number of seconds"),
        ({"map": ["reporting"]}, "must read DBNAME = primary"),
        ({"resolve-env": "perhaps"}, "neither true nor false"),
        ({"source": "embedded", "config": "x.yaml"}, "give one of them"),
        ({"source": "config"}, "name the file with --pgmonkey-config"),
        ({"bindir": "/x", "config": "x.yaml"}, "is for an embedded server"),
        ({"image": "postgres", "source": "embedded"}, "is for a container"),
        ({"image": "postgres", "bindir": "/x"}, "give one of them"),
        ({"data-directory": "/x", "source": "container"}, "is for an embedded server"),
        ({"database": "scratch"}, "for a server that --pgmonkey-config names"),
        (
            {"database": "existing", "config": "x.yaml", "schema": ["a.sql"]},
            "nothing is ever committed",
        ),
    ],
)
def test_a_wrong_option_is_named(given: dict[str, Any], message: str) -> None:
    """The error says which option is wrong and how, whichever place it came from."""
    with pytest.raises(OptionError, match=message):
        decide(cli=given)
    with pytest.raises(OptionError, match=message):
        decide(ini=given)


def test_usage_errors_are_one_line(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """pytest shows a wrong option as a usage error, without a traceback."""
    pytester.makepyfile("def test_nothing(): pass")
    result = run("--pgmonkey-source=docker")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --pgmonkey-source: 'docker' is not one of *"])
    result.stderr.no_fnmatch_line("*Traceback*")


def test_every_option_is_in_the_help(pytester: pytest.Pytester, run: Callable[..., Any]) -> None:
    """--help lists flags and ini keys of all options."""
    text = run("--help").stdout.str()
    for option in OPTIONS:
        assert option.flag in text
        assert option.ini in text


NATIVE = pytest.mark.skipif(pytest.version_tuple < (9, 0), reason="pytest 9 brought [tool.pytest]")


@NATIVE
def test_a_native_table_takes_values_of_toml(
    pytester: pytest.Pytester, run: Callable[..., Any]
) -> None:
    """In pytest 9's `[tool.pytest]` numbers, booleans and lists are written as such."""
    pytester.makepyprojecttoml("""
        [tool.pytest]
        pgmonkey_wait_timeout = 2.5
        pgmonkey_durations = 3
        pgmonkey_timeline_params = false
        pgmonkey_confirm = true
        pgmonkey_types = ["normal", "pool"]
        pgmonkey_schema = ["module:build"]
    """)
    pytester.makepyfile("""
        from pytest_pgmonkey.testing.plugin.configure import OPTIONS

        def test_options(pytestconfig):
            options = pytestconfig.stash[OPTIONS]
            assert (options.wait_timeout, options.durations) == (2.5, 3)
            assert (options.timeline_params, options.confirm) == (False, True)
            assert options.types == ("normal", "pool")
            assert options.schema == ("module:build",)
    """)
    run().assert_outcomes(passed=1)


@NATIVE
@pytest.mark.parametrize("line", ['pgmonkey_durations = "soon"', "pgmonkey_types = 'pool'"])
def test_a_wrong_value_in_a_native_table_is_a_usage_error(
    pytester: pytest.Pytester, run: Callable[..., Any], line: str
) -> None:
    """It names the option, whether pytest or the plugin refuses the value."""
    pytester.makepyprojecttoml(f"[tool.pytest]\n{line}\n")
    result = run()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: *{line.split()[0]}*"])


def test_names_may_be_a_list() -> None:
    """A TOML file gives a list, an ini file one line or several."""
    expected = ("normal", "pool")
    for given in (["normal", "pool"], ["normal, pool"], "normal pool"):
        assert decide(ini={"types": given}).types == expected
