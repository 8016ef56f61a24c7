"""What sources give, in short: to compare it between processes, and to read it."""

import hashlib
from collections.abc import Iterable

from k25sys.data import ByteTokenizer
from k25sys.data.sample import Sample, Source

BYTES = ByteTokenizer()


def learnt(sample: Sample) -> str:
    """The text that has loss."""
    return BYTES.decode(sample.ids_S[sample.loss_S].tolist())


def digest(sources: Iterable[Source], epoch: int) -> str:
    """Of all documents and their pixels."""
    state = hashlib.sha256()
    for source in sources:
        for index in range(len(source)):
            sample = source.sample(index, epoch)
            state.update(sample.ids_S.tobytes() + sample.loss_S.tobytes() + repr(sample.media).encode())
            for item in sample.media:
                state.update(source.pixels(item.key).numpy().tobytes())
    return state.hexdigest()
