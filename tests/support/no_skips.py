"""Where NIGHTSCHOOL_TEST_NO_SKIPS is set, as in CI, a test that would be skipped fails instead.

What a skip waits for is then installed (`.ci/run` does that), so a skip means that something went unproven unnoticed.
"""

import os

import pytest

# What no installation mends, by the reason that the skip gives.
ALLOWED = {
    "there is nothing to set in this C library": "only glibc keeps freed memory on request",
    "the peak is read from /proc": "only Linux has it",
    "this kernel counts no page faults": "sandboxes with a kernel of their own do not count them",
    "the file system of the tests takes nothing past its cache": "a file system in memory has no direct writes",
    "the real data is not here": "these files are laid beside the checkout and are not part of it",
}


def _refused(report, expected_failure=False):
    """The report, as a failure if it is a skip that nothing excuses."""
    if not os.environ.get("NIGHTSCHOOL_TEST_NO_SKIPS") or not report.skipped or expected_failure:
        return report
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    if not any(allowed in reason for allowed in ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"{reason}\nNIGHTSCHOOL_TEST_NO_SKIPS is set, so what this test needs must be installed."
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    return _refused(report, hasattr(report, "wasxfail"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    return _refused(report)
