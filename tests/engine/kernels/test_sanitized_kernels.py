"""The kernels, built with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests of their ops."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nanobind
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
TESTS = [
    "test_cpu_ops.py", "test_cpu_encoder_ops.py", "test_cpu_moe.py", "test_cpu_attention.py", "test_cpu_programs.py",
    "test_cpu_refusals.py", "test_cpu_team.py", "test_sampling_ops.py", "test_noise.py",
]  # fmt: skip
LEFT_OUT = (
    "thousands_of_keys or large_vocabulary or distribution_says or (large_products and 49152) or too_large or"
    " (emulated and (any_company or bounds_of_blocks or share_keys or shared_prefixes or head_sizes or 515 or 8192"
    " or every_token or a_decoder))"
)
"""What takes long here and goes where others go as well; and an allocation that the sanitizer itself refuses."""


RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")
SHORT_WEIGHTS = """
import numpy as np
from engine.kernels import _cpu

def test_short_weights():
    plan = _cpu.Plan(_cpu.Team(1, []), _cpu.usable_isas()[0])
    x, out = plan.buffer(64, 0), plan.buffer(64, 0)
    weights = np.zeros(48, np.float32)
    plan.norm(x, weights.ctypes.data, 1e-5, out, False)
    one = np.zeros(1, np.int64)
    plan.run(one, one, one, np.array([0, 1]), np.array([0, 1]), one, one[:0])
"""


def run(*command: str | Path) -> str:
    """What a command that must succeed has said. The tools beside this interpreter are found first."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=os.environ | {"PATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode} of {command[0]}:\n{done.stdout[-20_000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert shutil.which("g++"), "these tests need g++, with its sanitizers"
    build = tmp_path_factory.mktemp("sanitized")
    run(
        "cmake", "-S", "csrc", "-B", build, "-G", "Ninja", "-DTOKENMILL_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dnanobind_DIR={nanobind.cmake_dir()}",
    )  # fmt: skip
    run("cmake", "--build", build)
    (built,) = build.glob("_cpu*.so")
    return built


def run_tests(kernels: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The tests that `words` name, on sanitized kernels."""
    # An interpreter that knows nothing of the sanitizer loads its runtime first; with it goes libstdc++, whose
    # exceptions the runtime wants to see.
    runtimes = [run("g++", f"-print-file-name={name}").strip() for name in RUNTIMES]
    environment = {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # interpreters leak what they please
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(ROOT / "tests"),
    }
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "other_kernels", "--kernels", kernels, "-p", "no:cacheprovider",
        "--capture=sys", *words,
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_no_sanitizer_has_anything_to_report(kernels: Path) -> None:
    done = run_tests(kernels, "-k", f"not ({LEFT_OUT})", *(Path(__file__).with_name(name) for name in TESTS))
    said = done.stdout[-20_000:]
    assert done.returncode == 0, said
    assert "runtime error" not in said and "AddressSanitizer" not in said, said


def test_the_sanitizers_are_awake(kernels: Path, tmp_path: Path) -> None:
    """A norm whose weights end too soon is reported: these are the kernels that were built, and they are watched."""
    test = tmp_path / "test_short_weights.py"
    test.write_text(SHORT_WEIGHTS)
    done = run_tests(kernels, test)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stdout and "rms_norm" in done.stdout, done.stdout
