"""One function per format.  See ``miles.core.protocols.tools.ToolCallParser``."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from miles.core.protocols.tools import ToolCall, ToolSpec, ToolTurn
from miles.core.tools.blocks import cut_blocks
from miles.core.tools.objects import call_of, malformed, named_call, read_call, read_objects
from miles.core.tools.schema import typed_arguments


def hermes(text: str, tools: Sequence[ToolSpec]) -> ToolTurn:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (Hermes, Qwen 2.5, Qwen 3)."""
    outside, blocks = cut_blocks(text, "<tool_call>", "</tool_call>")
    return ToolTurn(outside, tuple(map(read_call, blocks)))


def llama3(text: str, tools: Sequence[ToolSpec]) -> ToolTurn:
    """``{"name": ..., "parameters": {...}}``, several divided by ``;``, alone or after ``<|python_tag|>`` (Llama 3)."""
    before, mark, after = text.partition("<|python_tag|>")
    if not mark:
        before, after = "", text
        if not _LLAMA_CALL.match(text):
            return ToolTurn(text)
    values, rest = read_objects(after)
    calls = [call_of(value) for value in values]
    if rest.strip() or not calls:
        calls.append(malformed(rest, "it is not JSON"))
    return ToolTurn(before.strip(), tuple(calls))


def mistral(text: str, tools: Sequence[ToolSpec]) -> ToolTurn:
    """``[TOOL_CALLS] [{"name": ..., "arguments": {...}}]``, or ``[TOOL_CALLS]name[ARGS]{...}`` for each call."""
    before, *pieces = text.split("[TOOL_CALLS]")
    calls = [call for piece in pieces for call in _mistral_calls(piece.strip())]
    return ToolTurn(before.strip(), tuple(calls))


def deepseek(text: str, tools: Sequence[ToolSpec]) -> ToolTurn:
    """``<｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>`` (DeepSeek V3.1).

    V3 and R1 write ``function`` before the separator, and the name and fenced JSON after it.
    """
    before, _, section = text.partition("<｜tool▁calls▁begin｜>")
    if not section:
        before, section = cut_blocks(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")[0], text
    _, blocks = cut_blocks(section, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
    return ToolTurn(before.strip(), tuple(map(_deepseek_call, blocks)))


def kimi(text: str, tools: Sequence[ToolSpec]) -> ToolTurn:
    """``<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`` (Kimi K2)."""
    before, _, _ = text.partition("<|tool_calls_section_begin|>")
    outside, blocks = cut_blocks(text, "<|tool_call_begin|>", "<|tool_call_end|>")
    return ToolTurn((before if before != text else outside).strip(), tuple(map(_kimi_call, blocks)))


def pythonic(text: str, tools: Sequence[ToolSpec]) -> ToolTurn:
    """``[name(key=value, ...), ...]`` (Llama 3.2 and 4)."""
    code = text.replace("<|python_start|>", "").replace("<|python_end|>", "").strip()
    if not _PYTHONIC_CALL.match(code):
        return ToolTurn(text)
    try:
        tree = ast.parse(code, mode="eval").body
    except (SyntaxError, ValueError) as error:
        return ToolTurn("", (malformed(code, f"it is not a list of calls: {error}"),))
    elements = tree.elts if isinstance(tree, ast.List) else [tree]
    return ToolTurn("", tuple(_python_call(element) for element in elements))


def glm(text: str, tools: Sequence[ToolSpec]) -> ToolTurn:
    """``<tool_call>name <arg_key>k</arg_key> <arg_value>v</arg_value> ... </tool_call>`` (GLM 4.5 and later)."""
    outside, blocks = cut_blocks(text, "<tool_call>", "</tool_call>")
    return ToolTurn(outside, tuple(_glm_call(block, tools) for block in blocks))


def qwen3_coder(text: str, tools: Sequence[ToolSpec]) -> ToolTurn:
    """``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`` (Qwen3-Coder)."""
    outside, blocks = cut_blocks(text, "<tool_call>", "</tool_call>")
    return ToolTurn(outside, tuple(_coder_call(block, tools) for block in blocks))


_LLAMA_CALL = re.compile(r'\s*\{\s*"(name|type|parameters|function)"')
_PYTHONIC_CALL = re.compile(r"\[\s*[A-Za-z_][\w.]*\s*\(")
_MISTRAL_NAMED = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*(?=\{|$)")
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*(?:```|$)", re.DOTALL)
_CODER_NAME = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|$)", re.DOTALL)
_CODER_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|$)", re.DOTALL)
_GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|$)", re.DOTALL)


def _mistral_calls(piece: str) -> list[ToolCall]:
    if not piece.startswith("["):
        return [_mistral_named(piece)]
    values, rest = read_objects(piece)
    if not values or not isinstance(values[0], list):
        return [malformed(piece, "expected a JSON list of calls")]
    calls = [call_of(value) for value in values[0]]
    return [*calls, malformed(rest, "text follows the calls")] if rest.strip() else calls


def _mistral_named(piece: str) -> ToolCall:
    found = _MISTRAL_NAMED.match(piece)
    if found is None:
        return malformed(piece, "expected a name and its arguments")
    return named_call(found[1], piece[found.end() :])


def _deepseek_call(block: str) -> ToolCall:
    head, mark, tail = block.partition("<｜tool▁sep｜>")
    if not mark:
        return malformed(block, "expected a name, <｜tool▁sep｜> and the arguments")
    if head.strip() != "function":
        return named_call(head.strip(), tail.strip())
    name, _, arguments = tail.partition("\n")
    fenced = _FENCE.search(arguments)
    return named_call(name.strip(), fenced[1] if fenced else arguments)


def _kimi_call(block: str) -> ToolCall:
    head, mark, arguments = block.partition("<|tool_call_argument_begin|>")
    name = head.strip().removeprefix("functions.").rpartition(":")[0] or head.strip().removeprefix("functions.")
    if not mark or not name:
        return malformed(block, "expected functions.NAME:INDEX, <|tool_call_argument_begin|> and the arguments")
    return named_call(name, arguments.strip())


def _python_call(node: ast.expr) -> ToolCall:
    written = ast.unparse(node)
    if not isinstance(node, ast.Call):
        return malformed(written, "it is not a call")
    name = ast.unparse(node.func)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        return malformed(written, "arguments must be given by name", name)
    try:
        arguments = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
    except ValueError:
        return malformed(written, "arguments must be plain values", name)
    return ToolCall(name, arguments)


def _literal(node: ast.expr) -> Any:
    """A plain value; models mix JSON's names into Python."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    return ast.literal_eval(node)


_JSON_NAMES = {"true": True, "false": False, "null": None}


def _glm_call(block: str, tools: Sequence[ToolSpec]) -> ToolCall:
    name = block.partition("<arg_key>")[0].strip()
    if not name or re.search(r"\s|[<{]", name):
        return malformed(block, "expected a name and pairs of <arg_key> and <arg_value>")
    pairs = _GLM_ARGUMENT.findall(block)
    if len(pairs) != block.count("<arg_key>"):
        return malformed(block, "a key has no value", name)
    return ToolCall(name, typed_arguments(name, {key.strip(): value for key, value in pairs}, tools))


def _coder_call(block: str, tools: Sequence[ToolSpec]) -> ToolCall:
    found = _CODER_NAME.search(block)
    if found is None:
        return malformed(block, "expected <function=NAME> and its parameters")
    name = found[1].strip()
    written = {key.strip(): value for key, value in _CODER_PARAMETER.findall(found[2])}
    return ToolCall(name, typed_arguments(name, written, tools))
