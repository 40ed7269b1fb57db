"""The README and the pages say what is true: every `sh` and `python` block runs, every link leads somewhere."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.warm_start import WarmStart

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INSTALLED = Path(sys.executable).parent
# Pages whose commands are processes of their own, as a reader starts them; those of the others begin warm.
COLD = ("evaluation.md", "models.md")
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text("utf-8"))


def missing_packages(page: Path) -> list[str]:
    """The packages that the page's Python imports and that are not installed here."""
    imported = set()
    for language, text in blocks(page):
        for node in ast.walk(ast.parse(text)) if language == "python" else ():
            if isinstance(node, ast.ImportFrom):
                imported.add(str(node.module))
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    return [name for name in sorted(imported) if importlib.util.find_spec(name.partition(".")[0]) is None]


def run_page(page: Path, folder: Path, programs: Path = INSTALLED) -> None:
    """Run the page's blocks in order in one shell, as a reader would who types them one after the other."""
    script, earlier, found = ["set -e"], "", blocks(page)
    for number, (language, text) in enumerate(found):
        if language == "python":
            earlier += text  # a page's Python is one session
            if found[number + 1 : number + 2] and found[number + 1][0] == "python":
                continue
            (folder / f"block{number}.py").write_text(earlier)
            text = f"python block{number}.py"
        script.append(text)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NIGHTSCHOOL")}
    environment |= {
        "PATH": f"{programs}:{environment['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        # What would be measured first, for seconds, on a machine that has other tests to run.
        "NIGHTSCHOOL_TRAIN__NUM_THREADS": "1",
        "NIGHTSCHOOL_TRAIN__DTYPE": "fp32",
    }
    log = folder / "output.txt"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            ["bash", "-c", "\n".join(script)],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        try:
            code = process.wait(timeout=240)
        finally:
            # What a page leaves running in the background ends with it.
            try:
                os.killpg(process.pid, signal.SIGTERM)
            except ProcessLookupError:
                code = process.wait()
    assert code == 0, f"{page.name} ended with {code}:\n{log.read_text(errors='replace')[-3000:]}"


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory: pytest.TempPathFactory, warm_start: WarmStart) -> Path:
    """A folder in which somebody has followed the README to its end."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("recipes", "data"):
        shutil.copytree(ROOT / name, folder / name)
    run_page(ROOT / "README.md", folder, warm_start.bin)
    return folder


@pytest.mark.timeout(300)
def test_readme_runs(after_readme: Path) -> None:
    output = (after_readme / "output.txt").read_text()
    assert "Hugo Adler lives in" in output
    assert (after_readme / ".nightschool" / "models" / "tiny").is_dir()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page)], ids=lambda page: page.name)
def test_page_runs_after_readme(page: Path, after_readme: Path, warm_start: WarmStart, tmp_path: Path) -> None:
    if missing := missing_packages(page):
        pytest.skip(f"{', '.join(missing)} is not installed: make install-ci")
    shutil.copytree(after_readme, tmp_path / "copy")
    run_page(page, tmp_path / "copy", INSTALLED if page.name in COLD else warm_start.bin)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {missing}"


def test_a_broken_block_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "broken.md"
    page.write_text("```sh\nfalse\n```\n")
    with pytest.raises(AssertionError, match="ended with 1"):
        run_page(page, tmp_path)


def test_every_page_is_reachable_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    missing = [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme]
    assert not missing, f"the README does not lead to {missing}"
