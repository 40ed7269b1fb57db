"""Hooks for all tests."""

import os

# Threads that wait without spinning, here and in every process that tests start: other tests have taken the cores. Set before
# torch is loaded, which reads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.support.no_skips import pytest_make_collect_report, pytest_runtest_makereport
from tests.support.warm_start import warm_children, warm_start

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport", "warm_children", "warm_start"]
