"""A loaded tokenizer, and text to ids and back with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import tokenizers

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The roles that a tokenizer's configuration gives to special tokens; chat templates see them under these names."""

EXTRA_STOP_TOKENS = ("<|eom_id|>",)
"""Added tokens that end a generation beside the EOS token, whatever the configuration says (as SGLang has it)."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of the `tokenizers` package and what belongs to it.

    backend: truncation and padding are switched off.
    vocab_size: every id the tokenizer can produce is below it (the model's own size may be larger).
    eos_ids: the tokenizer's EOS and its additional stop ids, ascending.
    model_max_length: the tokenizer's own length limit in tokens; None where it names none.
    chat_template: Jinja source; tool_template: the one to use when tools are given, where there is a separate one.
    special_ids: what `skip_special_tokens` leaves out of text.
    named_tokens: role (`bos_token` ...) → the token's text.
    """

    backend: tokenizers.Tokenizer
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    model_max_length: int | None = None
    chat_template: str | None = None
    tool_template: str | None = None
    special_ids: frozenset[int] = frozenset()
    named_tokens: dict[str, str] = field(default_factory=dict)


def finish_tokenizer(
    backend: tokenizers.Tokenizer,
    *,
    named_tokens: dict[str, str],
    extra_eos_ids: Sequence[int] = (),
    model_max_length: int | float | None = None,
    chat_template: str | None = None,
    tool_template: str | None = None,
) -> Tokenizer:
    """Switch off truncation and padding, and gather the ids that a `Tokenizer` names.

    extra_eos_ids: stop ids beyond those of `named_tokens["eos_token"]` and `EXTRA_STOP_TOKENS`.
    """
    backend.no_truncation()
    backend.no_padding()
    added = backend.get_added_tokens_decoder()
    by_text = {token.content: token_id for token_id, token in added.items()}
    bos, eos = (_id_of(backend, named_tokens.get(name)) for name in ("bos_token", "eos_token"))
    eos_ids = set(extra_eos_ids) | {by_text[text] for text in EXTRA_STOP_TOKENS if text in by_text}
    if eos is not None:
        eos_ids.add(eos)
    return Tokenizer(
        backend=backend,
        vocab_size=max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1),
        bos_id=bos,
        eos_ids=tuple(sorted(eos_ids)),
        model_max_length=_plausible_length(model_max_length),
        chat_template=chat_template,
        tool_template=tool_template,
        special_ids=frozenset(token_id for token_id, token in added.items() if token.special),
        named_tokens=named_tokens,
    )


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """The ids of `text`. Special tokens that are spelled out in it become their ids.

    A lone surrogate, which has no UTF-8 form, counts as U+FFFD.
    """
    return list(tokenizer.backend.encode(_well_formed(text), add_special_tokens=add_special_tokens).ids)


def encode_pair(
    tokenizer: Tokenizer, text: str, pair: str | None, max_length: int | None = None
) -> tuple[list[int], bytes]:
    """The ids of `text`, or of `text` and `pair` in one sequence, with special tokens; and the segment of each, uint8.

    max_length: cut a longer sequence to so many ids by taking the ends of the texts, of a pair the longer one's first.
    Special tokens stay. Raises what the tokenizers package raises where they alone are too many.
    """
    backend = tokenizer.backend
    pair = None if pair is None else _well_formed(pair)
    if max_length is not None:
        backend.enable_truncation(max_length)
    try:
        encoding = backend.encode(_well_formed(text), pair)
    finally:
        backend.no_truncation()
    return list(encoding.ids), bytes(encoding.type_ids)


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def decode(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of `ids` (each in [0, 2^32)); ids that the tokenizer does not know have none."""
    return str(tokenizer.backend.decode(ids, skip_special_tokens=skip_special_tokens))


def _id_of(backend: tokenizers.Tokenizer, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _plausible_length(length: object) -> int | None:
    """Configurations without a limit say 1e30; what does not fit 64 bits, or is no number, is no limit."""
    if not isinstance(length, int | float) or not 0 < length < 2**63:
        return None
    return int(length)
