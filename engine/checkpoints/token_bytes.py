"""What each token id adds to the text, as bytes, for tokenizers where that does not depend on its neighbours.

Two families cover nearly all language models: byte-level BPE, where each character of a token stands for a byte, and
sentencepiece, where `▁` is a blank and `<0xE2>` a byte. The one rule of theirs that looks at neighbours is that some
sentencepiece decoders drop the blank at the very start of a text; `Blank` says how.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from engine.checkpoints.tokenizer import Tokenizer

Blank = Literal["kept", "one", "token"]
"""At the start of a text: keep blanks; drop one blank; drop all blanks (`▁`) of the first token."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class ByteDecoder:
    """How a decoder of the `tokenizers` package spells a token in bytes. `blank`: see `Blank`."""

    tokenizer: Tokenizer
    byte_level: bool
    replacement: str
    byte_fallback: bool
    blank: Blank

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one id; none for an id that is not in the vocabulary."""
        if not 0 <= token_id < 2**32:
            return b""
        token = self.tokenizer.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.byte_level:
            spelled = [_BYTE_OF_CHARACTER.get(character) for character in token]
            # A token with a character that stands for no byte (an added one) is taken as it is written.
            return token.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace(self.replacement, " ").encode()

    def knows(self, token_id: int) -> bool:
        """Whether the id is in the vocabulary."""
        return 0 <= token_id < 2**32 and self.tokenizer.backend.id_to_token(token_id) is not None

    def without_replacement(self, token_id: int) -> bytes:
        """The bytes of the first token of a text where `blank` is "token"."""
        token = self.tokenizer.backend.id_to_token(token_id)
        return b"" if token is None else token.replace(self.replacement, "").encode()


def byte_decoder(tokenizer: Tokenizer) -> ByteDecoder | None:
    """The byte decoder that does what the tokenizer's own decoder does; None where there is none."""
    decoder = tokenizer.backend.decoder
    if decoder is None:
        return None
    steps = _flat(json.loads(decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteDecoder(tokenizer, byte_level=True, replacement="", byte_fallback=False, blank="kept")
    if kinds == ["Metaspace"]:
        blank: Blank = "kept" if steps[0].get("prepend_scheme", "always") == "never" else "token"
        return ByteDecoder(tokenizer, False, steps[0]["replacement"], byte_fallback=False, blank=blank)
    return _sentencepiece(tokenizer, steps, kinds)


def _sentencepiece(tokenizer: Tokenizer, steps: list[dict[str, Any]], kinds: list[str]) -> ByteDecoder | None:
    """Replace `▁` by a blank, then optionally: bytes, fuse, strip one blank at the start. Else None."""
    accepted = (
        ["Replace"],
        ["Replace", "Fuse"],
        ["Replace", "ByteFallback"],
        ["Replace", "ByteFallback", "Fuse"],
        ["Replace", "ByteFallback", "Fuse", "Strip"],
        ["Replace", "Fuse", "Strip"],
    )
    if kinds not in accepted or steps[0]["content"] != " ":
        return None
    replacement = steps[0]["pattern"].get("String")
    if replacement is None or len(replacement) != 1:
        return None
    strip = steps[-1] if kinds[-1] == "Strip" else None
    if strip is not None and (strip["content"], strip["start"], strip["stop"]) != (" ", 1, 0):
        return None
    blank: Blank = "kept" if strip is None else "one"
    return ByteDecoder(tokenizer, False, replacement, byte_fallback="ByteFallback" in kinds, blank=blank)


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [step for inner in state["decoders"] for step in _flat(inner)]


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level BPE: printable Latin-1 stands for itself, the rest follows from U+0100 on
    (OpenAI's GPT-2 encoder)."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + number): byte for number, byte in enumerate(rest)}


_BYTE_OF_CHARACTER = _byte_alphabet()
