"""The proof of schedules: what is generated and lowered passes, what is broken does not."""

from k25sys.parallel.pipeline import lower, validate
from tests.parallel.pipeline.sizes import all_schedules


def test_all_schedules_are_valid_and_stay_so_when_lowered() -> None:
    for schedule in all_schedules():
        validate(schedule)
        validate(lower(schedule))
