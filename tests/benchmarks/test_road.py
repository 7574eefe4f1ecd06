"""What benchmarks/road.py counts."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import road

_SOURCE = """
import functools

class Pair:
    size = 2

    def first(self):
        return sum(x for x in [second()])

def second():
    return (lambda: 1)()

def wrapped():
    import other
    return 0

def never():
    return 3
"""


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module in a folder of its own, and another one there that is imported on the way."""
    (tmp_path / "ours.py").write_text(_SOURCE, encoding="utf-8")
    (tmp_path / "other.py").write_text("def at_import():\n    return 1\n\nVALUE = at_import()\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.spec_from_file_location("ours", tmp_path / "ours.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("other", None)


def test_functions_that_were_called_count_once_and_no_others(ours: Any, tmp_path: Path) -> None:
    with road.Road(tmp_path).open() as found:
        for _ in range(3):
            ours.Pair().first()
        ours.wrapped()
        Path("elsewhere").as_posix()
    assert {name for _, _, name in found.functions} == {"first", "second", "wrapped"}
    assert found.modules == {"ours.py": 3}


def test_functions_of_other_threads_count(ours: Any, tmp_path: Path) -> None:
    with road.Road(tmp_path).open() as found:
        thread = threading.Thread(target=ours.second)
        thread.start()
        thread.join()
    ours.never()
    assert [name for _, _, name in found.functions] == ["second"]


def test_whoever_looked_on_before_does_so_again(tmp_path: Path) -> None:
    before = sys.getprofile()
    with pytest.raises(KeyError), road.Road(tmp_path).open():
        raise KeyError
    assert sys.getprofile() is before


def test_the_three_runs_are_counted(tmp_path: Path) -> None:
    found = road.passed(tmp_path)
    assert list(found) == list(road.RUNS) == ["new_rank", "target_size", "load"]
    assert all((road.PACKAGE / file).is_file() and count > 0 for modules in found.values() for file, count in modules.items())
    assert {"cli/main.py"} <= found["new_rank"].keys() & found["target_size"].keys() and "cli/main.py" not in found["load"]
    assert any(file.startswith("quantization/") for file in found["load"])
    lines = road.table(found).splitlines()
    assert [int(cell) for cell in lines[-1].split("|")[2:4]] == [len(found["load"]), sum(found["load"].values())]
