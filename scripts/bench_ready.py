"""How long a server takes from the command to the first 200 of /health, and where the time goes.

python -m scripts.bench_ready [--runs 5] [-- FLAGS ...]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import urllib.request

from engine.bench.http_client import call_json, parse_url

TIMEOUT = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--port", type=int, default=30_999)
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    times = [_run(number, options.port, options.flags) for number in range(options.runs)]
    print(f"median {statistics.median(times):.2f} s, from {min(times):.2f} to {max(times):.2f} s")


def _run(number: int, port: int, flags: list[str]) -> float:
    command = [sys.executable, "-m", "engine", "serve", "--port", str(port), "--log-level", "warning", *flags]
    started = time.monotonic()
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        opened = _first_answer(launcher, f"http://127.0.0.1:{port}/v1/models") - started
        ready = _first_answer(launcher, f"http://127.0.0.1:{port}/health") - started
        state = call_json(parse_url(f"http://127.0.0.1:{port}"), "GET", "/server_info")["internal_states"][0]
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in state["load_seconds"].items())
        print(f"run {number}: ready {ready:.2f} s, port open {opened:.2f} s,", end=" ")
        print(f"scheduler loaded in {state['startup_time']:.2f} s of its own ({phases})")
        return ready
    finally:
        launcher.terminate()
        launcher.wait(60)


def _first_answer(launcher: subprocess.Popen[bytes], url: str) -> float:
    """Monotonic time of the first 200."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if launcher.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {launcher.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return time.monotonic()
        except OSError:
            time.sleep(0.02)  # nothing to wait on: the port may not be open yet
    raise RuntimeError(f"no answer from {url} within {TIMEOUT} s")


if __name__ == "__main__":
    main()
