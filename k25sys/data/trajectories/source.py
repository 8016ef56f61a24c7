"""Chat files as a source: conversations with tools, loss on what the assistant wrote. Text only."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from k25sys.data.chat import AssistantTurn, SystemTurn, ToolCall, ToolTurn, Turn, UserTurn, render_chat
from k25sys.data.sample import Sample, check_position
from k25sys.data.sources.records import ConvertedRecords, JsonRecords, place, refuse_media
from k25sys.data.sources.text import TextDocuments
from k25sys.data.tokenizer import Tokenizer
from k25sys.data.trajectories.generate import write_conversations
from k25sys.errors import ChatFormatError, FileFormatError, message

_KEYS: Mapping[str, frozenset[str]] = {
    "system": frozenset({"role", "content", "name"}),
    "user": frozenset({"role", "content", "name"}),
    "assistant": frozenset({"role", "content", "name", "reasoning_content", "tool_calls"}),
    "tool": frozenset({"role", "content", "name", "tool_call_id"}),
}


class ConversationSource(TextDocuments):
    """Conversations of a JSONL file: one a line, {"messages": [...], "tools": [...]} as OpenAI's chat API has them.

    Messages have the roles system, user, assistant (with reasoning_content and tool_calls) and tool (with
    tool_call_id). Other keys of a line are for its readers' information; other keys of a message are refused. Call ids
    are rewritten as functions.<name>:<index>, the form of the chat template. Loss is on the assistant's tokens only:
    thinking, answer, calls and the end of turn.

    Args:
        file: its path. Blank lines do not count. It must not change while the source is in use.
        tokenizer: writes the conversations.
        name: unique within a mixture; by default the file's without its ending.

    Raises:
        OSError: the file cannot be read.
        ValueError (FileFormatError): it has no lines.
    """

    def __init__(self, file: str | os.PathLike[str], tokenizer: Tokenizer, *, name: str | None = None) -> None:
        documents: Sequence[Any] = ConvertedRecords(JsonRecords(file), _conversation)
        super().__init__(Path(file).stem if name is None else name, tokenizer, documents)

    def sample(self, index: int, epoch: int) -> Sample:
        """Conversation `index`, the same in each epoch.

        Raises:
            TypeError, ValueError: an index outside [0, len), a negative epoch; FileFormatError, which names the line:
                it is no conversation, has no assistant's message, or has something else than text.
            OSError: the file cannot be read any more.
        """
        check_position("ConversationSource", index, len(self), epoch)
        conversation: Any = self._documents[int(index)]
        turns, tools = conversation
        try:
            chat = render_chat(turns, self._tokenizer, tools=tools)
        except (ValueError, TypeError, RecursionError) as error:
            raise _refused(place(self._documents, self.name, int(index)), error) from error
        return Sample(ids_S=np.array(chat.token_ids, np.int64), loss_S=np.array(chat.loss_mask, bool))


def generated_conversations(
    count: int, seed: int, tokenizer: Tokenizer, file: str | os.PathLike[str], *, jobs: int = 1
) -> ConversationSource:
    """Conversations of generated problems as a source; `file` keeps them for the next time.

    Args:
        count, seed, jobs: as `make_conversations` takes them.
        tokenizer: writes the conversations.
        file: is written where it does not exist; else it must have been, for the same count and seed.

    Raises:
        ValueError (FileFormatError): the file is of another count or seed.
        TypeError, ValueError, RuntimeError, OSError: as `write_conversations` and `ConversationSource`.
    """
    if not os.path.exists(file):
        write_conversations(file, count, seed, jobs=jobs)
    source = ConversationSource(file, tokenizer, name=f"trajectories-{seed}")
    with open(file, "rb") as content:
        try:
            found = json.loads(content.readline()).get("seed")
        except (ValueError, AttributeError):
            found = None
    if found != seed or len(source) != count:
        got = f"{len(source)} conversations of seed {found}"
        accepted, hint = f"{count} of seed {seed}", "name another file, or remove this one"
        raise FileFormatError(message("generated_conversations", repr(str(file)), got, accepted, hint))
    return source


def _conversation(record: dict[str, Any], where: str) -> tuple[list[Turn], Any]:
    """Turns and tools of a line. Raises FileFormatError for what is no conversation, or has media beside it."""
    refuse_media(record, where, "ConversationSource", but="messages")
    try:
        return _turns(record), _tools(record)
    except ValueError as error:
        raise _refused(where, error) from error


def _refused(where: str, error: Exception) -> FileFormatError:
    return FileFormatError(message("ConversationSource", where, str(error), "a conversation"))


def _tools(record: dict[str, Any]) -> Any:
    tools = record.get("tools") or ()
    if not isinstance(tools, (str, list, tuple)) or not all(isinstance(tool, (str, dict)) for tool in tools):
        raise ChatFormatError("tools: neither a list of declarations nor a text")
    return tools


def _turns(record: dict[str, Any]) -> list[Turn]:
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise ChatFormatError('no {"messages": [...]}')
    turns, calls = [], {}
    for i, entry in enumerate(messages):
        try:
            turns.append(_turn(entry, calls))
        except ValueError as error:
            raise ChatFormatError(f"messages[{i}]: {error}") from error
    if not any(isinstance(turn, AssistantTurn) for turn in turns):
        raise ChatFormatError("messages: none of the assistant, nothing to learn")
    return turns


def _turn(entry: Any, calls: dict[str, ToolCall]) -> Turn:
    """One message. `calls` has the calls so far by the ids that the file gives them."""
    role = entry.get("role") if isinstance(entry, dict) else None
    if not isinstance(role, str) or role not in _KEYS:
        raise ChatFormatError(f"role {role!r} is none of {', '.join(_KEYS)}")
    assert isinstance(entry, dict)
    entry = {str(key): value for key, value in entry.items() if value is not None}
    if extra := sorted(entry.keys() - _KEYS[role]):
        raise ChatFormatError(f"{role} with {', '.join(extra)}, known are {', '.join(sorted(_KEYS[role]))}")
    content, name = _text(entry.get("content", "")), entry.get("name", role)
    if not isinstance(name, str):
        raise ChatFormatError("name is no text")
    if role == "system":
        return SystemTurn(content=content, name=name)
    if role == "user":
        return UserTurn(content=content, name=name)
    if role == "tool":
        call_id = entry.get("tool_call_id")
        if not isinstance(call_id, str) or call_id not in calls:
            raise ChatFormatError(f"tool_call_id {call_id!r} is of no call before it")
        return ToolTurn(call_id=calls[call_id].id, content=content, name=name)
    thinking = entry.get("reasoning_content", "")
    if not isinstance(thinking, str):
        raise ChatFormatError("reasoning_content is no text")
    made = tuple(_calls(entry.get("tool_calls", []), calls))
    return AssistantTurn(text=content, thinking=thinking, tool_calls=made, name=name)


def _calls(entries: Any, calls: dict[str, ToolCall]) -> Iterator[ToolCall]:
    if not isinstance(entries, list):
        raise ChatFormatError("tool_calls is no list")
    for entry in entries:
        function = entry.get("function") if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ChatFormatError("a tool call without a function's name")
        call_id, arguments = entry.get("id"), function.get("arguments")
        if not isinstance(call_id, str) or call_id in calls:
            raise ChatFormatError(f"tool call id {call_id!r} is not a new text")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls[call_id] = ToolCall(name=function["name"], index=len(calls), arguments=arguments)
        yield calls[call_id]


def _text(content: Any) -> str:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise ChatFormatError(f"content is {type(content).__name__}, neither a text nor a list of texts")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatFormatError("content has a part that is no text: this source is text only")
    return "".join(part["text"] for part in parts)
