"""Conversations as tokens: the released chat template, the mask of what the model wrote, and a reply parsed back.

Source: spec section 1.5. A turn is im_<role> NAME im_middle CONTENT im_end; tools are declared in a first system turn.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from k25sys.data.geometry import MERGE
from k25sys.data.media_text import clip_tokens, image_tokens
from k25sys.data.tokenizer import SpecialTokens, Tokenizer
from k25sys.errors import ArgumentTypeError, ArgumentValueError, ChatFormatError, message
from k25sys.special_tokens import SPECIAL_LITERALS

_CALL_ID = re.compile(r"functions\.(?P<name>[\w.-]+):(?P<index>0|[1-9]\d{0,8})", re.ASCII)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePart:
    """A picture in a turn: what `preprocess_image` returns. Its pixels may be left out where only tokens are wanted."""

    grid_thw: Tensor
    pixel_values: Tensor | None = None

    def __post_init__(self) -> None:
        _check_media("ImagePart", self.pixel_values, self.grid_thw, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoPart:
    """A video in a turn: what `preprocess_video` returns. Its pixels may be left out where only tokens are wanted."""

    grid_thw: Tensor
    timestamps: Sequence[str]
    pixel_values: Tensor | None = None

    def __post_init__(self) -> None:
        _check_media("VideoPart", self.pixel_values, self.grid_thw, len(self.timestamps))


Content = str | Sequence[str | ImagePart | VideoPart]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call of a tool. `arguments` is the JSON text of an object; `index` counts the conversation's calls from 0."""

    name: str
    index: int
    arguments: str

    def __post_init__(self) -> None:
        if not _CALL_ID.fullmatch(self.id):
            accepted = "functions.<name>:<index>, the name of letters, digits, _, - and ."
            raise ChatFormatError(message("ToolCall", "id", repr(self.id), accepted))
        try:
            is_object = isinstance(json.loads(self.arguments), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise ChatFormatError(message("ToolCall", "arguments", repr(self.arguments), "the JSON text of an object"))

    @property
    def id(self) -> str:
        """functions.<name>:<index>"""
        return f"functions.{self.name}:{self.index}"


@dataclass(frozen=True, kw_only=True)
class SystemTurn:
    """Instructions that come before the conversation, or within it."""

    content: Content
    name: str = "system"


@dataclass(frozen=True, kw_only=True)
class UserTurn:
    """What a user says and shows."""

    content: Content
    name: str = "user"


@dataclass(frozen=True, kw_only=True)
class AssistantTurn:
    """What the model says: its thinking (empty in instant mode), its answer, and the tools it calls."""

    text: str = ""
    thinking: str = ""
    tool_calls: Sequence[ToolCall] = ()
    name: str = "assistant"


@dataclass(frozen=True, kw_only=True)
class ToolTurn:
    """What a called tool gave. `call_id` is the id of its `ToolCall`."""

    call_id: str
    content: Content
    name: str = "tool"


Turn = SystemTurn | UserTurn | AssistantTurn | ToolTurn


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatTokens:
    """A conversation as the model reads it.

    Attributes:
        token_ids: S ids; a clip of a picture or video is a run of media_pad, h * w / 4 of them.
        loss_mask: S bools: true where the model itself writes the token. Thinking, answer, calls and im_end of its
            turns count; the opening of a turn and the think tokens that a generation prompt would hold do not.
        media: the pictures and videos in order.
    """

    token_ids: list[int]
    loss_mask: list[bool]
    media: list[ImagePart | VideoPart]

    @property
    def grid_thw(self) -> Tensor | None:
        """(N, 3) int64 of all clips in order; None without media."""
        return torch.cat([part.grid_thw for part in self.media]) if self.media else None

    @property
    def pixel_values(self) -> Tensor | None:
        """(P, 3, 14, 14) of all clips in order; None without media, an error where a part has no pixels."""
        pixels = [part.pixel_values for part in self.media if part.pixel_values is not None]
        if len(pixels) < len(self.media):
            got = f"{len(self.media) - len(pixels)} parts without pixel_values"
            raise ArgumentValueError(message("ChatTokens.pixel_values", "media", got, "pixel_values in each part"))
        return torch.cat(pixels) if pixels else None


@dataclass
class _Writer:
    """Ids and mask so far. Text is held back until a special token comes: pieces of it must merge as one text."""

    tokenizer: Tokenizer
    token_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    is_model: bool = False

    def text(self, *parts: str) -> None:
        self.pending += parts

    def special(self, *tokens: int) -> None:
        self._append(self.tokenizer.encode("".join(self.pending)))
        self.pending.clear()
        self._append(tokens)

    def _append(self, ids: Sequence[int]) -> None:
        self.token_ids += ids
        self.loss_mask += [self.is_model] * len(ids)


def render_chat(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    *,
    tools: str | Sequence[Mapping[str, Any]] = (),
    prompt: Literal["thinking", "instant"] | None = None,
    keep_thinking: bool = True,
) -> ChatTokens:
    """A conversation in the released chat format.

    Args:
        turns: in order. No special token comes of their texts, whatever they contain.
        tools: declarations (JSON schemas as in OpenAI's API, written compactly), or one text that declares them.
        prompt: end with the opening of an assistant's turn: "thinking" with an open think token, "instant" with an
            empty pair. None for a conversation to train on.
        keep_thinking: False drops the thinking of all turns up to the last answer without tool calls, as the released
            template does in a prompt; such turns then have no loss, since the model did not write them so.

    Raises:
        TypeError, ValueError: a turn or part of another type, an unknown `prompt`, a tool result without its call.
    """
    if prompt is not None:
        _check_prompt("render_chat", prompt)
    special, writer, media = tokenizer.special, _Writer(tokenizer), []
    if tools:
        declared = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False, separators=(",", ":"))
        _open_turn(writer, special.im_system, "tool_declare")
        writer.text(declared)
        writer.special(special.im_end)
    answers = [i for i, turn in enumerate(turns) if isinstance(turn, AssistantTurn) and not turn.tool_calls]
    first_kept = 0 if keep_thinking or not answers else answers[-1] + 1
    called: set[str] = set()
    for i, turn in enumerate(turns):
        if isinstance(turn, AssistantTurn):
            called |= {call.id for call in turn.tool_calls}
            _write_assistant(writer, turn, is_kept=i >= first_kept)
            continue
        if isinstance(turn, ToolTurn) and turn.call_id not in called:
            hint = "a tool's turn follows the assistant's that called it"
            got = f"a result of {turn.call_id!r}"
            raise ChatFormatError(message("render_chat", f"turns[{i}]", got, "a call before it", hint))
        if not isinstance(turn, (SystemTurn, UserTurn, ToolTurn)):
            raise ArgumentTypeError(message("render_chat", f"turns[{i}]", type(turn).__name__, "a turn"))
        _open_turn(writer, special.im_user if isinstance(turn, UserTurn) else special.im_system, turn.name)
        if isinstance(turn, ToolTurn):
            writer.text(f"## Return of {turn.call_id}\n")
        media += _write_content(writer, turn.content, f"turns[{i}]")
        writer.special(special.im_end)
    if prompt is not None:
        _open_turn(writer, special.im_assistant, "assistant")
        writer.special(special.think)
        if prompt == "instant":
            writer.special(special.end_think)
    return ChatTokens(token_ids=writer.token_ids, loss_mask=writer.loss_mask, media=media)


def parse_reply(
    token_ids: Iterable[int], tokenizer: Tokenizer, *, prompt: Literal["thinking", "instant"]
) -> AssistantTurn:
    """What the model wrote after a prompt of that mode, up to its stop token, as a turn.

    `render_chat` of the turn gives the same ids, where the tokenizer gives them for the same text.

    Raises:
        ValueError (ChatFormatError): no stop token at the end, thinking or tool calls that are not closed, a special
            token where none may stand, text behind the calls, a call without its form, arguments that are not a JSON
            object.
    """
    _check_prompt("parse_reply", prompt)
    reader = _Reader(tokenizer, list(token_ids))
    special = tokenizer.special
    thinking = ""
    if prompt == "thinking":
        thinking = reader.text()
        reader.expect("end_think")
    text = reader.text()
    calls = []
    if reader.next() == special.tool_calls_section_begin:
        reader.expect("tool_calls_section_begin")
        while reader.next() == special.tool_call_begin:
            calls.append(reader.call())
        if not calls:
            reader.expect("tool_call_begin")
        reader.expect("tool_calls_section_end")
    reader.expect("im_end", "eos")
    if reader.next() is not None:
        where, accepted = f"token {reader.position}", "nothing behind the stop token"
        raise ChatFormatError(message("parse_reply", where, reader.found(), accepted))
    return AssistantTurn(thinking=thinking, text=text, tool_calls=tuple(calls))


class _Reader:
    """Goes through a reply's tokens. An error names the token's position, what stands there and what may."""

    def __init__(self, tokenizer: Tokenizer, ids: list[int]) -> None:
        self.tokenizer, self.ids, self.position = tokenizer, ids, 0
        self.names = {getattr(tokenizer.special, name): name for name in SPECIAL_LITERALS}

    def next(self) -> int | None:
        return self.ids[self.position] if self.position < len(self.ids) else None

    def found(self) -> str:
        token = self.next()
        if token is None:
            return "the end"
        if token in self.names:
            return SPECIAL_LITERALS[self.names[token]]
        text = itertools.takewhile(lambda t: t not in self.names, self.ids[self.position : self.position + 20])
        return f"text {self.tokenizer.decode(text)!r}"

    def text(self) -> str:
        """The text up to the next special token."""
        start = self.position
        while self.position < len(self.ids) and self.ids[self.position] not in self.names:
            self.position += 1
        return self.tokenizer.decode(self.ids[start : self.position])

    def expect(self, *names: str) -> None:
        """Steps over one of the special tokens `names`."""
        if self.next() not in [getattr(self.tokenizer.special, name) for name in names]:
            accepted = " or ".join(SPECIAL_LITERALS[name] for name in names)
            hint = "the reply was cut" if self.next() is None else ""
            raise ChatFormatError(message("parse_reply", f"token {self.position}", self.found(), accepted, hint))
        self.position += 1

    def call(self) -> ToolCall:
        self.expect("tool_call_begin")
        start, call_id = self.position, self.text().strip()
        match = _CALL_ID.fullmatch(call_id)
        if not match:
            raise ChatFormatError(message("parse_reply", f"token {start}", repr(call_id), "functions.<name>:<index>"))
        self.expect("tool_call_argument_begin")
        start, arguments = self.position, self.text()
        self.expect("tool_call_end")
        try:
            return ToolCall(name=match["name"], index=int(match["index"]), arguments=arguments)
        except ChatFormatError as error:
            raise ChatFormatError(message("parse_reply", f"token {start}", str(error), "a well-formed call")) from error


def _open_turn(writer: _Writer, role: int, name: str) -> None:
    writer.special(role)
    writer.text(name)
    writer.special(writer.tokenizer.special.im_middle)


def _write_assistant(writer: _Writer, turn: AssistantTurn, *, is_kept: bool) -> None:
    special: SpecialTokens = writer.tokenizer.special
    thinking = turn.thinking if is_kept else ""
    _open_turn(writer, special.im_assistant, turn.name)
    writer.special(special.think)
    writer.is_model = bool(thinking)  # without thinking the closing token belongs to the instant prompt
    writer.text(thinking)
    writer.special(special.end_think)
    writer.is_model = is_kept or not turn.thinking
    writer.text(turn.text)
    if turn.tool_calls:
        writer.special(special.tool_calls_section_begin)
        for call in turn.tool_calls:
            writer.special(special.tool_call_begin)
            writer.text(call.id)
            writer.special(special.tool_call_argument_begin)
            writer.text(call.arguments)
            writer.special(special.tool_call_end)
        writer.special(special.tool_calls_section_end)
    writer.special(special.im_end)
    writer.is_model = False


def _write_content(writer: _Writer, content: Content, where: str) -> list[ImagePart | VideoPart]:
    media = []
    for i, part in enumerate([content] if isinstance(content, str) else content):
        if isinstance(part, str):
            writer.text(part)
        elif isinstance(part, ImagePart):
            writer.special(*image_tokens(part.grid_thw[0].tolist(), writer.tokenizer))
            media.append(part)
        elif isinstance(part, VideoPart):
            for time, grid in zip(part.timestamps, part.grid_thw, strict=True):
                writer.text(time)
                writer.special(*clip_tokens("video", grid.tolist(), writer.tokenizer))
            media.append(part)
        else:
            got = type(part).__name__
            raise ArgumentTypeError(message("render_chat", f"{where}.content[{i}]", got, "str, ImagePart or VideoPart"))
    return media


def _check_prompt(op: str, prompt: Any) -> None:
    if prompt not in ("thinking", "instant"):
        raise ArgumentValueError(message(op, "prompt", repr(prompt), "'thinking' or 'instant'"))


def _check_media(op: str, pixel_values: Any, grid_thw: Any, num_clips: int) -> None:
    if not isinstance(grid_thw, Tensor) or grid_thw.dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError(message(op, "grid_thw", type(grid_thw).__name__, "an int64 tensor"))
    if grid_thw.shape != (num_clips, 3) or num_clips == 0:
        got = f"shape {tuple(grid_thw.shape)}"
        raise ArgumentValueError(message(op, "grid_thw", got, f"({num_clips}, 3), a row a clip"))
    if (grid_thw < 1).any() or (grid_thw[:, 1:] % MERGE).any() or (op == "ImagePart" and grid_thw[0, 0] != 1):
        raise ArgumentValueError(message(op, "grid_thw", grid_thw.tolist(), "t >= 1 (1 for a picture), h and w even"))
    num_patches = int(grid_thw.prod(1).sum())
    if pixel_values is not None and tuple(pixel_values.shape) != (num_patches, 3, 14, 14):
        got = f"shape {tuple(pixel_values.shape)}"
        raise ArgumentValueError(message(op, "pixel_values", got, f"({num_patches}, 3, 14, 14), as grid_thw says"))
