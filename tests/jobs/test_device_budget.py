"""Whether a job fits: its plan against the device, the limit, and what others have taken or are about to take."""

import os

import pytest

from nightschool.jobs import device_budget as module
from nightschool.jobs.device_budget import PROCESS_BYTES, Need, room_for
from nightschool.work.host_memory import HostBytes
from nightschool.work.identity import ProcessIdentity

GB = 1_000_000_000


@pytest.fixture
def host(monkeypatch):
    """Sets what the machine has: bytes in all, and bytes that are free."""
    return lambda total, free: monkeypatch.setattr(module, "host_bytes", lambda: HostBytes(total, free))


def on_cpu(tensor_bytes):
    return Need.of({"device": "cpu", "expected_peak_bytes": tensor_bytes, "device_total_bytes": None})


def on_gpu(tensor_bytes, total=80 * GB):
    return Need.of({"device": "cuda", "expected_peak_bytes": tensor_bytes, "device_total_bytes": total})


def test_on_a_cpu_the_libraries_count_beside_the_tensors():
    assert on_cpu(GB).device_bytes == GB + PROCESS_BYTES
    assert on_gpu(GB).device_bytes == GB
    assert Need.of(None) is None


def test_those_that_share_a_base_need_it_once_and_on_a_cpu_one_process():
    plan = {"expected_peak_bytes": 5 * GB, "base_bytes": 4 * GB, "device_total_bytes": None}
    one = Need.of(plan)
    assert Need.together([one]) == one
    assert Need.together([one] * 16).device_bytes == (4 + 16) * GB + PROCESS_BYTES
    assert Need.together([Need.of(plan | {"device_total_bytes": 80 * GB})] * 16).device_bytes == 20 * GB
    assert Need.together([]) is None
    passes = Need.of(plan | {"pass_bytes": GB // 2, "joint_pass_bytes": 2 * GB})
    assert Need.together([passes]) == passes
    assert Need.together([passes] * 16).device_bytes == (4 + 8 + 2) * GB + PROCESS_BYTES, "one pass takes some of them"


def test_without_a_plan_a_job_begins_and_its_run_says_what_is_wrong():
    assert room_for(None, [], 1).verdict == "fits"


@pytest.mark.parametrize(
    ("limit", "allows"), [(None, "this machine allows 4 GB"), (2 * GB, "MAX_GPU_MEMORY_GB allows 2 GB")]
)
def test_what_is_larger_than_everything_never_fits(host, limit, allows):
    host(4 * GB, 4 * GB)
    room = room_for(on_cpu(9 * GB), [], limit)
    assert room.verdict == "never"
    assert "needs about 9.45 GB" in room.why
    assert allows in room.why


def test_a_limit_above_what_is_there_is_none(host):
    host(4 * GB, 4 * GB)
    assert "this machine allows 4 GB" in room_for(on_cpu(9 * GB), [], 100 * GB).why


def test_what_does_not_fit_into_what_is_free_now_waits(host):
    host(8 * GB, 2 * GB)
    assert room_for(on_cpu(GB), [], None).verdict == "fits"
    room = room_for(on_cpu(3 * GB), [], None)
    assert room.verdict == "waits"
    assert "2 GB are free now" in room.why


def test_what_others_have_not_taken_yet_is_not_free(host):
    host(8 * GB, 7 * GB)
    here = ProcessIdentity.of(os.getpid())
    assert room_for(on_cpu(3 * GB), [(on_cpu(2 * GB), None)], None).verdict == "fits"
    assert room_for(on_cpu(3 * GB), [(on_cpu(4 * GB), None)], None).verdict == "waits"
    # This process holds some megabytes of what it will need, which are gone from the free ones already.
    without = room_for(on_cpu(4 * GB), [(on_cpu(2 * GB), None)], None).why
    assert without != room_for(on_cpu(4 * GB), [(on_cpu(2 * GB), here)], None).why


def test_on_a_gpu_the_plans_of_those_that_run_count_and_the_host_does_not(host):
    host(1, 1)
    running = [(on_gpu(50 * GB), None)]
    assert room_for(on_gpu(25 * GB), running, None).verdict == "fits"
    assert room_for(on_gpu(40 * GB), running, None).verdict == "waits"
    assert room_for(on_gpu(25 * GB), running, 60 * GB).verdict == "waits"
    assert room_for(on_gpu(81 * GB), [], None).verdict == "never"
