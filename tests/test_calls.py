"""Every form of tool calls: a template says which one it writes, and what it writes is what is read."""

import copy
import logging
import warnings
from typing import Any

import pytest

from agentsdpo.calls import FORMS, HERMES, JSON, XML, CallForm
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.proxy.shapes import read_answer
from agentsdpo.collect.turns import check_call, read_turn
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


def test_a_call_whose_first_tag_was_forgotten_is_one() -> None:
    """Qwen3-Coder's at times; what it says of its calls inside a line is none."""
    inside = "<function=file>\n<parameter=count>\n2\n</parameter>\n</function>"
    for text in (f"I look.\n{inside}\n</tool_call>", f"I look.\n{inside}",
                 f"I look.\n<tool_call>\n{inside}\n</tool_call>"):
        turn = read_turn(text, 0, form=XML, tools=[TOOL])
        assert [(call.name, call.arguments) for call in turn.calls] == [("file", {"count": 2})]
        assert not turn.malformed
        assert text[:turn.calls_at].rstrip() == "I look."
    assert len(read_turn(f"{inside}\n{inside}", 0, form=XML, tools=[TOOL]).calls) == 2
    assert "not closed" in read_turn("<function=file>\n<parameter=cou", 0, form=XML, tools=[TOOL]).malformed[0].content
    assert not read_turn("A call is <function=file>, as you know.", 0, form=XML, tools=[TOOL]).calls
    assert not read_turn(inside, 0, form=HERMES, tools=[TOOL]).calls


@pytest.mark.parametrize(("form", "text", "said"), [
    (HERMES, "<think>I write <tool_call> now.</think>So.\n<tool_call>{}</tool_call>",
     "<think>I write <tool_call> now.</think>So."),
    (JSON, '<think>a</think>{"name": "f", "parameters": {"x": "<tool_call>"}}', "<think>a</think>"),
    (HERMES, '{"name": "f"} <tool_call>{}</tool_call>', '{"name": "f"}')])
def test_what_is_said_in_front_of_calls_is_read_in_the_same_form_as_these(form: CallForm, text: str, said: str) -> None:
    turn = read_turn(text, 0, form=form)
    assert turn.calls
    assert text[:turn.calls_at].rstrip() == said


def test_bare_values_that_do_not_fit_their_schema_stay_text() -> None:
    text = ("<tool_call><function=file><parameter=count>a dozen</parameter><parameter=new>1</parameter></function>"
            "</tool_call>")
    assert read_turn(text, 0, form=XML, tools=[TOOL]).calls[0].arguments == {"count": "a dozen", "new": "1"}


def xml(value: str, key: str = "x") -> str:
    return f"<tool_call>\n<function=f>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>"


WHOLE = {"type": "integer"}
TYPED: list[tuple[Any, str, Any]] = [
    ({"anyOf": [WHOLE, {"type": "null"}]}, "5", 5), ({"anyOf": [WHOLE, {"type": "null"}]}, "null", None),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", "null"),
    ({"oneOf": [WHOLE, {"type": "string"}]}, "5", "5"),
    ({"$ref": "#/$defs/n"}, "5", 5), ({"$ref": "#/$defs/n"}, "five", "five"), ({"enum": [1, 2]}, "2", 2),
    ({"enum": ["1"]}, "1", "1"), ({"const": True}, "true", True), ({"allOf": [{"$ref": "#/$defs/n"}]}, "7", 7),
    ({"type": "boolean"}, "True", True), ({"type": ["object", "null"]}, "None", None),
    ({"type": "string"}, "None", "None")]


@pytest.mark.parametrize(("schema", "value", "wanted"), TYPED)
def test_a_bare_value_is_what_its_schema_takes(schema: Any, value: str, wanted: Any) -> None:
    tool = ToolSpec(name="f", description="", parameters={"type": "object", "properties": {"x": schema},
                                                          "required": ["x", "y"], "$defs": {"n": WHOLE}})
    (call,) = read_turn(xml(value), 0, form=XML, tools=[tool]).calls
    assert isinstance(call.arguments, dict)
    assert call.arguments["x"] == wanted
    assert type(call.arguments["x"]) is type(wanted)


@pytest.mark.parametrize("properties", [
    [1], "x", None, {"x": None}, {"x": True}, {"x": {"type": None}}, {"x": {"type": 5}}, {"x": {"$ref": "#/nowhere"}},
    {"x": {"$ref": "#/properties/x"}}, {"x": {"$ref": 1}}, {"x": {"anyOf": 1}}, {"x": {"$schema": 1}}])
def test_a_schema_that_is_none_leaves_values_as_text(properties: Any) -> None:
    tool = ToolSpec(name="f", description="", parameters={"properties": properties})
    for form in FORMS:
        read_turn(xml("1"), 0, form=form, tools=[tool])
    assert read_turn(xml("1"), 0, form=XML, tools=[tool]).calls[0].arguments == {"x": "1"}


def test_no_schema_has_anything_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client of the proxy, or a server of tools, could have this machine ask any address."""
    asked: list[Any] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: asked.append(args))
    tool = ToolSpec(name="f", description="", parameters={"properties": {"x": {"$ref": "http://10.0.0.1/x.json"}}})
    with warnings.catch_warnings(action="ignore"):
        (call,) = read_turn(xml("1"), 0, form=XML, tools=[tool]).calls
        assert check_call(call, {"f": tool}) is None
    assert not asked
    assert call.arguments == {"x": "1"}


def test_values_that_a_template_turned_into_text_as_python_does_are_read(tiny_tokenizer: Any) -> None:
    """As that of Qwen3-Coder."""
    TEMPLATES["spoken"] = TEMPLATES["xml"].replace("value | tojson)", "value | string)")
    chat = chat_of(tiny_tokenizer, "spoken")
    arguments: Json = {"on": True, "count": 2, "path": "True"}
    text = said(chat, ToolCall(id="c", name="file", arguments=arguments))
    assert "\nTrue\n" in text
    assert read_turn(text, 0, form=chat.calls, tools=[TOOL]).calls[0].arguments == arguments


def test_json_with_a_name_is_a_call_only_if_nothing_else_is_in_it() -> None:
    def calls(text: str) -> list[Any]:
        return [(call.name, call.arguments) for call in read_turn(text, 0, form=JSON).calls]

    assert not calls('{"name": "Alice", "total": 3}'), "an answer"
    assert calls('{"type": "function", "name": "f", "parameters": {"x": 1}}') == [("f", {"x": 1})], "as Llama does"
    assert calls('{"name": "get"}') == [("get", {})]
    assert calls('{"name": "f", "arguments": {"x": 1}}') == [("f", {"x": 1})], "not run without what it was given"
    two = '{"name": "f", "parameters": {}}\r\n\t{"name": "g", "parameters": {"a": "<tool_call>"}}'
    assert calls(two) == [("f", {}), ("g", {"a": "<tool_call>"})]
    assert read_turn(two, 0, form=JSON).calls_at == 0
    assert len(calls('{"name": "f"}' + " 1" * 300_000)) == 2, "what is no object is one broken call"


@pytest.mark.parametrize("form", ["xml", "json"])
def test_histories_that_a_template_refuses_are_told_one_call_at_a_time(form: str, tiny_tokenizer: Any) -> None:
    """Llama's refuses several calls in a turn, Qwen3-Coder's one whose arguments are no object."""
    once = "{{- raise_exception('one at a time') if message['tool_calls'] | length > 1 -}}"
    TEMPLATES["strict"] = once + TEMPLATES[form]
    chat = chat_of(tiny_tokenizer, "strict")
    broken, calls = ToolCall(id="a", name="", arguments="<function=f"), [
        ToolCall(id=name, name="file", arguments={"path": name}) for name in ("b", "c")]
    asked: list[Json] = [{"role": "user", "content": "u"}]
    turn = {"role": "assistant", "content": "So.", "tool_calls": [call.openai() for call in (broken, *calls)]}
    answers = [{"role": "tool", "tool_call_id": call.id, "content": "r"} for call in (broken, *calls)]
    text = chat.decode(chat.open([*asked, turn, *answers], [TOOL]))
    after = text.partition("So.\n")[2].split("<|im_end|>")
    assert after[0].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>") == "<function=f"
    for turn_text, call in zip(after[1:], calls, strict=False):
        (read,) = read_turn(turn_text.partition("assistant\n")[2], 0, form=chat.calls, tools=[TOOL]).calls
        assert read.arguments == call.arguments
    assert text.count("<tool_response>\nr\n</tool_response>") == 3


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
