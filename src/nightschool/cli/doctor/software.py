"""Looks at what is installed: the system, Python, the libraries that are needed, and those that may be there."""

from __future__ import annotations

import importlib
import platform
import re
import resource
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from nightschool import __version__
from nightschool.cli.doctor.devices import system_facts
from nightschool.cli.doctor.finding import Finding
from nightschool.evaluation.programs.sandbox import landlock_version, why_not_confined
from nightschool.store.home import Home

# Shown with their versions, because they decide about speed and results.
SHOWN = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy")
# For developers; nobody misses them who trains and serves.
_DEVELOPMENT = frozenset({"test", "bench", "deploy"})
# A trainer, a server and their connections; each shard of data that is mapped takes one, too.
FEW_OPEN_FILES = 1024


def system() -> Finding:
    """Operating system, Python, and how many files a process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = "any number of" if soft == resource.RLIM_INFINITY else f"{soft}"
    name = ", ".join(filter(None, [system_facts().get("os"), platform.platform()]))
    found = f"{name}, Python {platform.python_version()}, {files} open files"
    if soft != resource.RLIM_INFINITY and soft < FEW_OPEN_FILES:
        return Finding("WARN", found, f"Allow more open files: ulimit -n {4 * FEW_OPEN_FILES}")
    return Finding("PASS", found)


def versions() -> Finding:
    """The libraries that nightschool cannot do without, in versions that it was tested with."""
    wrong = [
        (requirement, present)
        for requirement in _requirements().get("", [])
        if (present := _version(requirement.name)) is None
        or not requirement.specifier.contains(present, prereleases=True)
    ]
    shown = [f"nightschool {__version__}", *(f"{name} {_version(name)}" for name in SHOWN if _version(name))]
    if wrong:
        wanted = " ".join(f"'{requirement.name}{requirement.specifier}'" for requirement, _ in wrong)
        found = ", ".join(f"{requirement.name}: {present or 'missing'}" for requirement, present in wrong)
        return Finding("FAIL", found, f"pip install {wanted}")
    return Finding("PASS", ", ".join(shown))


def programs() -> Finding:
    """Whether the kernel can hold programs that a model wrote (`nightschool eval --dataset code`)."""
    why = why_not_confined()
    if why is not None:
        return Finding(
            "WARN",
            f"programs that models write cannot be run confined: {why}",
            "Where questions ask for programs: nightschool eval MODEL --dataset code --programs off",
        )
    return Finding("PASS", f"those that models write can be confined: Landlock {landlock_version()}, seccomp")


def optional() -> Finding:
    """What the extras of the package would add."""
    missing: dict[str, list[str]] = {}
    present = []
    for extra, requirements in sorted(_requirements().items()):
        for requirement in requirements if extra and extra not in _DEVELOPMENT else ():
            if (found := _version(requirement.name)) is None:
                missing.setdefault(extra, []).append(requirement.name)
            else:
                present.append(f"{requirement.name} {found}")
    parts = [*present, *(f"no {', '.join(names)} (extra {extra})" for extra, names in missing.items())]
    todo = f"Only where you want them: pip install 'nightschool[{','.join(missing)}]'" if missing else ""
    return Finding("PASS", ", ".join(parts) or "none", todo)


def tensorboard() -> Finding:
    """TensorBoard, which every run writes for."""
    runs = Home.find().runs
    try:
        module = importlib.import_module("tensorboard.version")
    except Exception as error:  # a half-installed package raises whatever it likes
        return Finding("FAIL", f"cannot be imported: {error}", "pip install --force-reinstall tensorboard")
    return Finding("PASS", f"{module.VERSION}; see curves with tensorboard --logdir {runs}")


def _requirements() -> dict[str, list[Requirement]]:
    """What the package itself says that it needs here, by the extra that asks for it; `""` is always."""
    found: dict[str, list[Requirement]] = {}
    for text in _declared():
        requirement = Requirement(text)
        named = re.search(r'extra == "([^"]+)"', str(requirement.marker))
        extra = named[1] if named else ""
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            found.setdefault(extra, []).append(requirement)
    return found


def _declared() -> list[str]:
    try:
        return requires("nightschool") or []
    except PackageNotFoundError:  # run from its source, without being installed
        return list(SHOWN)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
