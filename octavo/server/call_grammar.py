"""What an answer with tool calls must look like, as a grammar of the tools' schemas.

Where a call must be made, the answer is nothing else. Where the model may choose, it is any text; but what begins like
a call in the model's own form (tools.py) is one, and follows the schema of a strict tool.
"""

import json
import re
from typing import Any

from octavo.errors import InvalidValueError, UnsupportedParameterError
from octavo.sampling_params import StructuredOutputsParams
from octavo.server.front import Front
from octavo.server.protocol import ChatRequest, NamedTool
from octavo.server.tools import Form

_ANY: dict[str, Any] = {"type": "object"}
_KEPT = {"$defs", "definitions"}
_SIMPLE = {"type", "properties", "required", "additionalProperties", "title", "description", *_KEPT}
_MARKS = ('"[TOOL_CALLS]"', '"[ARGS]"', '"<|python_tag|>"')  # a tokenizer may have a special token for them
_THOUGHTS = {"qwen3": r"/[ \t\r\n]*<think>(.|\n)*<\/think>/", "deepseek_r1": 'TEXT "</think>"'}
_TEXT = r"""TEXT: /(.|\n)*/
SPACE: /[ \t\r\n]{0,20}/"""
_COMMA = ' "," SPACE '
_ANY_ARGUMENTS = r"""any: (pair ("," SPACE pair)*)?
pair: /[A-Za-z_][A-Za-z_0-9]{0,63}=/ %json {}"""


def forced(body: ChatRequest) -> StructuredOutputsParams | None:
    """What the answer must look like when a call must be made: the arguments of the named function, or a list of calls.

    Raises InvalidValueError beside another structure.
    """
    schemas = {tool.function.name: tool.function.parameters or _ANY for tool in body.tools or ()}
    if isinstance(body.tool_choice, NamedTool):
        schema = schemas[body.tool_choice.function.name]
    elif body.tool_choice == "required":
        calls, definitions = _call_schemas(schemas, "parameters")
        schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
        if body.parallel_tool_calls is False:
            schema["maxItems"] = 1
    else:
        return None
    if body.structure() is not None:
        raise InvalidValueError("a call that must be made excludes another structure", param="tool_choice")
    return StructuredOutputsParams(json=schema, asked_as="tools")


def strict(front: Front, body: ChatRequest, form: Form | None) -> StructuredOutputsParams | None:
    """Where the model may choose: any text, but what begins like a call is one, and follows a strict tool's schema.

    Raises UnsupportedParameterError for a schema that Python's calls cannot follow, InvalidValueError beside another
    structure.
    """
    tools = [tool.function for tool in body.tools or ()]
    if form is None or body.tool_choice not in (None, "auto") or not any(tool.strict for tool in tools):
        return None
    if body.structure() is not None:
        raise InvalidValueError("a strict tool and another structure exclude each other", param="tools")
    answer = re.sub("@(.*?)@", "" if body.parallel_tool_calls is False else r"\1", form.answer)
    for mark in _MARKS:
        ids = front.tokenizer.encode(mark[1:-1], add_special_tokens=False)
        if len(ids) == 1 and ids[0] in front.tokenizer.special_ids:
            answer = answer.replace(mark, f"({mark} | <[{ids[0]}]>)")
    lines = ["start: answer", answer, _TEXT]
    if form.openings:
        lines.append(f"PLAIN: TEXT & ~/[ \\t\\r\\n]*({'|'.join(map(re.escape, form.openings))})(.|\\n)*/")
        if front.reasoning_parser is not None:
            lines[0] = f"start: thought? answer\nthought[lazy]: {_THOUGHTS[front.reasoning_parser]}"
    schemas = {one.name: (one.strict and one.parameters) or _ANY for one in tools}
    calls, definitions = _call_schemas(schemas, "parameters" if form.openings else "arguments")
    lines += _python_calls(schemas) if form.is_python else [f"call: {_json({'anyOf': calls, '$defs': definitions})}"]
    if "named" in answer:
        own = (f"{json.dumps(name)} args? {_json(schema)}" for name, schema in schemas.items())
        lines.append(f"named: {' | '.join(own)}")
    return StructuredOutputsParams(grammar="\n".join(lines), asked_as="tools")


def _json(schema: Any) -> str:
    return "%json " + json.dumps(schema).replace("::=", ":\\u003a=")  # which would make it EBNF


def _python_calls(schemas: dict[str, Any]) -> list[str]:
    """The rules of calls with keyword arguments, in the order of their schemas; values are JSON.

    Raises UnsupportedParameterError for a schema that is more than an object of named properties, all required.
    """
    calls = []
    for name, schema in schemas.items():
        own, needed = schema.get("properties", {}), schema.get("required", [])
        named = isinstance(own, dict) and all(map(str.isidentifier, own)) and isinstance(needed, list)
        if not named or sorted(map(str, needed)) != sorted(own) or schema.keys() - _SIMPLE:
            raise UnsupportedParameterError(
                f"{name}: strict with --tool-call-parser pythonic needs named properties, each of them required",
                param="tools",
            )
        kept = {key: schema[key] for key in _KEPT & schema.keys()}
        words = [f'{json.dumps(word)[:-1]}=" {_json({"allOf": [one], **kept})}' for word, one in own.items()]
        calls.append(f'{json.dumps(name + "(")} {"any" if schema == _ANY else _COMMA.join(words)} ")"')
    return [_ANY_ARGUMENTS, f"call: {' | '.join(calls)}"]


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at `place` in another one: its references to itself lead there."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(part, place) for key, part in schema.items()}
    if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#"):
        moved["$ref"] = place + ref[1:]
    return moved


def _call_schemas(schemas: dict[str, Any], word: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A call of each tool, as an object whose arguments stand under `word`, and the definitions that it refers to."""
    definitions = {name: _moved(own, f"#/$defs/{name}") for name, own in schemas.items()}
    closed = {"type": "object", "required": ["name", word], "additionalProperties": False}
    calls = [{**closed, "properties": {"name": {"const": name}, word: {"$ref": f"#/$defs/{name}"}}} for name in schemas]
    return calls, definitions
