"""How much memory there is: the machine's, or that of the control group."""

from types import SimpleNamespace

from nightschool.work import host_memory as module
from nightschool.work.host_memory import host_bytes


def test_the_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    machine = SimpleNamespace(total=8_000_000_000, available=5_000_000_000)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(module, "_GROUP", tmp_path)
    assert host_bytes() == (7_600_000_000, 4_600_000_000)  # 5 % are left alone
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert host_bytes() == (950_000, 450_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_bytes() == (7_600_000_000, 4_600_000_000)
