"""The rounds of a row: those that warm up, then ours and theirs in turn."""

from __future__ import annotations

import dataclasses

from engine.bench.errors import BenchError
from engine.bench.figures import RowFigures, row_figures
from engine.bench.http_client import Target, call_json, request_bytes
from engine.bench.load import Round, Sender, closed_loop, open_loop
from engine.bench.options import BenchOptions
from engine.bench.progress import Progress
from engine.bench.server import flush
from engine.bench.transformers_run import TheirFigures, TransformersModel, their_figures
from engine.bench.workload import Prompt, Prompts, Work, arrivals, body_of

_WARM_TOKENS = 8
_WARM_CLIENTS = 8


def warm_up_of(work: Work) -> Work:
    """A short form of `work`: one request a client, and few tokens of each."""
    clients = work.clients or min(work.requests, _WARM_CLIENTS)
    kind = "closed" if work.kind == "poisson" else work.kind
    tokens = min(work.output_tokens, _WARM_TOKENS)
    return dataclasses.replace(work, kind=kind, clients=clients, rate=0.0, requests=clients, output_tokens=tokens)


class Runner:
    """Runs rows and keeps their figures. theirs: None without --against-transformers. notes: for the reader."""

    def __init__(
        self,
        options: BenchOptions,
        target: Target,
        prompts: Prompts,
        theirs: TransformersModel | None,
        progress: Progress,
    ) -> None:
        self.rows: list[RowFigures] = []
        self.their_rows: list[TheirFigures] = []
        self.notes: list[str] = []
        self._options = options
        self._target = target
        self._prompts = prompts
        self._theirs = theirs
        self._progress = progress

    def run_row(self, work: Work, row: int) -> None:
        """Raises BenchError when anything fails. Poisson arrivals are not asked of transformers, which has no queue."""
        theirs = self._theirs if work.kind != "poisson" else None
        self._flush()
        for number in range(1, self._options.warmup + 1):
            warm = warm_up_of(work)
            prompts = self._prompts.take(warm, row, -number)
            if theirs is not None:
                self._their_round(theirs, warm, prompts, f"{work.label}: warming up transformers")
            self._our_round(warm, prompts, row, -number, f"{work.label}: warming up")
        ours: list[Round] = []
        seconds: list[float] = []
        for number in range(self._options.rounds):
            prompts = self._prompts.take(work, row, number)
            label = f"{work.label}: round {number + 1} of {self._options.rounds}"
            if theirs is not None:
                seconds.append(self._their_round(theirs, work, prompts, f"{label}, transformers"))
            if not self._options.shared_prefix:
                self._flush()
            ours.append(self._our_round(work, prompts, row, number, label))
        figures = row_figures(work, ours)
        self.rows.append(figures)
        if theirs is not None:
            self.their_rows.append(their_figures(work, [one.prompt_tokens for one in figures.rounds], seconds))

    def _our_round(self, work: Work, prompts: list[Prompt], row: int, number: int, label: str) -> Round:
        self._progress.phase(label)
        streamed = self._options.stream
        wires = [
            request_bytes(self._target, "POST", "/generate", body_of(prompt, work, streamed=streamed))
            for prompt in prompts
        ]
        sender = Sender(self._target, streamed, work.output_tokens, self._options.timeout, self._progress.advance)
        if work.kind == "poisson":
            return open_loop(sender, wires, arrivals(work.rate, work.requests, self._options.seed, row, number))
        return closed_loop(sender, wires, work.clients)

    def _their_round(self, theirs: TransformersModel, work: Work, prompts: list[Prompt], label: str) -> float:
        self._progress.phase(label)
        seconds = theirs.round([self._ids(prompt) for prompt in prompts], work)
        self._progress.advance(work.requests)
        return seconds

    def _ids(self, prompt: Prompt) -> list[int]:
        """A text prompt's ids, as the server has them."""
        if not isinstance(prompt, str):
            return prompt
        ids: list[int] = call_json(self._target, "POST", "/tokenize", {"prompt": prompt})["tokens"]
        return ids

    def _flush(self) -> None:
        note = "The prefix cache could not be emptied between rounds; prompts that it holds from before cost less."
        try:
            flushed = flush(self._target)
        except BenchError:
            flushed = False
        if not flushed and note not in self.notes:
            self.notes.append(note)
