"""Drawn pictures: what the truth says, measured in the pixels; documents that are the same in any process."""

import hashlib
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from k25sys.data import ByteTokenizer, ImagePart, UserTurn, render_chat
from k25sys.data.augmentation import Augmentation, AugmentationPlan
from k25sys.data.boxes import Box, ink_box, read_boxes, read_points
from k25sys.data.drawn import DRAWN_KINDS, DrawnPictures, Truth
from k25sys.data.drawn.scene import draw_text, load_font
from k25sys.data.drawn.shapes import COLOURS, KINDS, shape_mask
from k25sys.data.media_text import clip_tokens, image_tokens
from k25sys.data.sample import MediaItem, Sample, Source
from k25sys.errors import ArgumentTypeError, ArgumentValueError
from tests.data.test_images import reassembled

TOKENIZER = ByteTokenizer()
PALETTE = dict(COLOURS)
# Only moves whole pixels, so that colours stay what they were.
STIFF = Augmentation(least_crop=0.4, scale=(1, 1), kept_area=0.2)
AUGMENTATIONS = (None, STIFF, Augmentation())

kinds = st.sampled_from(DRAWN_KINDS)
indices = st.integers(0, 9999)
epochs = st.integers(0, 5)


def source(kind: str, augmentation: Augmentation | None = None, cells: tuple[int, int] = (2, 4)) -> DrawnPictures:
    return DrawnPictures(kind, TOKENIZER, seed=11, length=10_000, cells=cells, augmentation=augmentation)


def has_colour(truth: Truth, name: str) -> np.ndarray:
    return (truth.picture_HW3 == np.array(PALETTE[name], np.uint8)).all(2)


def plan_of(sample: Sample) -> AugmentationPlan | None:
    text = sample.media[0].key.rpartition("/")[2]
    return AugmentationPlan.from_key(text) if text else None


def touches(mask_HW: np.ndarray, box: Box) -> bool:
    """Whether `box` is the smallest around the mask's pixels within it."""
    x0, y0, x1, y1 = (int(edge) for edge in box)
    return (x0, y0, x1, y1) == box and ink_box(mask_HW[y0:y1, x0:x1]) == (0, 0, x1 - x0, y1 - y0)


@settings(max_examples=200)
@given(kind=st.sampled_from(("shapes", "counting")), stiff=st.booleans(), index=indices, epoch=epochs)
def test_shapes_fill_their_boxes(kind: str, stiff: bool, index: int, epoch: int) -> None:
    drawn = source(kind, STIFF if stiff else None)
    truth = drawn.truth(index, epoch)
    for colour in PALETTE:
        mask_HW = has_colour(truth, colour)
        boxes = [mark.box for mark in truth.marks if mark.label.startswith(colour)]
        assert all(touches(mask_HW, box) for box in boxes)
        if len(boxes) == 1 and (kind == "counting" or not stiff):  # nothing was dropped
            assert ink_box(mask_HW) == boxes[0]
        for x0, y0, x1, y1 in boxes:
            mask_HW[int(y0) : int(y1), int(x0) : int(x1)] = False
        assert (kind == "shapes" and stiff) or not mask_HW.any()


@settings(max_examples=100)
@given(index=indices, epoch=epochs)
def test_what_a_crop_leaves(index: int, epoch: int) -> None:
    """A mark stays where enough of its pixels do, with the box around these: a cut circle's is not the cut box."""
    drawn, before = source("shapes", STIFF), source("shapes").truth(index, 0)
    truth, plan = drawn.truth(index, epoch), plan_of(drawn.sample(index, epoch))
    assert plan is not None
    crop_x0, crop_y0, crop_x1, crop_y1 = plan.crop
    expected = []
    for mark in before.marks:
        x0, y0, x1, y1 = (int(edge) for edge in mark.box)
        mask_HW = np.zeros(before.picture_HW3.shape[:2], bool)
        mask_HW[y0:y1, x0:x1] = has_colour(before, mark.label.split()[0])[y0:y1, x0:x1]
        part_HW = mask_HW[crop_y0:crop_y1, crop_x0:crop_x1]
        if part_HW.sum() < STIFF.kept_area * mask_HW.sum():
            continue
        seen = ink_box(part_HW[:, ::-1] if plan.is_flipped else part_HW)
        assert seen is not None
        y, x = plan.offset
        expected.append((mark.label, Box(seen.x0 + x, seen.y0 + y, seen.x1 + x, seen.y1 + y)))
    assert [(mark.label, mark.box) for mark in truth.marks] == expected


@settings(max_examples=100)
@given(index=indices, epoch=epochs)
def test_shapes_after_any_augmentation(index: int, epoch: int) -> None:
    drawn = source("shapes", Augmentation())
    truth, plan = drawn.truth(index, epoch), plan_of(drawn.sample(index, epoch))
    assert plan is not None
    scale = max(plan.resized[0] / (plan.crop[3] - plan.crop[1]), 1)
    names = [mark.label.split()[0] for mark in truth.marks]
    for mark, name in zip(truth.marks, names, strict=True):
        x0, y0, x1, y1 = mark.box
        assert 0 <= x0 < x1 <= truth.picture_HW3.shape[1]
        assert 0 <= y0 < y1 <= truth.picture_HW3.shape[0]
        if names.count(name) > 1 or "square" not in mark.label:
            continue
        # A square's edges are straight: what is nearer to its colour than to any other ends where its box does.
        region = slice(max(0, int(y0) - 1), int(y1) + 2), slice(max(0, int(x0) - 1), int(x1) + 2)
        distance = ((truth.picture_HW3[region].astype(int) - PALETTE[name]) ** 2).sum(2)
        seen = ink_box(distance < 60**2)
        assert seen is not None
        edges = (seen.x0 + region[1].start, seen.y0 + region[0].start, seen.x1 + region[1].start)
        assert max(abs(a - b) for a, b in zip(edges, (x0, y0, x1), strict=True)) <= 1 + scale


@pytest.mark.parametrize("kind", KINDS)
def test_shape_masks(kind: str) -> None:
    for side in range(8, 60):
        mask = shape_mask(kind, side)
        assert ink_box(mask) == (0, 0, side, side)
        assert (mask == mask[:, ::-1]).all()


@settings(max_examples=150)
@given(index=indices, epoch=epochs, augmentation=st.sampled_from(AUGMENTATIONS))
def test_answers_about_shapes(index: int, epoch: int, augmentation: Augmentation | None) -> None:
    truth = source("shapes", augmentation).truth(index, epoch)
    size = truth.picture_HW3.shape[:2]
    by_label = {mark.label: mark.box for mark in truth.marks}

    def is_near(one: Box, other: Box) -> bool:
        return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 0.5 * max(size) / 1000 + 1e-9

    question, answer = truth.question, truth.answer
    if match := re.fullmatch(r"Is the (.+) left or right of the (.+)\?\n", question):
        one, other = by_label[match[1]], by_label[match[2]]
        assert answer == ("left" if one.x1 <= other.x0 else "right")
        assert one.x1 <= other.x0 or other.x1 <= one.x0
    elif question.startswith("What is at"):
        (asked,) = read_boxes(question, size)
        assert any(is_near(asked, mark.box) and mark.label == answer for mark in truth.marks)
    elif match := re.fullmatch(r"Where is the (.+)\?\n", question):
        (box,) = read_boxes(answer, size)
        assert is_near(box, by_label[match[1]])
    elif match := re.fullmatch(r"Point at the (.+)\.\n", question):
        (point,) = read_points(answer, size)
        assert math.dist(point, by_label[match[1]].center) <= max(size) / 1000
    else:
        lines, boxes = answer.split("\n"), read_boxes(answer, size)
        assert len(lines) == len(boxes) == len(truth.marks) > 0
        assert [box.y0 for box in boxes] == sorted(box.y0 for box in boxes)
        for line, box in zip(lines, boxes, strict=True):
            assert any(is_near(box, mark.box) and mark.label in line for mark in truth.marks)


@settings(max_examples=150)
@given(index=indices, epoch=epochs, augmentation=st.sampled_from(AUGMENTATIONS))
def test_counts(index: int, epoch: int, augmentation: Augmentation | None) -> None:
    """Whatever the augmentation, no shape is lost, and the answer is the number of marks that the question means."""
    truth = source("counting", augmentation).truth(index, epoch)
    assert len(truth.marks) == len(source("counting").truth(index, 0).marks)
    noun = re.fullmatch(r"(?:How many|Point at all) (.+?)(?: are there\?|\.)\n", truth.question)
    assert noun
    words = re.sub(r"(crosse|[a-z]+?)s$", lambda m: m[1].removesuffix("e") if m[1] == "crosse" else m[1], noun[1])
    meant = [
        m for m in truth.marks if words == "shape" or set(words.removesuffix(" shape").split()) <= set(m.label.split())
    ]
    if truth.question.startswith("How many"):
        assert int(truth.answer) == len(meant)
    else:
        points = read_points(truth.answer, truth.picture_HW3.shape[:2])
        assert len(points) == len(meant) > 0
        assert all(any(math.dist(p, m.box.center) < 0.2 for m in meant) for p in points)


@pytest.mark.parametrize("size", [9, 10, 17, 40])
def test_text_is_drawn_as_pillow_draws_it(size: int) -> None:
    font = load_font(size)
    for x, y, text in ((10, 5, "jfly"), (0, 0, "jJ"), (150, 20, "Quay"), (30, 70, "pj|7"), (40, 20, "yard")):
        expected = Image.new("L", (200, 80), 255)
        ImageDraw.Draw(expected).text((x, y), text, fill=0, font=font)
        picture_HW3 = np.full((80, 200, 3), 255, np.uint8)
        changed_HW = draw_text(picture_HW3, (x, y), text, font, (0, 0, 0))
        assert abs(picture_HW3.astype(int) - np.asarray(expected)[:, :, None]).max() <= 1
        assert (changed_HW == (picture_HW3 < 255).all(2)).all()


@settings(max_examples=120)
@given(index=indices, cells=st.sampled_from(((2, 2), (2, 4), (6, 9))))
def test_word_boxes_hold_the_ink(index: int, cells: tuple[int, int]) -> None:
    truth = source("writing", cells=cells).truth(index, 0)
    picture_HW3 = truth.picture_HW3
    paper = picture_HW3[-1, -1]
    ink_HW = (picture_HW3 != paper).any(2) & (picture_HW3 != 128).any(2)  # the rules of a table are grey
    assert truth.marks
    for mark in truth.marks:
        x0, y0, x1, y1 = (int(edge) for edge in mark.box)
        assert touches(ink_HW, mark.box)
        ink_HW[y0:y1, x0:x1] = False
    assert not ink_HW.any()
    for one in truth.marks:
        assert all(one is other or not one.box.clipped(other.box).area for other in truth.marks)


@settings(max_examples=80)
@given(index=indices, epoch=epochs)
def test_words_after_augmentation(index: int, epoch: int) -> None:
    """All words stay, upright, never smaller; their ink stays in their boxes but for the reach of the resize."""
    drawn = source("writing", Augmentation(least_crop=0.3, scale=(0.3, 3)))
    before, truth, plan = (
        source("writing").truth(index, 0),
        drawn.truth(index, epoch),
        plan_of(drawn.sample(index, epoch)),
    )
    assert plan is not None
    assert not plan.is_flipped
    assert [mark.label for mark in truth.marks] == [mark.label for mark in before.marks]
    assert truth.question == before.question
    for mark, old in zip(truth.marks, before.marks, strict=True):
        assert mark.box.x1 - mark.box.x0 >= old.box.x1 - old.box.x0 - 1e-9
        x0, y0, x1, y1 = (round(edge) for edge in mark.box)
        part = truth.picture_HW3[max(0, y0) : y1, max(0, x0) : x1].astype(int)
        assert part.max() - part.min() > 60  # ink on paper


@settings(max_examples=80)
@given(index=indices)
def test_reading(index: int) -> None:
    truth = source("writing").truth(index, 0)
    words = [mark.label for mark in truth.marks]
    if truth.question.startswith("Where"):
        (asked,) = re.findall(r'"(.+)"', truth.question)
        (box,) = read_boxes(truth.answer, truth.picture_HW3.shape[:2])
        assert Box(*(round(edge) for edge in box)) == truth.marks[words.index(asked)].box
    elif truth.question.startswith("Read every"):
        assert [line.split(" [")[0] for line in truth.answer.split("\n")] == words
    else:
        assert [word for word in truth.answer.split() if word != "|"] == words


@settings(max_examples=150)
@given(index=indices, cells=st.sampled_from(((2, 2), (2, 4), (6, 9))))
def test_chart_values_are_to_be_measured(index: int, cells: tuple[int, int]) -> None:
    """The values follow from pixels: the axis's end and unit, and how high bars and points are."""
    drawn = source("charts", cells=cells)
    truth = drawn.truth(index, 0)
    ink_HW = (truth.picture_HW3 == 20).all(2)
    baseline = int(np.argmax(ink_HW.sum(1)))  # the longest row of ink
    is_bars = all(mark.box.y1 == baseline for mark in truth.marks)
    heights = [baseline - (mark.box.y0 if is_bars else mark.box.center.y - 0.5) for mark in truth.marks]
    for mark in truth.marks:
        x0, y0, x1, y1 = (int(edge) for edge in mark.box)
        colours = {tuple(c) for c in truth.picture_HW3[y0:y1, x0:x1].reshape(-1, 3).tolist()} & set(PALETTE.values())
        (colour,) = colours
        assert touches((truth.picture_HW3 == np.array(colour, np.uint8)).all(2), mark.box)
    values = {mark.label: mark.value or 0 for mark in truth.marks}
    units = {height / value for height, value in zip(heights, values.values(), strict=True)}
    assert len(units) == 1
    assert min(units) >= 3
    grid_HW = (truth.picture_HW3 == 215).all(2)
    numbered = np.flatnonzero(grid_HW[:, int(truth.marks[0].box.x0) :].any(1))  # writing lies left of it and below
    numbers = [(baseline - row) / min(units) for row in numbered if row < baseline]
    assert numbers  # besides the baseline's 0
    assert all(number == int(number) for number in numbers)


@settings(max_examples=60)
@given(index=indices, epoch=epochs)
def test_charts_stay_whole(index: int, epoch: int) -> None:
    """Axis, names and gridlines included."""
    before, after = (
        source("charts").truth(index, 0).picture_HW3,
        source("charts", STIFF).truth(index, epoch).picture_HW3,
    )
    for grey in (20, 215):
        assert (before == grey).all(2).sum() == (after == grey).all(2).sum()


@settings(max_examples=150)
@given(index=indices, epoch=epochs, augmentation=st.sampled_from(AUGMENTATIONS))
def test_answers_about_charts(index: int, epoch: int, augmentation: Augmentation | None) -> None:
    truth = source("charts", augmentation).truth(index, epoch)
    values = {mark.label: mark.value or 0 for mark in truth.marks}
    question, answer = truth.question, truth.answer
    if question in ("", "Give the values as a table.\n"):
        assert answer == "\n".join(f"{name} | {value}" for name, value in values.items())
    elif question.startswith("Which value"):
        extreme = max(values.values()) if "highest" in question else min(values.values())
        assert [name for name, value in values.items() if value == extreme] == [answer]
    elif question.startswith("Where"):
        (name,) = re.findall(r"of (\w+)\?", question)
        (box,) = [mark.box for mark in truth.marks if mark.label == name]
        size = truth.picture_HW3.shape[:2]
        centers = [b.center for b in read_boxes(answer, size)] or read_points(answer, size)
        assert math.dist(centers[0], box.center) <= max(size) / 1000
    elif question.startswith("What is the sum"):
        assert int(answer) == sum(values.values())
    elif question.startswith("What is the value"):
        assert int(answer) == values[re.findall(r"of (\w+)\?", question)[0]]
    else:
        one, other = re.findall(r"are (\w+) and (\w+)\?", question)[0]
        assert int(answer) == abs(values[one] - values[other])


@settings(max_examples=150)
@given(kind=kinds, index=indices, epoch=epochs, augmentation=st.sampled_from(AUGMENTATIONS))
def test_documents(kind: str, index: int, epoch: int, augmentation: Augmentation | None) -> None:
    drawn: Source = source(kind, augmentation)
    sample, truth = drawn.sample(index, epoch), source(kind, augmentation).truth(index, epoch)
    special = TOKENIZER.special
    sample.check(special.media_pad)
    (item,) = sample.media
    assert item.source == drawn.name == f"drawn-{kind}"
    assert 16 <= item.num_patches <= 64
    prompt = [*image_tokens(item.grid, TOKENIZER), *TOKENIZER.encode(truth.question)]
    assert sample.ids_S.tolist() == [*prompt, *TOKENIZER.encode(truth.answer), special.eos]
    assert sample.loss_S.tolist() == [i >= len(prompt) for i in range(len(sample.ids_S))]
    assert truth.answer
    assert truth.question in ("",) or truth.question.endswith("\n")
    pixels = drawn.pixels(item.key)
    assert (reassembled(pixels, torch.tensor([item.grid])) == truth.picture_HW3).all()
    assert pixels.dtype == torch.float32


@settings(max_examples=60)
@given(index=indices, epoch=epochs)
def test_mirrored_only_where_the_text_allows(index: int, epoch: int) -> None:
    drawn = source("shapes", Augmentation(flip=1))
    plan = plan_of(drawn.sample(index, epoch))
    assert plan is not None
    assert plan.is_flipped == ("left" not in drawn.truth(index, epoch).question)
    for kind in ("writing", "charts"):
        plan = plan_of(source(kind, Augmentation(flip=1)).sample(index, epoch))
        assert plan is not None
        assert not plan.is_flipped


def test_epochs_and_indices_differ() -> None:
    for kind in DRAWN_KINDS:
        drawn = source(kind, Augmentation())
        assert len({drawn.sample(3, epoch).media[0].key for epoch in range(8)}) > 4
        assert len({drawn.sample(index, 0).ids_S.tobytes() for index in range(40)}) > 30
        assert len({source(kind).sample(3, epoch).media[0].key for epoch in range(8)}) == 1
        other = DrawnPictures(kind, TOKENIZER, seed=12, length=10_000)
        assert [other.sample(i, 0).ids_S.tolist() for i in range(9)] != [
            source(kind).sample(i, 0).ids_S.tolist() for i in range(9)
        ]


def digest() -> str:
    """Of documents of all kinds and their pixels."""
    total = hashlib.sha256()
    for kind in DRAWN_KINDS:
        drawn = source(kind, Augmentation())
        for index in range(6):
            sample = drawn.sample(index, 2)
            total.update(sample.ids_S.tobytes() + sample.loss_S.tobytes() + sample.media[0].key.encode())
            total.update(drawn.pixels(sample.media[0].key).numpy().tobytes())
    return total.hexdigest()


def test_same_in_another_process() -> None:
    code = "from tests.data.test_drawn import digest; print(digest())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == digest()


@given(t=st.integers(1, 4), h=st.integers(1, 6), w=st.integers(1, 6))
def test_clips_are_written_as_in_chats(t: int, h: int, w: int) -> None:
    turn = UserTurn(content=["see ", ImagePart(grid_thw=torch.tensor([[1, 2 * h, 2 * w]])), " here"])
    ids = render_chat([turn], TOKENIZER).token_ids
    special = TOKENIZER.special
    clip = ids[ids.index(special.media_begin) : ids.index(special.media_end) + 1]
    assert clip == image_tokens((1, 2 * h, 2 * w), TOKENIZER)
    video = clip_tokens("video", (t, 2 * h, 2 * w), TOKENIZER)
    item = MediaItem(grid=(t, 2 * h, 2 * w), source="", key="")
    assert video.count(special.media_pad) == item.num_rows
    assert TOKENIZER.decode(video[1:6]) == "video"


def test_wrong_arguments() -> None:
    drawn = source("shapes")
    for index in (-1, 10_000):
        with pytest.raises(ArgumentValueError, match="index"):
            drawn.sample(index, 0)
    with pytest.raises(ArgumentValueError, match="epoch"):
        drawn.truth(0, -1)
    with pytest.raises(ArgumentTypeError, match="index"):
        drawn.sample(1.5, 0)  # pyright: ignore[reportArgumentType]
    good = drawn.sample(0, 0).media[0].key
    for key in ("", good + "x", good.replace("11", "12"), good.replace("/0/", "/10000/"), good.replace("shapes", "x")):
        with pytest.raises(ArgumentValueError, match="key"):
            drawn.pixels(key)
    with pytest.raises(ArgumentValueError, match="kind"):
        DrawnPictures("maps", TOKENIZER, seed=0, length=1)
    for cells in ((1, 2), (3, 2), (2, 65)):
        with pytest.raises(ArgumentValueError, match="cells"):
            DrawnPictures("shapes", TOKENIZER, seed=0, length=1, cells=cells)
    with pytest.raises(ArgumentValueError, match="seed"):
        DrawnPictures("shapes", TOKENIZER, seed=-1, length=1)
    with pytest.raises(ArgumentValueError, match="length"):
        DrawnPictures("shapes", TOKENIZER, seed=0, length=0)
    for grid in ((1, 2), (1, 3, 2), (0, 2, 2)):
        with pytest.raises(ArgumentValueError, match="grid_thw"):
            image_tokens(grid, TOKENIZER)
