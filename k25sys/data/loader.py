"""The streams of a rank, read in this process or ahead of it in workers: the result is the same."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from k25sys.data.packing import PackedSequence
from k25sys.data.stream import TokenStream
from k25sys.errors import ArgumentValueError, DataError, DataWorkerError, message

_STEPS_AHEAD = 2
_Read = tuple[PackedSequence, dict[str, Any]]


class Loader:
    """One sequence of each stream a step.

    Workers are processes of their own (forkserver: they inherit neither threads nor CUDA), so sources must be
    picklable and the program's main module must be importable without side effects. They start at the first step.
    """

    def __init__(self, streams: Sequence[TokenStream], *, workers: int = 0) -> None:
        """
        Args:
            streams: of this rank, in the order of its sequences.
            workers: processes that read ahead, each some of the streams, two steps; 0: none, read in this process.

        Raises:
            ValueError: no streams, one number twice, or a negative number of workers.
        """
        numbers = [stream.number for stream in streams]
        if not numbers or len(set(numbers)) < len(numbers):
            raise ArgumentValueError(message("Loader", "streams", f"numbers {numbers}", "one or more, all different"))
        if not isinstance(workers, int) or workers < 0:
            raise ArgumentValueError(message("Loader", "workers", workers, ">= 0"))
        self._streams = list(streams)
        self._workers = min(workers, len(numbers))
        self._states = [stream.state() for stream in streams]
        self._ahead: Iterator[bytes] | None = None

    def next_step(self) -> list[PackedSequence]:
        """The next sequence of each stream. After an error the loader is where it was before.

        Raises:
            ValueError: as `TokenStream.next`.
            RuntimeError: a worker died or could not be started; names its fate.
        """
        try:
            read = self._from_workers() if self._workers else _read(self._streams)
        except BaseException:
            self.close()
            self._rewind()
            raise
        self._states = [state for _, state in read]
        return [sequence for sequence, _ in read]

    def state(self) -> dict[str, dict[str, Any]]:
        """Stream number to its state after the last step that was handed out, whatever workers have read ahead."""
        return {str(s.number): state for s, state in zip(self._streams, self._states, strict=True)}

    def restore(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes on behind `states`, which may hold streams of other ranks too.

        Raises:
            ValueError: a stream is missing, or as `TokenStream.restore`; the loader stays as it was.
        """
        missing = [s.number for s in self._streams if str(s.number) not in states]
        if missing:
            raise DataError(message("Loader.restore", "states", f"none of the streams {missing}", "one of each stream"))
        self.close()
        try:
            for stream in self._streams:
                stream.restore(states[str(stream.number)])
        except BaseException:
            self._rewind()
            raise
        self._states = [stream.state() for stream in self._streams]

    def close(self) -> None:
        """Ends the workers. A later step starts new ones."""
        self._ahead = None  # the iterator ends its processes when it is let go

    def _rewind(self) -> None:
        for stream, state in zip(self._streams, self._states, strict=True):
            stream.restore(state)

    def _from_workers(self) -> list[_Read]:
        try:
            if self._ahead is None:
                self._ahead = self._started()
            parts = [pickle.loads(next(self._ahead)) for _ in range(self._workers)]
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            hint = "classes and functions of sources must be importable: no lambdas, none defined in functions"
            got = f"{type(error).__name__}: {error}"
            raise DataWorkerError(message("Loader", "streams", got, "what pickle takes", hint)) from error
        except RuntimeError as error:
            got, hint = f"a failure: {error}", "was it killed for memory? try fewer workers"
            raise DataWorkerError(message("Loader", "a worker", got, "live processes", hint)) from error
        return [parts[i % self._workers][i // self._workers] for i in range(len(self._streams))]

    def _started(self) -> Iterator[bytes]:
        self._rewind()
        return iter(
            DataLoader(
                _Steps(self._streams),
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=_STEPS_AHEAD,
                multiprocessing_context="forkserver",
                generator=torch.Generator(),  # else it would take a number from the run's own generator
            )
        )


class _Steps(IterableDataset):
    """Steps of one worker's streams, without end."""

    def __init__(self, streams: Sequence[TokenStream]) -> None:
        self._streams = streams

    def __iter__(self) -> Iterator[bytes]:
        worker = get_worker_info()
        assert worker is not None
        own = self._streams[worker.id :: worker.num_workers]
        while True:
            # Bytes: tensors would go through shared memory, which containers have little of.
            yield pickle.dumps(_read(own))


def _read(streams: Sequence[TokenStream]) -> list[_Read]:
    return [(stream.next(), stream.state()) for stream in streams]
