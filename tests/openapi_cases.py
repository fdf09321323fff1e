"""Schemathesis over a server's own /openapi.json: good and bad requests of every operation, and what is asked of the
answers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

SLOWEST = 30.0
"""Seconds that an answer may take, on a machine that does other things as well."""
_CHECKS = [
    status_code_conformance, content_type_conformance, response_headers_conformance, response_schema_conformance,
]  # fmt: skip


def fuzz(
    url: str, most: int, *, without: Collection[str] = (), only: Collection[str] = (), first: int = 1
) -> Counter[int]:
    """Send up to `most` good and as many bad requests to each operation; returns how many answers had which status.

    An answer has a status, type and body that the document declares; of the server's errors it may be the 503 of
    overload only. without, only: paths. first: seed.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schema.validate()
    schema.config.update(base_url=url)
    statuses: Counter[int] = Counter()
    session = requests.Session()
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in without or (only and operation.path not in only):
            continue
        for mode in GenerationMode:
            strategy = operation.as_strategy(generation_mode=mode)

            @seed(first)
            @settings(
                max_examples=most, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(strategy)
            def send(case: Case) -> None:
                statuses[_answered(case, session)] += 1

            try:
                send()
            except Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE, operation.path  # it takes nothing that could be wrong
    session.close()
    return statuses


def _answered(case: Case, session: Any) -> int:
    """Send the case, check its answer, and return the status."""
    started = time.monotonic()
    answer = case.call(session=session, timeout=SLOWEST, allow_redirects=False)
    assert time.monotonic() - started < SLOWEST
    if answer.status_code in (307, 405):
        return int(answer.status_code)  # of the router: another path, or another method, than the document's
    assert answer.status_code < 500 or answer.status_code == 503, (answer.status_code, answer.text)
    case.validate_response(answer, checks=_CHECKS)
    return int(answer.status_code)
