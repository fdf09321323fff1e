"""Requests with a grammar inside the scheduler: their way to a constraint, their tokens, their ends, their company."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from grammar_cases import PATIENCE, ids_of, small_engine, text_of
from simulation import EOS, HashModel, Sent, admit, expected_tokens, scheduler_over
from test_overlap import QueueingModel

from engine.kernels.batch import RaggedBatch
from engine.kernels.eager import EagerBackend
from engine.kernels.table import Rows
from engine.wire.results import Finish
from engine.wire.sampling import Grammar, LogprobOptions
from engine.wire.to_scheduler import Abort, Admit, FlushCache, StartOver
from scheduler_proc.constraint import Constraint
from scheduler_proc.grammars import Grammars
from scheduler_proc.sampler import is_adjusted, wanted_logits
from scheduler_proc.scheduler import Scheduler

ENGINE = small_engine()
PATTERN = Grammar("regex", "[a-f]{3}([0-9]{2}|x)[g-z]{0,4}")


class Slow:
    """Compiles nothing before it is let go. asked: how often it was asked to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.asked = 0

    def compile(self, grammar: Grammar, deadline: float) -> Constraint:
        self.asked += 1
        assert self.go.wait(PATIENCE)
        return ENGINE.compile(grammar, deadline)


def constrained_scheduler(engine: Any = ENGINE, pool: int = 400, patience: float = PATIENCE, **limits: Any) -> Any:
    """(scheduler, what it has sent)"""
    return scheduler_over(
        EagerBackend(), HashModel(pool), pool, longest=min(200, pool) - 1, eos_ids=[EOS],
        grammars=Grammars(lambda: engine, patience), **limits,
    )  # fmt: skip


def turn_until(scheduler: Scheduler, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        scheduler.turn()
        scheduler.planner.memory.check(scheduler.planner.running)
        assert time.monotonic() < deadline, "the scheduler makes no progress"
        if not scheduler.planner.running:
            time.sleep(0.001)


def run_out(scheduler: Scheduler) -> None:
    turn_until(scheduler, lambda: not scheduler.requests)
    scheduler.idle()


def alone(message: Admit, engine: Any = ENGINE) -> tuple[list[int], Finish]:
    scheduler, sent = constrained_scheduler(engine)
    scheduler.handle(message)
    run_out(scheduler)
    return sent.tokens.get(message.key, []), sent.finishes[message.key]


def test_an_output_follows_its_grammar_and_ends_with_it() -> None:
    for key in range(1, 20):
        tokens, finish = alone(admit(key, [key, 7], new=40, grammar=PATTERN, temperature=1.0, seed=key))
        assert re.fullmatch(PATTERN.text, text_of(tokens))
        assert tokens[-1] == EOS and finish == Finish("stop", matched=EOS)


def test_a_length_may_cut_it() -> None:
    tokens, finish = alone(admit(1, [5, 7], new=2, grammar=PATTERN))
    assert len(tokens) == 2 and finish == Finish("length", length=2)


def test_only_the_end_of_a_grammar_ends_what_ignores_ends() -> None:
    tokens, finish = alone(admit(1, [5, 7], new=40, grammar=PATTERN, ignore_eos=True))
    assert re.fullmatch(PATTERN.text, text_of(tokens))
    assert tokens[-1] == EOS and finish == Finish("stop", matched=EOS)


def test_a_model_without_an_end_stops_behind_the_last_token() -> None:
    scheduler, sent = constrained_scheduler(small_engine(()))
    scheduler.emission.eos_ids = scheduler.steps.eos_ids = []
    scheduler.handle(admit(1, [5, 7], new=40, grammar=Grammar("regex", "[a-f]{3}")))
    run_out(scheduler)
    assert re.fullmatch("[a-f]{3}", text_of(sent.tokens[1]))
    assert sent.finishes[1] == Finish("stop", matched=None)


def test_a_complete_grammar_ends_before_the_minimum_length() -> None:
    tokens, finish = alone(admit(1, [5, 7], new=40, min_new_tokens=20, grammar=Grammar("regex", "ca")))
    assert text_of(tokens) == "ca" and finish == Finish("stop", matched=EOS)


def test_a_grammar_that_has_only_stop_tokens_before_the_minimum_length_is_an_error() -> None:
    stops = ids_of("ab")
    _, finish = alone(admit(1, [5, 7], min_new_tokens=3, stop_token_ids=stops, grammar=Grammar("regex", "[ab]z*")))
    assert finish.status == 400 and "after 0 tokens; min_new_tokens is 3" in (finish.message or "")


def test_a_bias_cannot_allow_what_the_grammar_forbids() -> None:
    (token,) = ids_of("z")
    tokens, _ = alone(
        admit(1, [5, 7], new=40, grammar=PATTERN, logit_bias={str(token): 100.0, str(ids_of("f")[0]): 50.0})
    )
    assert text_of(tokens).startswith("fff")


def test_logprobs_of_what_is_forbidden_are_the_smallest_float() -> None:
    scheduler, sent = constrained_scheduler()
    a, b = ids_of("az")
    options = LogprobOptions(start=-1, top=3, ids=[a, b])
    scheduler.handle(admit(1, [5, 7], new=1, grammar=Grammar("regex", "[a-c]"), logprobs=options))
    run_out(scheduler)
    (entry,) = sent.logprobs[1]
    assert [value for value, _ in entry.ids] == [pytest.approx(entry.ids[0][0]), pytest.approx(-3.4028235e38)]
    assert {token for _, token in entry.top} == set(ids_of("abc"))


def test_a_prompt_that_is_only_computed_has_the_masked_distribution() -> None:
    tokens, finish = alone(admit(1, [5, 7], new=0, grammar=PATTERN))
    assert tokens == [] and finish == Finish("length", length=0)


def _messages() -> list[Admit]:
    """Requests with and without grammars, greedy ones and drawn ones."""
    schema = json.dumps({"type": "array", "items": {"enum": ["ab", 12, True]}, "minItems": 2, "maxItems": 3})
    kinds: list[dict[str, Any]] = [
        {}, {"grammar": PATTERN}, {"temperature": 0.9}, {"grammar": Grammar("json", schema), "temperature": 1.2},
        {"repetition_penalty": 1.3}, {"grammar": Grammar("ebnf", 'root ::= "[" root? "]"'), "temperature": 0.8},
        {"grammar": PATTERN, "frequency_penalty": 1.0, "temperature": 1.0},
    ]  # fmt: skip
    return [admit(key, [1 + key % 40, 3, key], new=12, seed=key, **kinds[key % len(kinds)]) for key in range(1, 22)]


@pytest.mark.parametrize("preempted", [False, True])
def test_company_changes_nobody(preempted: bool) -> None:
    """Whether they wait for grammars, share steps, or are sent back to the queue in the middle."""
    scheduler, sent = constrained_scheduler()
    for message in _messages():
        scheduler.handle(message)
    while scheduler.requests:
        turn_until(scheduler, lambda: bool(scheduler.planner.running) or not scheduler.requests)
        for _ in range(4):
            scheduler.turn()
        for request in list(scheduler.planner.running) if preempted else []:
            scheduler.planner.preempt(request)
    assert (scheduler.planner.preemptions > 0) is preempted
    for message in _messages():
        assert (sent.tokens[message.key], sent.finishes[message.key]) == alone(message)
        if message.sampling.grammar is None and not message.sampling.temperature and not message.key % 7:
            assert sent.tokens[message.key] == expected_tokens([1 + message.key % 40, 3, message.key], 12)


@pytest.mark.parametrize("delivered", range(1, 7))
def test_a_replay_goes_on_where_the_output_ends(delivered: int) -> None:
    """As after the death of a scheduler: another one gets what has been delivered."""
    for message in _messages():
        whole, finish = alone(message)
        if len(whole) > delivered:
            earlier = b"".join(token.to_bytes(4, "little") for token in whole[:delivered])
            again = msgspec.structs.replace(message, attempt=1, output_ids=earlier)
            assert alone(again) == (whole, finish)


def test_an_output_that_its_grammar_does_not_allow_is_refused() -> None:
    tokens, finish = alone(admit(1, [5, 7], earlier=ids_of("zz"), grammar=PATTERN))
    assert tokens == [] and finish.status == 400 and "does not allow the output" in (finish.message or "")


def test_a_grammar_that_does_not_compile_ends_its_request_alone() -> None:
    scheduler, sent = constrained_scheduler()
    scheduler.handle(admit(1, [5, 7]))
    scheduler.handle(admit(2, [5, 7], grammar=Grammar("json", "INVALID")))
    run_out(scheduler)
    assert sent.tokens[1] == expected_tokens([5, 7], 8)
    reason = "Failed to compile json grammar: Expecting value: line 1 column 1 (char 0)"
    assert sent.finishes[2] == Finish("abort", message=reason, status=400)


def test_others_are_served_while_a_grammar_is_compiled() -> None:
    engine = Slow()
    scheduler, sent = constrained_scheduler(engine)
    scheduler.handle(admit(1, [5, 7], grammar=PATTERN))
    scheduler.handle(admit(2, [5, 7], new=30))
    turn_until(scheduler, lambda: 2 in sent.finishes)
    state = scheduler.state()
    assert (state["num_grammar_reqs"], state["num_waiting_reqs"], state["num_running_reqs"]) == (1, 0, 0)
    assert scheduler._only_grammars
    engine.go.set()
    run_out(scheduler)
    assert re.fullmatch(PATTERN.text, text_of(sent.tokens[1]))
    assert scheduler.state()["num_grammar_reqs"] == 0


def test_a_grammar_that_takes_too_long_is_given_up_and_the_next_is_compiled() -> None:
    engine = Slow()
    scheduler, sent = constrained_scheduler(engine, patience=0.05)
    for key in (1, 2, 3):
        scheduler.handle(admit(key, [5, 7], grammar=Grammar("regex", "a" * key)))
    run_out(scheduler)
    reason = "Grammar preprocessing timed out: the regex grammar was not compiled in 0.05 s"
    assert [sent.finishes[key] for key in (1, 2, 3)] == [Finish("abort", message=reason, status=400)] * 3
    engine.go.set()
    scheduler.grammars.patience = PATIENCE
    scheduler.handle(admit(4, [5, 7], grammar=PATTERN))
    run_out(scheduler)
    assert sent.finishes[4] == Finish("stop", matched=EOS)


@pytest.mark.parametrize("message", [Abort([1]), StartOver(2, None)])
def test_who_leaves_meanwhile_is_not_missed(message: Any) -> None:
    engine = Slow()
    scheduler, sent = constrained_scheduler(engine)
    scheduler.handle(admit(1, [5, 7], grammar=PATTERN))
    scheduler.turn()
    scheduler.handle(message)
    assert not scheduler.requests
    assert (1 in sent.finishes) is isinstance(message, Abort)
    engine.go.set()
    turn_until(scheduler, lambda: not scheduler.grammars.jobs)
    assert 1 not in sent.tokens


def test_compiled_grammars_are_kept_until_the_cache_is_flushed() -> None:
    engine = Slow()
    engine.go.set()
    scheduler, sent = constrained_scheduler(engine)
    for key in range(1, 4):
        scheduler.handle(admit(key, [5, key], grammar=PATTERN))
        assert scheduler.requests[key].awaits_grammar is (key == 1)
        run_out(scheduler)
    assert engine.asked == 1
    scheduler.handle(FlushCache(9, 0.0))
    scheduler.turn()
    scheduler.handle(admit(4, [5, 4], grammar=PATTERN))
    run_out(scheduler)
    assert engine.asked == 2
    assert all(re.fullmatch(PATTERN.text, text_of(sent.tokens[key])) for key in range(1, 5))


class Panicking:
    def compile(self, grammar: Grammar, deadline: float) -> Constraint:
        raise type("PanicException", (BaseException,), {})("unreachable")


def test_a_compiler_that_breaks_ends_the_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    scheduler, sent = constrained_scheduler(Panicking())
    scheduler.handle(admit(1, [5, 7], grammar=PATTERN))
    scheduler.handle(admit(2, [5, 7]))
    run_out(scheduler)
    assert sent.finishes[1].status == 500
    assert sent.tokens[2] == expected_tokens([5, 7], 8)
    assert PATTERN.text not in caplog.text


def test_a_grammar_that_leads_nowhere_ends_its_request_alone() -> None:
    scheduler, sent = constrained_scheduler()
    scheduler.handle(admit(1, [5, 7], grammar=Grammar("ebnf", 'root ::= "a" x\nx ::= x')))
    scheduler.handle(admit(2, [5, 7]))
    scheduler.handle(admit(3, [5, 7], grammar=PATTERN))
    run_out(scheduler)
    assert sent.finishes[1].status == 400 and "cannot be followed" in (sent.finishes[1].message or "")
    assert sent.tokens[2] == expected_tokens([5, 7], 8)
    assert (sent.tokens[3], sent.finishes[3]) == alone(admit(3, [5, 7], grammar=PATTERN))


def test_a_suspect_whose_grammar_is_compiled_stands_in_nobodys_way() -> None:
    engine = Slow()
    scheduler, sent = constrained_scheduler(engine)
    scheduler.handle(msgspec.structs.replace(admit(1, [5, 7], grammar=PATTERN), suspect=1))
    scheduler.handle(admit(2, [5, 7]))
    turn_until(scheduler, lambda: 2 in sent.finishes)
    engine.go.set()
    run_out(scheduler)
    assert (sent.tokens[1], sent.finishes[1]) == alone(admit(1, [5, 7], grammar=PATTERN))


def test_without_a_tokenizer_no_grammar_is_taken() -> None:
    sent: Sent
    scheduler, sent = scheduler_over(EagerBackend(), HashModel(100), 100, longest=99, eos_ids=[EOS])
    scheduler.handle(admit(1, [5, 7], grammar=PATTERN))
    assert sent.finishes[1].status == 500 and not scheduler.requests


class Watched(HashModel):
    """batches: how many tokens each step had."""

    def __init__(self, pool: int) -> None:
        super().__init__(pool)
        self.batches: list[int] = []

    def run(self, batch: RaggedBatch, rows: Rows) -> Any:
        self.batches.append(batch.num_tokens)
        return super().run(batch, rows)


def test_constrained_rows_share_steps_and_want_all_logits() -> None:
    program = Watched(400)
    scheduler, _ = scheduler_over(
        EagerBackend(), program, 400, longest=199, eos_ids=[EOS], grammars=Grammars(lambda: ENGINE, PATIENCE)
    )
    for key in range(1, 5):
        scheduler.handle(admit(key, [5, key], grammar=Grammar("regex", "[a-z]{8}")))
    deadline = time.monotonic() + PATIENCE
    while any(request.awaits_grammar for request in scheduler.requests.values()):
        scheduler.admission.collect_grammars()
        assert time.monotonic() < deadline
    requests = list(scheduler.requests.values())
    assert all(is_adjusted(request) for request in requests)
    assert wanted_logits(requests).tolist() == [-1] * 4
    run_out(scheduler)
    assert max(program.batches) >= 4


def test_where_steps_overlap_those_with_grammars_follow_one_another() -> None:
    program = QueueingModel(400)
    scheduler, sent = scheduler_over(
        EagerBackend(), program, 400, longest=199, eos_ids=[EOS], queueing=program,
        grammars=Grammars(lambda: ENGINE, PATIENCE),
    )  # fmt: skip
    for message in _messages():
        scheduler.handle(message)
    run_out(scheduler)
    scheduler._settle()
    assert program.queued > 0
    for message in _messages():
        assert (sent.tokens[message.key], sent.finishes[message.key]) == alone(message)
