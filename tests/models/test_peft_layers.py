"""PEFT is imported by what makes or loads an adapter, and by nothing before."""

import ast
import sys
from pathlib import Path
from types import ModuleType

import torch

import nightschool
from nightschool.models.peft_layers import is_adapted, is_adapted_layer, is_adapted_parameter

SLOW_TO_IMPORT = {"peft", "bitsandbytes"}
# Imported itself only by a run that trains several adapters together.
MAY = {"training/together/joint.py"}


def imported_at_once(source):
    """The packages that a module imports when it is imported, outside of functions and of `if TYPE_CHECKING`."""
    found, pending = set(), list(ast.parse(source).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found


def test_no_module_imports_it_at_once():
    root = Path(nightschool.__file__).parent
    those = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if imported_at_once(path.read_text()) & SLOW_TO_IMPORT
    }
    assert those == MAY


def test_an_import_at_once_would_be_noticed():
    assert "peft" in imported_at_once("try:\n    from peft.tuners import lora\nexcept ImportError:\n    lora = None")
    assert not imported_at_once("def later():\n    import peft\nif TYPE_CHECKING:\n    import peft")


def test_nothing_is_adapted_while_peft_is_not_there_or_half_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", ModuleType("peft"))
    monkeypatch.delitem(sys.modules, "peft.tuners.tuners_utils", raising=False)
    monkeypatch.delitem(sys.modules, "peft.tuners.lora", raising=False)
    model = torch.nn.Linear(2, 2)
    assert [is_adapted(model), is_adapted_layer(model), is_adapted_parameter(model)] == [False] * 3


def test_what_peft_wraps_is_known():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert is_adapted(model)
    assert is_adapted_layer(model.base_model.model[0])
    assert not is_adapted_parameter(model.base_model.model[0])
    assert not is_adapted_layer(model.base_model.model[0].base_layer)
