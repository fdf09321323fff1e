"""One request in the detokenizer: its text so far, and the stops that may end it (contract §6.3 and §6.4)."""

from __future__ import annotations

import logging

from detokenizer_proc.incremental import SilentStream, Stream, StreamFactory
from detokenizer_proc.stops import PatternTimeoutError, StopPatterns, StopStrings
from engine.config import faults
from engine.wire.failures import internal_error, is_failure
from engine.wire.results import Finish
from engine.wire.to_detokenizer import NO_TOKEN, Opened

logger = logging.getLogger(__name__)


def decoding_failed(rid: str, error: BaseException) -> Finish:
    """How request `rid` ends when its decoding has failed. Raises what is no failure but a call to stop."""
    if not is_failure(error):
        raise error
    return internal_error(logger, "decoding", rid, error)


class RequestText:
    """The state of one request.

    plain: it has no stops, so that a token whose text stands in the table needs nothing else.
    early: it has ended before its first row here (its text could not be restored, or that of its prompt's logprobs);
    the next row says so.
    """

    __slots__ = ("_held", "_no_stop_trim", "_patterns", "_stops", "attempt", "early", "key", "plain", "rid", "stream")

    def __init__(self, opened: Opened, streams: StreamFactory) -> None:
        options = opened.text_options
        self.key = opened.key
        self.rid = opened.rid
        self.attempt = opened.attempt
        self.early: Finish | None = None
        self.stream: Stream = SilentStream()
        self.plain = not options.stop and not options.stop_regex
        self._held = ""
        self._no_stop_trim = options.no_stop_trim
        # A pattern that occurs literally is trimmed like a stop string, so its beginnings are held back as well.
        self._stops: StopStrings | None = None
        self._patterns: StopPatterns | None = None
        try:
            if faults.armed:
                faults.spring("detokenize", opened.prompt_tail + opened.output_ids)
            self.stream = streams.open(
                opened.prompt_tail,
                whole_prompt=len(opened.prompt_tail) >= opened.prompt_tokens,
                skip_special_tokens=options.skip_special_tokens,
            )
            if not self.plain:
                self._stops = StopStrings(options.stop, options.stop_regex)
            if options.stop_regex:
                self._patterns = StopPatterns(options.stop_regex)
            for token in opened.output_ids:
                if self.early is None:
                    _, self.early = self.advance(token, None)
        except BaseException as error:
            self.early = decoding_failed(self.rid, error)

    def advance(self, token: int, finish: Finish | None) -> tuple[str, Finish | None]:
        """Take one row: the new id, and why the scheduler ends the request (None: it goes on).

        Returns the text to be shown now and the reason for its end, which is `finish` unless a stop comes first.
        """
        if self.early is not None:
            return "", self.early
        if faults.armed:
            faults.spring("detokenize", (token,))
        left_out = (
            finish is not None
            and finish.kind == "stop"
            and isinstance(finish.matched, int)
            and not self._no_stop_trim
        )  # fmt: skip
        saved = self.stream.save() if left_out else None
        delta = "" if token == NO_TOKEN else self.stream.feed(token)
        text = self._held + delta
        if self._stops is not None and token != NO_TOKEN:
            stopped = self._stopped(text, delta)
            if stopped is not None:
                return stopped
        if finish is None:
            if self._stops is None:
                return text, None
            cut = self._stops.hold_from(text)
            self._held = text[cut:]
            return text[:cut], None
        if left_out:
            self.stream.restore(saved)
            text = self._held
        return text + self.stream.flush(), finish

    def _stopped(self, text: str, delta: str) -> tuple[str, Finish] | None:
        """The end by a stop string or pattern, if `text` (held back so far, and new) brings one."""
        assert self._stops is not None
        found = self._stops.find(text)
        if found is not None:
            start, end, stop = found
            return text[: end if self._no_stop_trim else start], Finish("stop", matched=stop)
        if self._patterns is None:
            return None
        try:
            pattern = self._patterns.feed(delta)
        except PatternTimeoutError as error:
            return text, Finish("abort", message=str(error), status=400)
        if pattern is None:
            return None
        literal = -1 if self._no_stop_trim or not pattern else text.find(pattern)
        return text if literal < 0 else text[:literal], Finish("stop", matched=pattern)
