"""The faults that tests inject: when they spring, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError, faults

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def unarmed() -> Iterator[None]:
    yield
    faults.arm(None)


def fault(**changes: Any) -> dict[str, Any]:
    return {"where": "forward", "token": 7, "what": "raise", **changes}


def test_a_fault_springs_for_its_place_and_token_as_often_as_it_says() -> None:
    faults.arm(json.dumps([fault(times=2), fault(where="emit", what="memory")]))
    faults.spring("forward", [6, 8])
    faults.spring("sample", [7])
    for _ in range(2):
        with pytest.raises(faults.InjectedFaultError, match="injected at forward by token 7"):
            faults.spring("forward", [6, 7])
    faults.spring("forward", [7])
    for _ in range(3):
        with pytest.raises(MemoryError):
            faults.spring("emit", (7,))


@pytest.mark.parametrize(
    "text",
    [
        "7", "[", '["forward"]', "[{}]", json.dumps(fault()), json.dumps([fault(where="nowhere")]),
        json.dumps([fault(what="burn")]), json.dumps([fault(token="7")]), json.dumps([fault(times=0)]),
        json.dumps([fault(time=1)]), json.dumps([fault(file="/a", process="scheduler")]),
        json.dumps([fault(where="loop", file="/a", process="scheduler")]),
        json.dumps([fault(where="loop", token=None, file="/a")]),
        json.dumps([fault(where="loop", token=None, file="/a", process="launcher")]),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="environment variable TOKENMILL_FAULTS: "):
        faults.arm(text)


def test_a_fault_of_a_loop_springs_once_for_each_time_that_its_file_is_there(tmp_path: Path) -> None:
    file = tmp_path / "now"
    faults.arm(json.dumps([{"where": "loop", "process": "scheduler", "file": str(file), "what": "raise"}]))
    faults.spring("forward", [7])
    for _ in range(2):
        faults.spring_in_loop("scheduler")
        file.touch()
        faults.spring_in_loop("tokenizer")
        with pytest.raises(faults.InjectedFaultError, match="injected into the loop of the scheduler"):
            faults.spring_in_loop("scheduler")
        assert not file.exists()


@pytest.mark.parametrize(("what", "code"), [("segv", -11), ("exit", faults.EXIT_CODE)])
def test_deaths(what: str, code: int) -> None:
    lines = "from engine.config import faults; faults.arm_from_environment(); faults.spring('emit', [7])"
    found = subprocess.run(
        [sys.executable, "-c", lines],
        cwd=REPOSITORY,
        env={"TOKENMILL_FAULTS": json.dumps([fault(where="emit", what=what)])},
        timeout=60,
        check=False,
    )
    assert found.returncode == code
