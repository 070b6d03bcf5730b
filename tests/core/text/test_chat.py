from __future__ import annotations

import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from chipset.core.errors import InvalidRequest, TemplateError
from chipset.core.text.chat import ChatTemplate
from chipset.core.text.tokenizer import Tokenizer

from . import templates

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS: dict[str, list[dict[str, object]]] = {
    "one": [{"role": "user", "content": "Hi"}],
    "unicode": [{"role": "user", "content": " <b>Grüße & 日本</b> \n"}],
    "system": [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "name": "calculator"},
        {"role": "user", "content": "really?\n"},
    ],
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"ä": [1, None, True]}}}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("source", templates.ALL.values(), ids=templates.ALL)
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_renders_as_transformers_does(
    source: str,
    chat: list[dict[str, object]],
    prompted: bool,
    tools: list[dict[str, object]] | None,
) -> None:
    expected, _ = render_jinja_template(
        [chat], tools=tools, chat_template=source, add_generation_prompt=prompted, **SPECIAL
    )
    rendered = ChatTemplate(source, SPECIAL).render(
        chat, add_generation_prompt=prompted, tools=tools
    )
    assert rendered == expected[0]


@pytest.mark.parametrize("content", ["Sure, ", "Sure", " x\n", ""])
@pytest.mark.parametrize("name", ["chatml", "llama", "gemma", "mistral", "generation"])
def test_continues_the_final_message_as_transformers_does(name: str, content: str) -> None:
    chat = [*CHATS["one"], {"role": "assistant", "content": content}]
    source = templates.ALL[name]
    expected, _ = render_jinja_template(
        [chat], chat_template=source, continue_final_message=True, **SPECIAL
    )
    assert ChatTemplate(source, SPECIAL).render(chat, continue_final_message=True) == expected[0]


def test_the_default_model_has_its_own(default_tokenizer: Tokenizer) -> None:
    template = default_tokenizer.chat_template
    assert template is not None
    for chat in CHATS.values():
        expected, _ = render_jinja_template(
            [chat], chat_template=template.source, add_generation_prompt=True
        )
        assert template.render(chat) == expected[0]
    assert template.render(CHATS["one"]).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_switches_of_the_template_reach_it() -> None:
    template = ChatTemplate(templates.SWITCHES, SPECIAL)
    assert "<think>" in template.render(CHATS["one"], thinking=True)
    assert "<think>" not in template.render(CHATS["one"])


@pytest.mark.parametrize("name", ["messages", "tokenize", "chat_template", "bos_token"])
def test_switches_cannot_replace_what_is_ours(name: str) -> None:
    with pytest.raises(TemplateError, match=name):
        ChatTemplate(templates.LLAMA, SPECIAL).render(CHATS["one"], **{name: "x"})


def test_the_template_cannot_change_the_messages() -> None:
    chat = [{"role": "user", "content": ["a"]}]
    with pytest.raises(TemplateError, match="unsafe"):
        ChatTemplate("{{ messages[0].content.append('b') }}", {}).render(chat)
    assert chat == [{"role": "user", "content": ["a"]}]


def test_what_the_template_refuses_is_an_invalid_request() -> None:
    chat = [{"role": "assistant", "content": "I begin"}]
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatTemplate(templates.MISTRAL, SPECIAL).render(chat)


@pytest.mark.parametrize(
    "source", ["{% for %}", "{% unknown %}", "{{ 'x' | nope }}", "x" * 2_000_000]
)
def test_a_template_that_cannot_be_parsed_fails_when_it_is_used(source: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(TemplateError, match="cannot be parsed"):
        template.render(CHATS["one"])


@pytest.mark.parametrize(
    "chat", [[], [{"role": "assistant"}], [{"role": "assistant", "content": []}]]
)
def test_only_a_message_with_text_can_be_continued(chat: list[dict[str, object]]) -> None:
    with pytest.raises(TemplateError, match="to continue"):
        ChatTemplate(templates.CHATML, {}).render(chat, continue_final_message=True)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__.os }}",
    "{{ raise_exception.__globals__ }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__base__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ dict.mro() }}",
    "{{ strftime_now.__closure__ }}",
    "{{ self._TemplateReference__context.environment.filters }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_leads_out_of_the_sandbox(source: str) -> None:
    try:
        rendered = ChatTemplate(source, SPECIAL).render(CHATS["one"])
    except TemplateError:
        return
    assert rendered.strip() == ""


_REPEATED = "{{% set n = namespace(x={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{{{{ n.x }}}}"
BOMBS = [
    *(
        _REPEATED.format(start=start, step=f"{{% set n.x = {step} %}}")
        for start, step in [
            ("'aa'", "n.x ~ n.x"),
            ("'aa'", "n.x + n.x"),
            ("'aa'", "n.x.replace('a', 'aa')"),
            ("['a']", "n.x + n.x"),
            ("['a']", "n.x * 2"),
            ("['a']", "[n.x, n.x]"),
            ("['a']", "(n.x, n.x)"),
            ("['a']", "{'a': n.x, 'b': n.x}"),
            ("['a']", "dict(a=n.x, b=n.x)"),
        ]
    ),
    _REPEATED.format(
        start="'aa'", step="{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"
    ),
    "{% for a in range(999) %}" * 3 + "x" + "{% endfor %}" * 3,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ 10 ** 9 * 'x' }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 'x'.ljust(10 ** 9) }}",
    "{{ 'x' | center(10 ** 9) }}",
    "{{ 'a\nb' | indent(10 ** 9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ (['x' * 1000000] * 1000) | join }}",
    "{{ ','.join(['x' * 1000000] * 1000) }}",
    "{{ [1] | tojson(indent=10 ** 7) }}",
    "{{ range(10 ** 9) | list }}",
    "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_bomb_goes_off_as_an_error_within_two_seconds(source: str) -> None:
    before = time.thread_time()
    with pytest.raises(TemplateError):
        ChatTemplate(source, {}).render(CHATS["one"])
    assert time.thread_time() - before < 2


def test_a_long_conversation_is_no_bomb() -> None:
    chat = [
        {"role": ("user", "assistant")[number % 2], "content": "word " * 400}
        for number in range(2000)
    ]
    for source in (templates.CHATML, templates.LLAMA, templates.MISTRAL, templates.GEMMA):
        assert len(ChatTemplate(source, SPECIAL).render(chat)) > 3_500_000
