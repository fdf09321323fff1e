"""A step of the scheduler → the step's texts. All state of the detokenizer lives here."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from detokenizer_proc.incremental import StreamFactory
from detokenizer_proc.request import RequestText, decoding_failed
from engine.checkpoints.tokenizer import Tokenizer, decode
from engine.config import faults
from engine.config.logs import about
from engine.wire.board import Board
from engine.wire.failures import internal_error
from engine.wire.results import Finish, InputLogprobs, TokenLogprobs
from engine.wire.to_detokenizer import NO_TOKEN, Opened, StepOutput
from engine.wire.to_frontend import Begun, Ended, TextStep

logger = logging.getLogger(__name__)


class StepDecoder:
    """The texts of all requests that run.

    tokenizer: None with --skip-tokenizer-init. board: where the request in hand is noted.
    """

    def __init__(self, tokenizer: Tokenizer | None, board: Board | None = None) -> None:
        self._board = board
        self._tokenizer = tokenizer
        self._streams = StreamFactory(tokenizer)
        self._requests: dict[int, RequestText] = {}
        self._with_texts: set[int] = set()
        self._single: dict[int, str] = {}

    @property
    def num_requests(self) -> int:
        """How many requests have state here."""
        return len(self._requests)

    def forget(self, key: int) -> None:
        """Drop the state of a request that ended elsewhere. Unknown keys are fine."""
        self._requests.pop(key, None)
        self._with_texts.discard(key)

    def forget_before(self, before: int) -> None:
        """Drop the state of every request whose key is below `before`."""
        for key in [key for key in self._requests if key < before]:
            self.forget(key)

    def decode(self, step: StepOutput) -> tuple[TextStep | None, list[int]]:
        """The step with its texts, and the keys that ended here, of which the scheduler does not know yet.

        Rows of requests that are not open (they have ended here) or of an older attempt are left out; None when no
        row is left. Raises ValueError where the columns of the step do not fit together.
        """
        check_columns(step)
        decoded = self._decode(step)
        self._hold(0)
        return decoded

    def _decode(self, step: StepOutput) -> tuple[TextStep | None, list[int]]:
        begun = [self._open(opened) for opened in step.opened]
        texts: list[str] = []
        finished = dict(step.finished)
        ended: list[int] = []
        dropped: set[int] = set()
        requests, attempts, tokens, finishes = self._requests, step.attempts, step.tokens, step.finished
        quick = not faults.armed
        logprob_texts = self._logprob_texts(step) if self._with_texts else {}
        for row, key in enumerate(step.keys):
            request = requests.get(key)
            if request is None or request.attempt != attempts[row]:
                dropped.add(row)
                continue
            finish = finishes.get(row)
            if finish is None and quick and request.plain and request.stream.plain and request.early is None:
                text = request.stream.table.get(tokens[row])
                if text is not None:
                    texts.append(text)
                    continue
            self._hold(key)
            text, reason = _advance(request, tokens[row], finish)
            texts.append(text)
            if reason is not None:
                finished[row] = reason
                if finish is None:
                    ended.append(key)
                del requests[key]
        for row in finished:
            self._with_texts.discard(step.keys[row])
        if len(dropped) == len(step.keys) and not begun:
            return None, ended
        whole = TextStep(
            begun, step.keys, attempts, texts, tokens, finished, step.logprobs, logprob_texts, step.retracted,
            step.weight_version,
        )  # fmt: skip
        return (_without(whole, dropped) if dropped else whole), ended

    def _hold(self, key: int) -> None:
        """What comes next concerns the request `key` alone: should this process die of it, the board has its name."""
        if self._board is not None:
            self._board.hold("detokenizer", key)

    def fail(self, step: StepOutput, error: Exception) -> list[Ended]:
        """End each request that `step`, which cannot be decoded, names and that is open here: what follows would have
        a gap."""
        ended = []
        for opened in step.opened:
            self.forget(opened.key)
            finish = internal_error(logger, "decoding", opened.rid, error)
            ended.append(Ended(opened.key, opened.attempt, finish, "scheduler"))
        for key in dict.fromkeys(step.keys):
            request = self._requests.get(key)
            if request is not None:
                self.forget(key)
                finish = internal_error(logger, "decoding", request.rid, error)
                ended.append(Ended(key, request.attempt, finish, "scheduler"))
        if not ended:
            logger.error(
                "A step of %d rows that concerns nobody here cannot be decoded", len(step.keys), exc_info=error
            )
        return ended

    def _open(self, opened: Opened) -> Begun:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("request %s: first output", opened.rid, extra=about(opened.rid))
        self._hold(opened.key)
        request = self._requests[opened.key] = RequestText(opened, self._streams)
        texts = None
        self._with_texts.discard(opened.key)
        if opened.text_options.text_in_logprobs and self._tokenizer is not None:
            self._with_texts.add(opened.key)
            if opened.input_logprobs is not None:
                texts = self._try_texts(request, _input_ids(opened.input_logprobs))
        return Begun(
            opened.key, opened.attempt, opened.prompt_tokens, opened.cached_tokens, opened.input_logprobs, texts,
            opened.admitted_at,
        )  # fmt: skip

    def _logprob_texts(self, step: StepOutput) -> dict[int, dict[int, str]]:
        """By row. A request whose texts fail has `early` set, and so ends with this step."""
        texts: dict[int, dict[int, str]] = {}
        for row, logprobs in step.logprobs.items():
            request = self._requests.get(step.keys[row])
            if request is None or request.attempt != step.attempts[row] or request.key not in self._with_texts:
                continue
            self._hold(request.key)
            texts[row] = self._try_texts(request, _output_ids(step.tokens[row], logprobs))
        return texts

    def _try_texts(self, request: RequestText, ids: set[int]) -> dict[int, str]:
        try:
            return self._texts_of(ids)
        except BaseException as error:
            request.early = decoding_failed(request.rid, error)
            return {}

    def _texts_of(self, ids: Iterable[int]) -> dict[int, str]:
        """Each id decoded by itself, special tokens shown; nothing for ids out of range."""
        assert self._tokenizer is not None
        texts: dict[int, str] = {}
        for token in ids:
            text = self._single.get(token)
            if text is None:
                known = 0 <= token < self._tokenizer.vocab_size
                text = decode(self._tokenizer, [token], skip_special_tokens=False) if known else ""
                if known:
                    self._single[token] = text
            texts[token] = text
        return texts


def check_columns(step: StepOutput) -> None:
    """Raise ValueError where a step's columns have different lengths, or a row is named that it has not."""
    rows = len(step.keys)
    if not rows == len(step.attempts) == len(step.tokens):
        raise ValueError(
            f"a step has {rows} keys, {len(step.attempts)} attempts and {len(step.tokens)} tokens; must be as many"
        )
    for name, some in (("finished", step.finished), ("logprobs", step.logprobs)):
        wrong = next((row for row in some if not 0 <= row < rows), None)
        if wrong is not None:
            raise ValueError(f"a step's {name} names row {wrong}, not in [0, {rows})")


def _advance(request: RequestText, token: int, finish: Finish | None) -> tuple[str, Finish | None]:
    try:
        return request.advance(token, finish)
    except BaseException as error:
        return "", decoding_failed(request.rid, error)


def _output_ids(token: int, logprobs: TokenLogprobs) -> set[int]:
    ids = {token} - {NO_TOKEN}
    for scored in (logprobs.top, logprobs.ids):
        ids.update(token_id for _, token_id in scored or ())
    return ids


def _input_ids(logprobs: InputLogprobs) -> set[int]:
    ids = {token_id for _, token_id in logprobs.tokens}
    for column in (logprobs.top, logprobs.ids):
        for scored in column or ():
            ids.update(token_id for _, token_id in scored or ())
    return ids


def _without(step: TextStep, dropped: set[int]) -> TextStep:
    """The step without the rows `dropped` (of which `step.texts` has none already)."""
    kept = [row for row in range(len(step.keys)) if row not in dropped]
    number = {row: new for new, row in enumerate(kept)}
    return TextStep(
        step.begun,
        [step.keys[row] for row in kept],
        [step.attempts[row] for row in kept],
        step.texts,
        [step.tokens[row] for row in kept],
        {number[row]: value for row, value in step.finished.items() if row in number},
        {number[row]: value for row, value in step.logprobs.items() if row in number},
        {number[row]: value for row, value in step.logprob_texts.items() if row in number},
        step.retracted,
        step.weight_version,
    )
