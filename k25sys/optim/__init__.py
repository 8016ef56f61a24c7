"""Optimisers and their schedules."""

from k25sys.optim.muon_clip import MuonClipConfig
from k25sys.optim.zero import StateShard, StepReport, ZeroOptimizer

__all__ = ["MuonClipConfig", "StateShard", "StepReport", "ZeroOptimizer"]
