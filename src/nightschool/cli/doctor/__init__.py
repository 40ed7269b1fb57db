"""`nightschool doctor`: what works on this machine, and what to do about the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from nightschool.cli.doctor import devices, environment, machine, software
from nightschool.cli.doctor.finding import Finding, Verdict
from nightschool.cli.output import answer, colour_wanted, note

__all__ = ["LOOKS", "doctor"]

# In the order in which they are printed. Those of `devices` share one child process, which loads torch.
LOOKS: tuple[Callable[[], Finding], ...] = (
    software.system,
    software.versions,
    software.optional,
    software.tensorboard,
    machine.processor,
    machine.main_memory,
    machine.container,
    environment.variables,
    devices.driver,
    devices.torch_wheel,
    devices.gpus,
    devices.products,
    devices.number_formats,
    machine.home_folder,
    machine.disk,
    machine.ports,
    machine.network,
)
_COLOURS: dict[Verdict, int] = {"PASS": 32, "WARN": 33, "FAIL": 31}
_WIDTH = 12


def doctor() -> int:
    """Look at drivers, torch, GPUs, matrix products, memory, disk, ports, environment and versions.

    Every line says PASS, WARN or FAIL, and what to do next. Exits 1 if something fails that nightschool cannot do
    without.
    """
    note("Looking; products of matrices are timed, which takes some seconds.")
    devices.forget()
    findings = [_carefully(look) for look in LOOKS]
    failed = [one for one in findings if one.verdict == "FAIL"]
    warned = [one for one in findings if one.verdict == "WARN"]

    def text() -> str:
        lines = []
        for one in findings:
            lines.append(f"{_coloured(one.verdict)}  {one.subject:<{_WIDTH}} {one.found}")
            if one.todo:
                lines.append(f"{'':{_WIDTH + 7}}→ {one.todo}")
        counts = f"{len(findings) - len(failed) - len(warned)} passed, {len(warned)} warned, {len(failed)} failed"
        return "\n".join([*lines, "", counts, _summary(failed, warned)])

    answer(
        {
            "ok": not failed,
            "passed": len(findings) - len(failed) - len(warned),
            "warned": len(warned),
            "failed": len(failed),
            "findings": [asdict(one) for one in findings],
        },
        text,
        quiet=lambda: "\n".join(f"{one.verdict} {one.subject}" for one in findings if one.verdict != "PASS"),
    )
    return 1 if failed else 0


def _summary(failed: list[Finding], warned: list[Finding]) -> str:
    if failed:
        return f"Do first what is said below {', '.join(one.subject for one in failed)}."
    if warned:
        return f"Everything that is needed works; look at {', '.join(one.subject for one in warned)}."
    return "Everything that is needed works. Next: nightschool demo"


def _carefully(look: Callable[[], Finding]) -> Finding:
    """A look that breaks is a finding too: the doctor must always come to its end."""
    try:
        return look()
    except Exception as error:
        return Finding(
            look.__name__.replace("_", " "), "FAIL", f"{type(error).__name__}: {error}", "Reinstall, and try again."
        )


def _coloured(verdict: Verdict) -> str:
    return f"\x1b[{_COLOURS[verdict]}m{verdict}\x1b[0m" if colour_wanted() else verdict
