"""The soak's own judgement: what it takes for wrong, for lost and for a leak."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

from scripts.soak.answers import GivenUpError, Item, RefusedError, WrongError, check_failure, compare
from scripts.soak.ledger import Incident, Ledger, Outage
from scripts.soak.table import Job, generating_table
from scripts.soak.tree import Sample, Tree

JOB = Job("a", "generation", "/generate", {})


def item(text: str, ids: list[int], finish: dict[str, Any] | None) -> Item:
    made = Item()
    made.add(
        {
            "text": text,
            "output_ids": ids,
            "meta_info": {"completion_tokens": len(ids), "prompt_tokens": 3, "finish_reason": finish},
        }
    )
    return made


WHOLE = item("abc", [1, 2, 3], {"type": "length", "length": 3}).essence()
ABORT = {"type": "abort", "message": "Aborted", "status_code": None}


def test_an_answer_is_the_oracles_to_the_last_token_or_wrong() -> None:
    assert compare(JOB, [item("abc", [1, 2, 3], {"type": "length", "length": 3})], [WHOLE]) == 3
    assert compare(JOB, [item("ab", [1, 2], ABORT)], [WHOLE]) == 2
    for wrong in (
        item("abc", [1, 2, 4], {"type": "length", "length": 3}),
        item("abd", [1, 2, 3], {"type": "length", "length": 3}),
        item("abc", [1, 2, 3], {"type": "stop", "matched": 3}),
        item("ab", [1, 3], ABORT),
        item("b", [1], ABORT),
        item("abc", [1, 2, 3], None),
    ):
        with pytest.raises(WrongError):
            compare(JOB, [wrong], [WHOLE])
    with pytest.raises(WrongError):
        compare(JOB, [], [WHOLE])


def test_pieces_of_a_stream_are_joined_and_none_comes_after_the_last() -> None:
    joined = item("a", [1], None)
    meta = {"prompt_tokens": 3, "completion_tokens": 3, "finish_reason": {"type": "length", "length": 3}}
    joined.add({"text": "bc", "output_ids": [2, 3], "meta_info": meta})
    assert compare(JOB, [joined], [WHOLE]) == 3
    with pytest.raises(WrongError, match="after the last"):
        joined.add({"text": "", "output_ids": [], "meta_info": meta})
    with pytest.raises(WrongError, match="completion_tokens"):
        item("a", [1], None).add({"text": "c", "output_ids": [3], "meta_info": meta})


def test_failures_are_told_apart() -> None:
    check_failure(None)
    check_failure(ABORT)
    for status, message, error in (
        (503, "The request queue is full.", RefusedError),
        (500, "Request x was in flight at 3 deaths of the scheduler and is not tried again.", GivenUpError),
        (500, "Internal error", WrongError),
        (400, "no", WrongError),
    ):
        with pytest.raises(error):
            check_failure({"type": "abort", "message": message, "status_code": status})


@pytest.mark.parametrize(
    ("kind", "what", "sent", "noticed", "excused"),
    [
        ("lost", "", 5.0, 10.3, True),
        ("lost", "", 5.0, 8.0, False),
        ("lost", "", 5.0, 30.0, False),
        ("lost", "", 20.0, 20.5, False),
        ("unhealthy", "", 21.0, 21.5, True),
        ("unhealthy", "", 2.0, 3.0, False),
        ("aborted", "", 41.0, 44.0, True),
        ("aborted", "", 44.0, 45.0, False),
        ("given up", "was in flight at 2 deaths of the scheduler", 15.0, 70.0, True),
        ("given up", "was in flight at 2 deaths of the scheduler", 30.0, 70.0, False),
        ("given up", "was in flight at 3 deaths of the scheduler", 15.0, 70.0, False),
        ("not ready", "", 51.0, 52.0, True),
        ("not ready", "", 56.0, 57.0, False),
    ],
)
def test_what_is_excused_by_what_was_done(kind: str, what: str, sent: float, noticed: float, excused: bool) -> None:
    ledger = Ledger(
        outages=[
            Outage("frontend", "SIGKILL", 1, 10.0, 10.1, 11.0),
            Outage("scheduler", "SIGSTOP", 2, 20.0, 28.0, 30.0 - 1),
            Outage("scheduler", "SIGKILL", 3, 60.0, 60.1, 64.0),
        ],
        aborts_of_all=[(42.0, 42.5)],
        pauses=[(50.0, 53.0)],
    )
    ledger.incidents.append(Incident(kind, what, sent, noticed))
    assert ledger.unexcused() == [] if excused else len(ledger.unexcused()) == 1


@pytest.mark.parametrize(("behind", "excused"), [(0.0, False), (4.0, True)])
def test_who_reads_slowly_notices_late(behind: float, excused: bool) -> None:
    ledger = Ledger(outages=[Outage("frontend", "SIGKILL", 1, 10.0, 10.1, 11.0)])
    ledger.incidents.append(Incident("lost", "", 9.0, 16.0, behind))
    assert (ledger.unexcused() == []) == excused


def test_growth_in_a_life_and_from_life_to_life_is_a_leak() -> None:
    flat = [Sample(at, "frontend", 1 + at // 4, 30.0, 50 << 20, 30 + at % 3) for at in range(12)]
    growing = [Sample(at, "tokenizer", 7, 30.0, (50 + 5 * at) << 20, 16) for at in range(12)]
    later = [Sample(at, "scheduler", at, 30.0, (90 if at > 5 else 50) << 20, 16) for at in range(12)]
    open_files = [Sample(at, "launcher", 9, 30.0, 50 << 20, 20 + at) for at in range(12)]
    young = [Sample(at, "detokenizer", at, 1.0, at << 25, at) for at in range(12)]
    tree = Tree(psutil.Process(), samples=[*flat, *growing, *later, *open_files, *young])
    _, faults = tree.growth(32 << 20, 0, 4)
    wanted = [("memory", "tokenizer"), ("memory", "scheduler"), ("descriptors", "launcher")]
    assert [words.split(":")[0] for words in faults] == [f"the {what} of the {role} grow{'s' * (what == 'memory')}"
                                                         for what, role in wanted]  # fmt: skip
    assert len(tree.growth(32 << 20, 64 << 20, 4)[1]) == 2


def test_the_table_is_the_seeds() -> None:
    assert generating_table(3) == generating_table(3) != generating_table(4)
    assert len({job.name for job in generating_table(3)}) == len(generating_table(3))
