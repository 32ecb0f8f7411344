"""Tool calls and thoughts in what models write, however it is cut into pieces; and what the API makes of them."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from types import SimpleNamespace

import httpx
import pytest
from fake_engine import BOS, EOS, HERMES_CALL, FakeEngine, FakeTokenizer
from inside import Inside

from octavo.engine.grammar import compile_here
from octavo.server.tools import (
    REASONING_PARSERS,
    REQUIRED,
    TOOL_PARSERS,
    Calls,
    Form,
    Message,
    Reasoning,
    whole_message,
)

ONE = [("weather", {"city": "Zürich", "days": 2})]
TWO = [*ONE, ("time", {})]
ZURICH = '{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}'
PARAMETERS = '{"name": "weather", "parameters": {"city": "Zürich", "days": 2}}'
WRITTEN = [
    ("hermes", f"<tool_call>\n{ZURICH}\n</tool_call>", "", ONE),
    (
        "qwen",
        f'Let me see.\n<tool_call>{ZURICH}</tool_call>\n<tool_call>{{"name": "time"}}</tool_call>',
        "Let me see.\n",
        TWO,
    ),
    ("hermes", f"<tool_call>{ZURICH}", "", ONE),
    ("hermes", "a < b and <tool> and <tool_cal", "a < b and <tool> and <tool_cal", []),
    ("hermes", "<tool_call>no JSON</tool_call> so", "<tool_call>no JSON</tool_call> so", []),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("llama3_json", PARAMETERS, "", ONE),
    ("llama3_json", f'<|python_tag|>{PARAMETERS}; {{"name": "time", "parameters": {{}}}}', "", TWO),
    ("llama3_json", "\n " + PARAMETERS, "", ONE),
    ("llama3_json", "{not a call}", "{not a call}", []),
    ("llama3_json", "It is {x}.", "It is {x}.", []),
    ("mistral", f'[TOOL_CALLS][{ZURICH}, {{"name": "time", "arguments": {{}}}}]', "", TWO),
    ("mistral", 'So:[TOOL_CALLS]weather{"city": "Zürich", "days": 2}[TOOL_CALLS]time[ARGS]{}', "So:", TWO),
    ("mistral", "[TOOL_CALLS]hm", "[TOOL_CALLS]hm", []),
    ("pythonic", '[weather(city="Zürich", days=2), time()]', "", TWO),
    ("pythonic", '[weather(city=open("/etc/passwd"))]', '[weather(city=open("/etc/passwd"))]', []),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[" * 5000, "[" * 5000, []),
    ("pythonic", "No list.", "No list.", []),
]


def message_of(text: str, size: int, *, parser: str | None = None, reasoning: Reasoning | None = None) -> dict:
    message = Message(reasoning, Calls(TOOL_PARSERS[parser]) if parser else None, single=False)
    deltas = []
    for at in range(0, len(text), size):
        deltas += message.feed(text[at : at + size])
    return whole_message(deltas + message.feed("", last=True))


@pytest.mark.parametrize(("parser", "text", "content", "calls"), WRITTEN)
def test_calls_are_found_however_the_text_is_cut(parser: str, text: str, content: str, calls: list) -> None:
    for size in (1, 2, 3, 7, 19, len(text)):
        message = message_of(text, size, parser=parser)
        assert (message["content"] or "") == content
        found = [call["function"] for call in message.get("tool_calls", ())]
        assert [(call["name"], json.loads(call["arguments"])) for call in found] == calls
        assert len({call["id"] for call in message.get("tool_calls", ())}) == len(calls)


FORMS = {**TOOL_PARSERS, "required": REQUIRED, "named": Form(openings=("{",), head=r"(?=\{)", named="weather")}
FRAGMENTS = (*"{}[]()\"\\'<,;= \nax1", '"name":', '"arguments": {', "</tool_call>", "<tool_call>", "[TOOL_CALLS]")
FRAGMENTS += ("<|python_tag|>", "[ARGS]", "weather(", "city=", '{"a": [1, "}"]}', PARAMETERS, ZURICH)


def split_anyhow(text: str, luck: random.Random) -> list[str]:
    cuts = sorted(luck.choices(range(len(text) + 1), k=luck.randrange(len(text) + 2)))
    return [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]


def spoiled(text: str, luck: random.Random) -> str:
    for _ in range(luck.randrange(4)):
        at = luck.randrange(len(text) + 1)
        text = text[:at] + luck.choice(FRAGMENTS) + text[at + luck.randrange(3) :]
    return text[: luck.randrange(len(text) + 1)] if luck.random() < 0.2 else text


@pytest.mark.parametrize("name", FORMS)
def test_deltas_add_up_to_the_whole_answer(name: str) -> None:
    """For any text, sound or not, cut into any tokens: the same content, names and arguments."""
    luck = random.Random(name)
    texts = [row[1] for row in WRITTEN if len(row[1]) < 200]
    own = [row[1] for row in WRITTEN if row[0] == name and row[3]]
    own = own or [f"[{PARAMETERS}, {PARAMETERS}]" if name == "required" else '{"city": "Rome"}']
    num_called = 0
    for _ in range(300):
        text = spoiled(luck.choice(luck.choice((own, texts))), luck)
        whole, cut = (Message(None, Calls(FORMS[name]), single=False) for _ in range(2))
        pieces = split_anyhow(text, luck)
        deltas = [delta for piece in pieces for delta in cut.feed(piece)] + cut.feed("", last=True)
        expected, got = whole_message(whole.feed(text, last=True)), whole_message(deltas)
        for message in (expected, got):
            for call in message.get("tool_calls", ()):
                del call["id"]
        assert got == expected, pieces
        num_called += "tool_calls" in got
    assert num_called > 30


@pytest.mark.parametrize(
    ("name", "before", "arguments", "behind"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": ', '{"a": "</tool_call> \\" }", "b": [{}]}', "}</tool_call>"),
        ("hermes", '<tool_call>{"name": "f", "arguments": ', '{"a": 1}', "</tool_call> A brace was forgotten."),
        ("llama3_json", '{"name": "f", "parameters": ', '{ "a":"long text"\n}', "}"),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]abc[ARGS]", '{"a": "long text"}', ""),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": ', '{"a": "long text"}', ', "id": "123456789"}]'),
        ("required", '[{"name": "f", "parameters": ', '{"a": "long text"}', "}]"),
        ("named", "", '{"city": "Rome", "b": {}}', "\n"),
        ("pythonic", "[f(", '{"a": "x, )", "b": [1, null]}', ")]"),
    ],
)
def test_arguments_are_told_while_they_are_written(name: str, before: str, arguments: str, behind: str) -> None:
    """Every letter at its time, as it was written; Python's literals each at its end."""
    written = arguments if name != "pythonic" else "a='x, )', b=[1, None]"
    message, told = Message(None, Calls(FORMS[name]), single=False), []
    for letter in before + written + behind:
        deltas = message.feed(letter)
        told.append("".join(call["function"]["arguments"] for d in deltas for call in d.get("tool_calls", ())))
    assert "".join(told) == arguments
    inside = told[len(before) : len(before) + len(written)]
    assert inside == (list(arguments) if name != "pythonic" else inside)
    assert sum(map(bool, told)) == (len(arguments) if name != "pythonic" else 2)


def test_the_official_client_sees_arguments_grow(serve) -> None:
    server = serve(FakeEngine(answer=HERMES_CALL), tool_form=TOOL_PARSERS["hermes"])
    with server.client.chat.completions.stream(model="fake", **CHAT) as events:
        kind = "tool_calls.function.arguments.delta"
        deltas = [event.arguments_delta for event in events if event.type == kind]
        message = events.get_final_completion().choices[0].message
    assert len(deltas) > 10
    assert "".join(deltas) == message.tool_calls[0].function.arguments == '{"zone": "CET"}'


def test_a_call_that_max_tokens_cuts_is_shown_as_far_as_it_went() -> None:
    ask = Inside(FakeEngine(answer=HERMES_CALL), tool_form=TOOL_PARSERS["hermes"])
    choice = ask("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 55}).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "time", "arguments": '{"zone": "'}


def test_every_parser_is_tested() -> None:
    assert {row[0] for row in WRITTEN} == set(TOOL_PARSERS)


@pytest.mark.parametrize(
    ("parser", "text", "thought", "content"),
    [
        ("qwen3", "<think>\nIs it?\n</think>\n\nYes.", "\nIs it?\n", "\n\nYes."),
        ("qwen3", "Yes </think>.", None, "Yes </think>."),
        ("qwen3", "  <think>cut", "cut", ""),
        ("qwen3", "<thin", None, "<thin"),
        ("deepseek_r1", "Is it?</think>Yes.", "Is it?", "Yes."),
        ("deepseek_r1", "<think>Is it?</think>Yes.", "Is it?", "Yes."),
        ("deepseek_r1", "Is it", "Is it", ""),
    ],
)
def test_thoughts_are_split_off(parser: str, text: str, thought: str | None, content: str) -> None:
    assert parser in REASONING_PARSERS
    for size in (1, 2, 5, len(text)):
        message = message_of(text, size, reasoning=Reasoning(opened=parser == "deepseek_r1", shown=True))
        assert (message.get("reasoning_content"), message["content"]) == (thought, content)
    hidden = message_of(text, 3, reasoning=Reasoning(opened=parser == "deepseek_r1", shown=False))
    assert "reasoning_content" not in hidden
    assert hidden["content"] == content


def tool(name: str, **properties: object) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


CHAT = {
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [tool("weather", city={"type": "string"}), tool("time")],
}


def chunks(answer) -> list[dict]:
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return [json.loads(event)["choices"][0] for event in events[:-1]]


def test_auto_calls_whole_and_streamed() -> None:
    ask = Inside(FakeEngine(answer=HERMES_CALL), tool_form=TOOL_PARSERS["hermes"])
    choice = ask("POST", "/v1/chat/completions", json=CHAT).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "Hm. "
    (call,) = message["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "time", "arguments": '{"zone": "CET"}'})
    streamed = chunks(ask("POST", "/v1/chat/completions", json={**CHAT, "stream": True}))
    assert "".join(c["delta"].get("content", "") for c in streamed) == "Hm. "
    first, *others = [call for c in streamed for call in c["delta"].get("tool_calls", ())]
    assert (first["index"], first["type"], first["function"]) == (0, "function", {"name": "time", "arguments": ""})
    assert [one["function"]["arguments"] for one in others] == list('{"zone": "CET"}'), "as the tokens come"
    assert all(one.keys() == {"index", "function"} and one["index"] == 0 for one in others)
    assert streamed[-1]["finish_reason"] == "tool_calls"
    with_logprobs = chunks(ask("POST", "/v1/chat/completions", json={**CHAT, "stream": True, "logprobs": True}))
    assert sum(len((c["logprobs"] or {"content": []})["content"]) for c in with_logprobs) == len(HERMES_CALL) + 1


def test_one_call_where_they_may_not_be_parallel() -> None:
    two = b'<tool_call>{"name": "time"}</tool_call><tool_call>{"name": "weather"}</tool_call>'
    ask = Inside(FakeEngine(answer=two), tool_form=TOOL_PARSERS["hermes"])
    for parallel, count in ((None, 2), (True, 2), (False, 1)):
        body = {**CHAT, "parallel_tool_calls": parallel}
        message = ask("POST", "/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert len(message["tool_calls"]) == count
        assert message["content"] is None


def test_arguments_that_nest_without_end_are_shown_as_they_are() -> None:
    nested = "[" * 100_000
    call = {"id": "c", "type": "function", "function": {"name": "time", "arguments": nested}}
    body = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert Inside()("POST", "/v1/chat/completions", json=body).status_code == 200


def test_required_and_named_calls_are_made_by_a_grammar() -> None:
    """No parser is needed: the answer is JSON of the tools' schemas."""
    ask = Inside(FakeEngine(answer=b'[{"name": "time", "parameters": {"a": 1}}]'))
    body = {**CHAT, "tool_choice": "required", "parallel_tool_calls": False}
    choice = ask("POST", "/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "time", "arguments": '{"a": 1}'}
    kind, schema = ask.engine.seen[-1].params.structured_outputs.chosen
    assert kind == "json"
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    names = [one["properties"]["name"]["const"] for one in schema["items"]["anyOf"]]
    assert names == ["weather", "time"]
    ask = Inside(FakeEngine(answer=b'{"city": "Rome"}'))
    body = {**CHAT, "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    choice = ask("POST", "/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "stop", "as OpenAI's, for a function that was named"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    kind, schema = ask.engine.seen[-1].params.structured_outputs.chosen
    assert schema["properties"] == {"city": {"type": "string"}}


def test_each_tool_keeps_its_own_definitions() -> None:
    """Definitions of one name, draft-07's keyword, and a schema that refers to itself."""
    llguidance = pytest.importorskip("llguidance")

    def refers(name: str, ref: str, **more: object) -> dict:
        schema = {"type": "object", "properties": {"x": {"$ref": ref}}, "required": ["x"], **more}
        return {"type": "function", "function": {"name": name, "parameters": {**schema, "additionalProperties": False}}}

    tools = [
        refers("a", "#/$defs/T", **{"$defs": {"T": {"type": "integer"}}}),
        refers("b", "#/definitions/T", definitions={"T": {"const": "u"}}),
        {"type": "function", "function": {"name": "c", "parameters": {"properties": {"next": {"$ref": "#"}}}}},
    ]
    ask = Inside(FakeEngine(answer=b"[]"))
    assert (
        ask("POST", "/v1/chat/completions", json={**CHAT, "tools": tools, "tool_choice": "required"}).status_code == 200
    )
    grammar = compile_here(ask.engine.seen[-1].params.structured_outputs)
    tokenizer = llguidance.LLTokenizer("byte")
    for name, argument, fits in (("a", 5, True), ("a", "u", False), ("b", "u", True), ("b", 5, False)):
        text = json.dumps([{"name": name, "parameters": {"x": argument}}], separators=(",", ":"))
        ids = tokenizer.tokenize_str(text)
        assert (llguidance.LLMatcher(tokenizer, grammar).try_consume_tokens(ids) == len(ids)) == fits


ZONE = {"type": "object", "properties": {"zone": {"enum": ["CET", "a::=b"]}}, "required": ["zone"]}
STRICT = {"name": "time", "strict": True, "parameters": {**ZONE, "additionalProperties": False}}
STRICT_BODY = {**CHAT, "tools": [tool("weather", n={"const": 1}), {"type": "function", "function": STRICT}]}
MARKS = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")


class MarkTokenizer(FakeTokenizer):
    """One that has special tokens for marks: 258 to 260."""

    special_ids = frozenset((BOS, EOS, 258, 259, 260))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [258 + MARKS.index(text)] if text in MARKS else super().encode(text)


class Words(SimpleNamespace):
    """The same as llguidance asks for it."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = EOS
    special_token_ids = tuple(range(256, 261))
    tokens = tuple([bytes([byte]) for byte in range(256)] + [b"<bos>", b"<eos>", *map(str.encode, MARKS)])

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def fits(grammar: str, text: str, *, special: bool = False) -> bool:
    """Whether a text can be written, and whole, under a grammar; with `special` its marks are special tokens."""
    llguidance = pytest.importorskip("llguidance")
    parts = re.split("(" + "|".join(map(re.escape, MARKS)) + ")", text) if special else [text]
    ids = [i for part in parts for i in ([258 + MARKS.index(part)] if part in MARKS else part.encode())]
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer(Words(), n_vocab=261, eos_token=[EOS]), grammar)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def written(name: str, *calls: tuple[str, dict]) -> str:
    """Calls as the models of a form write them."""
    word = "parameters" if name in ("llama3_json", "tagged") else "arguments"
    objects = [json.dumps({"name": called, word: arguments}) for called, arguments in calls]
    keywords = [(called, ", ".join(f"{k}={json.dumps(v)}" for k, v in own.items())) for called, own in calls]
    return {
        "hermes": "".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects),
        "llama3_json": "; ".join(objects),
        "tagged": "<|python_tag|>" + "; ".join(objects),
        "mistral": f"[TOOL_CALLS] [{', '.join(objects)}]",
        "named": "".join(f"[TOOL_CALLS]{called}[ARGS]{json.dumps(own)}" for called, own in calls),
        "pythonic": "[" + ", ".join(f"{called}({own})" for called, own in keywords) + "]",
    }[name]


@pytest.mark.parametrize(("special", "parallel"), [(True, False), (False, True)])
@pytest.mark.parametrize("name", ["hermes", "llama3_json", "tagged", "mistral", "named", "pythonic"])
def test_strict_tools_bind_calls_and_nothing_else(name: str, special: bool, parallel: bool) -> None:
    parser = {"tagged": "llama3_json", "named": "mistral"}.get(name, name)
    engine = FakeEngine()
    engine.tokenizer = MarkTokenizer() if special else engine.tokenizer
    ask = Inside(engine, tool_form=TOOL_PARSERS[parser], reasoning_parser="qwen3")
    answer = ask("POST", "/v1/chat/completions", json={**STRICT_BODY, "parallel_tool_calls": parallel})
    assert answer.status_code == 200, answer.text
    grammar = compile_here(ask.engine.seen[-1].params.structured_outputs)
    cet, utc, date = ("time", {"zone": "CET"}), ("time", {"zone": "UTC"}), ("date", {})
    weather = ("weather", {"n": 1})
    before = "Well: " if parser in ("hermes", "mistral") else ""
    for text, good in (
        ("<think>If a < b</think> it is\n<tool, (1) or [2].", True),
        ("", True),
        (before + written(name, cet), True),
        (before + written(name, ("weather", {"n": 2})), True),
        (f"<think>Hm.</think>\n{before}{written(name, ('time', {'zone': 'a::=b'}))}", True),
        (before + written(name, cet, weather), parallel or name == "hermes"),  # where a text may follow it is one
        (before + written(name, utc), False),
        (f"<think>Hm.</think>{before}{written(name, utc)}", False),
        (before + written(name, date), False),
        (before + written(name, cet, utc), name == "hermes" and not parallel),
        (written(name, cet)[:-6], False),
    ):
        assert fits(grammar, text, special=special) == good, text
        if good and "zone" in text:
            message = Message(Reasoning(opened=False, shown=False), Calls(TOOL_PARSERS[parser]), single=False)
            assert "tool_calls" in whole_message(message.feed(text, last=True)), text


def test_python_s_arguments_follow_their_schema_in_order() -> None:
    ask = Inside(FakeEngine(), tool_form=TOOL_PARSERS["pythonic"])

    def asked(parameters: dict) -> httpx.Response:
        strict = {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}
        return ask("POST", "/v1/chat/completions", json={**CHAT, "tools": [strict]})

    def grammar_of(parameters: dict) -> str:
        assert asked(parameters).status_code == 200
        return compile_here(ask.engine.seen[-1].params.structured_outputs)

    kinds = {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/B"}, "c": {"type": "array", "items": {"type": "null"}}}
    schema = {"type": "object", "properties": kinds, "required": list(kinds), "$defs": {"B": {"type": "boolean"}}}
    grammar = grammar_of(schema)
    for text, good in (
        ("[f(a=1, b=true, c=[null])]", True),
        ("[f(a=1,b=false,c=[])]", True),
        ("[f(a=1, b=true)]", False),
        ("[f(b=true, a=1, c=[])]", False),
        ("[f(a=1, b=5, c=[])]", False),
    ):
        assert fits(grammar, text) == good, text
    assert fits(grammar_of({"type": "object", "properties": {}}), "[f(), f()]")
    assert fits(grammar_of({"type": "object"}), '[f(a=1, b={"c": []})]')
    bad = [{"anyOf": []}, {**schema, "properties": []}, {**schema, "required": [{}]}, {**schema, "required": ["a"]}]
    for parameters in (
        *bad,
        {"type": "object", "properties": {"a b": {}}, "required": ["a b"]},
        {**schema, "properties": 5},
    ):
        answer = asked(parameters)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools"), parameters


def test_a_strict_tool_and_another_structure_exclude_each_other() -> None:
    ask = Inside(FakeEngine(), tool_form=TOOL_PARSERS["hermes"])
    answer = ask("POST", "/v1/chat/completions", json={**STRICT_BODY, "response_format": {"type": "json_object"}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


def test_none_leaves_the_tools_out() -> None:
    ask = Inside(FakeEngine(answer=HERMES_CALL), tool_form=TOOL_PARSERS["hermes"])
    choice = ask("POST", "/v1/chat/completions", json={**CHAT, "tool_choice": "none"}).json()["choices"][0]
    assert choice["message"]["content"] == HERMES_CALL.decode()
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({}, "tools"),  # without a parser
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("a"), tool("a")]}, "tools"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "tools"),
        ({"tools": [tool("a", b={"enum": ["x" * 70_000]})]}, "tools[0].function.parameters"),
        ({"tools": [tool("a", b=json.loads('{"a":' * 40 + "1" + "}" * 40))]}, "tools[0].function.parameters"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: dict, param: str) -> None:
    answer = Inside()("POST", "/v1/chat/completions", json={**CHAT, **change})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_calls_and_their_results_go_through_the_template() -> None:
    seen = []

    class Template:
        def render(self, messages, *, tools=None, add_generation_prompt=True):
            seen.append((messages, tools))
            return "prompt"

    engine = FakeEngine()
    engine.chat_template = Template()
    ask = Inside(engine, tool_form=TOOL_PARSERS["hermes"])
    call = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "CET"}'}}
    history = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
    ]
    assert ask("POST", "/v1/chat/completions", json={**CHAT, "messages": history}).status_code == 200
    (messages, tools) = seen[0]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "time", "arguments": {"zone": "CET"}}
    assert messages[2] == {"role": "tool", "tool_call_id": "c1", "content": "12:00"}
    assert [one["function"]["name"] for one in tools] == ["weather", "time"]


def test_reasoning_over_the_api() -> None:
    ask = Inside(FakeEngine(answer=b"<think>Hm.</think>Yes."), reasoning_parser="qwen3")
    body = {"messages": CHAT["messages"], "max_tokens": 60}
    message = ask("POST", "/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
    streamed = chunks(ask("POST", "/v1/chat/completions", json={**body, "stream": True}))
    assert "".join(c["delta"].get("reasoning_content", "") for c in streamed) == "Hm."
    assert "".join(c["delta"].get("content", "") for c in streamed) == "Yes."
    body["include_reasoning"] = False
    assert "reasoning_content" not in ask("POST", "/v1/chat/completions", json=body).json()["choices"][0]["message"]


@pytest.mark.parametrize(("parser", "begin"), [("qwen3", "<think>"), ("deepseek_r1", "")])
def test_a_thinking_budget_reaches_the_engine(parser: str, begin: str) -> None:
    ask = Inside(FakeEngine(), reasoning_parser=parser)
    body = {"messages": CHAT["messages"], "max_thinking_tokens": 5}
    assert ask("POST", "/v1/chat/completions", json=body).status_code == 200
    params = ask.engine.seen[-1].params
    assert (params.max_thinking_tokens, params.thinking_marks) == (5, (begin, "</think>"))
    answer = Inside()("POST", "/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_thinking_tokens")
