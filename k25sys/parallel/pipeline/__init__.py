"""Pipeline parallelism: schedules as data, and what proves, times, draws and runs them."""

from k25sys.parallel.pipeline.ir import Action, Kind, Schedule

__all__ = ["Action", "Kind", "Schedule"]
