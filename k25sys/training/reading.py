"""The batches of a run, read and decoded while the steps before them train."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from k25sys.data import Loader, PackedSequence
from k25sys.training.batches import BatchMaker, StepBatch

_Read = tuple[list[PackedSequence], dict[str, dict[str, Any]]]


class SourceThread(ThreadPoolExecutor):
    """The one thread in which a run reads its sources: documents, unless workers do, and pixels.

    torch's operators run on that thread alone there: a second team of OpenMP's would make more threads than processors,
    and libgomp then puts threads to sleep at the end of every parallel region, in the training step too.
    """

    def __init__(self) -> None:
        number = torch.get_num_threads()
        super().__init__(1, thread_name_prefix="sources", initializer=torch.set_num_threads, initargs=(1,))
        self.submit(torch.get_num_threads).result()
        torch.set_num_threads(number)  # what threads that are yet to come take over, and the one above has changed


class StepReader:
    """Gives the batch of each step. While a step trains, the documents of the step after the next are read, and the
    pictures of the next one, whose metadata all ranks have told each other by then, are decoded.

    Args:
        loader: of this data rank, the reader's own from here.
        batches: makes batches of its sequences.
        thread: see SourceThread; the pixels of `batches` are to come from it too. The reader's own.
    """

    def __init__(self, loader: Loader, batches: BatchMaker, thread: SourceThread) -> None:
        self._loader, self._batches, self._thread = loader, batches, thread
        self._state = loader.state()
        self._read: Future[_Read] | None = None
        self._described: tuple[StepBatch, dict[str, dict[str, Any]]] | None = None

    def next_step(self, following: int) -> StepBatch:
        """The next batch. Collective over "data".

        Args:
            following: steps that will be asked for after this one: no document is read for more.

        Raises:
            What `Loader.next_step`, `BatchMaker.describe` and decoding raise: where the documents of the next step are
            at fault, that is before this one trains.
        """
        batch, state = self._described or self._describe()
        self._described = None
        if following > 0:
            self._described = self._describe()
            self._batches.pixels.decode_ahead(self._described[0].encoded_here)
        if following > 1 and self._loader.num_workers == 0:
            self._read = self._thread.submit(self._read_step)
        batch = self._batches.load(batch)
        self._state = state
        return batch

    def state(self) -> dict[str, dict[str, Any]]:
        """See Loader.state: after the last step that was handed out, whatever was read ahead."""
        return self._state

    def restore(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """See Loader.restore."""
        self._drop()
        self._loader.restore(states)
        self._state = self._loader.state()

    def close(self) -> None:
        """Ends the thread and the loader's workers."""
        self._drop()
        self._thread.shutdown(cancel_futures=True)
        self._loader.close()

    def _describe(self) -> tuple[StepBatch, dict[str, dict[str, Any]]]:
        sequences, state = self._next_read()
        return self._batches.describe(sequences), state

    def _next_read(self) -> _Read:
        if self._loader.num_workers > 0:  # they are ahead by themselves, and waiting for them must not delay decoding
            return self._read_step()
        future, self._read = self._read or self._thread.submit(self._read_step), None
        return future.result()

    def _read_step(self) -> _Read:
        return self._loader.next_step(), self._loader.state()

    def _drop(self) -> None:
        """What was read ahead."""
        if self._read is not None and not self._read.cancel():
            self._read.exception()
        self._read = self._described = None
