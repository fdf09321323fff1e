"""The peers of `scripts.bench_vectors`, under a Python that has them: sentence-transformers, or transformers alone.

PYTHON peer_vectors.py JOB.json: reads a job, then does one round for each line on stdin and prints its seconds.
It imports nothing of this project, so that any environment can run it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import torch

    torch.set_num_threads(job["threads"])
    work = {"embed": embedding, "rerank": reranking}[job["kind"]](job)
    work()  # what is set up at the first call is not part of a round
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        work()
        print(time.perf_counter() - began, flush=True)


def embedding(job: dict[str, Any]) -> Callable[[], object]:
    """sentence-transformers with its own batching: sorted by length, 32 at once."""
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]

    model = SentenceTransformer(job["model"], device="cpu", model_kwargs={"torch_dtype": job["dtype"]})
    return lambda: model.encode(job["texts"], show_progress_bar=False)


def reranking(job: dict[str, Any]) -> Callable[[], object]:
    """transformers: pairs in padded batches of 32, in the order in which they came."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    pairs = [(job["query"], document) for document in job["documents"]]

    def work() -> list[float]:
        scores: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(pairs), 32):
                batch = tokenizer(pairs[start : start + 32], padding=True, truncation=True, return_tensors="pt")
                scores += model(**batch).logits[:, 0].tolist()
        return scores

    return work


if __name__ == "__main__":
    main()
