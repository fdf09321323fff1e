"""Whether a message that admits a request makes sense. The tokenizer process has checked what clients ask for; this is
for messages that are broken, which must not reach the kernels, the pool or the queue."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from engine.wire.sampling import Sampling
from engine.wire.to_scheduler import Admit


def check_admissible(admit: Admit, vocab_size: int | None, longest: int) -> None:
    """Raise ValueError, which names the field, the value and what is allowed.

    vocab_size: None where it is not known. longest: prompt and output may have so many tokens.
    """
    prompt = _ids("input_ids", admit.input_ids, vocab_size)
    earlier = _ids("output_ids", admit.output_ids, vocab_size)
    if not len(prompt):
        raise ValueError("input_ids must have at least 1 token, got 0")
    if len(prompt) + len(earlier) > longest + 1:
        raise ValueError(f"input_ids and output_ids may have {longest + 1} tokens, got {len(prompt)} + {len(earlier)}")
    _check_sampling(admit.sampling, vocab_size)
    if (options := admit.logprobs) is not None:
        if options.top < 0:
            raise ValueError(f"logprobs.top must be at least 0, got {options.top}")
        _check_vocabulary("logprobs.ids", options.ids, vocab_size)
    if (vector := admit.vector) is not None:
        if vector.type_ids and len(vector.type_ids) < len(prompt):
            raise ValueError(f"vector.type_ids must be as many as input_ids, {len(prompt)}, got {len(vector.type_ids)}")
        if vector.dimensions is not None and vector.dimensions < 1:
            raise ValueError(f"vector.dimensions must be at least 1, got {vector.dimensions}")


def _ids(name: str, packed: bytes, vocab_size: int | None) -> NDArray[np.int32]:
    if len(packed) % 4:
        raise ValueError(f"{name} must be int32, got {len(packed)} bytes")
    ids = np.frombuffer(packed, "<i4")
    if len(ids) and (ids.min() < 0 or (vocab_size is not None and ids.max() >= vocab_size)):
        raise ValueError(f"{name} must lie in [0, {vocab_size}), got {ids.min()} to {ids.max()}")
    return ids


def _check_vocabulary(name: str, ids: list[int], vocab_size: int | None) -> None:
    for token in ids:
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            raise ValueError(f"{name} must lie in [0, {vocab_size}), got {token}")


def _check_sampling(sampling: Sampling, vocab_size: int | None) -> None:
    if sampling.max_new_tokens is not None and sampling.max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {sampling.max_new_tokens}")
    if not 0 <= sampling.temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {sampling.top_p}")
    if not 0 <= sampling.min_p <= 1:
        raise ValueError(f"min_p must be in [0, 1], got {sampling.min_p}")
    if sampling.top_k != -1 and sampling.top_k < 1:
        raise ValueError(f"top_k must be -1 or at least 1, got {sampling.top_k}")
    if not 0 < sampling.repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be over 0 and finite, got {sampling.repetition_penalty}")
    for name in ("frequency_penalty", "presence_penalty"):
        if not math.isfinite(getattr(sampling, name)):
            raise ValueError(f"{name} must be finite, got {getattr(sampling, name)}")
    if sampling.logit_bias:
        _check_vocabulary("logit_bias", [int(key) for key in sampling.logit_bias], vocab_size)
