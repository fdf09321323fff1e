"""Grammars compiled by llguidance: first by another process, which may take any time and any end, then in this one.

This module, the library and the tokenizer are loaded when the first grammar comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from engine.checkpoints.token_bytes import byte_decoder
from engine.checkpoints.tokenizer import Tokenizer, load_tokenizer
from engine.config import RunConfig
from engine.wire.sampling import Grammar
from scheduler_proc.constraint import Constraint, GrammarError
from scheduler_proc.grammar_text import JsonSpaces, limits, shortened
from scheduler_proc.grammar_trial import Question, TrialProcess

if TYPE_CHECKING:
    from llguidance import LLTokenizer


@dataclass(frozen=True)
class GrammarEngine:
    """Compiles grammars for one tokenizer. special: texts of special tokens. idle: processes that wait for a
    grammar."""

    tokenizer: LLTokenizer
    width: int
    eos_ids: frozenset[int]
    spaces: JsonSpaces
    special: frozenset[str]
    idle: SimpleQueue[TrialProcess] = field(default_factory=SimpleQueue)

    def compile(self, grammar: Grammar, deadline: float) -> Constraint:
        """Compile a grammar, in any thread; takes milliseconds, or seconds.

        deadline: by `time.monotonic()`. Raises GrammarError with the contract's message (E40), and TimeoutError.
        """
        from llguidance import LLMatcher

        text = self._tried(grammar, deadline)
        # Another process has compiled the same, and has come to an end.
        matcher = LLMatcher(self.tokenizer, text, log_level=0, limits=limits())
        if matcher.is_error():
            raise _failed(grammar, matcher.get_error())
        return Constraint(matcher, self.width, self.eos_ids)

    def _tried(self, grammar: Grammar, deadline: float) -> str:
        """The grammar as llguidance reads it."""
        question = Question(grammar, self.spaces, sorted(self.special))
        try:
            process = self.idle.get_nowait()
            verdict = process.ask(question, deadline)
        except Empty:
            process = None
        if process is None or not process.alive:  # what has ended one that was idle may be somebody else's doing
            process = TrialProcess()
            verdict = process.ask(question, deadline)
        if process.alive:
            self.idle.put(process)
        if verdict.error is not None:
            raise _failed(grammar, verdict.error)
        return verdict.text


def new_engine(tokenizer: Tokenizer, width: int, eos_ids: list[int], spaces: JsonSpaces) -> GrammarEngine:
    """The engine for a model whose logits are `width` wide. Takes a moment, in part with all threads held.

    Raises GrammarError for a tokenizer whose tokens have no bytes of their own.
    """
    from llguidance import LLTokenizer, TokenizerWrapper

    decoder = byte_decoder(tokenizer)
    if decoder is None:
        raise GrammarError("Constrained output is not available: the text of this tokenizer's tokens depends on others")
    ends = frozenset(token for token in eos_ids if token < width)
    # Where the model has no end, the one of the grammar is an id that it cannot choose.
    known = [decoder.token_bytes(token) for token in range(width)] + ([] if ends else [b"<end>"])
    first_end = min(ends) if ends else width
    special = sorted({token for token in tokenizer.special_ids if token < width} | ends | {first_end})
    tokens = _Tokens(first_end, None, known, special, _never)
    made = LLTokenizer(
        TokenizerWrapper(tokens), n_vocab=len(known), eos_token=sorted(ends) or [first_end],
        # They speed masks up by what they take to be made, during which no thread can go on.
        slices=[],
    )  # fmt: skip
    texts = (tokenizer.backend.id_to_token(token) for token in special if token < width)
    return GrammarEngine(made, width, ends, spaces, frozenset(text for text in texts if text))


def _failed(grammar: Grammar, detail: str) -> GrammarError:
    return GrammarError(f"Failed to compile {grammar.kind} grammar: {shortened(detail)}")


@dataclass(frozen=True)
class _Tokens:
    """A vocabulary as llguidance reads it."""

    eos_token_id: int
    bos_token_id: int | None
    tokens: list[bytes]
    special_token_ids: list[int]
    encode: Callable[[bytes], list[int]]

    def __call__(self, text: bytes) -> list[int]:
        return self.encode(text)


def _never(text: bytes) -> list[int]:
    raise AssertionError("nothing is forced, and so no text has to become tokens")


def open_engine(config: RunConfig) -> GrammarEngine:
    """The engine of a launch. Raises GrammarError, and CheckpointError where the tokenizer cannot be loaded."""
    server, source, facts = config.server, config.tokenizer, config.facts
    assert source is not None, "who has no tokenizer asks for no grammar"
    spaces = JsonSpaces(
        server.constrained_json_whitespace_pattern, allowed=not server.constrained_json_disable_any_whitespace
    )
    return new_engine(load_tokenizer(source, mode=server.tokenizer_mode), facts.vocab_size, facts.eos_ids, spaces)
