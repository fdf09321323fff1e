"""Incremental decoding: each new token id of a request → the text that may be shown now.

Bytes that do not yet make a whole character wait. What has been shown is never taken back, and all of it together is
the text of the output's bytes read as UTF-8 in the context of the prompt; what is not UTF-8 becomes U+FFFD (one for
each maximal invalid part, as Unicode recommends and both Rust and Python do).
"""

from __future__ import annotations

from codecs import utf_8_decode
from typing import Protocol

from engine.checkpoints.token_bytes import Blank, ByteDecoder, byte_decoder
from engine.checkpoints.tokenizer import Tokenizer, decode

_LONGEST_WAIT = 32
"""Tokens after which `WindowStream` shows text although it ends in U+FFFD, which no unfinished character explains."""


class Stream(Protocol):
    """The decoding of one request.

    table: id → text, for ids whose text does not depend on what came before; `plain` says whether it may be used now
    (nothing waits). The caller looks there first: for nearly every token that is the whole work.
    """

    table: dict[int, str]
    plain: bool

    def feed(self, token: int) -> str:
        """The text that `token` brings. Ids outside the vocabulary bring none."""
        ...

    def flush(self) -> str:
        """What still waits, at the end of the output."""
        ...

    def save(self) -> object:
        """The state, for `restore`."""
        ...

    def restore(self, state: object) -> None: ...


class StreamFactory:
    """Makes the `Stream` of a request, and holds the tables that all of them share."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._bytes = None if tokenizer is None else byte_decoder(tokenizer)
        self._tables: dict[bool, TokenTable] = {}

    def open(self, prompt_tail: list[int], *, whole_prompt: bool, skip_special_tokens: bool) -> Stream:
        """A stream that goes on behind `prompt_tail`. whole_prompt: there is no prompt before the tail."""
        if self._tokenizer is None:
            return SilentStream()
        if self._bytes is None:
            return WindowStream(self._tokenizer, prompt_tail, skip_special_tokens)
        table = self._tables.get(skip_special_tokens)
        if table is None:
            hidden = self._tokenizer.special_ids if skip_special_tokens else frozenset()
            table = self._tables[skip_special_tokens] = TokenTable(self._bytes, hidden)
        return ByteStream(table, prompt_tail, whole_prompt=whole_prompt)


class TokenTable:
    """What each id brings, worked out when it is first seen.

    texts: ids whose bytes are whole characters. parts: the bytes of the other ids.
    """

    def __init__(self, decoder: ByteDecoder, hidden: frozenset[int]) -> None:
        self.decoder = decoder
        self.hidden = hidden
        self.texts: dict[int, str] = {}
        self.parts: dict[int, bytes] = {}

    @property
    def blank(self) -> Blank:
        return self.decoder.blank

    def data(self, token: int) -> bytes:
        """The bytes of `token`; none where it is hidden or unknown."""
        text = self.texts.get(token)
        if text is not None:
            return text.encode()
        part = self.parts.get(token)
        if part is not None:
            return part
        data = b"" if token in self.hidden else self.decoder.token_bytes(token)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            self.parts[token] = data
        else:
            self._remember(token, text)
        return data

    def _remember(self, token: int, text: str) -> None:
        # An id out of range is a bug elsewhere; it must not make the table grow without end.
        if 0 <= token < self.decoder.tokenizer.vocab_size:
            self.texts[token] = text

    def is_visible(self, token: int) -> bool:
        return token not in self.hidden and self.decoder.knows(token)


class ByteStream:
    """Decoding by bytes. `waiting`: the beginning of a character.

    at_start: no text yet, in prompt or output, so that the decoder's rule for a blank at the start still applies.
    inherited: `waiting` came from the prompt. It counts if the output completes the character; its U+FFFD would not be
    the output's.
    """

    __slots__ = ("_at_start", "_inherited", "_table", "_waiting", "plain", "table")

    def __init__(self, table: TokenTable, prompt_tail: list[int], *, whole_prompt: bool) -> None:
        self._table = table
        self.table = table.texts
        self._waiting = b""
        self._inherited = False
        self._at_start = whole_prompt and table.blank != "kept"
        for token in prompt_tail:
            self.feed(token)
        self._inherited = bool(self._waiting)
        self._settle()

    def feed(self, token: int) -> str:
        data = self._table.data(token)
        if self._at_start:
            data = self._without_first_blank(token, data)
        if not data:
            return ""
        if self._inherited:
            self._inherited = False
            if not 0x80 <= data[0] < 0xC0:
                self._waiting = b""
        data = self._waiting + data
        text, used = utf_8_decode(data, "replace", False)
        self._waiting = data[used:]
        self._settle()
        return text

    def flush(self) -> str:
        waiting, self._waiting = self._waiting, b""
        return "" if self._inherited else waiting.decode("utf-8", "replace")

    def save(self) -> object:
        return self._waiting, self._inherited, self._at_start

    def restore(self, state: object) -> None:
        assert isinstance(state, tuple)
        self._waiting, self._inherited, self._at_start = state
        self._settle()

    def _settle(self) -> None:
        self.plain = not self._waiting and not self._at_start

    def _without_first_blank(self, token: int, data: bytes) -> bytes:
        if self._table.blank == "token":
            if not self._table.is_visible(token):
                return data
            self._at_start = False
            return self._table.decoder.without_replacement(token)
        if not data:
            return data
        self._at_start = False
        return data.removeprefix(b" ")


class WindowStream:
    """Decoding with the tokenizer's own decoder, for decoders that look at neighbours (WordPiece, for instance).

    The last tokens are decoded with and without the new one, and what is longer is new; text that ends in U+FFFD may
    be half a character and waits. (The method of Hugging Face's text-generation-inference.)
    """

    __slots__ = ("_fresh", "_ids", "_shown", "_skip", "_tokenizer", "plain", "table")

    def __init__(self, tokenizer: Tokenizer, prompt_tail: list[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self.table: dict[int, str] = {}
        self.plain = False
        self._ids = [token for token in prompt_tail if self._counts(token)]
        self._fresh = len(self._ids)
        self._shown = self._text(self._ids)

    def feed(self, token: int) -> str:
        if not self._counts(token):
            return ""
        self._ids.append(token)
        text = self._text(self._ids)
        new = text[len(self._shown) :]
        waits = text.endswith("\ufffd") and len(self._ids) - self._fresh < _LONGEST_WAIT
        if not new or waits:
            return ""
        self._ids = self._ids[self._fresh :]
        self._fresh = len(self._ids)
        self._shown = self._text(self._ids)
        return new

    def flush(self) -> str:
        text = self._text(self._ids)[len(self._shown) :]
        self._fresh = len(self._ids)
        self._shown = self._text(self._ids)
        return text

    def save(self) -> object:
        return list(self._ids), self._fresh, self._shown

    def restore(self, state: object) -> None:
        assert isinstance(state, tuple)
        self._ids, self._fresh, self._shown = state

    def _counts(self, token: int) -> bool:
        if not 0 <= token < self._tokenizer.vocab_size:
            return False
        return not (self._skip and token in self._tokenizer.special_ids)

    def _text(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids, self._skip) if ids else ""


class SilentStream:
    """No tokenizer (`--skip-tokenizer-init`): no text."""

    __slots__ = ("plain", "table")

    def __init__(self) -> None:
        self.table: dict[int, str] = {}
        self.plain = False

    def feed(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""

    def save(self) -> object:
        return None

    def restore(self, state: object) -> None:
        return None
