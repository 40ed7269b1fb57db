"""Processes, their leases and their pauses."""

import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from nightschool.work.backoff import BackOff
from nightschool.work.identity import ProcessIdentity
from nightschool.work.lease import Lease

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC)


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def wait_for_the_end(process):
    """Until it is a zombie, which it stays until its parent asks how it ended."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def test_a_process_is_known_by_its_number_its_beginning_and_its_machine(child):
    mine, its = ProcessIdentity.mine(), ProcessIdentity.of(child.pid)
    assert (mine.pid, mine.lives, its.lives) == (os.getpid(), True, True)
    assert its.find().pid == child.pid
    assert not replace(its, created_at=its.created_at - 60).lives, "its number was another's before"
    assert not replace(its, host="elsewhere").lives, "nobody sees processes of other machines"
    child.kill()
    wait_for_the_end(child)
    assert not its.lives  # a zombie does nothing any more
    child.wait()
    assert not its.lives
    assert ProcessIdentity.of(child.pid) is None


def test_an_identity_survives_being_written_down():
    mine = ProcessIdentity.mine()
    assert ProcessIdentity.parse(str(mine)) == mine
    assert ProcessIdentity.parse("[::1]:12:3.50") == ProcessIdentity("[::1]", 12, 3.5)
    for text in ("", "host", "host:12", "host:twelve:3.5"):
        assert ProcessIdentity.parse(text) is None


def test_a_lease_ends_with_its_process_on_this_machine(child):
    lease = Lease(ProcessIdentity.of(child.pid), NOON)
    assert lease.is_held_by_another(NOON + timedelta(days=1)), "it lives, however long it was silent"
    child.kill()
    wait_for_the_end(child)
    assert not lease.is_held_by_another(NOON - timedelta(days=1))


def test_a_lease_of_this_process_is_its_own():
    assert not Lease.begin(NOON, 60).is_held_by_another(NOON)


def test_a_lease_of_another_machine_ends_when_it_was_silent_for_too_long():
    lease = Lease(ProcessIdentity("elsewhere", 12, 3.5), NOON)
    assert lease.is_held_by_another(NOON - timedelta(seconds=1))
    assert not lease.is_held_by_another(NOON)
    again = lease.heartbeat(NOON, 60)
    assert (again.owner, again.is_held_by_another(NOON)) == (lease.owner, True)


def test_without_an_owner_nobody_works():
    assert not Lease(None, None).is_held_by_another(NOON)


def test_pauses_double_up_to_the_longest_and_are_random():
    back_off = BackOff(first_seconds=1.0, longest_seconds=10.0)
    for attempts, longest in ((0, 1.0), (1, 1.0), (2, 2.0), (4, 8.0), (5, 10.0), (5000, 10.0)):
        pauses = [back_off.pause_seconds(attempts) for _ in range(50)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest
