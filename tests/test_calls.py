"""Every form of tool calls: a template says which one it writes, and what it writes is what is read."""

import copy
import logging
from typing import Any

import pytest

from agentsdpo.calls import FORMS, HERMES, JSON, XML, CallForm
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.proxy.shapes import read_answer
from agentsdpo.collect.turns import read_turn
from agentsdpo.errors import ModelError
from agentsdpo.types import Json, ToolCall, ToolSpec

_HERMES = "'\\n<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>'"
TEMPLATES = {
    "hermes": f"{{{{- {_HERMES} -}}}}",
    "xml": """{{- '\\n<tool_call>\\n<function=' + call['function']['name'] + '>\\n' -}}
{%- for key, value in call['function']['arguments'].items() -%}
{{- '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' -}}
{%- endfor -%}
{{- '</function>\\n</tool_call>' -}}""",
    "json": """{{- '{"name": "' + call['function']['name'] + '", "parameters": ' -}}
{{- (call['function']['arguments'] | tojson) + '}' -}}"""}
TOOL = ToolSpec(name="file", description="", parameters={"type": "object", "properties": {
    "path": {"type": "string"}, "count": {"type": "integer"}, "rows": {"type": "array"}, "deep": {"type": "object"},
    "maybe": {"type": ["string", "null"]}, "on": {"type": "boolean"}}})
ARGUMENTS: list[Json] = [
    {}, {"path": "/a b"}, {"path": "12", "count": 12}, {"rows": [1, "2", None], "deep": {"x": {"y": "</a>"}}},
    {"path": "line\nline <b>&\n\n  x", "on": False, "maybe": "null"}, {"path": "é 漢 \U0001f600 {\"q\": 1}"},
    {"path": "<function=g>"}, {"path": ""}, {"path": " padded "}]


def chat_of(tokenizer: Any, form: str) -> ChatFormat:
    tokenizer = copy.deepcopy(tokenizer)
    assert f"{{{{- {_HERMES} -}}}}" in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(f"{{{{- {_HERMES} -}}}}", TEMPLATES[form])
    return ChatFormat(tokenizer)


def said(chat: ChatFormat, *calls: ToolCall, content: str = "") -> str:
    """What the template makes of a turn."""
    asked: list[Json] = [{"role": "user", "content": "u"}]
    turn: Json = {"role": "assistant", "content": content, "tool_calls": [call.openai() for call in calls]}
    whole = chat.tokenizer.apply_chat_template([*asked, turn], tokenize=False)
    before = chat.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return whole.removeprefix(before).removesuffix("\n").removesuffix(chat.tokenizer.eos_token)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_what_a_template_writes_is_read(form: CallForm, tiny_tokenizer: Any) -> None:
    chat = chat_of(tiny_tokenizer, form.name)
    assert chat.calls is form
    for arguments in ARGUMENTS:
        text = said(chat, ToolCall(id="c", name="file", arguments=arguments))
        turn = read_turn(f"<think>so {{}}</think>\n{text}", 3, form=chat.calls, tools=[TOOL])
        assert [(call.id, call.name, call.arguments) for call in turn.calls] == [("call_3_0", "file", arguments)]
        assert not turn.malformed
        answer = read_answer(chat, text, 3, thinking=False, tools=[TOOL])
        assert answer["content"] == ""
        assert answer["tool_calls"][0]["function"]["arguments"] == arguments
    assert not read_turn("It is 5, of {\"name\": \"x\"}.", 0, form=form).calls
    assert not read_turn('{"total": 5}', 0, form=form).calls, "an answer may be JSON"


@pytest.mark.parametrize("form", [HERMES, XML], ids=lambda form: form.name)
def test_several_calls_and_what_was_said_before_them(form: CallForm, tiny_tokenizer: Any) -> None:
    chat = chat_of(tiny_tokenizer, form.name)
    calls = [ToolCall(id="a", name="file", arguments={"count": 1}), ToolCall(id="b", name="g", arguments={"x": "1"})]
    text = said(chat, *calls, content="First this.")
    turn = read_turn(text, 0, form=chat.calls, tools=[TOOL])
    assert [(call.name, call.arguments) for call in turn.calls] == [("file", {"count": 1}), ("g", {"x": "1"})]
    assert read_answer(chat, text, 0, thinking=False, tools=[TOOL])["content"] == "First this."


BROKEN = {
    "xml": [("<tool_call>\n<function=f>\n<parameter=a>\n1", "not closed by </tool_call>"),
            ("<tool_call>{}</tool_call>", "must be <function=NAME>"),
            ("<tool_call><function=f>free words</function></tool_call>", "'free words' is no <parameter"),
            ("<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
             "given twice")],
    "json": [('{"name": "f", "parameters": {"a": ', "not valid JSON"), ('{"name": 3}', "must be an object with"),
             ('{"name": "f", "parameters": [1]}', '"parameters" must be an object'),
             ('{"name": "f", "parameters": {"a": NaN}}', "not valid JSON")]}


@pytest.mark.parametrize(("form", "text", "message"),
                         [(form, *case) for form in (XML, JSON) for case in BROKEN[form.name]])
def test_a_broken_call_is_answered_and_kept_as_it_was_written(form: CallForm, text: str, message: str) -> None:
    turn = read_turn(text, 1, form=form, tools=[TOOL])
    (call,), (owed,) = turn.calls, turn.malformed
    assert isinstance(call.arguments, str)
    assert call.arguments in text
    assert owed.call_id == call.id == "call_1_0"
    assert message in owed.content


@pytest.mark.parametrize("noise", [" ", "\n<parameter=a>", "</parameter>", "<function=f>", "</function>", "{",
                                   "<tool_call>"])
def test_a_model_that_repeats_itself_for_a_whole_window_can_be_read(noise: str) -> None:
    """Patterns that go back for every beginning would take hours."""
    for form in FORMS:
        for text in (noise * 100_000, f'<tool_call><function=f>{noise * 100_000}</function></tool_call>',
                     '{"name": "f", "parameters": ' + noise * 100_000):
            assert {call.name for call in read_turn(text, 0, form=form, tools=[TOOL]).calls} <= {"", "f"}


def test_bare_values_that_do_not_fit_their_schema_stay_text() -> None:
    text = ("<tool_call><function=file><parameter=count>a dozen</parameter><parameter=new>1</parameter></function>"
            "</tool_call>")
    assert read_turn(text, 0, form=XML, tools=[TOOL]).calls[0].arguments == {"count": "a dozen", "new": "1"}


def test_a_form_nobody_reads_is_said(tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    TEMPLATES["odd"] = "{{- '[TOOL_CALLS]' + call['function']['name'] -}}"
    with caplog.at_level(logging.WARNING):
        chat = chat_of(tiny_tokenizer, "odd")
    assert chat.calls is HERMES
    assert "'[TOOL_CALLS]probe', a form that is not read" in caplog.text


def test_calls_without_delimiters_have_no_tokens_of_their_own(tiny_tokenizer: Any) -> None:
    chat = chat_of(tiny_tokenizer, "json")
    assert not chat.marks_calls
    with pytest.raises(ModelError, match="do not stand between two tokens of their own"):
        chat.in_calls([1, 2])
    assert chat_of(tiny_tokenizer, "xml").marks_calls
