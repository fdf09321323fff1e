"""Builds for GPUs that are not there: what a launch compiles to, and whether it fits.

A build starts from the same `launch.Call` that runs, made with tensors of torch's device "meta": no list of kernels is
kept beside the code that launches them.
"""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from engine.kernels.gpu.choices import DTYPES, SAMPLING, distinct, launches
from engine.kernels.gpu.launch import Call

SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that a block may have, by compute capability."""
REGISTER_LIMIT = 255

_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Build:
    """A kernel compiled for one target. registers: of a thread. shared: bytes of a block. spills: bytes a thread,
    stored and loaded. stack: bytes a thread."""

    target: int
    registers: int
    shared: int
    spills: int
    stack: int


def compile_call(call: Call, target: int) -> Build:
    """Compile a launch for a compute capability (80, 90, 100), specialised as a launch on the GPU would be."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(call.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    unspecialised = {parameter.name for parameter in call.kernel.params if parameter.do_not_specialize}
    for number, name in enumerate(call.kernel.arg_names):
        value = call.constants.get(name, call.arguments.get(name))
        if name in call.constants or value is None or _is_one(value, name in unspecialised):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(number,)] = _ALIGNED
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in unspecialised:
                attributes[(number,)] = _ALIGNED
    source = ASTSource(call.kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=call.options)
    registers, spills, stack = _resources(built.asm["ptx"], target)
    return Build(target, registers, built.metadata.shared, spills, stack)


def _is_one(value: Any, unspecialised: bool) -> bool:
    return type(value) is int and value == 1 and not unspecialised


def _resources(ptx: str, target: int) -> tuple[int, int, int]:
    """What the assembler says of a kernel: registers of a thread, bytes spilled, bytes of stack."""
    # Triton assembles for the target with its own features (wgmma, tcgen05), which the PTX names itself.
    architecture = re.search(r"^\.target (\w+)", ptx, re.M)
    assert architecture is not None, "PTX without a target"
    with tempfile.TemporaryDirectory(prefix="tokenmill-aot-") as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [get_ptxas(target).path, "-v", "--fmad=false", f"--gpu-name={architecture[1]}", str(file)]
        said = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    used = re.search(r"Used (\d+) registers", said)
    assert found is not None and used is not None, f"ptxas reports in another form: {said}"
    return int(used[1]), int(found[2]) + int(found[3]), int(found[1])


@dataclass(frozen=True)
class Job:
    """A build to be made: which launch of `choices.launches(shape, dtype)`, told apart by `choices.distinct`."""

    shape: str
    dtype: str
    number: int
    target: int


def jobs(shapes: list[str], dtypes: list[str], targets: list[int], kernels: list[str] | None = None) -> list[Job]:
    """Every build for these; kernels: only of those, by name."""
    return [
        Job(shape, dtype, number, target)
        for shape in shapes
        for dtype in (dtypes if shape != SAMPLING else ["float32"])
        for number, call in enumerate(distinct(launches(shape, DTYPES[dtype])))
        if kernels is None or call.name in kernels
        for target in targets
    ]


def run_job(job: Job) -> Build:
    return compile_call(distinct(launches(job.shape, DTYPES[job.dtype]))[job.number], job.target)


def build_all(wanted: list[Job], processes: int) -> dict[Job, Build]:
    """Raises what a compiler raised, for the first build that failed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return dict(zip(wanted, pool.map(run_job, wanted), strict=True))
