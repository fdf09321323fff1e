"""Chat templates of strangers: what they may not reach, and what they may not take."""

from __future__ import annotations

import contextlib
import resource
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from engine.checkpoints import chat_template, render_bounds
from engine.checkpoints.chat_template import ChatTemplateError, render_chat


def render(template: str, **variables: Any) -> str:
    tokenizer: Any = SimpleNamespace(chat_template=template, tool_template=None, named_tokens={})
    return render_chat(tokenizer, [{"role": "user", "content": "hello"}], template_kwargs=variables)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception.__code__.co_consts[0] }}",
        "{{ strftime_now.__globals__['datetime'] }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ self._TemplateReference__context.environment.loader.x }}",
        "{{ ('%s' | attr('format'))('{0.__class__.__mro__}').format(1).x }}",
        "{{ ''['__cl' ~ 'ass__']['__mro__'] }}",
        "{{ messages | attr('__class__') | attr('__mro__') }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
    ],
)
def test_a_template_reaches_nothing_outside(template: str) -> None:
    try:
        text = render(template)
    except ChatTemplateError:
        return
    assert not any(word in text for word in ("class", "object", "module", "function", "root:", "uid=")), text


@pytest.mark.parametrize("change", ["append({})", "pop()", "clear()", "reverse()", "extend([1])"])
def test_a_template_changes_nothing_that_it_is_given(change: str) -> None:
    shared: list[Any] = [{"a": 1}, {"a": 2}]
    with pytest.raises(ChatTemplateError, match="SecurityError"):
        render(f"{{{{ shared.{change} }}}}", shared=shared)
    with pytest.raises(ChatTemplateError, match="SecurityError"):
        render("{{ shared[0].update({'a': 3}) }}", shared=shared)
    assert shared == [{"a": 1}, {"a": 2}]


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail what takes more CPU time, which a bound of its own has not ended."""

    def fail(*_: object) -> None:
        raise AssertionError("it was not stopped")

    before = signal.signal(signal.SIGVTALRM, fail)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].content }}{% endfor %}{% endfor %}",
        "{{ ('a' * (4 * 10 ** 8)) | length }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{{ 'a' | center(10 ** 10) }}",
        "{% set n = namespace(s='aaaaaaaaaa') %}{% for i in range(90) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{% set n = namespace(s=[1]) %}{% for i in range(90) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_template_takes_no_more_than_it_may(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = render_bounds.bounded
    monkeypatch.setattr(chat_template, "bounded", lambda: bounded(0.5, 256 << 20))
    limit, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    with at_most(5.0), pytest.raises(ChatTemplateError, match="chat template"):
        render(template)
    assert time.monotonic() - began < 5.0
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == (limit, handler)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert render("{{ messages[0].content }}!") == "hello!"


def test_the_text_of_a_template_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MOST_CHARACTERS", 100)
    assert len(render("{% for i in range(20) %}hello{% endfor %}")) == 100
    with pytest.raises(ChatTemplateError, match="more than 100 characters"):
        render("{% for i in range(21) %}hello{% endfor %}")


def test_messages_are_data() -> None:
    assert render("{{ messages[0].content }}{{ x }}", x="{{ 7 * 7 }}") == "hello{{ 7 * 7 }}"
