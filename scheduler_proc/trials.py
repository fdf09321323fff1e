"""Trials: who was in flight when the scheduler died is computed alone before it joins the others again.

The key of the request on trial stands on the board while its step is planned and computed. Should the process die of
it, the launcher finds the key there, and only the culprit is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.wire.board import Board
from scheduler_proc.planner import Extend, Planner
from scheduler_proc.request import Request

LONG_TRIAL = 8
"""Tokens that a request makes alone when it was in flight at more than one death: what kills a step may lie behind
tokens that had not left the dead process yet."""
IN_A_ROW = 16
"""After so many steps of suspects the others get one."""


@dataclass(slots=True)
class Trials:
    """board: None where nobody would read it. suspects: whose trial has not ended, in order of arrival."""

    planner: Planner
    requests: Mapping[int, Request]
    board: Board | None = None
    suspects: list[Request] = field(default_factory=list)
    _in_a_row: int = 0
    _current: Request | None = None
    _made: int = 0

    def enter(self, request: Request) -> None:
        """Note a new request, if it is suspect."""
        deaths = request.admit.suspect
        if deaths:
            request.trial = 1 if deaths == 1 else LONG_TRIAL
            self.suspects.append(request)

    def plan(self, plan: list[Extend], hopeless: list[Request]) -> None:
        """Plan the next step, as `Planner.plan`: of one suspect, or of all who are none. The board has who runs then,
        should the process die of the step."""
        self._plan(plan, hopeless)
        if self.board is not None:
            self.board.note_computed([request.key for request in self.planner.running])

    def _plan(self, plan: list[Extend], hopeless: list[Request]) -> None:
        if not self.suspects:
            self.planner.plan(plan, hopeless)
            return
        self.suspects = [r for r in self.suspects if r.trial and self.requests.get(r.key) is r]
        suspect = self._next()
        if suspect is not None and self._in_a_row < IN_A_ROW:
            self._hold(suspect.key)
            self.planner.plan_alone(suspect, plan, hopeless)
            if plan:
                self._current, self._made = suspect, suspect.generated
            else:
                self._hold(0)
            if plan or hopeless:
                self._in_a_row += 1
                return
        self._in_a_row = 0
        self.planner.plan(plan, hopeless)

    def _next(self) -> Request | None:
        """Whose trial goes on, or begins. One that runs goes on first: it holds a place and slots, which another one
        might wait for. One that may not begin before a weight update does not stand before those that this waits for,
        and one whose grammar is not compiled yet before nobody.
        """
        able = [r for r in self.suspects if not r.awaits_grammar and (r.begun or not self.planner.hold)]
        return next((request for request in self.planner.running if request.trial), able[0] if able else None)

    def end_step(self) -> None:
        """The step that was planned last is over."""
        if self._current is None:
            return
        self._hold(0)
        if self._current.generated > self._made:
            self._current.trial -= 1
        self._current = None

    def _hold(self, key: int) -> None:
        if self.board is not None:
            self.board.hold("scheduler", key)
