"""`nightschool doctor`: what works on this machine, and what to do about the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from nightschool.cli.doctor import devices, environment, machine, software
from nightschool.cli.doctor.finding import Finding, Verdict
from nightschool.cli.output import answer, colour_wanted, note

__all__ = ["LOOKS", "doctor"]

# In the order in which they are printed.
LOOKS: dict[str, Callable[[], Finding]] = {
    "system": software.system,
    "versions": software.versions,
    "optional": software.optional,
    "programs": software.programs,
    "TensorBoard": software.tensorboard,
    "CPU": machine.processor,
    "RAM": machine.main_memory,
    "container": machine.container,
    "environment": environment.variables,
    "driver": devices.driver,
    "torch": devices.torch_wheel,
    "GPU": devices.gpus,
    "products": devices.products,
    "dtype": devices.number_formats,
    "home": machine.home_folder,
    "disk": machine.disk,
    "ports": machine.ports,
    "network": machine.network,
}
_COLOURS: dict[Verdict, int] = {"PASS": 32, "WARN": 33, "FAIL": 31}
_WIDTH = 12


def doctor() -> int:
    """Look at drivers, torch, GPUs, matrix products, memory, disk, ports, environment and versions.

    Every line says PASS, WARN or FAIL, and what to do next. Exits 1 if something fails that nightschool cannot do
    without.
    """
    note("Looking. This takes some seconds, because matrix products are timed.")
    devices.forget()
    findings = {subject: _carefully(look) for subject, look in LOOKS.items()}
    by_verdict = {
        verdict: [subject for subject, one in findings.items() if one.verdict == verdict] for verdict in _COLOURS
    }
    passed, warned, failed = (len(subjects) for subjects in by_verdict.values())

    def text() -> str:
        lines = []
        for subject, one in findings.items():
            lines.append(f"{_coloured(one.verdict)}  {subject:<{_WIDTH}} {one.found}")
            if one.todo:
                lines.append(f"{'':{_WIDTH + 7}}→ {one.todo}")
        return "\n".join([*lines, "", f"{passed} passed, {warned} warned, {failed} failed", _summary(by_verdict)])

    answer(
        {
            "ok": not failed,
            "passed": passed,
            "warned": warned,
            "failed": failed,
            "findings": [{"subject": subject, **asdict(one)} for subject, one in findings.items()],
        },
        text,
        quiet=lambda: "\n".join(
            f"{one.verdict} {subject}" for subject, one in findings.items() if one.verdict != "PASS"
        ),
    )
    return 1 if failed else 0


def _summary(by_verdict: dict[Verdict, list[str]]) -> str:
    if by_verdict["FAIL"]:
        return f"Begin with what it says below {', '.join(by_verdict['FAIL'])}."
    if by_verdict["WARN"]:
        return f"Everything you need works; look at {', '.join(by_verdict['WARN'])}."
    return "Everything you need works. Next: nightschool demo"


def _carefully(look: Callable[[], Finding]) -> Finding:
    """A look that breaks is a finding too: the doctor must always come to its end."""
    try:
        return look()
    except devices.ProbeFailed:
        return Finding("WARN", "unknown, because torch cannot be asked", "See torch.")
    except Exception as error:
        return Finding("FAIL", f"{type(error).__name__}: {error}", "Reinstall nightschool, then try again.")


def _coloured(verdict: Verdict) -> str:
    return f"\x1b[{_COLOURS[verdict]}m{verdict}\x1b[0m" if colour_wanted() else verdict
