"""Runs a function on several processes over gloo, and leaves no process behind.

Processes are forked from a server that has torch imported already, so that one costs tens of milliseconds.
"""

import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_PRELOAD = ["torch", "torch.distributed.device_mesh", "k25sys.models", "k25sys.parallel", "tests.parallel.processes"]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """`function(*args)` on each of `world_size` ranks with torch.distributed initialised; their results, by rank.

    Results and arguments are pickled: keep them small, and give functions of a module.

    Raises:
        RankError: with the traceback of every rank that raised, died, or did not end within `timeout` seconds.
    """
    results, problems = run_failing_ranks(world_size, function, *args, timeout=timeout)
    if problems:
        text = "\n".join(f"--- rank {rank} of {world_size}: {problem}" for rank, problem in sorted(problems.items()))
        raise RankError(text)
    return [results[rank] for rank in range(world_size)]


class RankError(AssertionError):
    """What went wrong on which ranks."""


DIED, RUNNING = "died without a word", "still running at the time limit"


def run_failing_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0, stopped: Collection[int] = ()
) -> tuple[dict[int, Any], dict[int, str]]:
    """As `run_ranks`, for ranks of which some are to fail: results, and what went wrong, both by rank.

    What went wrong is a traceback, DIED, or RUNNING. Ranks in `stopped` are not waited for, and are RUNNING.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(target=_main, args=(rank, world_size, folder, pipes[rank][1], timeout, function, args))
            for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            for _, sender in pipes:
                sender.close()
            receivers = {rank: receiver for rank, (receiver, _) in enumerate(pipes) if rank not in stopped}
            results, problems = _collect(receivers, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
    return results, {**problems, **dict.fromkeys(stopped, RUNNING)}


def _collect(receivers: dict[int, Connection], deadline: float) -> tuple[dict[int, Any], dict[int, str]]:
    results: dict[int, Any] = {}
    problems: dict[int, str] = {}
    waiting = dict(receivers)
    while waiting:
        ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            problems.update(dict.fromkeys(waiting, RUNNING))
            break
        for rank, receiver in list(waiting.items()):
            if receiver in ready:
                try:
                    error, value = pickle.loads(receiver.recv_bytes())
                    (problems if error else results)[rank] = value
                except EOFError:
                    problems[rank] = DIED
                del waiting[rank]
    return results, problems


def _main(
    rank: int, world_size: int, folder: str, sender: Connection, timeout: float, function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    failed = False
    try:
        outcome = pickle.dumps((False, function(*args)))
    except BaseException:
        failed, outcome = True, pickle.dumps((True, traceback.format_exc()))
    sender.send_bytes(outcome)  # not send(): it would pass tensors as handles of this process, which ends now
    sender.close()
    if not failed:  # others may still be connecting to this rank: it stays until all have reported, and is killed then
        threading.Event().wait(timeout)
    # Leaving takes its time in c10d, and a rank that raised must not wait for the others.
    os._exit(0)
