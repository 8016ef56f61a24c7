"""DEP, the decoupled encoder process: one training step in three phases over all ranks (K2.5 report, section 4.5.1)."""

from k25sys.parallel.dep.balance import Clip, EncoderCost, EncodingPlan, Pack, assign, make_packs

__all__ = ["Clip", "EncoderCost", "EncodingPlan", "Pack", "assign", "make_packs"]
