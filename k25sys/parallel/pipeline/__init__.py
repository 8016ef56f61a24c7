"""Pipeline parallelism: schedules as data, and what proves, times, draws and runs them."""

from k25sys.parallel.pipeline.generators import make_schedule
from k25sys.parallel.pipeline.ir import Action, Kind, Schedule
from k25sys.parallel.pipeline.lowering import lower
from k25sys.parallel.pipeline.simulator import simulate
from k25sys.parallel.pipeline.timeline import Timeline
from k25sys.parallel.pipeline.validator import validate

__all__ = ["Action", "Kind", "Schedule", "Timeline", "lower", "make_schedule", "simulate", "validate"]
