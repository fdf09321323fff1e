"""Chat templates: Jinja templates that come with a checkpoint and turn messages into the text of a prompt.

The environment is that of `transformers.PreTrainedTokenizerBase.apply_chat_template`, which is what templates are
written for. They come from strangers, so they run in Jinja's sandbox.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.checkpoints.render_bounds import MOST_CHARACTERS, RenderLimitError, bounded
from engine.checkpoints.tokenizer_data import Tokenizer

if TYPE_CHECKING:
    import jinja2

_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Stands at the end of the message to be continued, to find it again in the rendered text."""


class ChatTemplateError(ValueError):
    """Messages that cannot be rendered: no template, or the template refuses them."""


def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> str:
    """The prompt for `messages`. Encode it without special tokens: the template writes them itself.

    continue_final_message: leave off what closes the last message, so that the model goes on with it.
    template_kwargs: further variables for the template. Raises ChatTemplateError.
    """
    source = tokenizer.tool_template if tools and tokenizer.tool_template else tokenizer.chat_template
    if source is None:
        raise ChatTemplateError("this model has no chat template; give one with --chat-template")
    if continue_final_message:
        if add_generation_prompt:
            raise ChatTemplateError("continue_final_message and add_generation_prompt exclude each other")
        messages, final = _marked(messages)
    # Imported here, because most servers never render a chat and the import takes a tenth of the process's start.
    import jinja2

    variables = {
        **tokenizer.named_tokens,
        **(template_kwargs or {}),
        "messages": messages,
        "tools": tools,
        "documents": (template_kwargs or {}).get("documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        text = _rendered(source, variables)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error
    except (RenderLimitError, MemoryError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ChatTemplateError(f"the chat template was stopped: {reason}") from None
    return _cut_at_mark(text, final) if continue_final_message else text


def _rendered(source: str, variables: dict[str, Any]) -> str:
    """Raises RenderLimitError or MemoryError where the template does not come to an end within its bounds."""
    with bounded():
        parts, length = [], 0
        for part in _compiled(source).generate(variables):
            length += len(part)
            if length > MOST_CHARACTERS:
                raise RenderLimitError(f"its text has more than {MOST_CHARACTERS} characters")
            parts.append(part)
        return "".join(parts)


def _marked(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """A copy whose last message ends with the mark, and that message's text."""
    if not messages or messages[-1].get("content") is None:
        raise ChatTemplateError("continue_final_message is set, but the last message has no content to continue")
    messages = copy.deepcopy(messages)
    content = messages[-1]["content"]
    if isinstance(content, str):
        messages[-1]["content"] = content + _MARK
        return messages, content
    if isinstance(content, list):
        for block in reversed(content):
            if isinstance(block, dict) and isinstance(block.get("text"), str):
                final = block["text"]
                block["text"] = final + _MARK
                return messages, final
    raise ChatTemplateError("continue_final_message is set, but the last message has no text to continue")


def _cut_at_mark(text: str, final: str) -> str:
    mark = _MARK.strip()
    if mark not in text or final.strip() not in text:
        raise ChatTemplateError("continue_final_message is set, but the template does not show the last message whole")
    at = text.rindex(mark)
    kept = text[:at]
    # A template that strips messages has eaten the mark's own blank; then the blanks before the mark go as well.
    return kept if text.startswith(_MARK, at) else kept.rstrip()


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    from jinja2 import ext, nodes, parser, sandbox

    class GenerationBlock(ext.Extension):
        """`{% generation %}` marks what the assistant says, for training. Rendering ignores it."""

        tags = {"generation"}

        def parse(self, stream: parser.Parser) -> list[nodes.Node]:
            next(stream.stream)
            return stream.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raiser()
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not have."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raiser() -> Callable[[str], None]:
    import jinja2

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    return raise_exception


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
