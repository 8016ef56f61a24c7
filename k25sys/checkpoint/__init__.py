"""Checkpoints: the released layout of Kimi-K2.5 and transformers' in and out, INT4 experts, folders whose every changed
bit is found. Nothing here reads a pickle."""

from k25sys.checkpoint.convert import convert
from k25sys.checkpoint.int4 import (
    SCALE_RULES,
    Int4Origin,
    OddGroups,
    dequantize_int4,
    pack_int4,
    quantize_int4,
    recover_int4,
    unpack_int4,
)
from k25sys.checkpoint.load import load_hf, read_config
from k25sys.checkpoint.save import released_tensors, save_hf
from k25sys.checkpoint.store import publish, read_manifest, verify_manifest
from k25sys.checkpoint.verify import verify_folder

__all__ = [
    "SCALE_RULES",
    "Int4Origin",
    "OddGroups",
    "convert",
    "dequantize_int4",
    "load_hf",
    "pack_int4",
    "publish",
    "quantize_int4",
    "read_config",
    "read_manifest",
    "recover_int4",
    "released_tensors",
    "save_hf",
    "unpack_int4",
    "verify_folder",
    "verify_manifest",
]
