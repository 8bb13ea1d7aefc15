"""The drills' figures at the end of the run; `make faults` keeps them in bench/results/faults.json."""

import os
import time

import pytest

from tests.faults import figures

_BEGAN = time.monotonic()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not figures.found:
        return
    terminalreporter.section("drills")
    for line in figures.lines():
        terminalreporter.write_line(line)
    if os.environ.get("RATCHET_FAULTS_RESULT"):
        terminalreporter.write_line(f"written to {figures.write(time.monotonic() - _BEGAN)}")
