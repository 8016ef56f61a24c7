"""The special tokens of Kimi-K2.5: the one table that tokenizers and models share. Source: spec section 1.5."""

from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Generic, TypeVar

Id = TypeVar("Id")

RELEASED_VOCABULARY = 163840


@dataclass(frozen=True, kw_only=True)
class SpecialTable(Generic[Id]):
    """An entry for each token that structures a conversation, in the order of their released ids."""

    bos: Id
    eos: Id
    im_end: Id
    im_user: Id
    im_assistant: Id
    start_header: Id
    end_header: Id
    eot: Id
    im_system: Id
    tool_calls_section_begin: Id
    tool_calls_section_end: Id
    tool_call_begin: Id
    tool_call_argument_begin: Id
    tool_call_end: Id
    im_middle: Id
    media_begin: Id
    media_content: Id
    media_end: Id
    media_pad: Id
    think: Id
    end_think: Id
    unk: Id
    pad: Id


SPECIAL_NAMES = tuple(field.name for field in fields(SpecialTable))
_LITERALS = MappingProxyType({
    "bos": "[BOS]", "eos": "[EOS]", "eot": "[EOT]", "unk": "[UNK]", "pad": "[PAD]",
    "start_header": "<|start_header_id|>", "end_header": "<|end_header_id|>",
    "think": "<think>", "end_think": "</think>",
})  # fmt: skip
SPECIAL_LITERALS = MappingProxyType({name: _LITERALS.get(name, f"<|{name}|>") for name in SPECIAL_NAMES})
# Distance of each from the first one, which follows the ordinary tokens. The ids between them are reserved.
_DISTANCES = (0, 1, 2, 3, 4, 6, 7, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 22, 23, 254, 255)
SPECIAL_OFFSETS = MappingProxyType(dict(zip(SPECIAL_NAMES, _DISTANCES, strict=True)))
NUM_RESERVED = 256
RELEASED_SPECIAL_IDS = MappingProxyType(
    {name: RELEASED_VOCABULARY - NUM_RESERVED + offset for name, offset in SPECIAL_OFFSETS.items()}
)
