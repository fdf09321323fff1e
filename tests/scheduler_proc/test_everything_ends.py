"""Whatever comes together (deaths, trials, weight updates, pauses, aborts, a full pool), everything ends."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from lives import Lives
from simulation import expected_tokens

from engine.wire.to_scheduler import FlushCache
from engine.wire.weights import ContinueGeneration, PauseGeneration, UpdateWeights

MOST_TURNS = 6_000
IN_FLIGHT = 10


def finish_all(lives: Lives) -> None:
    """Take turns until nothing is left to do, and look at all that has come."""
    lives.ask(ContinueGeneration)
    for _ in range(MOST_TURNS):
        if not (lives.inbox or lives.asked or any(entry.finish is None for entry in lives.entries.values())):
            break
        lives.turn()
    else:
        raise AssertionError(f"no progress: {lives.waits_for()}")
    lives.scheduler.idle()
    for entry in lives.entries.values():
        prompt = list(memoryview(entry.message.input_ids).cast("i"))
        wanted = expected_tokens(prompt, entry.message.sampling.max_new_tokens or 0)
        assert entry.finish is not None and entry.finish.status is None, entry
        assert entry.output == (wanted[: len(entry.output)] if entry.finish.kind == "abort" else wanted)
    lives.entries.clear()


def prompt(key: int, size: int) -> list[int]:
    return [1 + (7 * key + i) % 48 for i in range(size)]


def begun_and_fresh(pool: int, places: int) -> tuple[Lives, list[int]]:
    """Three suspects at their second death; all but the second have made something, and an update waits for these."""
    lives = Lives(pool, {"priorities": True, "max_running": 2, "prefill_budget": 16, "chunked": True})
    keys = [lives.request(prompt(i, size), new, urgent) for i, size, new, urgent in ((1, 5, 12, 5), (2, 20, 20, 0))]
    keys.append(lives.request(prompt(3, 9), 30, 5))
    lives.turn()
    lives.limits["max_running"] = places
    lives.die(suspect=True, lost=False)
    lives.die(suspect=True, lost=False)
    assert [len(lives.entries[key].output) for key in keys] == [1, 0, 1]
    lives.ask(UpdateWeights, model_path="elsewhere")
    return lives, keys


@pytest.mark.parametrize("places", [1, 4])
def test_a_suspect_that_may_not_begin_yet_does_not_hold_up_those_that_the_update_waits_for(places: int) -> None:
    lives, (first, second, third) = begun_and_fresh(200, places)
    ends: list[Any] = []
    for _ in range(100):
        lives.turn()
        ends += [key for key in (first, third) if lives.entries[key].finish and key not in ends]
        if not lives.asked and "update" not in ends:
            ends.append("update")
            assert not lives.entries[second].output
    assert ends == [first, third, "update"]
    finish_all(lives)


@pytest.mark.parametrize(("pool", "places"), [(200, 1), (48, 4)])
def test_a_trial_that_has_begun_goes_on_before_another_begins(pool: int, places: int) -> None:
    """An update that has taken place in a pause lets the second begin, for which the third leaves no place."""
    lives, (_, second, third) = begun_and_fresh(pool, places)
    while len(lives.entries[third].output) < 3:
        lives.turn()
    lives.ask(PauseGeneration, mode="in_place")
    while lives.asked:
        lives.turn()
    assert not lives.entries[second].output and lives.scheduler.planner.running
    finish_all(lives)


class EverythingEnds(RuleBasedStateMachine):
    """Requests come, processes die, and operators do what they please; nobody is forgotten."""

    lives: Lives

    @initialize(
        pool=st.sampled_from([45, 60, 90, 300]),
        places=st.integers(1, 5),
        budget=st.sampled_from([4, 16, 64]),
        flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        at_once=st.sampled_from([1, 3, 100]),
    )
    def be_born(self, pool: int, places: int, budget: int, flags: tuple[bool, bool, bool], at_once: int) -> None:
        chunked, lpm, priorities = flags
        limits = {"max_running": places, "prefill_budget": budget, "chunked": chunked, "longest_prefix_first": lpm}
        self.lives = Lives(pool, limits | {"priorities": priorities}, at_once=at_once)

    @property
    def in_flight(self) -> list[int]:
        return [key for key, entry in self.lives.entries.items() if entry.finish is None]

    @precondition(lambda self: len(self.in_flight) < IN_FLIGHT)
    @rule(
        start=st.integers(0, 3),
        size=st.sampled_from([1, 5, 20]),
        new=st.sampled_from([0, 1, 6, 20]),
        priority=st.integers(0, 1),
        count=st.integers(1, 3),
    )
    def ask(self, start: int, size: int, new: int, priority: int, count: int) -> None:
        for number in range(count):
            self.lives.request(prompt(start + number, size), new, priority)

    @rule(count=st.sampled_from([1, 1, 2, 5, 20]))
    def turn(self, count: int) -> None:
        for _ in range(count):
            self.lives.turn()

    @rule()
    def update(self) -> None:
        self.lives.ask(UpdateWeights, model_path="elsewhere")

    @rule(turns=st.integers(1, 30), mode=st.sampled_from(["retract", "in_place"]))
    def update_in_a_pause(self, turns: int, mode: str) -> None:
        """One that waits at first for what runs."""
        self.update()
        self.turn(turns)
        self.pause(mode)
        self.turn(3)
        self.go_on()
        self.turn(1)

    @rule(mode=st.sampled_from(["abort", "retract", "in_place"]))
    def pause(self, mode: str) -> None:
        self.lives.ask(PauseGeneration, mode=mode)

    @rule()
    def go_on(self) -> None:
        self.lives.ask(ContinueGeneration)

    @rule(timeout=st.sampled_from([0.0, 1e9]))
    def flush(self, timeout: float) -> None:
        self.lives.ask(FlushCache, timeout=timeout)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.lives.abort(data.draw(st.lists(st.sampled_from(self.in_flight), min_size=1, max_size=3, unique=True)))

    @precondition(lambda self: self.in_flight)
    @rule()
    def abort_all(self) -> None:
        self.lives.abort(self.in_flight)

    @rule(suspect=st.sampled_from([True, True, False]), lost=st.booleans(), again=st.booleans())
    def die(self, suspect: bool, lost: bool, again: bool) -> None:
        self.lives.die(suspect=suspect, lost=lost)
        if again:
            self.lives.die(suspect=suspect, lost=lost)

    @rule(before=st.integers(1, 3), turns=st.integers(1, 30))
    def die_in_an_update(self, before: int, turns: int) -> None:
        """Which waits for those on trial that have begun, while others that have not may not begin."""
        self.ask(0, 5, 20, 0, before)
        self.ask(before, 5, 20, 1, 2)
        self.turn(2)
        self.die(suspect=True, lost=False, again=True)
        self.update()
        self.turn(turns)

    @rule()
    def start_over(self) -> None:
        self.lives.start_over()

    @precondition(lambda self: self.lives.limits["chunked"])
    @rule(room=st.sampled_from([1, 3, 8, 10**9]))
    def have_memory(self, room: int) -> None:
        self.lives.model.room = room

    @rule()
    def finish(self) -> None:
        finish_all(self.lives)

    def teardown(self) -> None:
        if hasattr(self, "lives"):
            finish_all(self.lives)


class TestEverythingEnds(EverythingEnds.TestCase):  # type: ignore[misc]
    settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
