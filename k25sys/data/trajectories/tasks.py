"""Problems of pictures with exact answers, from (seed, index) alone."""

from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType

from k25sys.data.trajectories import grids, pictures, shapes
from k25sys.data.trajectories.task import Task
from k25sys.errors import ArgumentTypeError, ArgumentValueError, message

TASK_KINDS: Mapping[str, Callable[[Random], Task]] = MappingProxyType(
    {
        "count": shapes.count_shapes,
        "area": shapes.colour_area,
        "size": shapes.largest_size,
        "distance": shapes.centre_distance,
        "holes": shapes.plate_holes,
        "maze": grids.maze_path,
        "board": grids.board_rows,
        "chart": grids.bar_chart,
        "clock": grids.clock_time,
        "difference": pictures.two_pictures,
        "digits": pictures.turned_digits,
        "histogram": pictures.grey_levels,
        "crop": pictures.crop_colour,
        "turn": pictures.turn_and_flip,
    }
)
"""What is asked for, by name."""


def task_kind(index: int) -> str:
    """The kind of problem `index`: they take turns."""
    return list(TASK_KINDS)[index % len(TASK_KINDS)]


def make_task(seed: int, index: int) -> Task:
    """Problem `index` of that seed: the same in any process with the same versions of Pillow and NumPy.

    Raises:
        TypeError, ValueError: a seed or an index that is not an int or is negative.
    """
    for name, value in (("seed", seed), ("index", index)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(message("make_task", name, type(value).__name__, "an int"))
        if value < 0:
            raise ArgumentValueError(message("make_task", name, value, "at least 0"))
    return TASK_KINDS[task_kind(index)](Random(f"{seed}/{index}"))
