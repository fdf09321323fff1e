"""The same work through `transformers`, in this process, while the server is idle (an idle server uses no CPU)."""

from __future__ import annotations

import contextlib
import gc
import io
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from engine.bench.errors import BenchError
from engine.bench.server import Facts
from engine.bench.workload import Work
from engine.checkpoints.gguf_split import split_files


class TheirFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One row through transformers: medians over rounds of tokens a second of the whole `generate` call."""

    label: str
    prompt_tok_s: float
    output_tok_s: float
    seconds: list[float]


class TransformersModel:
    """The server's model as transformers has it, with the server's dtype and number of threads."""

    def __init__(self, facts: Facts) -> None:
        """Raises BenchError when the model cannot be loaded."""
        import torch
        import transformers

        if facts.source is None:
            raise BenchError(f"--against-transformers: the files of {facts.name} are not on this machine")
        path = Path(facts.source.path)
        if facts.source.kind == "gguf" and len(split_files(path)) > 1:
            raise BenchError("--against-transformers: transformers reads no GGUF model that is split over files")
        place: tuple[Path, dict[str, str]] = (path, {})
        if facts.source.kind == "gguf":
            place = (path.parent, {"gguf_file": path.name})
        transformers.utils.logging.set_verbosity_error()
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(facts.threads or self._threads_before)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # it draws bars of its own, even into a file
                self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    place[0], dtype=getattr(torch, facts.dtype), local_files_only=True, **place[1]
                ).eval()
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            torch.set_num_threads(self._threads_before)
            raise BenchError(f"--against-transformers: transformers cannot load {path}: {error}") from error

    def round(self, prompts: Sequence[list[int]], work: Work) -> float:
        """Seconds that a round takes: batches of as many prompts as there are clients, one after the other."""
        began = time.perf_counter()
        for start in range(0, len(prompts), work.clients):
            self._generate(prompts[start : start + work.clients], work.output_tokens)
        return time.perf_counter() - began

    def _generate(self, prompts: Sequence[list[int]], tokens: int) -> None:
        """Greedy, exactly `tokens` of each; shorter prompts are padded on their left."""
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            answers = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        if answers.shape[1] != longest + tokens:
            raise BenchError(f"transformers made {answers.shape[1] - longest} tokens where {tokens} were asked for")

    def close(self) -> None:
        """Give its memory and the number of torch's threads back."""
        import torch

        self._model = None
        gc.collect()
        torch.set_num_threads(self._threads_before)


def their_figures(work: Work, prompt_tokens: Sequence[int], seconds: Sequence[float]) -> TheirFigures:
    """prompt_tokens, seconds: of each round."""
    output = work.requests * work.output_tokens
    return TheirFigures(
        label=work.label,
        prompt_tok_s=statistics.median(tokens / wall for tokens, wall in zip(prompt_tokens, seconds, strict=True)),
        output_tok_s=statistics.median(output / wall for wall in seconds),
        seconds=list(seconds),
    )
