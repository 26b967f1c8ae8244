"""Option --cpu-times: a list of the tests that took most CPU seconds, their processes included."""

import os
from collections.abc import Iterator

import forked
import pytest

_started: dict[str, float] = {}
_seconds: dict[str, float] = {}


def now() -> float:
    """Return the CPU seconds of this process, of its children that have ended, and of the fork server's."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + forked.cpu_seconds()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-times", type=int, default=0, metavar="N", help="list the N tests that took most CPU seconds"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("--cpu-times"):
        _started[item.nodeid] = now()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if call.when == "teardown" and item.nodeid in _started:
        report.user_properties.append(("cpu_seconds", now() - _started[item.nodeid]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    given = dict(report.user_properties)
    if "cpu_seconds" in given:
        _seconds[report.nodeid] = given["cpu_seconds"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    slowest = sorted(_seconds, key=lambda name: -_seconds[name])[: config.getoption("--cpu-times")]
    if slowest:
        terminalreporter.section(f"CPU seconds: {sum(_seconds.values()):.0f} in {len(_seconds)} tests")
        files: dict[str, float] = {}
        for name, seconds in _seconds.items():
            file = name.partition("::")[0]
            files[file] = files.get(file, 0.0) + seconds
        for name, seconds in sorted(files.items(), key=lambda each: -each[1])[: len(slowest)]:
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")
        terminalreporter.write_line("")
        for name in slowest:
            terminalreporter.write_line(f"{_seconds[name]:8.1f}  {name}")
