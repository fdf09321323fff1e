"""Texts that are far too long, which is seen from their beginning.

To tokenize a character takes up to ten microseconds and hundreds of bytes, and everybody's requests pass here one by
one: a body full of text would hold them up for minutes.
"""

from __future__ import annotations

from engine.checkpoints.tokenizer import Tokenizer, encode
from tokenizer_proc.validation import Bounds, RefusalError

LONG_TEXT = 1 << 17
"""Characters up to which a text is tokenized as a whole, however many tokens that makes."""
CHARACTERS = 4
"""A context has room for about so many a token; longer texts are looked at first."""
_PART = 1 << 14


def within_reach(tokenizer: Tokenizer, text: str, bounds: Bounds) -> str:
    """`text`; where prompts may be cut, so much of it that what is cut off cannot have fitted.

    Raises RefusalError (E14) for a text with more than twice the tokens of a context, where they may not be cut.
    """
    context = bounds.context_length
    if len(text) <= max(LONG_TEXT, CHARACTERS * context):
        return text
    tokens = 0
    for start in range(0, len(text), _PART):
        tokens += len(encode(tokenizer, text[start : start + _PART], add_special_tokens=False))
        if tokens <= 2 * context:
            continue
        if bounds.auto_truncate:
            return text[: start + _PART]
        raise RefusalError(
            f"The input (at least {tokens} tokens) is longer than the model's context length ({context} tokens)."
        )
    return text
