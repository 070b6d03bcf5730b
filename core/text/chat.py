"""Chat templates: messages to the text that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jinja2

from ..errors import TemplateError
from .sandbox import Budget, Exhausted, Sandbox

_MAX_SOURCE_CHARS = 1 << 20
_RESERVED = frozenset(
    {
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "conversation",
        "tokenize",
    }
)
_MARK = "\ue000end of the final message\ue001"
"""Private-use characters: no message has them by accident. A space follows, which shows if the template trims."""


class ChatTemplate:
    """A model's template. Rendering takes a bounded time, see sandbox.py, but belongs into a worker thread.

    A template that cannot be parsed is an error only when it is rendered: the model still completes texts.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._sandbox = Sandbox()
        self._template: jinja2.Template | None = None
        self._error = ""
        try:
            if len(source) > _MAX_SOURCE_CHARS:
                raise ValueError(f"it has {len(source)} characters")
            self._template = self._sandbox.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            self._error = f"The model's chat template cannot be parsed: {_one_line(error)}."

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        **kwargs: object,
    ) -> str:
        """The prompt, special tokens written out: encode it without adding more.

        continue_final_message ends the prompt right after the last message's text, so that the model writes on;
        there is no generation prompt then. kwargs are the template's own switches, such as enable_thinking.
        Raises TemplateError, whose message may be shown to the client.
        """
        if self._template is None:
            raise TemplateError(self._error)
        reserved = sorted(_RESERVED & kwargs.keys() | self._special_tokens.keys() & kwargs.keys())
        if reserved:
            raise TemplateError(f"The chat template's argument {reserved[0]!r} cannot be set.")
        marked = [_plain(message) for message in messages]
        if continue_final_message:
            _mark_end(marked)
        text = self._render(
            self._special_tokens
            | kwargs
            | {
                "messages": marked,
                "tools": None if tools is None else [_plain(tool) for tool in tools],
                "add_generation_prompt": add_generation_prompt and not continue_final_message,
            }
        )
        return _cut_at_mark(text) if continue_final_message else text

    def _render(self, variables: Mapping[str, object]) -> str:
        assert self._template is not None
        token = self._sandbox.budget.set(Budget())
        try:
            return self._template.render(variables)
        except Exhausted as error:
            raise TemplateError(f"The model's chat template {error}.") from error
        except RecursionError as error:
            raise TemplateError("The model's chat template calls itself without end.") from error
        except (
            Exception
        ) as error:  # a template is a program: it may raise anything, for what a client sent
            raise TemplateError(
                f"The chat template refused the messages: {_one_line(error)}"
            ) from error
        finally:
            self._sandbox.budget.reset(token)


def _plain(value: Mapping[str, object]) -> dict[str, object]:
    """A copy of JSON-like data, so that a template sees dicts and lists and nothing of ours."""
    return {str(key): _plain_item(item) for key, item in value.items()}


def _plain_item(value: object) -> object:
    match value:
        case Mapping():
            return _plain(value)
        case list() | tuple():
            return [_plain_item(item) for item in value]
        case _:
            return value


def _mark_end(messages: list[dict[str, object]]) -> None:
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str):
        raise TemplateError("There is no final message with text to continue.")
    messages[-1]["content"] = content + _MARK + " "


def _cut_at_mark(text: str) -> str:
    """Up to the end of the final message, as the template wrote it."""
    head, mark, tail = text.rpartition(_MARK)
    if not mark:
        raise TemplateError(
            "The chat template does not write the final message, so it cannot be continued."
        )
    return head if tail.startswith(" ") else head.rstrip()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
