"""Builds ahead of time for sm_80, sm_90 and sm_100: they fit, and none spills.

They are made in processes of their own, since in this one the kernels are interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

ROOT = Path(__file__).resolve().parents[4]
SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


def table(cache: Path, *flags: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "scripts.gpu_table", "--json", "--processes", "2", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment, "TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return msgspec.json.decode(done.stdout, type=list[dict[str, Any]])


def check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["asked"] >= row["fewest"] > 0
        for target, build in row["builds"].items():
            name = f"{row['kernel']} of {row['shape']}, {row['dtype']}, for sm_{target}"
            assert build["shared"] <= SHARED_LIMITS[int(target)], f"{name}: {build['shared']} bytes of shared memory"
            assert build["registers"] <= 255, name
            assert build["spills"] == 0, f"{name} spills {build['spills']} bytes"


def test_attention_in_bfloat16(tmp_path: Path) -> None:
    """Every tile for the dtype that is served most, on every target; decodes and chunks share their build."""
    rows = table(tmp_path, "--dtype", "bfloat16", "--kernel", "attend", "--kernel", "merge")
    check(rows)
    assert {row["kernel"] for row in rows} == {"attend", "merge"}
    assert all(set(row["builds"]) == {"80", "90", "100"} for row in rows)
    used = [(row["shape"], row["use"]) for row in rows if row["kernel"] == "attend"]
    assert used == [(shape, use) for shape in dict.fromkeys(shape for shape, _ in used) for use in ("decode", "chunk")]
    assert len(used) == 22


def test_every_kernel_for_one_target(tmp_path: Path) -> None:
    flags = ["--shape", "Qwen3", "--shape", "MiniLM", "--shape", "SmolLM2", "--shape", "sampling"]
    rows = table(tmp_path, "--dtype", "bfloat16", "--target", "90", *flags)
    check(rows)
    assert {row["kernel"] for row in rows} == {
        "embed", "embed_sum", "rms_norm", "layer_norm", "finish", "gate", "pool", "add_up", "rotary_store", "attend",
        "merge", "choose", "grouped_product", "combine", "best_parts", "best_whole", "locate", "log_sums",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_build(dtype: str, tmp_path: Path) -> None:
    check(table(tmp_path, "--dtype", dtype))
