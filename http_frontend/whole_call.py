"""Calls that are answered in one piece: /encode, /classify and the /v1 routes beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from http_frontend.bodies import ClientGoneError, Receive, check_content_type, check_json_only, content_type, read_body
from http_frontend.broken_answers import send_broken
from http_frontend.call import Call, Scope, Send, all_ended, send_json, watch
from http_frontend.deadlines import check_timeout, set_deadline
from http_frontend.errors import RefusedError, error_response
from http_frontend.frontend import Frontend
from http_frontend.items import Desk
from http_frontend.journal import Entry, Request
from http_frontend.metrics import count_body, count_refusal


@dataclass(frozen=True)
class Work:
    """A call as messages, one an item, and what makes its JSON of the ended entries (in the order of the messages).

    timeout: seconds, as its body says.
    """

    messages: Sequence[Request]
    answer: Callable[[list[Entry]], bytes]
    timeout: float | None = None


class WholeCall:
    """The ASGI application of a route.

    plan: body → work; it may raise `RefusedError`. shape: of what is refused as invalid. With D an entry that was
    aborted fails the call, since there is no place in the answer that could say so.
    """

    def __init__(self, frontend: Frontend, plan: Callable[[bytes, Desk], Work], shape: Literal["A", "D"]) -> None:
        self._frontend = frontend
        self._plan = plan
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(receive)
        except ClientGoneError:
            return
        await self._frontend.turnstile.enter()
        count_body(self._frontend.metrics, len(body))
        work: Work | None = None
        check = check_content_type if self._shape == "A" else check_json_only
        try:
            work = self._planned(body, content_type(scope["headers"]), check)
            answer = await self._run(work, receive)
        except RefusedError as refused:
            await error_response(self._shaped(refused))(scope, receive, send)
            return
        except Exception as error:
            rids = [message.rid for message in work.messages] if work else []
            await send_broken(error, rids, scope, receive, send)
            return
        if answer is not None:
            await send_json(send, answer)

    def _planned(self, body: bytes, declared: str, check: Callable[[str, bytes], None]) -> Work:
        """Raises what refuses the call, once it is counted."""
        try:
            self._frontend.check_open()
            check(declared, body)
            return self._plan(body, self._frontend.desk)
        except RefusedError as refused:
            count_refusal(self._frontend.metrics, refused)
            raise

    async def _run(self, work: Work, receive: Receive) -> bytes | None:
        """The answer's body; None when the client has gone."""
        frontend = self._frontend
        check_timeout(work.timeout)
        frontend.check_room(work.messages)
        call = Call(frontend.loop)
        watcher = frontend.loop.create_task(watch(receive, call))
        deadline = set_deadline(call, work.timeout, frontend.run.server, frontend.journal, frontend.loop)
        try:
            call.entries = [Entry(message, call.notify, index=i) for i, message in enumerate(work.messages)]
            frontend.journal.submit(call.entries)
            if not await all_ended(call):
                return None
        finally:
            watcher.cancel()
            if deadline is not None:
                deadline.cancel()
            # Whatever has not ended by now has nobody left to tell.
            frontend.journal.forget(call.entries)
        if self._shape == "D":
            for entry in call.entries:
                if entry.finish is not None and entry.finish.kind == "abort":
                    raise RefusedError("D", f"The request was aborted: {entry.finish.message}", 503)
        return work.answer(call.entries)

    def _shaped(self, refused: RefusedError) -> RefusedError:
        if self._shape == "A" or refused.shape == "C":
            return refused
        return RefusedError("D", refused.message, refused.status)
