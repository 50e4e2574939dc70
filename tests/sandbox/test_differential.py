"""Random programs give in the sandbox what they give on a real database of their own.

`PGMONKEY_PROGRAMS=20000 pytest tests/sandbox/test_differential.py` runs as many as you like.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from helpers.four_types import ASYNC, call
from hypothesis import HealthCheck, Phase, given, settings

from pytest_pgmonkey import PGConnectionManager

from .programs import LoopsRun, Run, SharedRun, Step, programs
from .twins import JOINING, World, difference

if TYPE_CHECKING:
    from .twins import Twins

PROGRAMS = int(os.environ.get("PGMONKEY_PROGRAMS", "160"))
TYPES = 4


def run(
    twins: Twins,
    type_: str,
    steps: list[Step],
    *,
    real: bool,
    limit: int | None,
    how: type[Run] = Run,
    joins: bool = False,
) -> Any:
    """Run a program; gives what it noted, and at which step it was refused."""
    world = World(twins, type_, real=real, joins=joins)
    running = how(world)

    complete = False

    async def whole() -> Any:
        nonlocal complete
        try:
            await running.prepare()
            complete = await running.program(steps, limit)
            noted = world.noted
            if complete:
                world.manager = PGConnectionManager()
                await world.finish()
            else:
                await running.abandon()
        finally:
            await running.end()
        if real or joins:
            for handle in world.handles:
                await call(handle.disconnect())
        return noted

    with twins.intercepting(not (real or joins)):
        try:
            noted = twins.drive(whole(), loop=world.type.is_async)
        finally:
            if real:
                twins.renew()
            else:
                twins.sandbox.take_refusals()
                problems = twins.sandbox.reset()
    if not real:
        assert problems == []
    return noted, running.refused_at if not real else not complete


def profile(number: int) -> settings:
    """Give the settings for so many programs over all types."""
    return settings(
        max_examples=max(1, number // TYPES),
        deadline=None,
        database=None,
        derandomize="PGMONKEY_PROGRAMS" not in os.environ,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@profile(PROGRAMS)
@given(steps=programs)
def test_programs(twins: Twins, type_: str, steps: list[Step]) -> None:
    """A random program's steps give the same values and errors, and leave nothing behind."""
    compare(twins, type_, steps, Run)


@profile(PROGRAMS // 4)
@given(steps=programs)
def test_programs_of_several(
    twins: Twins, monkeypatch: pytest.MonkeyPatch, type_: str, steps: list[Step]
) -> None:
    """So do the steps of several threads or tasks, which hand over to each other."""
    # Who waits here waits in vain: the other goes on only afterwards.
    monkeypatch.setattr(twins.sandbox, "wait_timeout", 0.01)
    compare(twins, type_, steps, SharedRun)


@pytest.mark.parametrize("type_", ASYNC)
@profile(PROGRAMS // 8)
@given(steps=programs)
def test_programs_of_several_loops(
    twins: Twins, monkeypatch: pytest.MonkeyPatch, type_: str, steps: list[Step]
) -> None:
    """So do those of several threads with an event loop each."""
    monkeypatch.setattr(twins.sandbox, "wait_timeout", 0.01)
    compare(twins, type_, steps, LoopsRun)


def compare(twins: Twins, type_: str, steps: list[Step], how: type[Run]) -> None:
    before = twins.persisted()
    ours, limit = run(twins, type_, steps, real=False, limit=None, how=how)
    assert before == twins.persisted()
    theirs, theirs_stopped = run(twins, type_, steps, real=True, limit=limit, how=how)
    if limit is not None or theirs_stopped:
        del ours[len(theirs) :]
    if ours != theirs:
        raise AssertionError(difference(theirs, ours))
    if how is Run and type_ in JOINING:
        joined, stopped = run(twins, type_, steps, real=False, limit=limit, joins=True)
        assert before == twins.persisted()
        if limit is not None or theirs_stopped or stopped is not None:
            shortest = min(len(joined), len(theirs))
            del joined[shortest:], theirs[shortest:]
        if joined != theirs:
            raise AssertionError(difference(theirs, joined))
