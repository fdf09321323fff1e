"""Prefix matching of a 32,000-token prompt in a radix tree of a million tokens.

python -m scripts.bench_radix
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from scheduler_proc.radix_cache import RadixCache


def main() -> None:
    random = np.random.default_rng(0)

    def some(count: int) -> np.ndarray:
        return random.integers(0, 49_152, count).astype(np.int32)

    tree = RadixCache()
    prompt = some(32_000)
    tree.insert(None, prompt, prompt)
    for _ in range(200):  # branches off the long prompt, so that its path has many nodes
        sequence = np.concatenate([prompt[: random.integers(1, 32_000)], some(50)])
        tree.insert(None, sequence, sequence)
    systems = [some(500) for _ in range(20)]
    while tree.token_count < 1_000_000:  # conversations of four turns behind shared system prompts
        sequence = systems[random.integers(20)]
        for _ in range(4):
            sequence = np.concatenate([sequence, some(int(random.integers(20, 300)))])
            tree.insert(None, sequence, sequence)
    times = []
    for _ in range(200):
        started = time.perf_counter()
        match = tree.match(None, prompt)
        times.append(1000 * (time.perf_counter() - started))
        assert len(match.slots) == len(prompt)
    print(f"{tree.token_count} tokens, {sum(1 for _ in tree.nodes())} nodes:", end=" ")
    print(f"median {statistics.median(times):.2f} ms, most {max(times):.2f} ms")


if __name__ == "__main__":
    main()
