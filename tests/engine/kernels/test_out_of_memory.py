"""A step for which there is no memory raises MemoryError, wherever it runs out, and leaves a plan that goes on to
compute the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_llama, tiny_qwen2_moe

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import resource, sys
import torch
from engine.checkpoints.load_weights import load_weights, open_weights
from engine.checkpoints.read_config import read_model_config
from engine.config import ModelSource
from engine.kernels.batch import RaggedBatch
from engine.kernels.cpu import open_cpu_backend
from engine.kernels.kv_cache import allocate_kv_cache
from engine.models.registry import build_model
import numpy as np

LONG, SHORT, LENGTH = 200, 2, 50
source = ModelSource(name=sys.argv[1], kind="folder", path=sys.argv[1])
config = read_model_config(source)
from engine.kernels import _cpu
model = build_model(config, dtype=torch.float32, backend=open_cpu_backend(_cpu.usable_isas()[0], [], 2))
load_weights(open_weights(source, config), model.places, ignore=model.ignored)
cache = allocate_kv_cache(model.config, LONG * LENGTH, torch.float32, "cpu")

def batch_of(count):
    total = count * LENGTH
    starts = tuple(range(0, total + 1, LENGTH))
    return RaggedBatch(
        token_ids=torch.arange(total) % 97, positions=torch.arange(total) % LENGTH, slots=torch.arange(total),
        query_starts=starts, context_lengths=(LENGTH,) * count, context_slots=torch.arange(total),
        context_starts=starts,
    ), np.arange(LENGTH - 1, total, LENGTH)

def virtual():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

long, short = batch_of(LONG), batch_of(SHORT)
wanted_long = model.program(cache).run(*long).clone()
program = model.program(cache)
wanted = program.run(*short).clone()
failures = 0
_, hard = resource.getrlimit(resource.RLIMIT_AS)
for room in range(400):
    resource.setrlimit(resource.RLIMIT_AS, (virtual() + (room << 20), hard))
    try:
        made = program.run(*long)
    except MemoryError:
        failures += 1
    else:
        break
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert torch.equal(program.run(*short), wanted)
assert torch.equal(made, wanted_long)
assert torch.equal(program.run(*short), wanted)
print("failures", failures)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2_moe])
def test_a_plan_survives_every_allocation_that_fails(tmp_path: Path, build: object) -> None:
    folder = build(tmp_path / "model")  # type: ignore[operator]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 3, done.stdout
