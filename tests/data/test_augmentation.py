"""Augmentation: boxes against the pixels they enclose, bounds of a plan, keys that redraw the same."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25sys.data.augmentation import (
    Augmentation,
    AugmentationPlan,
    mentions_sides,
    plan_augmentation,
    plan_for_text,
)
from k25sys.data.boxes import Box, Point, box_text, ink_box, point_text, read_boxes, read_points
from k25sys.errors import ArgumentTypeError, ArgumentValueError

FREE = Augmentation(least_crop=0.3, flip=0.5, scale=(0.5, 3.0), kept_area=0.3)


@st.composite
def pictures(draw: st.DrawFn) -> tuple[np.ndarray, Box]:
    """A grey picture with one red rectangle, and its box."""
    height, width = draw(st.integers(20, 120)), draw(st.integers(20, 120))
    x0, y0 = draw(st.integers(0, width - 10)), draw(st.integers(0, height - 10))
    x1, y1 = draw(st.integers(x0 + 10, width)), draw(st.integers(y0 + 10, height))
    picture_HW3 = np.full((height, width, 3), 60, np.uint8)
    picture_HW3[y0:y1, x0:x1] = (255, 60, 60)
    return picture_HW3, Box(x0, y0, x1, y1)


def red_box(picture_HW3: np.ndarray) -> Box | None:
    """The box around what is more red than not: half way, a smoothed edge lies where the edge itself does."""
    return ink_box(picture_HW3[:, :, 0] > 157)


def nearest_pixels(box: Box) -> Box:
    """The box around the pixels whose centres lie in `box`."""
    return Box(*(math.ceil(edge - 0.5) for edge in box))


def plan_for(picture_HW3: np.ndarray, seed: int, epoch: int, **arguments: object) -> AugmentationPlan:
    size = picture_HW3.shape[0], picture_HW3.shape[1]
    return plan_augmentation(FREE, size, seed=seed, index=5, epoch=epoch, **arguments)  # pyright: ignore[reportArgumentType]


@settings(max_examples=150)
@given(picture=pictures(), seed=st.integers(0, 10**9), epoch=st.integers(0, 99))
def test_boxes_equal_pixels(picture: tuple[np.ndarray, Box], seed: int, epoch: int) -> None:
    picture_HW3, box = picture
    plan = plan_for(picture_HW3, seed, epoch)
    result_HW3, mapped = plan.apply(picture_HW3), plan.map_box(box, kept_area=FREE.kept_area)
    seen = red_box(result_HW3)
    x0, y0, x1, y1 = plan.crop
    kept = int((picture_HW3[y0:y1, x0:x1, 0] > 157).sum())
    assert (mapped is not None) == (kept >= FREE.kept_area * box.area)
    if mapped is None or kept == 0:
        return
    # Where nothing is resized the edges are whole numbers and must be the pixels'. Where it is, a smoothed edge that
    # lies within a hair of a pixel's centre may fall on either side of it.
    assert seen is not None
    if plan.resized == (y1 - y0, x1 - x0):
        assert seen == mapped
    else:
        tolerance = 0.5 + 0.1 * max(plan.resized[0] / (y1 - y0), plan.resized[1] / (x1 - x0), 1)
        assert max(abs(a - b) for a, b in zip(seen, mapped, strict=True)) <= tolerance


@settings(max_examples=60)
@given(picture=pictures(), factor=st.integers(1, 3), flip=st.booleans(), y=st.integers(0, 30), x=st.integers(0, 30))
def test_whole_factors_are_exact(picture: tuple[np.ndarray, Box], factor: int, flip: bool, y: int, x: int) -> None:
    picture_HW3, box = picture
    height, width = picture_HW3.shape[:2]
    plan = AugmentationPlan(
        crop=(0, 0, width, height),
        resized=(height * factor, width * factor),
        is_flipped=flip,
        offset=(y, x),
        canvas=(420, 420),
    )
    mapped = plan.map_box(box, kept_area=1)
    assert mapped is not None
    assert red_box(plan.apply(picture_HW3)) == nearest_pixels(mapped) == mapped


@settings(max_examples=150)
@given(picture=pictures(), seed=st.integers(0, 10**9), epoch=st.integers(0, 99))
def test_bounds_of_a_plan(picture: tuple[np.ndarray, Box], seed: int, epoch: int) -> None:
    picture_HW3, box = picture
    height, width = picture_HW3.shape[:2]
    plan = plan_for(picture_HW3, seed, epoch, keep=[box], can_flip=False, can_shrink=False)
    assert not plan.is_flipped
    assert plan.map_box(box, kept_area=1) is not None
    x0, y0, x1, y1 = plan.crop
    assert plan.resized[0] >= y1 - y0
    assert plan.resized[1] >= x1 - x0
    assert y1 - y0 >= 0.3 * height
    assert x1 - x0 >= 0.3 * width
    assert plan.canvas == (math.ceil(height / 28) * 28, math.ceil(width / 28) * 28)
    assert AugmentationPlan.from_key(plan.key) == plan
    assert plan_for(picture_HW3, seed, epoch, keep=[box], can_flip=False, can_shrink=False) == plan


def test_points_go_with_their_pixels() -> None:
    picture_HW3 = np.zeros((40, 60, 3), np.uint8)
    picture_HW3[10, 50] = 255
    plan = AugmentationPlan(crop=(20, 5, 60, 40), resized=(35, 40), is_flipped=True, offset=(3, 7), canvas=(56, 56))
    (y,), (x,) = np.nonzero(plan.apply(picture_HW3)[:, :, 0])
    assert plan.map_point(Point(50.5, 10.5)) == (x + 0.5, y + 0.5)
    assert plan.map_point(Point(19, 10)) is None


def test_plans_differ_and_use_everything() -> None:
    plans = {
        (seed, index, epoch): plan_augmentation(FREE, (84, 84), seed=seed, index=index, epoch=epoch)
        for seed in range(4)
        for index in range(4)
        for epoch in range(4)
    }
    assert len({plan.key for plan in plans.values()}) == 64
    assert 16 < sum(plan.is_flipped for plan in plans.values()) < 48
    still = dataclasses.replace(FREE, least_crop=1, flip=0, scale=(1, 1))
    assert plan_augmentation(still, (84, 84), seed=1, index=1, epoch=1).key == "0,0,84,84,84,84,0,0,0,84,84"


@pytest.mark.parametrize("text", ["the LEFT one", "leftmost", "right-hand side", "counter-clockwise", "a mirror image"])
def test_text_about_sides(text: str) -> None:
    assert mentions_sides(text)


def test_text_about_no_sides() -> None:
    assert not mentions_sides("a bright cleft; upright copyrights, aright")


@given(
    size=st.tuples(st.integers(1, 1000), st.integers(1, 1000)),
    edges=st.lists(st.integers(0, 1000), min_size=4, max_size=4),
)
def test_written_boxes_come_back(size: tuple[int, int], edges: list[int]) -> None:
    """Up to 1000 pixels a side, a thousandth is no more than a pixel: whole pixels come back exactly."""
    height, width = size
    (x0, x1), (y0, y1) = sorted(e % (width + 1) for e in edges[:2]), sorted(e % (height + 1) for e in edges[2:])
    box = Box(x0, y0, x1, y1)
    if box.area == 0:
        with pytest.raises(ArgumentValueError, match="box_text"):
            box_text(box, size)
        return
    (read,) = read_boxes("at " + box_text(box, size) + ".", size)
    assert tuple(round(edge) for edge in read) == box
    ((x, y),) = read_points("at " + point_text(Point(x0, y0), size), size)
    assert (round(x), round(y)) == (x0, y0)


@settings(max_examples=60)
@given(picture=pictures(), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_boxes_and_points_of_a_caption_go_with_their_pixels(
    picture: tuple[np.ndarray, Box], seed: int, epoch: int
) -> None:
    picture_HW3, box = picture
    size = picture_HW3.shape[:2]
    caption = f"Something red {box_text(box, size)} around {point_text(box.center, size)}, not [9,9,3,3] nor [1,2]."
    plan, text = plan_for_text(Augmentation(), size, caption, seed=seed, index=3, epoch=epoch)
    (written,), (point,) = read_boxes(caption, size), read_points(caption, size)
    moved, centre = plan.map_box(written, kept_area=1.0), plan.map_point(point)
    assert moved is not None
    assert centre is not None
    marks = f"{box_text(moved, plan.canvas)} around {point_text(centre, plan.canvas)}"
    assert text == f"Something red {marks}, not [9,9,3,3] nor [1,2]."
    found = red_box(plan.apply(picture_HW3))
    if found is not None and min(plan.resized) >= min(plan.crop[3] - plan.crop[1], plan.crop[2] - plan.crop[0]):
        slack = 2 + max(*plan.canvas, *size) / 500  # of thousandths, twice, and of a resize
        assert all(abs(a - b) <= slack * 2 for a, b in zip(found, moved, strict=True))


@pytest.mark.parametrize("point", ["(1000,500)", "(0,1000)", "(1000,1000)", "(0,0)"])
def test_points_on_an_edge_are_kept(point: str) -> None:
    for index in range(40):
        plan, text = plan_for_text(Augmentation(), (100, 60), f"At {point}.", seed=1, index=index, epoch=0)
        (given,), (moved,) = read_points(point, (100, 60)), read_points(text, plan.canvas)
        wanted = plan.map_point(given)
        assert wanted is not None
        assert abs(wanted.x - moved.x) + abs(wanted.y - moved.y) < 0.3


def test_a_caption_of_the_whole_keeps_it() -> None:
    for epoch in range(20):
        for options in ({"can_crop": False}, {"has_writing": True}):
            plan, _ = plan_for_text(Augmentation(), (100, 60), "Six coins.", seed=1, index=0, epoch=epoch, **options)
            assert plan.crop == (0, 0, 60, 100)
            assert not (options.get("has_writing") and (plan.is_flipped or plan.resized[0] < 100))
    free = [plan_for_text(Augmentation(), (100, 60), "Grass.", seed=1, index=0, epoch=epoch)[0] for epoch in range(20)]
    assert any(plan.crop != (0, 0, 60, 100) for plan in free)
    assert any(plan.is_flipped for plan in free)
    told = [plan_for_text(Augmentation(), (100, 60), "On the left.", seed=1, index=0, epoch=e)[0] for e in range(20)]
    assert not any(plan.is_flipped for plan in told)


def test_what_is_no_box() -> None:
    assert read_boxes("[1,2,3] [5,5,5,9] [0,0,1001,5] [9,0,3,4] [0,0,1000,1000]", (20, 10)) == [(0, 0, 10, 20)]
    assert read_points("(1001,5) (1,2,3) (500,500)", (20, 10)) == [(5, 10)]


def test_wrong_arguments() -> None:
    plan = plan_augmentation(FREE, (84, 84), seed=0, index=0, epoch=0)
    picture_HW3 = np.zeros((84, 84, 3), np.uint8)
    for arguments in ({"least_crop": 0}, {"flip": 2}, {"scale": (2, 1)}, {"scale": (0, 1)}, {"kept_area": math.nan}):
        with pytest.raises(ArgumentValueError, match="Augmentation"):
            Augmentation(**arguments)  # pyright: ignore[reportArgumentType]
    for key in ("", "1,2", plan.key + ",1", "0,0,0,84,84,84,0,0,0,84,84", "0,0,84,84,84,84,2,0,0,84,84"):
        with pytest.raises(ArgumentValueError, match="AugmentationPlan"):
            AugmentationPlan.from_key(key)
    for key in ("0,0,84,84,84,84,0,1,0,84,84", "0,0,84,84,84,84,0,0,0,85,85"):
        with pytest.raises(ArgumentValueError, match="multiples of 28"):
            AugmentationPlan.from_key(key)
    with pytest.raises(ArgumentTypeError, match="uint8"):
        plan.apply(picture_HW3.astype(np.float32))
    with pytest.raises(ArgumentValueError, match="holds"):
        plan.apply(picture_HW3[:10])
    with pytest.raises(ArgumentValueError, match=r"\(H, W, 3\)"):
        plan.apply(picture_HW3[:, :, 0])
    with pytest.raises(ArgumentValueError, match="x0 < x1"):
        plan.map_box(Box(1, 1, 1, 2), kept_area=0.5)
    with pytest.raises(ArgumentValueError, match="keep"):
        plan_augmentation(FREE, (84, 84), seed=0, index=0, epoch=0, keep=[Box(0, 0, 85, 3)])
    with pytest.raises(ArgumentValueError, match="epoch -1"):
        plan_augmentation(FREE, (84, 84), seed=0, index=0, epoch=-1)
    with pytest.raises(ArgumentValueError, match="point_text"):
        point_text(Point(11, 0), (10, 10))
