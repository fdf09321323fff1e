"""The ids of a prompt, as they travel: int32, little-endian."""

from __future__ import annotations

import sys
from array import array

from engine.checkpoints.tokenizer import Tokenizer
from tokenizer_proc.validation import RefusalError


def unpack(packed: bytes) -> array[int]:
    ids = array("i")
    ids.frombytes(packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def pack(ids: array[int]) -> bytes:
    if sys.byteorder == "big":
        ids = array("i", ids)
        ids.byteswap()
    return ids.tobytes()


def need(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer that a text needs. Raises RefusalError where the server has none (E18)."""
    if tokenizer is None:
        raise RefusalError(
            "The engine initialized with skip_tokenizer_init=True cannot accept text prompts. Please provide "
            "input_ids or re-initialize the engine with skip_tokenizer_init=False."
        )
    return tokenizer
