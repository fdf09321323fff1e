"""What the fake scheduler says of its requests: tokens, texts, logprobs and vectors that can be foretold."""

from __future__ import annotations

import time
from array import array

import msgspec

from engine.wire.results import Finish, InputLogprobs, TokenLogprobs
from engine.wire.sampling import LogprobOptions, Sampling, TextOptions
from engine.wire.to_frontend import Begun, TextStep, Vectors
from engine.wire.to_tokenizer import Embed, Generate, Judge


def text_of(token: int) -> str:
    """The fake vocabulary: printable, with quotes, line ends and characters of several bytes among them."""
    return ('"', "\n", "é", "漢", "🙂", "\\", " a")[token % 7] + str(token)


class Running(msgspec.Struct):
    """A request that the fake scheduler runs: its n-th token is `len(prompt) + n`. opened: its first row is out."""

    message: Generate | Embed | Judge
    prompt: list[int]
    made: int = 0
    opened: bool = False

    @property
    def generate(self) -> Generate:
        """The message; a `Judge` becomes the `Generate` that it is answered as."""
        if isinstance(self.message, Judge):
            return Generate(
                key=self.message.key,
                attempt=self.message.attempt,
                rid=self.message.rid,
                text=None,
                input_ids=None,
                output_ids=b"",
                sampling=Sampling(max_new_tokens=0),
                text_options=TextOptions(),
                logprobs=LogprobOptions(ids=[11, 12]),
            )
        assert isinstance(self.message, Generate)
        return self.message


def fake_vector(prompt: list[int], width: int) -> array[float]:
    """The fake model's vector: float32 with no short decimal."""
    return array("f", [(sum(prompt) % 97 - 48) / 7 + i / 3 for i in range(width)])


def fake_logprob(prompt: list[int], token: int) -> float:
    """The fake model's logprob of a next token, a float32."""
    return array("f", [-((sum(prompt) * 31 + token * 17) % 101) / 7])[0]


def texts_of(message: Generate | Embed | Judge) -> list[str]:
    if isinstance(message, Judge):
        return [message.instruct or "", message.query, message.document]
    return [message.text or "", *([message.pair or ""] if isinstance(message, Embed) and message.pair else [])]


def vectors_of(running: list[Running], width: int) -> Vectors:
    """The vectors of all that wait for one; a row of another attempt lies in front."""
    embeds = [one.message for one in running if isinstance(one.message, Embed)]
    rows = [fake_vector(one.prompt, embed.dimensions or width) for one, embed in zip(running, embeds, strict=True)]
    hidden = {i + 1: array("f", [0.1, 0.7]).tobytes() for i, embed in enumerate(embeds) if embed.with_hidden}
    return Vectors(
        keys=[embeds[0].key, *(embed.key for embed in embeds)],
        attempts=[embeds[0].attempt + 1, *(embed.attempt for embed in embeds)],
        prompt_tokens=[1, *(len(one.prompt) for one in running)],
        widths=[2, *map(len, rows)],
        entries=array("f", [9.0, 9.0]).tobytes() + b"".join(row.tobytes() for row in rows),
        hidden=hidden,
        retracted={embeds[0].key: 1},
        weight_version="v7",
    )


def begun_of(one: Running) -> Begun:
    options = one.generate.logprobs
    inputs = None
    if options is not None and options.start >= 0:
        asked = one.prompt[options.start :]
        inputs = InputLogprobs(
            [(None if i == 0 else -1.5, token) for i, token in enumerate(asked)],
            [None if i == 0 else [(-0.25, token)] * options.top for i, token in enumerate(asked)]
            if options.top
            else None,
            None,
        )
    texts = {token: text_of(token) for token in one.prompt} if one.generate.text_options.text_in_logprobs else None
    return Begun(one.generate.key, one.generate.attempt, len(one.prompt), 2, inputs, texts, time.monotonic())


def rows_of(
    rows: list[tuple[Running, str, int, Finish | None, TokenLogprobs | None]], begun: list[Begun], weight_version: str
) -> TextStep:
    texts = {}
    for i, (one, _, token, _, logprobs) in enumerate(rows):
        if logprobs is not None and one.generate.text_options.text_in_logprobs:
            named = [token, *(t for _, t in logprobs.top or []), *(t for _, t in logprobs.ids or [])]
            texts[i] = {t: text_of(t) for t in named if t >= 0}
    return TextStep(
        begun=begun,
        keys=[row[0].generate.key for row in rows],
        attempts=[row[0].generate.attempt for row in rows],
        texts=[row[1] for row in rows],
        tokens=[row[2] for row in rows],
        finished={i: row[3] for i, row in enumerate(rows) if row[3] is not None},
        logprobs={i: row[4] for i, row in enumerate(rows) if row[4] is not None},
        logprob_texts=texts,
        retracted={},
        weight_version=weight_version,
    )
