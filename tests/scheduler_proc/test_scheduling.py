"""Planning, preemption, prefix reuse and aborts, with a model that notices every wrong slot."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import admit, change_settings, expected_tokens, run_to_end, simulated_scheduler

from engine.wire.results import Finish
from engine.wire.sampling import LogprobOptions
from engine.wire.to_frontend import Flushed, State
from engine.wire.to_scheduler import Abort, FlushCache, QueryState, StopSeen

PROMPTS = st.one_of(
    st.lists(st.integers(1, 4), min_size=1, max_size=12),
    st.integers(1, 60).map(lambda n: [1 + i % 9 for i in range(n)]),  # these share prefixes
)
REQUESTS = st.lists(
    st.tuples(
        PROMPTS,
        st.integers(0, 30),  # new tokens
        st.sampled_from([None, None, "a"]),  # extra_key
        st.sampled_from(["run", "run", "run", "abort", "stop"]),
        st.integers(0, 6),  # steps before the next one arrives
        st.sampled_from([-1, -1, 0, 3]),  # logprob start
    ),
    min_size=1,
    max_size=16,
)


@settings(max_examples=150, deadline=None)
@given(
    REQUESTS,
    st.integers(100, 260),
    st.booleans(),
    st.sampled_from([1, 5, 16, 400]),
    st.booleans(),
    st.booleans(),
)
def test_every_request_gets_its_own_tokens(
    requests: list[tuple[list[int], int, str | None, str, int, int]],
    pool: int,
    reuse: bool,
    budget: int,
    chunked: bool,
    longest_prefix_first: bool,
) -> None:
    scheduler, sent, _ = simulated_scheduler(
        pool, reuse=reuse, prefill_budget=budget, chunked=chunked, longest_prefix_first=longest_prefix_first
    )
    for key, (prompt, new, extra_key, fate, pause, start) in enumerate(requests):
        logprobs = LogprobOptions(start=min(start, len(prompt)), top=2, ids=[3])
        scheduler.handle(admit(key, prompt, new=new, extra_key=extra_key, logprobs=logprobs))
        for _ in range(pause):
            if scheduler.requests:
                scheduler.step()
                scheduler.planner.memory.check(scheduler.planner.running)
        if fate != "run":
            scheduler.handle(Abort([key]) if fate == "abort" else StopSeen([key], [0]))
    run_to_end(scheduler)
    for key, (prompt, new, _, fate, _, start) in enumerate(requests):
        expected = expected_tokens(prompt, new)
        if fate == "run":
            assert sent.tokens[key] == expected
            assert sent.finishes[key] == Finish("length", length=new)
            assert len(sent.logprobs[key]) == max(new, 1)
            _check_prompt_logprobs(sent.opened[key].input_logprobs, prompt, min(start, len(prompt)))
        else:
            assert sent.tokens.get(key, []) == expected[: len(sent.tokens.get(key, []))]


def _check_prompt_logprobs(found: Any, prompt: list[int], start: int) -> None:
    if start < 0 or start == len(prompt):
        assert found is None
        return
    assert [token for _, token in found.tokens] == prompt[start:]
    assert found.tokens[0][0] is None and found.top[0] is None and found.ids[0] is None
    for offset in range(1, len(prompt) - start):
        guess = expected_tokens(prompt[: start + offset], 1)[0]
        assert found.top[offset][0][1] == guess
        (likely, _), (unlikely, _) = found.top[offset]
        token = prompt[start + offset]
        assert found.tokens[offset][0] == pytest.approx(likely if token == guess else unlikely)
        assert [token for _, token in found.ids[offset]] == [3]


def test_a_small_pool_preempts_and_loses_nothing() -> None:
    scheduler, sent, _ = simulated_scheduler(120, max_running=8)
    prompts = [[1 + (key * 7 + i) % 40 for i in range(20)] for key in range(8)]
    for key, prompt in enumerate(prompts):
        scheduler.handle(admit(key, prompt, new=60))
    run_to_end(scheduler)
    for key, prompt in enumerate(prompts):
        assert sent.tokens[key] == expected_tokens(prompt, 60)


def test_the_oldest_request_is_never_preempted() -> None:
    scheduler, _, _ = simulated_scheduler(100, max_running=8)
    for key in range(6):
        scheduler.handle(admit(key, [key + 1] * 10, new=70))
    oldest = scheduler.requests[0]
    preempted = 0
    while scheduler.requests:
        scheduler.step()
        preempted += sum(r.retractions for r in scheduler.planner.waiting)
        assert oldest.retractions == 0
    assert preempted > 0


def test_cached_tokens_follow_the_contract() -> None:
    """The sequence of contract §5.5, scaled to this pool."""
    scheduler, sent, _ = simulated_scheduler(600, prefill_budget=64)
    for key, (length, cached) in enumerate([(10, 0), (100, 10), (100, 99), (50, 49), (150, 100)]):
        scheduler.handle(admit(key, [1 + i % 49 for i in range(length)], new=1))
        run_to_end(scheduler)
        assert sent.opened[key].cached_tokens == cached


def test_outputs_are_cached_too() -> None:
    scheduler, sent, model = simulated_scheduler(300)
    scheduler.handle(admit(0, [1, 2, 3], new=10))
    run_to_end(scheduler)
    turn = [1, 2, 3, *sent.tokens[0], 7]
    before = model.computed
    scheduler.handle(admit(1, turn, new=1))
    run_to_end(scheduler)
    assert sent.opened[1].cached_tokens == 12  # prompt + output - 1
    assert model.computed - before == 2


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    scheduler, sent, model = simulated_scheduler(2_000, prefill_budget=64, max_running=16)
    prompt = [1 + i % 49 for i in range(170)]
    for key in range(10):
        scheduler.handle(admit(key, prompt, new=2))
    run_to_end(scheduler)
    assert model.computed == 170 + 9 + 10
    assert all(sent.tokens[key] == expected_tokens(prompt, 2) for key in range(10))


def test_decodes_go_on_beside_a_long_prefill() -> None:
    scheduler, sent, model = simulated_scheduler(500, prefill_budget=8)
    scheduler.handle(admit(0, [1, 2], new=40))
    scheduler.step()
    scheduler.handle(admit(1, [5] * 100, new=1))
    for expected in range(2, 12):
        scheduler.step()
        assert len(sent.tokens[0]) == expected
    assert model.largest_batch <= 8 + 1
    run_to_end(scheduler)


def test_longest_prefix_goes_first_until_the_others_are_overdue() -> None:
    def order(max_wait: float) -> list[int]:
        scheduler, sent, _ = simulated_scheduler(
            800, max_running=1, longest_prefix_first=True, max_wait=max_wait, prefill_budget=400
        )
        scheduler.handle(admit(0, list(range(1, 41)), new=1))
        run_to_end(scheduler)
        scheduler.handle(admit(1, [9] * 20, new=1))
        scheduler.handle(admit(2, list(range(1, 45)), new=1))
        run_to_end(scheduler)
        return [key for key in sent.finishes if key]

    assert order(max_wait=1000.0) == [2, 1]
    assert order(max_wait=0.0) == [1, 2]


def test_priorities_order_the_queue_and_the_full_queue_drops_the_least_urgent() -> None:
    scheduler, sent, _ = simulated_scheduler(300, max_running=1, priorities=True)
    change_settings(scheduler, max_queued=2)
    scheduler.handle(admit(0, [1], new=2))
    scheduler.step()
    for key, priority in [(1, 0), (2, 5), (3, 3), (4, -1)]:
        scheduler.handle(admit(key, [1 + key], new=1, priority=priority))
    assert sent.finishes[1] == Finish(
        "abort", message="The request is aborted by a higher priority request.", status=503
    )
    assert sent.finishes[4] == Finish("abort", message="The request queue is full.", status=503)
    run_to_end(scheduler)
    assert [key for key in sent.finishes if key in (0, 2, 3)] == [0, 2, 3]


def test_aborts_are_answered_according_to_where_they_find_the_request() -> None:
    scheduler, sent, _ = simulated_scheduler(300, max_running=1)
    scheduler.handle(admit(0, [1, 2], new=50))
    scheduler.handle(admit(1, [3, 4], new=50))
    scheduler.step()
    scheduler.handle(Abort([0, 1, 99]))
    assert sent.finishes[0] == Finish("abort", message="Aborted") and sent.tokens[0] == expected_tokens([1, 2], 1)
    assert sent.finishes[1] == Finish("abort", message="Abort in waiting queue") and 1 not in sent.tokens
    run_to_end(scheduler)


def test_a_replayed_request_goes_on_where_it_stopped() -> None:
    scheduler, sent, _ = simulated_scheduler(300)
    whole = expected_tokens([4, 5, 6], 12)
    scheduler.handle(admit(0, [4, 5, 6], new=12, earlier=whole[:5], repetition_penalty=1.0))
    run_to_end(scheduler)
    assert sent.opened[0].output_ids == whole[:5] and sent.tokens[0] == whole


def test_requests_beyond_the_pool_are_refused() -> None:
    scheduler, sent, _ = simulated_scheduler(50)
    scheduler.handle(admit(0, [1] * 44, new=1))
    assert sent.finishes[0].status == 400 and "Input length (44 tokens)" in (sent.finishes[0].message or "")
    scheduler.handle(admit(1, [1] * 43, new=None))  # type: ignore[arg-type]
    run_to_end(scheduler)
    assert sent.finishes[1] == Finish("length", length=49 - 43 - 1)


def test_end_of_text_and_stop_ids() -> None:
    second = expected_tokens([1, 2], 3)[1]
    scheduler, sent, _ = simulated_scheduler(300)
    scheduler.handle(admit(0, [1, 2], new=9, stop_token_ids=[second]))
    scheduler.handle(admit(1, [1, 2], new=9, stop_token_ids=[second], ignore_eos=True))
    scheduler.handle(admit(2, [1, 2], new=9, logit_bias={"0": 100.0}))
    scheduler.handle(admit(3, [1, 2], new=9, logit_bias={"0": 100.0}, min_new_tokens=4))
    run_to_end(scheduler)
    assert sent.finishes[0] == Finish("stop", matched=second) and len(sent.tokens[0]) == 2
    assert sent.finishes[1] == Finish("length", length=9)
    assert sent.finishes[2] == Finish("stop", matched=0) and sent.tokens[2] == [0]
    assert sent.finishes[3] == Finish("stop", matched=0) and sent.tokens[3][4:] == [0]


def test_flush_waits_for_idleness_and_empties_the_cache() -> None:
    scheduler, sent, _ = simulated_scheduler(300)
    scheduler.handle(admit(0, [1, 2, 3], new=5))
    scheduler.step()
    scheduler.handle(FlushCache(77, 0.0))
    scheduler._answer_flushes()
    assert sent.others == [Flushed(77, False)]
    scheduler.handle(FlushCache(78, 60.0))
    scheduler._answer_flushes()
    run_to_end(scheduler)
    scheduler._answer_flushes()
    assert sent.others[1:] == [Flushed(78, True)]
    assert scheduler.planner.memory.pool.free_count == 300


def test_state_counts_what_is_there() -> None:
    scheduler, sent, _ = simulated_scheduler(300, max_running=1)
    scheduler.handle(admit(0, [1, 2, 3], new=5))
    scheduler.handle(admit(1, [1, 2, 3], new=5))
    scheduler.step()
    scheduler.handle(QueryState(5))
    (state,) = sent.others
    assert isinstance(state, State) and state.key == 5
    assert (state.state["num_running_reqs"], state.state["num_waiting_reqs"]) == (1, 1)
    run_to_end(scheduler)
