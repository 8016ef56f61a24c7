"""Documents that are held out, and the rest of them."""

import pytest

from k25sys.data import ByteTokenizer, Subset, hold_out
from k25sys.data.drawn import DrawnPictures
from k25sys.errors import ArgumentValueError
from tests.training.toy_sources import Sentences


@pytest.mark.parametrize("length", [20, 39, 40, 41, 400])
def test_every_document_is_on_one_side(length: int) -> None:
    source = Sentences(length)
    trained, held_out = hold_out(source)
    assert held_out is not None
    texts = [[each.sample(i, 0).ids_S.tobytes() for i in range(len(each))] for each in (trained, held_out)]
    whole = [source.sample(i, 0).ids_S.tobytes() for i in range(length)]
    assert sorted(texts[0] + texts[1]) == sorted(whole)
    assert texts[1] == whole[19::20]
    assert (trained.name, held_out.name) == ("sentences", "sentences-held-out")


def test_pixels_are_asked_of_the_part() -> None:
    source = DrawnPictures("shapes", ByteTokenizer(), seed=4, length=40, cells=(2, 2))
    for part in hold_out(source):
        assert part is not None
        (item,) = part.sample(1, 0).media
        assert item.source == part.name
        assert len(part.pixels(item.key)) == item.num_patches


def test_a_small_source_is_not_split() -> None:
    source = Sentences(19)
    assert hold_out(source) == (source, None)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ArgumentValueError, match="stride: got 1, accepted an int >= 2"):
        Subset(Sentences(), "a", stride=1, rest=True)
    with pytest.raises(ArgumentValueError, match="index: got 20, accepted 0 to 19"):
        Subset(Sentences(400), "a", stride=20, rest=False).sample(20, 0)
