"""Random programs that are interrupted at a random moment leave nothing to the next test.

`PGMONKEY_INTERRUPTED=5000 pytest tests/sandbox/test_interrupted.py` runs as many as you like.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

import psycopg
import pytest
from helpers.four_types import SYNC
from hypothesis import given
from hypothesis import strategies as st

from .programs import Run, Step, programs
from .test_differential import profile
from .test_misbehaving import SWALLOWING, AlarmError, next_test_is_well
from .twins import World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from .twins import Twins

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",
    "ignore::RuntimeWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


@pytest.fixture(autouse=True)
def tidied(twins: Twins, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """End what was interrupted in the middle, and collect it while nobody is warned of it."""
    yield
    # What was logged holds tracebacks, and they hold all the rest.
    twins.last_error = None
    caplog.get_records("call").clear()
    twins.settle()


INTERRUPTIONS = (KeyboardInterrupt, AlarmError)
MOST = 3
INTERRUPTED = int(os.environ.get("PGMONKEY_INTERRUPTED", "160"))
#: What a test may be told: whatever it was, it has happened in the test itself.
TOLD = ("did not end, so", "hit the sandbox between", "closed the test's connection")


def run_interrupted(
    twins: Twins, type_: str, steps: list[Step], how: str, moments: list[float]
) -> None:
    """Run a program, and interrupt the main thread at these distances in seconds."""
    left = list(moments)
    over: list[bool] = []
    pid = twins.sandbox.backend.backend_pid
    before = signal.getsignal(signal.SIGALRM)

    def arm(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def ring(_: int, frame: FrameType | None) -> None:
        while frame is not None and not over:
            if frame.f_code.co_name in SWALLOWING:
                arm(0.001)
                return
            frame = frame.f_back
        if over:
            return
        if how == "cancel":
            twins.admins[True].execute("SELECT pg_cancel_backend(%s)", [pid])
        if left:
            arm(left.pop())
        if how != "cancel":
            raise KeyboardInterrupt if how == "interrupt" else AlarmError

    signal.signal(signal.SIGALRM, ring)
    # As deep as there are moments: one can come while the last is caught.
    try:
        try:
            try:
                arm(left.pop())
                run(twins, type_, steps)
            except INTERRUPTIONS:
                pass
            over.append(True)
        except INTERRUPTIONS:
            pass
        over.append(True)
    except INTERRUPTIONS:
        over.append(True)
    arm(0)
    signal.signal(signal.SIGALRM, before)


def run(twins: Twins, type_: str, steps: list[Step]) -> None:
    world = World(twins, type_, real=False)
    running = Run(world)

    async def whole() -> None:
        with suppress(psycopg.Error):
            await running.program(steps, None)

    twins.drive(whole(), loop=world.type.is_async)


def judge(twins: Twins) -> None:
    """Find out whether the test has ended well, and the next two are well."""
    twins.sandbox.take_refusals()
    problems = twins.sandbox.reset()
    assert [each for each in problems if not any(told in each for told in TOLD)] == []
    twins.sandbox.connect()
    assert next_test_is_well(twins)
    assert next_test_is_well(twins)


moments = st.lists(st.floats(0.0002, 0.02), min_size=1, max_size=MOST)


@pytest.mark.parametrize("type_", SYNC)
@profile(INTERRUPTED)
@given(steps=programs, how=st.sampled_from(["alarm", "interrupt"]), moments=moments)
def test_interrupted(
    own: Twins, type_: str, steps: list[Step], how: str, moments: list[float]
) -> None:
    """A time-out by signal and Ctrl-C, once and again while the first is dealt with."""
    run_interrupted(own, type_, steps, how, moments)
    judge(own)


@profile(INTERRUPTED)
@given(steps=programs, moments=moments)
def test_cancelled_from_outside(
    own: Twins, type_: str, steps: list[Step], moments: list[float]
) -> None:
    """`pg_cancel_backend()` by another session, at any moment."""
    run_interrupted(own, type_, steps, "cancel", moments)
    judge(own)


@pytest.mark.parametrize("type_", ["async", "async_pool"])
@profile(INTERRUPTED)
@given(steps=programs, turns=st.lists(st.integers(1, 60), min_size=1, max_size=2))
def test_cancelled_tasks(own: Twins, type_: str, steps: list[Step], turns: list[int]) -> None:
    """A task that is cancelled after so many turns of its loop, perhaps once more later on."""
    world = World(own, type_, real=False)

    async def whole() -> None:
        task = asyncio.ensure_future(Run(world).program(steps, None))
        for number in turns:
            for _ in range(number):
                await asyncio.sleep(0)
            task.cancel()
        with suppress(asyncio.CancelledError, psycopg.Error):
            await task

    own.drive(whole(), loop=True)
    judge(own)
