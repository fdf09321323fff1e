"""Stop strings and stop patterns, looked for in a request's output as it grows."""

from __future__ import annotations

import time

import regex

PATTERN_SECONDS = 0.05
"""Most CPU time (which is what the regex package's own timeout counts) that one token's search for the patterns of one
request may take: the process serves everyone else too."""
BUDGET_SECONDS, BUDGET_PER_TOKEN = 0.5, 0.001
"""Most CPU time that all searches for the patterns of one request may take: so much, and so much more for each token.
Usual patterns take some 0.01 ms a token."""


class StopStrings:
    """The stop strings of one request. All methods are about a text whose earlier part has been shown already, so that
    only an occurrence that begins in `text` can still come.

    also_held: strings that do not stop, but whose beginnings are held back too.
    """

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: list[str], also_held: list[str]) -> None:
        self._stops = stops
        self._held = [word for word in (*stops, *also_held) if len(word) > 1]

    def find(self, text: str) -> tuple[int, int, str] | None:
        """The occurrence that ends first (the longest of those), as (start, end, stop string).

        The one that ends first would have been seen first had each character been a token, so the answer does not
        depend on how the text was cut into tokens.
        """
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop) if best is None else text.find(stop, 0, best[1])
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or end < best[1] or start < best[0]:
                best = start, end, stop
        return best

    def hold_from(self, text: str) -> int:
        """Where the longest end of `text` begins that could be the beginning of a stop string; its length if none."""
        size = first = len(text)
        for word in self._held:
            at = text.find(word[0], max(0, size - len(word) + 1), first)
            while at >= 0:
                if word.startswith(text[at:]):
                    first = at
                    break
                at = text.find(word[0], at + 1, first)
        return first


class PatternTimeoutError(Exception):
    """A pattern whose search took too long: for one token's text, or in all."""

    def __init__(self, pattern: str, searching: str, seconds: float) -> None:
        super().__init__(
            f"stop_regex {pattern!r} was given up: searching {searching} took over {seconds * 1000:.0f} ms"
        )


class StopPatterns:
    """The stop patterns of one request, searched in its whole output after each token.

    `_from` is where each pattern's next search begins: before it, no match can begin any more, however the text goes
    on (a partial match, which the regex package reports, is one that could). `_spent`: CPU seconds of each pattern's
    searches, in all; `_tokens`: how many have brought text.
    """

    __slots__ = ("_compiled", "_from", "_spent", "_text", "_tokens")

    def __init__(self, patterns: list[str]) -> None:
        self._compiled = [regex.compile(pattern) for pattern in patterns]
        self._from = [0] * len(patterns)
        self._spent = [0.0] * len(patterns)
        self._text = ""
        self._tokens = 0

    def feed(self, delta: str) -> str | None:
        """Append `delta`; the first pattern, in the request's order, that now matches. Raises PatternTimeoutError."""
        if not delta and self._text:
            return None
        self._text += delta
        self._tokens += 1
        began = time.process_time()
        deadline = began + PATTERN_SECONDS
        for number, compiled in enumerate(self._compiled):
            try:
                if compiled.search(self._text, self._from[number], timeout=_left(deadline)):
                    return str(compiled.pattern)
                begun = compiled.search(self._text, self._from[number], partial=True, timeout=_left(deadline))
            except TimeoutError:
                raise PatternTimeoutError(compiled.pattern, "one token's text", PATTERN_SECONDS) from None
            self._from[number] = begun.start() if begun else len(self._text)
            ended = time.process_time()
            self._spent[number] += ended - began
            began = ended
        budget = BUDGET_SECONDS + self._tokens * BUDGET_PER_TOKEN
        if sum(self._spent) > budget:
            slowest = self._compiled[self._spent.index(max(self._spent))].pattern
            raise PatternTimeoutError(slowest, f"the texts of {self._tokens} tokens for all patterns", budget)
        return None


def _left(deadline: float) -> float:
    return max(deadline - time.process_time(), 1e-6)
