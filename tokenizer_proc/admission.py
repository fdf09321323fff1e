"""One request: its prompt as ids, checked and sent on, or refused."""

from __future__ import annotations

import logging
from array import array

from engine.checkpoints.tokenizer import Tokenizer, encode
from engine.config import faults
from engine.config.logs import about
from engine.wire.failures import internal_error, is_failure
from engine.wire.results import Finish
from engine.wire.to_frontend import Accepted, Ended
from engine.wire.to_scheduler import Admit
from engine.wire.to_tokenizer import Embed, Generate, Judge
from tokenizer_proc.embedding import admit_embed
from tokenizer_proc.judging import question
from tokenizer_proc.long_texts import within_reach
from tokenizer_proc.prompt_ids import need, pack, unpack
from tokenizer_proc.replies import accepted
from tokenizer_proc.validation import (
    Bounds,
    RefusalError,
    cap_lengths,
    check_grammar,
    check_ids,
    check_logprobs,
    check_sampling,
    check_stops,
    fit_context,
)

logger = logging.getLogger(__name__)


def admit(
    message: Generate | Embed | Judge, tokenizer: Tokenizer | None, bounds: Bounds
) -> tuple[Accepted, Admit] | Ended:
    """What to send to the frontend and the scheduler, or to the frontend alone when the request is refused.

    Never raises: an unexpected failure, a panic of the tokenizer among them, ends this request with status 500, and
    the log has the traceback.
    """
    try:
        match message:
            case Generate():
                return _admit(message, tokenizer, bounds)
            case Embed():
                return admit_embed(message, tokenizer, bounds)
            case Judge():
                return _admit(question(message, tokenizer, bounds), tokenizer, bounds)
    except RefusalError as refusal:
        finish = Finish("abort", message=str(refusal), status=400)
        return Ended(message.key, message.attempt, finish, refusal.origin)
    except BaseException as error:
        if not is_failure(error):
            raise
        finish = internal_error(logger, "admitting", message.rid, error)
        return Ended(message.key, message.attempt, finish, "scheduler")


def _admit(message: Generate, tokenizer: Tokenizer | None, bounds: Bounds) -> tuple[Accepted, Admit]:
    ids = _prompt_ids(message, tokenizer, bounds)
    if faults.armed:
        faults.spring("tokenize", ids)
    check_ids(ids, bounds.vocab_size)
    kept, sampling, cuts = fit_context(len(ids), message.sampling, bounds)
    check_sampling(sampling, bounds.vocab_size)
    check_grammar(sampling.grammar, bounds)
    check_stops(message.text_options, sampling, bounds.has_tokenizer)
    if message.logprobs is not None:
        room = max(0, bounds.context_length - kept)
        wanted = room if sampling.max_new_tokens is None else sampling.max_new_tokens
        check_logprobs(message.logprobs, kept, min(wanted, room), bounds.vocab_size)
    for cut in cuts:
        logger.warning(
            "request %s does not fit the context of %d tokens: %s", message.rid, bounds.context_length, cut,
            extra=about(message.rid),
        )  # fmt: skip
    packed = pack(ids[:kept] if kept < len(ids) else ids)
    admitted = Admit(
        key=message.key,
        attempt=message.attempt,
        rid=message.rid,
        input_ids=packed,
        output_ids=message.output_ids,
        sampling=cap_lengths(sampling, bounds.max_new_tokens_limit),
        text_options=message.text_options,
        logprobs=message.logprobs,
        extra_key=message.extra_key,
        priority=message.priority,
        suspect=message.suspect,
        probe=message.probe,
    )
    return accepted(message, packed), admitted


def _prompt_ids(message: Generate, tokenizer: Tokenizer | None, bounds: Bounds) -> array[int]:
    if message.input_ids is not None:
        return unpack(message.input_ids)
    tokenizer = need(tokenizer)
    return array("i", encode(tokenizer, within_reach(tokenizer, message.text or "", bounds)))
