"""New attempts at requests, trials of suspects, and questions that are asked twice."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from simulation import admit, answer_to, change_settings, expected_tokens, run_to_end, simulated_scheduler

from engine.wire.board import Board, Heart
from engine.wire.operation import Profile
from engine.wire.results import Finish
from engine.wire.to_frontend import Flushed, StartedOver
from engine.wire.to_scheduler import Abort, Admit, FlushCache, StartOver, StopSeen
from engine.wire.weights import Paused, PauseGeneration
from scheduler_proc.answers import Answers
from scheduler_proc.scheduler import Scheduler
from scheduler_proc.trials import LONG_TRIAL, Trials

PROMPT = list(range(1, 41))


class Attempts:
    """Stands for the outbox: rows by (key, attempt)."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.cached: dict[tuple[int, int], int] = {}
        self.finishes: dict[tuple[int, int], Finish] = {}
        self.others: list[Any] = []

    def send(self, message: Any) -> None:
        if not hasattr(message, "opened"):
            self.others.append(message)
            return
        for opened in message.opened:
            self.tokens[opened.key, opened.attempt] = list(opened.output_ids)
            self.cached[opened.key, opened.attempt] = opened.cached_tokens
        for row, name in enumerate(zip(message.keys, message.attempts, strict=True)):
            if message.tokens[row] >= 0:
                self.tokens[name].append(message.tokens[row])
            if row in message.finished:
                self.finishes[name] = message.finished[row]


def attempt(message: Admit, number: int, **fields: Any) -> Admit:
    return msgspec.structs.replace(message, attempt=number, **fields)


def scheduler_with(pool: int = 400, **limits: Any) -> tuple[Scheduler, Attempts]:
    scheduler, _, _ = simulated_scheduler(pool, **limits)
    sent = Attempts()
    answer_to(scheduler, sent)
    return scheduler, sent


def test_a_newer_attempt_replaces_the_older_and_finds_its_work_in_the_tree() -> None:
    scheduler, sent = scheduler_with()
    first = admit(1, PROMPT, new=12)
    scheduler.handle(first)
    for _ in range(7):
        scheduler.step()
    wanted = expected_tokens(PROMPT, 12)
    delivered = wanted[:2]
    second = attempt(admit(1, PROMPT, new=12, earlier=delivered), 1)
    scheduler.handle(second)
    scheduler.handle(attempt(first, 0))  # late, and harmless
    scheduler.handle(StopSeen([1], [0]))  # of the older attempt
    assert [request.admit.attempt for request in scheduler.requests.values()] == [1]
    run_to_end(scheduler)
    assert sent.tokens[1, 1] == wanted and sent.tokens[1, 0] == wanted[: len(sent.tokens[1, 0])]
    assert sent.cached[1, 1] >= len(PROMPT) - 1
    assert (1, 0) not in sent.finishes


def test_starting_over_forgets_everything_below_a_key() -> None:
    scheduler, sent = scheduler_with(max_running=2)
    for key in (1, 2, 3, 8):
        scheduler.handle(admit(key, [*PROMPT, key], new=12))
    scheduler.step()
    scheduler.step()
    scheduler.handle(StartOver(8, True))
    assert list(scheduler.requests) == [8] and scheduler.generation.paused
    assert sent.others == [StartedOver(8, True, "default")]
    scheduler.handle(StartOver(0, None))
    assert scheduler.generation.paused
    scheduler.handle(StartOver(0, False))
    assert not scheduler.generation.paused
    run_to_end(scheduler)
    assert list(sent.finishes) == [(8, 0)]


def test_an_abort_of_a_waiting_attempt_with_output_flushes_its_text() -> None:
    scheduler, sent = scheduler_with()
    scheduler.handle(attempt(admit(1, PROMPT, new=12, earlier=[3, 4]), 1))
    scheduler.handle(Abort([1]))
    assert sent.tokens == {(1, 1): [3, 4]} and sent.finishes[1, 1].message == "Aborted"


def test_a_full_queue_takes_back_what_was_in_it() -> None:
    scheduler, sent = scheduler_with()
    change_settings(scheduler, max_queued=1)
    for key in range(4):
        scheduler.handle(attempt(admit(key, PROMPT, new=3), 1))
    scheduler.handle(admit(9, PROMPT, new=3))
    assert [message.key for message in sent.others] == [9]
    run_to_end(scheduler)
    assert len(sent.finishes) == 4


@pytest.mark.parametrize("deaths", [1, 2])
def test_suspects_are_computed_alone_at_first(tmp_path: Any, deaths: int) -> None:
    scheduler, sent = scheduler_with()
    heart = Heart(str(tmp_path), "scheduler")
    trials = Trials(scheduler.planner, scheduler.requests, heart.board)
    scheduler.trials = scheduler.steps.trials = scheduler.admission.trials = trials
    seen: list[tuple[int, set[int]]] = []
    run = scheduler.runner.program.run

    def watched(batch: Any, rows: Any) -> Any:
        running = {request.key for request in scheduler.planner.running}
        seen.append((Board(str(tmp_path)).held("scheduler"), running if len(batch.context_lengths) > 1 else set()))
        return run(batch, rows)

    scheduler.runner.program.run = watched  # type: ignore[method-assign]
    for key in range(3):
        scheduler.handle(attempt(admit(key, [*PROMPT[:6], 20 + key], new=20), 1, suspect=deaths))
    scheduler.handle(admit(7, PROMPT, new=20))
    run_to_end(scheduler)
    trials = [key for key, _ in seen if key or key == 0]
    length = 1 if deaths == 1 else LONG_TRIAL
    assert [key for key in trials if key == 1] == [1] * length
    assert [key for key in trials if key == 2] == [2] * length
    assert all(not company for key, company in seen if key)
    assert Board(str(tmp_path)).held("scheduler") == 0
    for key in range(3):
        assert sent.tokens[key, 1] == expected_tokens([*PROMPT[:6], 20 + key], 20)
    assert sent.tokens[7, 0] == expected_tokens(PROMPT, 20)


def test_the_board_has_who_runs_and_not_who_waits(tmp_path: Any) -> None:
    scheduler, sent = scheduler_with(max_running=2)
    heart = Heart(str(tmp_path), "scheduler")
    trials = Trials(scheduler.planner, scheduler.requests, heart.board)
    scheduler.trials = scheduler.steps.trials = scheduler.admission.trials = trials
    board = Board(str(tmp_path))
    seen: set[tuple[int, ...]] = set()
    run = scheduler.runner.program.run

    def watched(batch: Any, rows: Any) -> Any:
        seen.add(tuple(board.take_computed() or ()))
        return run(batch, rows)

    scheduler.runner.program.run = watched  # type: ignore[method-assign]
    for key in range(1, 6):
        scheduler.handle(admit(key, [*PROMPT[:6], 20 + key], new=5))
    run_to_end(scheduler)
    assert len(sent.finishes) == 5 and seen == {(1, 2), (3, 4), (5,)}


def test_one_that_kills_the_planning_of_its_trial_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, _ = scheduler_with()
    heart = Heart(str(tmp_path), "scheduler")
    trials = Trials(scheduler.planner, scheduler.requests, heart.board)
    scheduler.trials = scheduler.steps.trials = scheduler.admission.trials = trials
    scheduler.handle(attempt(admit(4, PROMPT, new=3), 1, suspect=1))

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(scheduler.planner), "plan_alone", dies)
        with pytest.raises(KeyboardInterrupt):
            scheduler.turn()
    assert heart.board.held("scheduler") == 4
    run_to_end(scheduler)
    assert heart.board.held("scheduler") == 0


def test_a_question_that_is_asked_twice_is_done_once() -> None:
    sent: list[Any] = []

    class Out:
        def send(self, message: Any) -> None:
            sent.append(message)

    answers = Answers(Out())
    pause, flush = PauseGeneration(5, "abort"), FlushCache(6, 1.0)
    assert [answers.known(message) for message in (pause, flush, pause, Abort([5]), Abort([5]))] == [
        False, False, True, False, False,
    ]  # fmt: skip
    assert not sent
    answers.send(Paused(5, True))
    answers.send(Flushed(6, True))
    profile = Profile(key=7, action="start", num_steps=5)
    assert [answers.known(profile) for _ in range(2)] == [False, True]
    assert answers.known(pause) and answers.known(flush)
    assert sent == [Paused(5, True), Flushed(6, True)] * 2
