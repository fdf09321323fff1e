"""What is sent: rows of work, and their prompts, which are new in each round."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.bench.errors import BenchError
from engine.bench.options import BenchOptions

Prompt = list[int] | str


@dataclass(frozen=True, kw_only=True)
class Work:
    """One row of the table.

    clients: at once, of a closed loop (1 for prefill; 0 for Poisson). rate: requests a second (0 for a closed loop).
    requests: in a round.
    """

    kind: Literal["closed", "poisson", "prefill"]
    label: str
    clients: int
    rate: float
    requests: int
    prompt_tokens: int
    output_tokens: int


def rows_of(options: BenchOptions) -> list[Work]:
    """The rows, in the order in which they are run."""
    tokens = {"prompt_tokens": options.prompt_tokens + options.shared_prefix, "output_tokens": options.output_tokens}
    rows = []
    if options.prefill is not None:
        rows.append(
            Work(
                kind="prefill",
                label=f"prefill {options.prefill}",
                clients=1,
                rate=0.0,
                requests=options.requests_per_client,
                prompt_tokens=options.prefill,
                output_tokens=1,
            )
        )
    for clients in options.concurrency:
        label = f"{clients} client" + ("s" if clients > 1 else "")
        requests = clients * options.requests_per_client
        rows.append(Work(kind="closed", label=label, clients=clients, rate=0.0, requests=requests, **tokens))
    for rate in options.request_rates:
        rows.append(
            Work(
                kind="poisson",
                label=f"{rate:g} a second",
                clients=0,
                rate=rate,
                requests=options.num_requests,
                **tokens,
            )
        )
    return rows


@dataclass(frozen=True)
class Prompts:
    """Where prompts come from: `texts` in turn, or ids from [low, high) drawn anew for each round, behind `prefix`."""

    seed: int
    low: int
    high: int
    prefix: list[int]
    texts: list[str]

    def take(self, work: Work, row: int, round_number: int) -> list[Prompt]:
        """The prompts of one round, warm-up rounds having negative numbers. The same arguments give the same prompts.

        Random prompts of a round differ in their first own token as far as there are enough ids.
        """
        if self.texts and work.kind != "prefill":
            start = (row * 1009 + round_number) * work.requests
            return [self.texts[(start + i) % len(self.texts)] for i in range(work.requests)]
        prefix = [] if work.kind == "prefill" else self.prefix
        random = np.random.default_rng([self.seed, row, abs(round_number), round_number < 0])
        ids = random.integers(self.low, self.high, (work.requests, work.prompt_tokens - len(prefix)))
        width = self.high - self.low
        ids[:, 0] = self.low + random.choice(width, work.requests, replace=work.requests > width)
        return [[*prefix, *own] for own in ids.tolist()]


def make_prompts(options: BenchOptions, vocab_size: int) -> Prompts:
    """Raises BenchError when the file of prompts holds none."""
    low, high = id_range(vocab_size)
    prefix = np.random.default_rng([options.seed, 1]).integers(low, high, options.shared_prefix).tolist()
    texts = [] if options.prompts is None else read_texts(options.prompts)
    return Prompts(options.seed, low, high, prefix, texts)


def id_range(vocab_size: int) -> tuple[int, int]:
    """Ids that are drawn: the middle eight tenths, since special ids stand at the beginning or the end."""
    margin = vocab_size // 10
    return margin, vocab_size - margin


def read_texts(path: Path) -> list[str]:
    """The lines that are not empty. Raises BenchError when there is none, or the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"--prompts: {str(path)!r} cannot be read: {error}") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise BenchError(f"--prompts: {str(path)!r} holds no prompt: every line is empty")
    return texts


def body_of(prompt: Prompt, work: Work, *, streamed: bool) -> dict[str, Any]:
    """The body of /generate: greedy, and exactly as many tokens as asked."""
    sampling = {"max_new_tokens": work.output_tokens, "ignore_eos": True, "temperature": 0}
    name = "text" if isinstance(prompt, str) else "input_ids"
    return {name: prompt, "stream": streamed, "sampling_params": sampling}


def arrivals(rate: float, count: int, seed: int, row: int, round_number: int) -> list[float]:
    """Seconds from the start at which requests come: a Poisson process; the first comes at once."""
    random = np.random.default_rng([seed, row, abs(round_number), 2 + (round_number < 0)])
    gaps = random.exponential(1 / rate, count)
    gaps[0] = 0.0
    times: list[float] = np.cumsum(gaps).tolist()
    return times
