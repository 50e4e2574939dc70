"""Runs a test that rollback cannot serve again at once, in a clone; only that run counts.

It happens inside the phase in which the refusal is known, by the hooks that pytest itself calls:
so other plugins see one test, and whoever owns the protocol of running one knows nothing of it.
"""

from __future__ import annotations

import time
import traceback
from typing import TYPE_CHECKING, Any, Final, Literal

import pytest

from . import internals
from .collection import CLONED, ISOLATIONS_WANTED, MOVED, shared_data_of
from .configure import OPTIONS
from .lifecycle import kit_in_use
from .memory import known_to, of_this_run
from .statements import tell_of_statements
from .teardown import STOPS

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from .memory import Memory

    When = Literal["setup", "call", "teardown"]
    Phase = Generator[None, object, object]

_NAME: Final = "pgmonkey-second-runs"
_TITLE: Final = "pgmonkey isolation"
_MOVED: Final = "This test ran in a clone, as rollback cannot serve it: {}"
_NEXT_TIME: Final = "Rollback cannot serve this test; its next run begins in a clone: {}"
_PASSES: Final = "It passes in a clone: look at now(), sequences, locks."
_FAILS: Final = "It fails in a clone, too: {}"


def watch(config: pytest.Config) -> None:
    """Register the hooks that run tests again."""
    options = config.stash[OPTIONS]
    moves = options.isolation == "auto" or "auto" in config.stash.get(ISOLATIONS_WANTED, ())
    if (moves or options.confirm) and not config.pluginmanager.has_plugin(_NAME):
        plugin = SecondRuns(of_this_run(config), confirms=options.confirm)
        config.pluginmanager.register(plugin, _NAME)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if config.stash.get(ISOLATIONS_WANTED, ()):
        watch(config)
        tell_of_statements(config)
    elif session.items and config.stash[OPTIONS].isolation == "auto" and known_to(config):
        watch(config)  # one that asks by getfixturevalue() may be among them


class _Run:
    """What is known of the test that runs."""

    def __init__(self, item: pytest.Item) -> None:
        self.item: Final = item
        self.kit = kit_in_use(item.config)
        self._properties: Final = len(item.user_properties)
        self.is_calling = False
        self.is_told = False
        """Whether others have reported of it during its call: its subtests."""
        self.has_failed = False
        self.again: When | None = None
        """The phase in which it was run again."""
        self.started = self.duration = 0.0
        self.verdict = ""

    @property
    def refusal(self) -> str:
        """Why it must run in a clone; empty if it need not."""
        self.kit = self.kit or kit_in_use(self.item.config)
        return self.kit.refusal if self.kit is not None else ""

    def remember(self) -> None:
        """Note that it needs a clone."""
        self.item.stash[MOVED] = self.refusal.partition("\n")[0]

    @property
    def may_move(self) -> bool:
        """Whether a refusal would run it again."""
        return self.kit is not None and self.kit.may_move

    @property
    def may_clone(self) -> bool:
        """Whether it is in rollback isolation, and could be in a clone."""
        return (
            self.kit is not None
            and self.kit.may_clone
            and not shared_data_of(self.item)
            and self.item.get_closest_marker("xfail") is None
        )

    def run(self, hook: Callable[..., object]) -> object:
        """Run a phase by its hook, as pytest does."""
        __tracebackhide__ = True
        self.started, begin = time.time(), time.perf_counter()
        try:
            return hook(item=self.item)
        finally:
            self.duration = time.perf_counter() - begin

    def undo(self) -> None:
        """End the test's own fixtures; failures there do not count, as their run does not."""
        try:
            self.item.ihook.pytest_runtest_teardown(item=self.item, nextitem=self.item.parent)
        except STOPS:
            raise
        except BaseException as error:  # as pytest's own outcomes are
            _let_go(error)

    def renew(self) -> Callable[[], None]:
        """Drop its report; return a function that brings it back."""
        properties = self.item.user_properties
        kept, properties[self._properties :] = properties[self._properties :], []
        restore = internals.renew(self.item)

        def restore_all() -> None:
            restore()
            properties[self._properties :] = kept

        return restore_all


class SecondRuns:
    """The hooks; a run that needs none of them does not register them."""

    def __init__(self, memory: Memory, *, confirms: bool) -> None:
        self._memory: Final = memory
        self._confirms: Final = confirms
        self._run: _Run | None = None
        self._is_again = False

    # Each phase, and perhaps all of the test again

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Phase:
        __tracebackhide__ = True
        if not self._is_again:
            self._expect(item)
        return (yield from self._phase("setup"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Phase:
        __tracebackhide__ = True
        if self._run is not None:
            self._run.is_calling = True
        try:
            return (yield from self._phase("call"))
        finally:
            if self._run is not None:
                self._run.is_calling = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, nextitem: pytest.Item | None) -> Phase:
        __tracebackhide__ = True
        return (yield from self._phase("teardown", nextitem))

    @pytest.hookimpl(specname="pytest_runtest_teardown", tryfirst=True)
    def pytest_runtest_teardown_of_item(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> None:
        """End the test's own fixtures before wider ones, which a second run is to find.

        Inside all wrappers, so that what is printed belongs to the teardown.
        """
        __tracebackhide__ = True
        run = self._run
        ends_wider = nextitem is None or nextitem.parent is not item.parent
        if not ends_wider or run is None or self._is_again or not run.may_move:
            return
        runner: Any = item.config.pluginmanager.get_plugin("runner")
        try:
            runner.pytest_runtest_teardown(item=item, nextitem=item.parent)
        except STOPS:
            raise
        except BaseException as error:
            if not self._is_to_move(run, error):
                runner.pytest_runtest_teardown(item=item, nextitem=nextitem)
            raise
        if self._is_to_move(run, None):
            raise _InTeardownError

    @staticmethod
    def _is_to_move(run: _Run, failure: BaseException | None) -> bool:
        was_told = run.is_told or run.has_failed
        return bool(run.refusal) and not (was_told or _is_timeout(failure))

    def _expect(self, item: pytest.Item) -> None:
        run = self._run = _Run(item)
        if run.kit is not None:
            run.kit.expect_test()
        if MOVED not in item.stash and (reason := self._memory.recall(item)):
            item.stash[MOVED] = reason

    def _phase(self, when: When, nextitem: pytest.Item | None = None) -> Phase:
        __tracebackhide__ = True
        run = self._run
        failure: BaseException | None = None
        result: object = None
        try:
            result = yield
        except STOPS:
            raise
        except BaseException as error:
            # Else what comes next would have it for its context.
            if run is None or self._is_again or not (run.refusal or self._confirms):
                raise
            failure = error
        if run is None or self._is_again:
            return result
        if run.refusal:
            run.remember()
            if self._is_to_move(run, failure):
                if failure is not None:
                    _let_go(failure)
                return self._move(run, when, nextitem)
        elif self._confirms and when != "teardown":
            self._confirm(run, failure or internals.failure_of(run.item))
        if failure is not None:
            raise failure
        return result

    def _move(self, run: _Run, when: When, nextitem: pytest.Item | None) -> object:
        """Undo the test, and run it in a clone as far as it has come."""
        __tracebackhide__ = True
        hooks = run.item.ihook
        self._is_again, run.again = True, when
        try:
            if when != "teardown":
                run.undo()
            run.renew()
            if when == "teardown":
                self._move_whole(run, nextitem)
                return None
            result = run.run(hooks.pytest_runtest_setup)
            return result if when == "setup" else run.run(hooks.pytest_runtest_call)
        finally:
            self._is_again = False

    @staticmethod
    def _move_whole(run: _Run, nextitem: pytest.Item | None) -> None:
        """Run all of a test within its teardown, because its call was reported as passed.

        What it ends with is the teardown's, unless that would be told as another outcome.
        """
        __tracebackhide__ = True
        hooks, failure = run.item.ihook, None
        try:
            run.run(hooks.pytest_runtest_setup)
            run.run(hooks.pytest_runtest_call)
            failure = internals.failure_of(run.item)
        except (pytest.skip.Exception, pytest.xfail.Exception):
            pass
        except STOPS:
            raise
        except BaseException as error:
            failure = error
        hooks.pytest_runtest_teardown(item=run.item, nextitem=nextitem)
        if failure is not None and run.item.get_closest_marker("xfail") is None:
            raise failure

    def _confirm(self, run: _Run, failure: BaseException | None) -> None:
        """Run a test that has failed in a clone, too; its own failure stays."""
        ended_early = (pytest.skip.Exception, pytest.xfail.Exception)
        if failure is None or isinstance(failure, ended_early) or not run.may_clone:
            return
        self._is_again, run.item.stash[CLONED] = True, True
        run.undo()
        restore = run.renew()
        try:
            run.run(run.item.ihook.pytest_runtest_setup)
            run.run(run.item.ihook.pytest_runtest_call)
            raised = internals.failure_of(run.item)
        except STOPS:
            raise
        except BaseException as error:
            raised = error
        finally:
            self._is_again = False
            del run.item.stash[CLONED]
            restore()
        run.verdict = _PASSES if raised is None else _FAILS.format(_first_line(raised))

    # What is told of it

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        run = self._run
        if run is None:
            run = self._run = _Run(item)  # it has asked by getfixturevalue(), as the first one
            if run.refusal:
                run.remember()
        if run.again == call.when:
            call.start, call.duration = run.started, run.duration
            call.stop = run.started + run.duration
        report = yield
        run.has_failed |= report.failed
        told = self._explain(run, report, item.stash.get(MOVED, ""))
        if told and (report.failed or report.when == "call"):
            report.sections.append((_TITLE, told))
        return report

    def _explain(self, run: _Run, report: pytest.TestReport, reason: str) -> str:
        if not reason or run.kit is None or not (run.kit.has_moved or run.refusal):
            return run.verdict
        self._memory.attach(report, run.item, reason, has_moved=run.kit.has_moved)
        return (_MOVED if run.kit.has_moved else _NEXT_TIME).format(reason)

    def pytest_runtest_logreport(self) -> None:
        if self._run is not None:
            self._run.is_told |= self._run.is_calling


class _InTeardownError(Exception):
    """Something was refused in a teardown that has not failed."""


def _is_timeout(failure: BaseException | None) -> bool:
    """Whether pytest-timeout has ended a phase: a second run would have no timer."""
    return failure is not None and "from pytest-timeout" in str(failure)


def _let_go(error: BaseException | None) -> None:
    """Free what an error keeps alive that nobody will see, for example connections."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
