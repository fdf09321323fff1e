"""The answer to a `/detokenize` call."""

from __future__ import annotations

import logging

from engine.checkpoints.tokenizer import Tokenizer, decode
from engine.wire.failures import is_failure
from engine.wire.to_detokenizer import Detokenize
from engine.wire.to_frontend import Detokenized

logger = logging.getLogger(__name__)


def detokenized(message: Detokenize, tokenizer: Tokenizer | None, vocab_size: int) -> Detokenized:
    """Decode each list of ids. An id outside [0, vocab_size) is an error, as is a server without a tokenizer."""
    if tokenizer is None:
        return Detokenized(message.key, [], "this server has no tokenizer (--skip-tokenizer-init)")
    wrong = next((token for ids in message.ids for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        error = f"token id {wrong} is out of vocabulary, valid range is [0, {vocab_size})"
        return Detokenized(message.key, [], error, bad_ids=True)
    try:
        texts = [decode(tokenizer, ids, message.skip_special_tokens) for ids in message.ids]
    except BaseException as error:
        if not is_failure(error):
            raise
        logger.exception("/detokenize failed")
        return Detokenized(message.key, [], f"{type(error).__name__}: {error}")
    return Detokenized(message.key, texts, None)
