"""The streams of a rank, read in this process or ahead of it in workers: the result is the same."""

import atexit
import multiprocessing
import pickle
import signal
import traceback
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from k25sys.data.packing import PackedSequence
from k25sys.data.stream import TokenStream
from k25sys.errors import ArgumentTypeError, ArgumentValueError, DataError, DataWorkerError, message

_STEPS_AHEAD = 2
_PATIENCE = 5.0  # seconds in which a worker may finish its document before it is killed

_Read = tuple[PackedSequence, dict[str, Any]]


class Loader:
    """One sequence of each stream a step. The streams are the loader's own from here: do not use them elsewhere.

    Workers are new processes (spawned: they inherit no threads and no CUDA), so sources must be picklable and the main
    module importable without side effects. They start at the first step and leave at `close`, when the loader is
    let go, or when this process ends in whatever way. They ignore SIGINT and SIGTERM: what a job is told by them is
    this process's to decide.
    """

    def __init__(self, streams: Sequence[TokenStream], *, workers: int = 0) -> None:
        """
        Args:
            streams: of this rank, in the order of its sequences.
            workers: processes that read ahead, each some of the streams, two steps; 0: none, read in this process.

        Raises:
            ValueError: no streams, one number twice, or a negative number of workers.
            TypeError: a number of workers that is no integer.
        """
        numbers = [stream.number for stream in streams]
        if not numbers or len(set(numbers)) < len(numbers):
            raise ArgumentValueError(message("Loader", "streams", f"numbers {numbers}", "one or more, all different"))
        if not isinstance(workers, int) or isinstance(workers, bool):
            raise ArgumentTypeError(message("Loader", "workers", repr(workers), "an integer"))
        if workers < 0:
            raise ArgumentValueError(message("Loader", "workers", workers, ">= 0"))
        self._streams = list(streams)
        self.num_workers = min(workers, len(numbers))
        self._states = [stream.state() for stream in streams]
        self._are_ahead = False
        self._workers: _Workers | None = None

    def next_step(self) -> list[PackedSequence]:
        """The next sequence of each stream. After an error the loader is where it was before.

        Raises:
            ValueError: as `TokenStream.next`; the cause has the worker's traceback.
            RuntimeError: a worker died or could not be started; says how.
        """
        try:
            self._rewind()
            self._are_ahead = self.num_workers == 0
            read = self._from_workers() if self.num_workers else [_read(stream) for stream in self._streams]
        except BaseException:
            self.close()
            raise
        self._states = [state for _, state in read]
        self._are_ahead = False
        return [sequence for sequence, _ in read]

    def state(self) -> dict[str, dict[str, Any]]:
        """Stream number to its state after the last step that was handed out, whatever workers have read ahead."""
        return {str(s.number): state for s, state in zip(self._streams, self._states, strict=True)}

    def restore(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes on behind `states`, which may hold streams of other ranks too.

        Raises:
            ValueError: a stream is missing, or as `TokenStream.restore`; the loader stays as it was.
        """
        missing = [stream.number for stream in self._streams if str(stream.number) not in states]
        if missing:
            raise DataError(message("Loader.restore", "states", f"none of the streams {missing}", "one of each stream"))
        self.close()
        self._are_ahead = True
        for stream in self._streams:
            stream.restore(states[str(stream.number)])
        self._states = [stream.state() for stream in self._streams]
        self._are_ahead = False

    def close(self) -> None:
        """Ends the workers. A later step starts new ones, which go on in the same place."""
        if self._workers is not None:
            self._are_ahead = True
            self._workers.finalizer()
            self._workers = None

    def _rewind(self) -> None:
        """To the last step that was handed out, if the streams are not there: a step failed, or workers stopped."""
        if self._are_ahead:
            for stream, state in zip(self._streams, self._states, strict=True):
                stream.restore(state)
            self._are_ahead = False

    def _from_workers(self) -> list[_Read]:
        if self._workers is None:
            self._workers = _Workers(self, self._streams, self.num_workers)
        parts = self._workers.next_step()
        return [parts[i % self.num_workers][i // self.num_workers] for i in range(len(self._streams))]


class _Workers:
    """Processes that answer each request with a step of their streams.

    A pipe that ends tells either side of the other's death, so neither polls, and nothing is shared that a killed
    process could leave locked.
    """

    def __init__(self, owner: Loader, streams: Sequence[TokenStream], count: int) -> None:
        try:
            shares = [pickle.dumps(streams[i::count]) for i in range(count)]
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            got = f"{type(error).__name__}: {error}"
            hint = "classes and functions of sources must be importable: no lambdas, none defined within functions"
            raise DataWorkerError(message("Loader", "streams", got, "what pickle takes", hint)) from error
        self._links: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self.finalizer = weakref.finalize(owner, self.stop)
        # Before multiprocessing's own handler, which waits for all processes: the last one registered comes first.
        atexit.register(self.stop)
        try:
            for number, share in enumerate(shares):
                self._start(number, share)
        except BaseException:
            self.finalizer()
            raise

    def _start(self, number: int, share: bytes) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._links.append(ours)
        process = context.Process(target=_work, args=(theirs, share), name=f"data worker {number}", daemon=True)
        process.start()
        theirs.close()
        self._processes.append(process)
        for _ in range(_STEPS_AHEAD):
            self._request(number)

    def next_step(self) -> list[list[_Read]]:
        """What each worker read of its streams."""
        return [self._received(number) for number in range(len(self._links))]

    def stop(self) -> None:
        """Ends all processes; a second call does nothing."""
        atexit.unregister(self.stop)
        for link in self._links:
            link.close()
        for process in self._processes:
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()

    def _received(self, number: int) -> list[_Read]:
        try:
            answer = pickle.loads(self._links[number].recv_bytes())
        except (EOFError, OSError) as error:
            raise self._death(number) from error
        if isinstance(answer, _Failure):
            if answer.error is not None:
                raise answer.error from DataWorkerError(f"in data worker {number}:\n{answer.text}")
            raise DataWorkerError(message("Loader", f"data worker {number}", answer.text, "a step of its streams"))
        self._request(number)
        return answer

    def _request(self, number: int) -> None:
        try:
            self._links[number].send_bytes(b"next")
        except OSError as error:
            raise self._death(number) from error

    def _death(self, number: int) -> DataWorkerError:
        process = self._processes[number]
        process.join(_PATIENCE)
        code = process.exitcode
        fate = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        hint = "SIGKILL often means out of memory: try fewer workers"
        if code != -signal.SIGKILL:
            hint = "see its output; a script that uses workers needs `if __name__ == '__main__':`"
        return DataWorkerError(message("Loader", f"data worker {number}", fate, "a process that lives", hint))


class _Failure:
    """An error in a worker: itself where it says what the user needs, and its traceback."""

    def __init__(self, error: BaseException) -> None:
        self.error = error if isinstance(error, DataError) else None
        self.text = "".join(traceback.format_exception(error))


def _work(link: Connection, share: bytes) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        streams = pickle.loads(share)
        while True:
            link.recv_bytes()
            # Pickled here: tensors that a connection sends go through shared memory, which containers have little of.
            link.send_bytes(pickle.dumps([_read(stream) for stream in streams]))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the loader was closed, or its process is gone
    except Exception as error:
        link.send_bytes(pickle.dumps(_Failure(error)))


def _read(stream: TokenStream) -> _Read:
    return stream.next(), stream.state()
