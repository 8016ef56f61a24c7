"""The Kimi-K2.5 model: architecture only, plain modules that know no parallelism."""

from k25sys.models.config import KimiK25Config, TextConfig, TokenIds, VisionConfig, YarnConfig
from k25sys.models.generate import Sample, generate
from k25sys.models.kimi_k25 import KimiK25

__all__ = ["KimiK25", "KimiK25Config", "Sample", "TextConfig", "TokenIds", "VisionConfig", "YarnConfig", "generate"]
