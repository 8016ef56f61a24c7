"""Optimisers and their schedules."""

from k25sys.optim.groups import ParameterGroup
from k25sys.optim.muon_clip import MuonClipConfig
from k25sys.optim.schedules import WSD, Cosine, Schedule
from k25sys.optim.zero import StateShard, StepReport, ZeroOptimizer

__all__ = ["WSD", "Cosine", "MuonClipConfig", "ParameterGroup", "Schedule", "StateShard", "StepReport", "ZeroOptimizer"]
