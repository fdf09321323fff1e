"""Events of a stream stay on one line for every reader."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from http_frontend.answers import one_line


@given(st.text(st.sampled_from('ab"\\\u0085\u2028\u2029\u2019\u00e9\U0001f642\x0b\x1c\n')))
def test_an_event_is_one_line_by_the_rules_of_unicode(text: str) -> None:
    body = one_line(json.dumps({"text": text}, ensure_ascii=False).encode())
    assert len(body.decode().splitlines()) == 1
    assert json.loads(body) == {"text": text}
