"""One `Embed`: its text, or pair of texts, as ids and segments."""

from __future__ import annotations

import logging
from array import array

from engine.checkpoints.tokenizer import Tokenizer, encode_pair
from engine.config import faults
from engine.wire.sampling import Sampling, TextOptions
from engine.wire.to_frontend import Accepted
from engine.wire.to_scheduler import Admit, VectorOptions
from engine.wire.to_tokenizer import Embed
from tokenizer_proc.long_texts import within_reach
from tokenizer_proc.prompt_ids import need, pack, unpack
from tokenizer_proc.replies import accepted
from tokenizer_proc.validation import Bounds, RefusalError, check_ids, too_long

logger = logging.getLogger(__name__)


def admit_embed(message: Embed, tokenizer: Tokenizer | None, bounds: Bounds) -> tuple[Accepted, Admit]:
    """What to send to the frontend and the scheduler. Raises RefusalError."""
    ids, segments = _prompt(message, tokenizer, bounds)
    if faults.armed:
        faults.spring("tokenize", ids)
    check_ids(ids, bounds.vocab_size)
    packed = pack(ids)
    admitted = Admit(
        key=message.key,
        attempt=message.attempt,
        rid=message.rid,
        input_ids=packed,
        output_ids=b"",
        sampling=Sampling(max_new_tokens=0),
        text_options=TextOptions(),
        logprobs=None,
        extra_key=None,
        priority=message.priority,
        suspect=message.suspect,
        probe=message.probe,
        vector=VectorOptions(
            type_ids=_told_apart(segments, bounds.segments),
            dimensions=message.dimensions,
            with_hidden=message.with_hidden,
        ),
    )
    return accepted(message, packed), admitted


def _told_apart(segments: bytes, kinds: int) -> bytes:
    """The segments as far as the model tells any apart; empty where all are 0. Raises RefusalError."""
    if kinds < 2 or not any(segments):
        return b""
    if max(segments) >= kinds:
        raise RefusalError(f"the tokenizer names segment {max(segments)}; valid range for this model is [0, {kinds}).")
    return segments


def _prompt(message: Embed, tokenizer: Tokenizer | None, bounds: Bounds) -> tuple[array[int], bytes]:
    """Ids and segments (uint8) of the prompt, which may fill the context: no token will follow it.

    Where a prompt may be cut, a text is cut so that the special tokens behind it stay.
    """
    most = bounds.context_length
    if message.input_ids is not None:
        ids, segments = unpack(message.input_ids), b""
        size = len(ids)
        ids = ids[:most]
    else:
        tokenizer = need(tokenizer)
        text = within_reach(tokenizer, message.text or "", bounds)
        pair = None if message.pair is None else within_reach(tokenizer, message.pair, bounds)
        try:
            listed, segments = encode_pair(tokenizer, text, pair)
            size = len(listed)
            if size > most and bounds.auto_truncate:
                listed, segments = encode_pair(tokenizer, text, pair, max_length=most)
        except Exception as error:  # the package raises bare Exception
            raise RefusalError(f"the text cannot be tokenized: {error}") from error
        ids = array("i", listed)
    if size > most:
        if not bounds.auto_truncate:
            raise too_long(size, most)
        logger.warning("request %s: the prompt was cut from %d to %d tokens", message.rid, size, most)
    return ids, segments
