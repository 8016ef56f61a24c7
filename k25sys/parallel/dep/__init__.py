"""DEP, the decoupled encoder process: one training step in three phases over all ranks (K2.5 report, section 4.5.1)."""

from k25sys.parallel.dep.balance import Clip, EncoderCost, EncodingPlan, Pack, assign, make_packs
from k25sys.parallel.dep.phases import DecoupledEncoder, DecoupledOptions
from k25sys.parallel.dep.splice import splice, taken

__all__ = [
    "Clip",
    "DecoupledEncoder",
    "DecoupledOptions",
    "EncoderCost",
    "EncodingPlan",
    "Pack",
    "assign",
    "make_packs",
    "splice",
    "taken",
]
