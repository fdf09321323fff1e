"""What the tokenizer tells the frontend: that a request is on its way, and the answer to a `/tokenize` call."""

from __future__ import annotations

import logging
import time

from engine.checkpoints.chat_template import ChatTemplateError, render_chat
from engine.checkpoints.tokenizer import Tokenizer, encode
from engine.config.logs import about
from engine.wire.failures import is_failure
from engine.wire.to_frontend import Accepted, Tokenized
from engine.wire.to_tokenizer import Embed, Generate, Tokenize, longest_text

logger = logging.getLogger(__name__)


def accepted(message: Generate | Embed, input_ids: bytes) -> Accepted:
    """That the request is on its way, now."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("request %s accepted: %d tokens", message.rid, len(input_ids) // 4, extra=about(message.rid))
    return Accepted(message.key, message.attempt, input_ids, time.monotonic())


def tokenized(message: Tokenize, tokenizer: Tokenizer | None, context_length: int) -> Tokenized:
    """Encode each prompt, or the messages as the chat template renders them (one list of ids).

    Whatever fails is told in `error`. A tokenizer without a limit of its own has the server's context length.
    """
    if tokenizer is None:
        return Tokenized(message.key, [], -1, "this server has no tokenizer (--skip-tokenizer-init)")
    limit = tokenizer.model_max_length or context_length
    try:
        return Tokenized(message.key, _ids(message, tokenizer, longest_text(context_length)), limit, None)
    except ChatTemplateError as error:
        return Tokenized(message.key, [], limit, str(error))
    except BaseException as error:
        if not is_failure(error):
            raise
        logger.exception("/tokenize failed")
        return Tokenized(message.key, [], limit, f"{type(error).__name__}: {error}")


def _ids(message: Tokenize, tokenizer: Tokenizer, longest: int) -> list[list[int]]:
    """longest: characters of messages that are rendered; the frontend bounds those of prompts."""
    if message.messages is None:
        return [encode(tokenizer, prompt, message.add_special_tokens) for prompt in message.prompts or []]
    text = render_chat(
        tokenizer,
        message.messages,
        add_generation_prompt=message.add_generation_prompt,
        continue_final_message=message.continue_final_message,
        tools=message.tools,
        template_kwargs=message.template_kwargs,
    )
    if len(text) > longest:
        raise ChatTemplateError(f"the messages make a text of {len(text)} characters; at most {longest}")
    return [encode(tokenizer, text, add_special_tokens=False)]
