"""Compile the GPU's kernels for GPUs that are not there, and print what they take: python -m scripts.gpu_table

--target 80 --dtype bfloat16 --shape "heads of 128" --kernel attend   only these; each may be given several times
--json                                                                a list of rows rather than Markdown
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import msgspec

from engine.kernels.gpu.aot import SHARED_LIMITS, Build, Job, build_all, jobs
from engine.kernels.gpu.choices import DTYPES, SAMPLING, SHAPES, build_key, context_of, distinct, launches
from engine.kernels.gpu.launch import Call
from engine.kernels.gpu.traffic import traffic


def rows(built: dict[Job, Build]) -> list[dict[str, Any]]:
    """A row for each use of each build: a kernel that serves decodes and chunks has one for both."""
    found: list[dict[str, Any]] = []
    for shape, dtype, number in dict.fromkeys((job.shape, job.dtype, job.number) for job in built):
        calls = launches(shape, DTYPES[dtype])
        call = distinct(calls)[number]
        own = {job.target: build for job, build in built.items() if job == Job(shape, dtype, number, job.target)}
        said = {"shape": shape, "dtype": dtype, "kernel": call.name, "tile": tile(call), "warps": call.warps}
        for use, launched in uses(call, calls).items():
            asked, fewest = traffic(launched, context_of(shape))
            found.append({**said, "use": use, "builds": own, "asked": asked, "fewest": fewest})
    return found


def uses(call: Call, calls: list[Call]) -> dict[str, Call]:
    if call.name != "attend":
        return {"": call}
    same = [other for other in calls if build_key(other) == build_key(call)]
    return {"decode" if other.arguments["in_parts"] else "chunk": other for other in same}


def tile(call: Call) -> str:
    """What a program holds at once: of attention rows and keys, of products rows, columns and depth; else entries."""
    names = {
        "attend": ("ROWS", "BLOCK_KEYS"), "merge": ("ROWS",), "grouped_product": ("ROWS", "COLUMNS", "DEPTH"),
        "rotary_store": ("HEADS", "BLOCK"),
    }.get(call.name, ("BLOCK",))  # fmt: skip
    return " × ".join(str(call.constants[name]) for name in names)


def markdown(found: list[dict[str, Any]], targets: list[int]) -> str:
    columns = [
        "shape",
        "dtype",
        "kernel",
        "tile, warps",
        *(f"sm_{target}" for target in targets),
        "bytes asked / fewest",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in found:
        name = f"{row['kernel']} ({row['use']})" if row["use"] else row["kernel"]
        cells = " | ".join(cell(row["builds"][target]) for target in targets)
        ratio = f"{row['asked']:,} / {row['fewest']:,} = {row['asked'] / row['fewest']:.2f}"
        lines.append(
            f"| {row['shape']} | {row['dtype']} | {name} | {row['tile']}, {row['warps']} | {cells} | {ratio} |"
        )
    return "\n".join(lines)


def cell(build: Build) -> str:
    """Registers, kilobytes of shared memory, and bytes spilled if there are any."""
    spilled = f", {build.spills} spilled" if build.spills else ""
    return f"{build.registers}, {build.shared / 1024:.1f}{spilled}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, action="append", choices=sorted(SHARED_LIMITS))
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--shape", action="append", help="part of a shape's name")
    parser.add_argument("--kernel", action="append")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    targets = given.target or sorted(SHARED_LIMITS)
    shapes = [name for name in (*SHAPES, SAMPLING) if any(part in name for part in given.shape or [""])]
    found = rows(build_all(jobs(shapes, given.dtype or list(DTYPES), targets, given.kernel), given.processes))
    print(msgspec.json.encode(found).decode() if given.json else markdown(found, targets))


if __name__ == "__main__":
    main()
