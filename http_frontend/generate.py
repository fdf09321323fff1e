"""POST|PUT /generate: from the body to the last byte of the answer (contract §5 and §7).

Written as plain ASGI: a stream sends tens of chunks a second, each of which should cost as little as it can.
"""

from __future__ import annotations

from http_frontend.answers import DONE, AnswerStyle, Writer, refused_event
from http_frontend.bodies import (
    GENERATE,
    NOT_JSON,
    ClientGoneError,
    GenerateBody,
    Message,
    Receive,
    check_content_type,
    content_type,
    find_wide_integer,
    forget_inputs,
    read_body,
)
from http_frontend.broken_answers import end_broken, send_broken
from http_frontend.call import BARE_SEND, Call, Scope, Send, all_ended, send_json, send_last, watch
from http_frontend.deadlines import check_timeout, set_deadline
from http_frontend.diagnosis import diagnose
from http_frontend.errors import RefusedError, error_response, unreadable
from http_frontend.frontend import Frontend
from http_frontend.items import Plan, plan_call
from http_frontend.journal import NEVER, Entry, Journal, nothing_to_do
from http_frontend.metrics import count_body, count_refusal

_STREAM_START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")],
}


def read_generate(body: bytes, declared: str) -> GenerateBody:
    """The typed body of a call; `declared` is its Content-Type. Raises `RefusedError` of shape B or C."""
    check_content_type(declared, body)
    try:
        decoded = GENERATE.decode(body)
        wide = find_wide_integer(body)
    except NOT_JSON as error:
        raise diagnose(body, error) from None
    if wide is not None:
        raise unreadable(f"JSON decode error: the body contains non-int64 element {wide}")
    return decoded


class GenerateEndpoint:
    """The ASGI application of /generate."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(receive)
        except ClientGoneError:
            return
        await self._frontend.turnstile.enter()
        count_body(self._frontend.metrics, len(body))
        try:
            self._frontend.check_open()
            request = read_generate(body, content_type(scope["headers"]))
        except RefusedError as refused:
            count_refusal(self._frontend.metrics, refused)
            await error_response(refused)(scope, receive, send)
            return
        try:
            self._frontend.check_any_room()
            check_timeout(request.timeout)
            plan = plan_call(request, self._frontend.desk)
            self._frontend.check_room([item.generate for item in plan.items])
        except RefusedError as refused:
            await self._refuse(refused, request, scope, receive, send)
            return
        forget_inputs(request)
        del body
        await self._run(plan, request, scope, receive, send)

    async def _refuse(
        self, refused: RefusedError, request: GenerateBody, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Shapes B and C are plain answers; the rest is told a stream as an event (§7.5)."""
        count_refusal(self._frontend.metrics, refused)
        if not request.stream or refused.shape == "C":
            await error_response(refused)(scope, receive, send)
            return
        rid = request.rid if isinstance(request.rid, str) else ""
        await send(_STREAM_START)
        await send_last(send, refused_event(refused, rid, self._style(request, False)) + DONE)

    def _style(self, request: GenerateBody, many: bool) -> AnswerStyle:
        server = self._frontend.run.server
        return AnswerStyle(
            with_text=not server.skip_tokenizer_init,
            with_prompt=request.return_prompt_token_ids,
            incremental=request.stream and server.incremental_streaming_output,
            indexed=request.stream and many,
            weight_version=self._frontend.weight_version,
            with_timeline=request.return_timeline,
            with_timings=server.enable_metrics,
        )

    async def _run(self, plan: Plan, request: GenerateBody, scope: Scope, receive: Receive, send: Send) -> None:
        frontend = self._frontend
        call = Call(frontend.loop)
        style = self._style(request, plan.many)
        bare_send = scope.get(BARE_SEND, send)
        begun = False
        watcher = frontend.loop.create_task(watch(receive, call))
        deadline = set_deadline(call, request.timeout, frontend.run.server, frontend.journal, frontend.loop)
        try:
            start_call(call, plan, request.stream, frontend.journal, quiet=request.no_logs)
            if request.stream:
                await send(_STREAM_START)
                begun = True
                # Only the start of an answer concerns the middleware, and each of its layers costs a coroutine a chunk.
                await _stream(call, plan, style, bare_send)
            else:
                await _answer(call, plan, style, scope, receive, send)
        except RefusedError:
            raise  # answered as such by the application
        except Exception as error:
            rids = [item.generate.rid for item in plan.items]
            if begun:
                await end_broken(error, rids, style, bare_send)
            else:
                await send_broken(error, rids, scope, receive, send)
        finally:
            watcher.cancel()
            if deadline is not None:
                deadline.cancel()
            # Whatever has not ended by now has nobody left to tell.
            frontend.journal.forget(call.warmers + call.entries)


def start_call(call: Call, plan: Plan, stream: bool, journal: Journal, *, quiet: bool = False) -> None:
    """Put the plan's items into the journal: at once, or for n > 1 behind the request that computes their prompt.

    quiet: they are not to be logged.
    """
    due = 1 if stream else NEVER
    call.entries = [
        Entry(item.generate, call.notify, due=due, index=index, asked_rid=item.asked_rid)
        for index, item in enumerate(plan.items)
    ]
    for entry in call.entries if quiet else ():
        entry.quiet = True
    if not plan.warmers:
        journal.submit(call.entries)
        return
    for i, generate in enumerate(plan.warmers):
        warmer = Entry(generate, nothing_to_do, asked_rid=plan.items[i * plan.n].asked_rid)
        warmer.followers = call.entries[i * plan.n : (i + 1) * plan.n]
        call.warmers.append(warmer)
    journal.enter(call.entries)
    journal.submit(call.warmers)


async def _stream(call: Call, plan: Plan, style: AnswerStyle, send: Send) -> None:
    """Send a chunk for each entry with news; `send` waits while the client is slow, and news pile up as one."""
    writers = [Writer(entry, style) for entry in call.entries]
    left = len(writers)
    while left:
        entries = call.news()
        if call.gone:
            return
        if not entries:
            await call.rest()
            continue
        events = []
        for entry in entries:
            events.append(writers[entry.index].event())
            if entry.finish is None:
                entry.due = len(entry.output_ids) + plan.items[entry.index].stream_interval
            else:
                left -= 1
        if left:
            body = events[0] if len(events) == 1 else b"".join(events)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        else:
            events.append(DONE)
            await send_last(send, b"".join(events))
            return
    await send_last(send, DONE)


async def _answer(call: Call, plan: Plan, style: AnswerStyle, scope: Scope, receive: Receive, send: Send) -> None:
    """Wait for all entries, or for the first that fails the call, and send one JSON body."""
    try:
        if not await all_ended(call):
            return
    except RefusedError as refused:
        await error_response(refused)(scope, receive, send)
        return
    objects = [Writer(entry, style).write() for entry in call.entries]
    await send_json(send, b"[%b]" % b",".join(objects) if plan.many else objects[0])
