"""Vocabularies small enough to read, the grammar engines over them, and outputs chosen from their masks."""

from __future__ import annotations

import time

import numpy as np
from simulation import EOS, VOCABULARY
from tokenizers import AddedToken, Tokenizer, decoders, models

from engine.checkpoints.tokenizer_data import Tokenizer as Loaded
from engine.checkpoints.tokenizer_data import finish_tokenizer
from engine.wire.sampling import Grammar, GrammarKind
from scheduler_proc.constraint import Constraint
from scheduler_proc.grammar_engine import GrammarEngine, new_engine
from scheduler_proc.grammar_text import JsonSpaces

PATIENCE = 60.0
TEXTS = [*'abcdefghijklmnopqrstuvwxyz0123456789{}[]:,"-', "ab", '":', "ca", "true"]
"""Of the ids from 1 on; 0 is the end, which is what the simulated scheduler has it for."""


def small_tokenizer() -> Loaded:
    """As many tokens as the simulated model has, and no way to put letters together."""
    vocabulary = {"</s>": EOS} | {text: 1 + i for i, text in enumerate(TEXTS)}
    assert len(vocabulary) < VOCABULARY
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>")])
    return finish_tokenizer(backend, named_tokens={"eos_token": "</s>"})


def small_engine(eos_ids: tuple[int, ...] = (EOS,)) -> GrammarEngine:
    return new_engine(small_tokenizer(), VOCABULARY, list(eos_ids), JsonSpaces(allowed=False))


def text_of(ids: list[int]) -> str:
    return "".join(TEXTS[token - 1] for token in ids if token != EOS)


def ids_of(text: str) -> list[int]:
    return [1 + TEXTS.index(character) for character in text]


def compiled(engine: GrammarEngine, kind: GrammarKind, text: str) -> Constraint:
    return engine.compile(Grammar(kind, text), time.monotonic() + PATIENCE)


def allowed(constraint: Constraint) -> list[int]:
    return np.flatnonzero(~constraint.forbidden()).tolist()


def random_output(constraint: Constraint, seed: int, most: int = 400) -> list[int]:
    """An output whose every token is chosen from the mask; its end, if it comes to one, is left out."""
    generator = np.random.default_rng(seed)
    taken: list[int] = []
    for _ in range(most):
        token = int(generator.choice(allowed(constraint)))
        constraint.advance([token])
        if constraint.ends_with(token):
            return taken if token in constraint.eos_ids else [*taken, token]
        taken.append(token)
    raise AssertionError(f"no end within {most} tokens")
