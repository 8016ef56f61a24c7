"""Ranks, and how a model's parts, its gradients and its optimiser's state are spread over them."""

from k25sys.parallel.grid import GridSizes, RankGrid
from k25sys.parallel.layout import ParameterLayout
from k25sys.parallel.weight_grads import WeightGradStore

__all__ = ["GridSizes", "ParameterLayout", "RankGrid", "WeightGradStore"]
