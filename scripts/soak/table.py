"""The fixed table of requests, made from the seed: asked again and again, and always to be answered the same."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

Json = dict[str, Any]

WORDS = (
    "the a one of in on with and but old new small great river house winter summer light dark number seven twelve "
    "walks sees writes reads forgets remembers always never tomorrow zwölf naïve 東京 😀 (maybe) «so» table: 3.14 end."
).split()
LONG_PROMPTS = (100, 300, 500)
"""Words: several chunks of a prefill."""
GENERATIONS = 60
BODY_LIMIT = 1 << 20
"""--max-body-bytes of the server, so that a body may be too large."""


@dataclass(frozen=True)
class Job:
    """A request of the table.

    kind: generation; call (answered with 200 and always the same JSON); bad (refused, always in the same words).
    body: JSON, or the bytes of it. many: the answer is a list. exact: the request determines the answer.
    plain_text: where an aborted text must be the beginning of the whole one: nothing is cut off at its end.
    """

    name: str
    kind: Literal["generation", "call", "bad"]
    path: str
    body: Any
    method: str = "POST"
    many: bool = False
    exact: bool = True
    plain_text: bool = True


def generating_table(seed: int) -> list[Job]:
    """For a model that generates."""
    source = random.Random(seed)
    shared = _words(source, 60)
    return [
        *(_generation(source, number, shared) for number in range(GENERATIONS)),
        *_lists(source, shared),
        *(_score(source, number) for number in range(4)),
        *_texts(source),
        Job("tokenize messages", "call", "/tokenize", {"messages": [{"role": "user", "content": "Hello?"}]}),
        *_bad_generations(),
        Job("encode on a generating model", "bad", "/encode", {"text": "a"}),
    ]


def encoding_table(seed: int) -> list[Job]:
    """For a model that answers with vectors."""
    source = random.Random(seed)
    vectors = [Job(f"encode {i}", "call", "/encode", {"text": _words(source, 2 + 3 * i)}) for i in range(8)]
    batches = [
        Job(f"encode batch {i}", "call", "/encode", {"text": [_words(source, 1 + k) for k in range(2 + i)]})
        for i in range(4)
    ]
    named = [Job("embeddings", "call", "/v1/embeddings", {"input": [_words(source, 5), "b"], "model": "m"})]
    bad = [
        Job("generate on an encoder", "bad", "/generate", {"text": "a"}),
        Job("encode nothing", "bad", "/encode", {}),
        Job("encode a number", "bad", "/encode", {"text": 5}),
        Job("broken JSON", "bad", "/encode", b'{"text": "a'),
    ]
    return [*vectors, *batches, *named, *_texts(source), *bad]


def _words(source: random.Random, count: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(count))


def _generation(source: random.Random, number: int, shared: str) -> Job:
    """Greedy and sampled, with penalties, stops, logprobs, grammars, priorities, long and short, of texts and ids."""
    sampling: Json = {"max_new_tokens": source.randrange(1, 40), "temperature": 0, "ignore_eos": True}
    body: Json = {"text": shared[: number % 3 * 120] + _words(source, source.randrange(1, 40))}
    plain_text = True
    if number % 2:
        sampling |= {"temperature": source.choice([0.7, 1.0, 1.4]), "sampling_seed": number}
        sampling |= source.choice([{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}])
    if number % 5 == 1:
        sampling |= {"frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.1}
    if number % 7 == 2:
        sampling |= {"stop": [" the", "\n", "e"][number % 3 :], "max_new_tokens": 60}
        plain_text = False
    if number % 7 == 5:
        sampling |= {"stop_regex": ["[aeiou][^aeiou]e", "[0-9]{4}"], "max_new_tokens": 60}
        plain_text = False
    if number % 6 == 3:
        body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    if number % 12 == 4:
        body |= {"return_logprob": True, "token_ids_logprob": [5, 9, 77], "return_text_in_logprobs": True}
    if number % 10 == 6:
        del body["text"]
        body |= {"input_ids": [source.randrange(3, 400) for _ in range(source.randrange(1, 300))]}
    if number % 10 == 8:
        body |= {"text": _words(source, LONG_PROMPTS[number % 3])}
    if number % 15 == 7:
        sampling |= {"max_new_tokens": 200}
    if number % 9 == 2:
        sampling |= {
            "logit_bias": {"40": 3.0, "50": -100.0},
            "min_new_tokens": min(3, sampling["max_new_tokens"]),
            "ignore_eos": False,
        }
    if number % 11 == 3:
        sampling |= [{"regex": "[a-z ]{2000,}"}, {"ebnf": 'root ::= "a" (" " [a-m]+)*'}][number % 2]
    if number % 4 == 3:
        body |= {"priority": source.randrange(-2, 3)}
    return Job(f"generation {number}", "generation", "/generate", body | {"sampling_params": sampling},
               plain_text=plain_text)  # fmt: skip


def _lists(source: random.Random, shared: str) -> list[Job]:
    """Batches, parallel samples, and a sample that has no seed."""
    jobs = []
    for number in range(4):
        texts = [shared[: 40 * number] + _words(source, source.randrange(1, 30)) for _ in range(2 + number)]
        each = [
            {"max_new_tokens": 5 + 7 * i, "temperature": i % 2, "sampling_seed": i, "ignore_eos": True}
            for i in range(len(texts))
        ]
        body: Json = {"text": texts, "sampling_params": each, "return_logprob": number % 2 == 1}
        jobs.append(Job(f"batch {number}", "generation", "/generate", body, many=True))
        sampling = {"n": 2 + number, "max_new_tokens": 12, "temperature": 1.0, "sampling_seed": 5, "ignore_eos": True}
        body = {"text": _words(source, 30), "sampling_params": sampling}
        jobs.append(Job(f"samples {number}", "generation", "/generate", body, many=True))
    free = {"max_new_tokens": 20, "temperature": 1.0, "ignore_eos": True}
    body = {"text": shared, "sampling_params": free}
    return [*jobs, Job("sample without a seed", "generation", "/generate", body, exact=False)]


def _score(source: random.Random, number: int) -> Job:
    body: Json = {
        "query": _words(source, 20),
        "items": [_words(source, 1 + i) for i in range(1 + number)],
        "label_token_ids": [5, 60, 77],
        "apply_softmax": number % 2 == 0,
        "item_first": number == 3,
    }
    return Job(f"score {number}", "call", "/v1/score", body)


def _texts(source: random.Random) -> list[Job]:
    """What the tokenizer and the detokenizer answer alone."""
    return [
        Job("tokenize", "call", "/tokenize", {"prompt": _words(source, 50)}),
        Job("tokenize a list", "call", "/v1/tokenize", {"prompt": [_words(source, 5), "", "x"]}),
        Job("detokenize", "call", "/detokenize", {"tokens": [source.randrange(3, 300) for _ in range(40)]}),
        Job("tokenize nothing", "bad", "/tokenize", {}),
        Job("detokenize words", "bad", "/detokenize", {"tokens": ["a"]}),
        Job("detokenize far ids", "bad", "/detokenize", {"tokens": [1 << 30]}),
    ]


def _bad_generations() -> list[Job]:
    bodies: dict[str, Any] = {
        "broken JSON": b'{"text": "a", "sampling_params": {',
        "no JSON": b"\xff\xfe\x00garbage",
        "NaN": b'{"text": "a", "sampling_params": {"temperature": NaN}}',
        "deep JSON": b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}",
        "empty body": b"",
        "a list": [1, 2],
        "nothing": {},
        "text is a number": {"text": 5},
        "ids are words": {"input_ids": ["a"]},
        "no ids": {"input_ids": []},
        "ids out of vocabulary": {"input_ids": [1, 2, 1 << 30]},
        "negative ids": {"input_ids": [-1]},
        "unknown sampling key": {"text": "a", "sampling_params": {"best_off": 3}},
        "wrong type": {"text": "a", "sampling_params": {"temperature": "0.5"}},
        "out of range": {"text": "a", "sampling_params": {"top_p": 3}},
        "negative n": {"text": "a", "sampling_params": {"n": -1}},
        "bad pattern": {"text": "a", "sampling_params": {"stop_regex": "["}},
        "too long": {"input_ids": [7] * 100_000},
        "too many tokens": {"text": "a", "sampling_params": {"max_new_tokens": 1 << 40}},
        "rid is a number": {"text": "a", "rid": 1},
        "same rid twice": {"text": ["a", "b"], "rid": ["x", "x"]},
        "short list of parameters": {"text": ["a", "b"], "sampling_params": [{}]},
        "far label": {"text": "a", "return_logprob": True, "token_ids_logprob": [1 << 30]},
        "session": {"text": "a", "session_params": {"id": "nobody"}},
        "grammar": {"text": "a", "sampling_params": {"json_schema": "INVALID"}},
        "too large": b'{"text": "' + b"a" * BODY_LIMIT + b'"}',
    }
    return [
        *(Job(name, "bad", "/generate", body) for name, body in bodies.items()),
        Job("score without labels", "bad", "/v1/score", {"query": "a", "items": ["b"]}),
        Job("score a far label", "bad", "/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [1 << 30]}),
        Job("update from nowhere", "bad", "/update_weights_from_disk", {"model_path": "/nowhere/at/all"}),
        Job("update without a path", "bad", "/update_weights_from_disk", {}),
        Job("pause of a wrong kind", "bad", "/pause_generation", {"mode": "sideways"}),
        Job("unknown route", "bad", "/generate_all", {}),
        Job("wrong method", "bad", "/generate", None, method="GET"),
        Job("unknown rank", "bad", "/v1/loads?dp_rank=7", None, method="GET"),
    ]
