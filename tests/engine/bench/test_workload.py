"""Rows, prompts and arrivals: fresh in each round, and the same again with the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.bench.errors import BenchError
from engine.bench.options import parse_bench
from engine.bench.rounds import warm_up_of
from engine.bench.workload import arrivals, body_of, id_range, make_prompts, rows_of

VOCABULARY = 1000


def test_each_option_makes_its_row() -> None:
    words = (
        "--concurrency 1,4 --requests-per-client 3 --request-rate 2.5 --num-requests 7 --prefill 50 --shared-prefix 5"
    )
    rows = rows_of(parse_bench(words.split()))
    assert [row.label for row in rows] == ["prefill 50", "1 client", "4 clients", "2.5 a second"]
    assert [row.requests for row in rows] == [3, 3, 12, 7]
    assert [row.prompt_tokens for row in rows] == [50, 133, 133, 133]
    assert [row.output_tokens for row in rows] == [1, 64, 64, 64]
    assert [row.label for row in rows_of(parse_bench([]))] == ["1 client"]
    assert [row.label for row in rows_of(parse_bench(["--prefill"]))] == ["prefill 1024"]


def test_random_prompts_share_the_prefix_and_nothing_else() -> None:
    options = parse_bench("--concurrency 40 --prompt-tokens 6 --shared-prefix 9 --seed 5".split())
    prompts = make_prompts(options, VOCABULARY)
    work = rows_of(options)[0]
    rounds = [prompts.take(work, 0, number) for number in (-1, 0, 1)]
    everything = [prompt for taken in rounds for prompt in taken if isinstance(prompt, list)]
    low, high = id_range(VOCABULARY)
    assert len(everything) == 120
    assert all(len(prompt) == 15 and low <= min(prompt) and max(prompt) < high for prompt in everything)
    assert {tuple(prompt[:9]) for prompt in everything} == {tuple(prompts.prefix)}
    assert len({tuple(prompt[9:]) for prompt in everything}) == 120
    for taken in rounds:
        assert len({prompt[9] for prompt in taken}) == 40, "the first own tokens of a round differ"
    assert rounds[1] == make_prompts(options, VOCABULARY).take(work, 0, 0)
    assert rounds[1] != prompts.take(work, 1, 0), "another row has other prompts"
    assert prompts.take(warm_up_of(work), 0, -1) != prompts.take(warm_up_of(work), 0, 1)


def test_more_prompts_than_ids_are_allowed() -> None:
    options = parse_bench("--concurrency 40 --prompt-tokens 1".split())
    assert len(make_prompts(options, 16).take(rows_of(options)[0], 0, 0)) == 40


def test_a_prefill_has_no_shared_prefix() -> None:
    options = parse_bench("--prefill 20 --concurrency 1 --shared-prefix 9".split())
    prompts = make_prompts(options, VOCABULARY)
    (prompt,) = prompts.take(rows_of(options)[0], 0, 0)
    assert len(prompt) == 20 and prompt[:9] != prompts.prefix


def test_lines_of_a_file_follow_one_another(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n  \nthree\n")
    options = parse_bench(["--prompts", str(file), "--concurrency", "2"])
    prompts, work = make_prompts(options, VOCABULARY), rows_of(options)[0]
    assert prompts.take(work, 0, 0) == ["one", "two"]
    assert prompts.take(work, 0, 1) == ["three", "one"]
    assert body_of("one", work, streamed=True) == {
        "text": "one",
        "stream": True,
        "sampling_params": {"max_new_tokens": 64, "ignore_eos": True, "temperature": 0},
    }
    file.write_text("\n \n")
    with pytest.raises(BenchError, match="holds no prompt"):
        make_prompts(options, VOCABULARY)


def test_arrivals_are_a_poisson_process_of_the_seed() -> None:
    times = arrivals(20.0, 4000, seed=1, row=0, round_number=0)
    gaps = np.diff(times)
    assert times[0] == 0.0 and (gaps > 0).all()
    # The gaps of a Poisson process are exponential: their mean and their standard deviation are both 1 / rate.
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.1)
    assert times == arrivals(20.0, 4000, seed=1, row=0, round_number=0)
    assert times != arrivals(20.0, 4000, seed=2, row=0, round_number=0)
    assert times != arrivals(20.0, 4000, seed=1, row=0, round_number=1)
