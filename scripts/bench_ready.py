"""How long a server takes from the command to the first 200 of /health, and where the time goes.

python -m scripts.bench_ready [--runs 5] [-- FLAGS ...]
"""

from __future__ import annotations

import argparse
import statistics

from scripts.live import serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    times = []
    for run in range(options.runs):
        with serving(*options.flags) as server:
            state = server.get("/server_info")["internal_states"][0]
            times.append(server.ready_seconds)
            phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in state["load_seconds"].items())
            print(f"run {run}: {server.ready_seconds:.2f} s (scheduler ready {state['startup_time']:.2f} s: {phases})")
    print(f"median {statistics.median(times):.2f} s, from {min(times):.2f} to {max(times):.2f} s")


if __name__ == "__main__":
    main()
