"""The pages for contributors say what is there."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from nightschool.config.training_service import JobSettings, TrainingServiceSettings, variable_of

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "nightschool"
PAGES = [
    ROOT / "docs" / "architecture.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs" / "decisions").glob("*.md")),
]

# Constants that look like names of variables and are none, and prefixes of names.
NO_VARIABLES = {
    "ANY_NAME", "CAUSAL_LM", "F8_E4M3", "F8_E5M2", "MAP_POPULATE", "O_DIRECT", "PCI_BUS_ID", "LC_ALL",
    "CUDA_LAUNCH", "MALLOC_", "MKL_", "MKL_NUM", "NCCL_", "NIGHTSCHOOL_", "OMP_",
}  # fmt: skip
# Shown as an example of a setting, and names without an underscore, which the search does not find by themselves.
EXAMPLES = {"NIGHTSCHOOL_TRAIN__LEARNING_RATE"}
PLAIN_NAMES = {"ENV", "PORT", "RANK", "TERM", "container"}


def layers_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return [[name.strip().removeprefix("nightschool.") for name in row.split("|")] for row in layers]


def layers_of_the_page(text):
    section = text.split("## The layers")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [re.findall(r"`(\w+)`", row) for row in rows]


def test_the_table_of_layers_is_that_of_the_import_contract():
    assert layers_of_the_page(PAGES[0].read_text()) == layers_of_the_contract()


def test_another_table_would_be_noticed():
    text = PAGES[0].read_text().replace("| `views` |", "| `panes` |")
    assert layers_of_the_page(text) != layers_of_the_contract()


def missing_files(text):
    """Names in backticks that look like files or folders of ours, and are not there."""
    named = re.findall(r"`([\w./-]+(?:\.py|\.md|\.toml|\.yaml|/))`", text)
    return [name for name in named if not any((base / name).exists() for base in (SOURCE, ROOT))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_file_that_is_named_exists(page):
    known = {"runs/", "models/default/"}  # in a home
    assert set(missing_files(page.read_text())) <= known


def test_a_file_that_is_gone_would_be_noticed():
    assert missing_files("see `training/loop.py`, `server/routes/` and `training/classroom.py`") == [
        "training/classroom.py"
    ]


def variables_of(tree):
    """String constants that look like names of environment variables."""
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {one for one in constants if isinstance(one, str) and re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]*)+", one)}


def test_the_example_of_an_environment_has_each_variable_that_the_code_reads():
    trees = [ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))]
    read = set().union(*map(variables_of, trees)) - NO_VARIABLES
    plain = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)} & PLAIN_NAMES
    of_the_service = {variable_of(name) for name in (*TrainingServiceSettings.model_fields, *JobSettings.model_fields)}
    read |= of_the_service - {"JOB"}
    deployed = "".join((ROOT / name).read_text() for name in ("compose.yaml", "deploy/entrypoint.sh"))
    in_containers = set(re.findall(r"\$\{([A-Z][A-Z0-9_]+)", deployed))
    shown = set(re.findall(r"^# (\w+)=", (ROOT / ".env.example").read_text(), flags=re.MULTILINE))
    assert shown == read | plain | EXAMPLES | in_containers


def test_each_variable_of_the_example_has_a_meaning_above_it():
    text = (ROOT / ".env.example").read_text()
    for block in text.split("# --- ")[1:]:
        first = block.splitlines()[1]
        assert " " in first.removeprefix("# ") or "torchrun" in block.splitlines()[0], block
