"""doctor: what it looks at, what it says of what is broken, and that it always comes to its end."""

import json
import os
import socket
import subprocess
import sys
import warnings

import pytest
import torch

from nightschool.cli import doctor as doctor_module
from nightschool.cli.doctor import devices, environment, machine, probe, software
from nightschool.cli.doctor.finding import Finding
from nightschool.cli.main import main
from nightschool.store.home import Home

NVIDIA_SMI = "| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15    CUDA Version: 12.8   |"
SYSTEM = {
    "torch_version": "2.13.0",
    "cuda_compiled_version": None,
    "hip_compiled_version": "N/A",
    "nvidia_driver_version": None,
    "nvidia_gpu_models": None,
    "os": "Debian",
    "cpu_info": "Model name: Chip\nFlags: fpu avx2\nHypervisor vendor: KVM",
}
WITH_DRIVER = SYSTEM | {"nvidia_driver_version": "570.86.15", "nvidia_gpu_models": "GPU 0: NVIDIA H200"}
ONE_GPU = {
    "name": "NVIDIA H200",
    "capability": "9.0",
    "free_bytes": 140 * 10**9,
    "total_bytes": 150 * 10**9,
    "bf16": True,
}


def product(device="cpu", dtype="fp32", **changes):
    found = {"device": device, "dtype": dtype, "width": 1000, "error": 1e-6, "right": True}
    return found | {"seconds": 0.01, "flops": 2e11} | changes


def facts(**changes):
    """What the child process would print on a machine with a processor only."""
    found = {
        "system": SYSTEM,
        "driver_cuda": None,
        "driver_failure": "",
        "cuda_complaints": ["Torch not compiled with CUDA enabled"],
        "cudnn": None,
        "threads": 2,
        "devices": [],
        "products": [product(), product(dtype="bf16"), product(dtype="fp16")],
        "dtype": {"device": "cpu", "speedup": 1.5},
    }
    return found | changes


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    for name in (*environment.SHOWN, *environment.SECRET):
        if name != "NIGHTSCHOOL_HOME":
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "HUB", ("127.0.0.1", 9))
    return Home(tmp_path / "home").ensure()


@pytest.fixture
def probed(monkeypatch):
    """The doctor, told what torch would have said."""

    def set_to(**changes):
        found = facts(**changes)
        monkeypatch.setattr(devices, "probe", lambda: found)
        monkeypatch.setattr(devices, "forget", lambda: None)

    set_to()
    return set_to


@pytest.fixture(autouse=True)
def no_gpu_files(monkeypatch):
    monkeypatch.setattr(devices, "gpu_files", list)
    yield
    devices.forget()


def test_the_doctor_looks_at_everything_and_says_what_to_do(home, probed, capsys):
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    findings = {one["subject"]: one for one in said["findings"]}
    assert list(findings) == [
        "system", "versions", "optional", "programs", "TensorBoard", "CPU", "RAM", "container", "environment", "driver",
        "torch", "GPU", "products", "dtype", "home", "disk", "ports", "network",
    ]  # fmt: skip
    assert "everything but downloading models works offline" in findings["network"]["found"]
    assert "name@version" in findings["network"]["todo"]
    assert said["passed"] + said["warned"] == len(findings)
    assert main(["doctor"]) == 0
    assert f"{said['passed']} passed, {said['warned']} warned, 0 failed" in capsys.readouterr().out


def test_the_child_process_computes_products_that_are_right(home):
    devices.forget()
    found = devices.probe()
    assert found["threads"] >= 1
    assert {(one["device"], one["dtype"], one["right"]) for one in found["products"]} >= {("cpu", "fp32", True)}
    assert devices.products().verdict == "PASS"
    assert "each run measures its own steps" in devices.number_formats().found
    assert torch.__version__ in devices.torch_wheel().found
    assert found["system"]["os"] in software.system().found
    assert devices.probe() is found, "torch is loaded once, not once a look"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("raise ImportError('libcudart.so.12 is missing')", "libcudart.so.12 is missing"),
        ("print('no json')", "no answer that can be read"),
        ("import time; time.sleep(60)", "no answer within"),
    ],
)
def test_a_torch_that_dies_or_hangs_is_a_finding(code, said, home, monkeypatch, capsys):
    real = subprocess.run
    monkeypatch.setattr(devices, "PROBE_SECONDS", 3.0)

    def run(words, **options):
        return real([sys.executable, "-c", code] if words[0] == sys.executable else words, **options)

    monkeypatch.setattr(devices.subprocess, "run", run)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert said in out
    assert "FAIL  torch" in out
    assert "pip install --force-reinstall torch" in out
    assert "WARN  GPU          unknown, because torch cannot be asked" in out


@pytest.mark.parametrize("speedup", [0.02, 1.5, 7.0])
def test_the_doctor_reports_layers_and_leaves_the_choice_to_the_run(probed, speedup):
    """Training may choose otherwise: it times whole steps, so the doctor names no dtype."""
    probed(dtype={"device": "cpu", "speedup": speedup})
    assert devices.number_formats().found == (
        f"bf16 layers are {speedup:.2g} times as fast as fp32 ones on this CPU; each run measures its own steps"
    )


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        (product(right=False, error=0.5), "FAIL"),
        (product(dtype="fp16", right=False, error=None), "WARN"),
        (product("cuda:0", "bf16", right=False, failure="RuntimeError: no kernel image"), "FAIL"),
    ],
)
def test_a_product_that_comes_out_wrong_is_told(wrong, verdict, probed):
    probed(products=[product(), wrong])
    finding = devices.products()
    assert finding.verdict == verdict
    assert "WRONG" in finding.found or "no kernel image" in finding.found
    assert finding.todo


def test_a_gpu_is_described_with_its_capability_and_memory(probed):
    probed(
        system=WITH_DRIVER | {"cuda_compiled_version": "12.8"},
        driver_cuda="12.8",
        devices=[ONE_GPU],
        cuda_complaints=[],
    )
    assert devices.driver() == Finding("PASS", "NVIDIA 570.86.15, for CUDA up to 12.8: GPU 0: NVIDIA H200")
    assert devices.torch_wheel().verdict == "PASS"
    assert devices.gpus() == Finding("PASS", "0: NVIDIA H200 (capability 9.0, 140 GB free of 150 GB, bf16)")


@pytest.mark.parametrize(
    ("changes", "complaints", "word"),
    [
        ({}, ["cuda capability sm_120 is not compatible"], "sm_120 is not compatible"),
        ({"free_bytes": 10**9}, [], "nearly full"),
    ],
)
def test_a_gpu_that_cannot_be_used_well_is_told(changes, complaints, word, probed):
    probed(devices=[ONE_GPU | changes], cuda_complaints=complaints)
    finding = devices.gpus()
    assert finding.verdict == "WARN"
    assert word in finding.todo


def test_a_driver_without_a_torch_that_uses_it_is_told(probed):
    probed(system=WITH_DRIVER)
    assert devices.torch_wheel().verdict == "WARN"
    assert "pytorch.org" in devices.torch_wheel().todo
    assert devices.gpus().verdict == "WARN"


def test_what_torch_says_of_an_old_driver_is_told(monkeypatch, probed):
    """torch raises when it first uses a GPU that it cannot use, and warns where it lacks code for one."""

    def refuse():
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040).")

    monkeypatch.setattr(probe.torch.cuda, "init", refuse)
    probed(system=WITH_DRIVER, cuda_complaints=probe.start_cuda())
    assert "too old (found version 11040)" in devices.gpus().found
    monkeypatch.setattr(probe.torch.cuda, "init", lambda: warnings.warn("no code for sm_120", stacklevel=1))
    assert probe.start_cuda() == ["no code for sm_120"]


@pytest.mark.parametrize(
    ("script", "cuda", "word"),
    [
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", None, "mismatch"),
        ("exit 9", None, "code 9"),
        (f"echo '{NVIDIA_SMI}'", "12.8", ""),
    ],
)
def test_a_driver_that_fails_is_told_in_its_own_words(script, cuda, word, monkeypatch, tmp_path, probed):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = probe.ask_driver()
    assert found["driver_cuda"] == cuda
    probed(**found)
    assert word in devices.driver().found
    assert devices.driver().verdict == ("WARN" if word else "PASS")


def test_devices_without_tools_hint_at_the_container(probed, monkeypatch):
    monkeypatch.setattr(devices, "gpu_files", lambda: ["/dev/nvidia0"])
    assert "--gpus all" in devices.driver().todo


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("OMP_NUM_THREADS", "many", "is not a number of threads"),
        ("OMP_NUM_THREADS", "0", "is not a number of threads"),
        ("OMP_NUM_THREADS", "100000", "more than"),
        ("CUDA_VISIBLE_DEVICES", "", "hides every GPU"),
        ("CUDA_VISIBLE_DEVICES", "-1", "hides every GPU"),
        ("CUDA_VISIBLE_DEVICES", "1,0", "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        ("NVIDIA_VISIBLE_DEVICES", "none", "--gpus all"),
    ],
)
def test_variables_that_are_wrong_are_told(name, value, word, home, monkeypatch):
    monkeypatch.setenv(name, value)
    finding = environment.variables()
    assert finding.verdict == "WARN"
    assert word in finding.todo
    assert f"{name}={value}" in finding.found


def test_secrets_are_not_shown(home, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    finding = environment.variables()
    assert finding.verdict == "PASS"
    assert "AWS_ACCESS_KEY_ID is set" in finding.found
    assert "AKIAEXAMPLE" not in finding.found


def test_a_library_that_is_missing_or_too_old_fails_and_says_what_to_type(monkeypatch):
    declared = ["torch>=2.11", "nosuchthing>=3", "matplotlib>=99; extra == 'plot'", "nor-this>=1; extra == 'gcs'"]
    monkeypatch.setattr(software, "requires", lambda package: declared)
    assert software.versions() == Finding("FAIL", "nosuchthing: missing", "pip install 'nosuchthing>=3'")
    declared[:] = ["torch>=99"]
    assert software.versions().verdict == "FAIL"
    assert software.versions().found.startswith("torch: 2")


def test_a_kernel_that_cannot_hold_programs_is_no_failure(monkeypatch):
    monkeypatch.setattr(software, "why_not_confined", lambda: "the kernel has no seccomp")
    finding = software.programs()
    assert finding.verdict == "WARN"
    assert "the kernel has no seccomp" in finding.found
    assert "--programs off" in finding.todo


def test_extras_that_are_missing_are_no_failure(monkeypatch):
    declared = ["torch>=2", "numpy>=2; extra == 'plot'", "nor-this>=1; extra == 'gcs'", "x>=1; extra == 'test'"]
    monkeypatch.setattr(software, "requires", lambda package: declared)
    finding = software.optional()
    assert finding.verdict == "PASS"
    assert finding.found.startswith("numpy 2")
    assert "no nor-this (extra gcs)" in finding.found
    assert finding.todo == "Only where you want them: pip install 'nightschool[gcs]'"


def test_a_container_and_its_limits_are_seen(tmp_path, monkeypatch, probed):
    root = tmp_path / "root"
    for path, text in {
        "sys/fs/cgroup/memory.current": "1000000000",
        "sys/fs/cgroup/memory.max": "1500000000",
        "sys/fs/cgroup/cpu.max": "150000 100000",
        ".dockerenv": "",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    monkeypatch.setattr(machine, "_ROOT", root)
    assert machine.container().found.startswith("Docker, virtual machine (KVM)")
    memory = machine.main_memory()
    assert memory.verdict == "WARN"
    assert "may use 1.5 GB, 500 MB are left" in memory.found
    assert "Chip" in machine.processor().found
    assert machine.processor().found.endswith(", avx2")
    assert "1.5 by the container's quota" in machine.processor().found


@pytest.mark.parametrize(("kind", "verdict"), [("ext4", "PASS"), ("nfs4", "WARN"), ("tmpfs", "WARN")])
def test_a_home_on_a_network_or_in_memory_is_told(kind, verdict, home, monkeypatch):
    monkeypatch.setattr(machine, "_file_system", lambda path: kind)
    assert machine.disk().verdict == verdict


def test_the_doctor_fails_where_nothing_can_be_written(home, probed, monkeypatch, capsys):
    def refuses(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuses)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  home" in out
    assert "Set NIGHTSCHOOL_HOME" in out
    assert "1 failed" in out


def test_the_doctor_survives_a_look_that_breaks(home, probed, monkeypatch, capsys):
    def gpu():
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(doctor_module, "LOOKS", {"GPU": gpu})
    assert main(["doctor", "-q"]) == 1
    assert "FAIL GPU" in capsys.readouterr().out


def test_the_doctor_warns_of_a_taken_port(home, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(machine, "SERVER_PORT", taken.getsockname()[1])
        assert machine.ports().verdict == "WARN"
