"""Signs of life: probes of one token or one vector through the whole ring, and the warm-up (contract §1.1, §3.3)."""

from __future__ import annotations

import asyncio
import math
import uuid
from array import array

from engine.config.environment import number
from engine.wire.sampling import Sampling, TextOptions
from engine.wire.to_tokenizer import Embed, Generate
from http_frontend.journal import Entry
from http_frontend.ring import Ring

FRESH = 0.3
"""Seconds for which a sign of life stands."""
SHORT = 0.08
"""Seconds that a check waits at any load: whoever checks health wants to hear in a tenth of a second."""
_PROBE_SECONDS = 1.0
"""Seconds that the probe gets before the scheduler is asked as well: many who check health wait only a few."""
_WARM_UP_TOKENS = 8
_WARM_UP_SECONDS = 600.0


class WarmUpError(RuntimeError):
    """The warm-up request was refused, failed or took too long."""


class Pulse:
    """The scheduler's signs of life. However many ask at once, one probe and one question at most are on the ring.

    Of a server that has nothing to do, the probe is the proof, and a check waits for it. While it has, its ordinary
    messages are, and a question that the scheduler answers between two steps. A step may be long, so that the scheduler
    is believed to be alive until its silence has lasted for as long as a check may take.
    """

    def __init__(self, ring: Ring, loop: asyncio.AbstractEventLoop, *, generates: bool) -> None:
        self._ring = ring
        self._loop = loop
        self._generates = generates
        self._next_beat: asyncio.Future[None] | None = None
        self._probing = False
        self._asked_at = -math.inf
        self._heard_at = -math.inf
        self._silent_since: float | None = None

    def beat(self) -> None:
        """A message of the scheduler has come."""
        self._asked_at = -math.inf
        self._heard_at = self._loop.time()
        self.wake()

    def wake(self) -> None:
        """Have whoever waits for a sign of life look again."""
        self._silent_since = None
        if self._next_beat is not None:
            self._next_beat.set_result(None)
            self._next_beat = None

    async def felt_within(self, seconds: float, *, probe: bool = True) -> bool:
        """Whether there is a sign of life, new or to come. Without `probe` the scheduler computes nothing for now."""
        now = self._loop.time()
        if now - self._heard_at < FRESH:
            return True
        if self._silent_since is None:
            self._silent_since = now
        if self._next_beat is None:
            self._next_beat = self._loop.create_future()
        beat, deadline = self._next_beat, self._silent_since + seconds
        brief = len(self._ring.journal) > 0 or now >= deadline
        if probe and not brief:
            self._probe()
            if await _done(beat, min(_PROBE_SECONDS, seconds / 2)):
                return True
        # Behind a long prompt a probe has to wait, and chunks of a prompt that are not its last make no message. A
        # scheduler that is busy with these still answers a question between two steps.
        if self._loop.time() - self._asked_at >= seconds:
            self._asked_at = self._loop.time()
            self._ring.nudge()
        if brief:
            return await _done(beat, SHORT) or self._loop.time() < deadline
        return await _done(beat, deadline - self._loop.time())

    def _probe(self) -> None:
        if not self._probing:
            self._probing = True
            message = probe_message(self._ring.next_key(), "HEALTH_CHECK", None, 1 if self._generates else None)
            self._ring.journal.submit([Entry(message, self._probed, probe=True)])

    def _probed(self, _entry: Entry) -> None:
        self._probing = False


async def _done(beat: asyncio.Future[None], seconds: float) -> bool:
    done, _ = await asyncio.wait({beat}, timeout=max(seconds, 0.0))
    return bool(done)


def probe_message(key: int, kind: str, text: str | None, max_new_tokens: int | None) -> Generate | Embed:
    """A greedy request of the server's own, for `text` or for the ids [0]; its rid starts with `kind`.

    max_new_tokens: None for a model that answers with a vector.
    """
    rid = f"{kind}_{uuid.uuid4().hex}"
    input_ids = array("i", [0]).tobytes() if text is None else None
    if max_new_tokens is None:
        return Embed(key=key, attempt=0, rid=rid, text=text, pair=None, input_ids=input_ids, probe=True)
    return Generate(
        key=key,
        attempt=0,
        rid=rid,
        text=text,
        input_ids=input_ids,
        output_ids=b"",
        sampling=Sampling(max_new_tokens=max_new_tokens, temperature=0.0),
        text_options=TextOptions(),
        logprobs=None,
        probe=True,
    )


async def warm_up(ring: Ring, loop: asyncio.AbstractEventLoop, *, with_text: bool, generates: bool) -> None:
    """Run one request of 8 tokens, or for one vector, through the ring. Raises `WarmUpError`."""
    ended: asyncio.Future[None] = loop.create_future()

    def notify(_entry: Entry) -> None:
        if not ended.done():
            ended.set_result(None)

    text = "The capital city of France is" if with_text else None
    message = probe_message(ring.next_key(), "WARM_UP", text, _WARM_UP_TOKENS if generates else None)
    entry = Entry(message, notify, probe=True)
    ring.journal.submit([entry])
    given = number("WARMUP_TIMEOUT", -1)
    seconds = given if given > 0 else _WARM_UP_SECONDS
    try:
        async with asyncio.timeout(seconds):
            await ended
    except TimeoutError:
        raise WarmUpError(f"the warm-up request has not ended within {seconds:g} s") from None
    if entry.finish is None or entry.finish.kind == "abort":
        raise WarmUpError(f"the warm-up request failed: {entry.finish}")
