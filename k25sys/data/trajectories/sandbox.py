"""A persistent Python interpreter for programs that a model wrote: a process with limits, guarded against accidents."""

import contextlib
import json
import os
import shutil
import signal
import site
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from k25sys.errors import ArgumentTypeError, ArgumentValueError, SandboxError, message

_START_SECONDS = 60.0
_PASSED_ON = ("LD_LIBRARY_PATH", "PYTHONPATH")  # without them some installations find neither libpython nor packages


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What a cell gave.

    Attributes:
        text: what it printed (stdout and stderr as they came), then the repr of its last expression, or the traceback
            (frames of cells only). Ends in a line that says so where the interpreter was lost.
        status: "ok"; "error", an exception; "timeout", the interpreter was killed; "died", it ended by itself or by a
            limit. After the last two the next cell runs in a new interpreter: variables are gone, files are not.
    """

    text: str
    status: Literal["ok", "error", "timeout", "died"]


@dataclass
class _Held:
    """What must be given back, even where nobody calls `close`."""

    folder: Path
    owner: int = field(default_factory=os.getpid)
    process: "subprocess.Popen[bytes] | None" = None
    channel: socket.socket | None = None

    def kill(self) -> int | None:
        """Ends the interpreter, if there is one. Returns its exit status."""
        process, channel = self.process, self.channel
        self.process = self.channel = None
        if channel is not None:
            channel.close()
        if process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so that the number is still its own
        return process.wait()

    def clean(self) -> None:
        """Ends the interpreter and removes the folder."""
        if os.getpid() != self.owner:
            return  # a fork of the owner: neither is its own
        self.kill()
        for root, folders, _ in os.walk(self.folder):
            for path in (Path(root, name) for name in folders):
                if not path.is_symlink():
                    path.chmod(0o700)  # a cell may have made it unreadable
        shutil.rmtree(self.folder, ignore_errors=True)


class PythonSandbox:
    """Runs cells like an IPython kernel: names live on from cell to cell, the last expression's value is shown.

    Pillow and NumPy can be imported, as can whatever this interpreter's environment has. The process has a working
    folder of its own, almost no environment variables, and limits of memory, processor time, file size and output.
    It dies with the thread that ran its first cell, and so with this process. The folder is removed by `close`, by
    the garbage collector or at exit; only where this process is killed outright does it stay.

    This is a guard against accidents, not against an attacker. The kernel refuses new processes, other programs and
    sockets by a seccomp filter (`confined`; where it has none, Python's audit hook alone does, and RLIMIT_NPROC except
    for root). Changes of files outside the folder and signals are refused by the audit hook only, which native code
    can get around. Not isolated: reading files that this user may read, the number of files, shared memory.

    Args:
        cell_seconds: wall-clock time of one cell, > 0.
        cpu_seconds: processor time of one interpreter, all its cells together, in whole seconds.
        memory_bytes: its address space; NumPy and Pillow take about 0.3 GB of it.
        file_bytes: the largest file that it may write.
        output_characters: what is kept of a cell's printed text, and as much of its value or traceback.

    Raises:
        TypeError, ValueError: a limit of another type or out of its range.
        OSError: this is not Linux, or there is no room for the folder.
    """

    def __init__(
        self,
        *,
        cell_seconds: float = 10.0,
        cpu_seconds: int = 120,
        memory_bytes: int = 2 << 30,
        file_bytes: int = 64 << 20,
        output_characters: int = 8000,
    ) -> None:
        if sys.platform != "linux":
            raise OSError(message("PythonSandbox", "system", sys.platform, "linux"))
        if isinstance(cell_seconds, bool) or not isinstance(cell_seconds, (int, float)):
            raise ArgumentTypeError(message("PythonSandbox", "cell_seconds", type(cell_seconds).__name__, "a number"))
        if not 0 < cell_seconds <= 86400:
            raise ArgumentValueError(message("PythonSandbox", "cell_seconds", cell_seconds, "> 0, at most a day"))
        limits = {
            "cpu_seconds": (cpu_seconds, 1),
            "memory_bytes": (memory_bytes, 64 << 20),
            "file_bytes": (file_bytes, 1),
            "output_characters": (output_characters, 100),
        }
        for name, (value, least) in limits.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(message("PythonSandbox", name, type(value).__name__, "an int"))
            if not least <= value < 1 << 62:
                raise ArgumentValueError(message("PythonSandbox", name, value, f"{least} to 2**62"))
        self._seconds, self._output = float(cell_seconds), output_characters
        kernel_limits = {"memory": memory_bytes, "cpu": cpu_seconds, "file": file_bytes, "output": output_characters}
        self._limits = json.dumps(kernel_limits)
        self._held = _Held(Path(tempfile.mkdtemp(prefix="k25sys-sandbox-")).resolve())
        self._finalizer = weakref.finalize(self, self._held.clean)
        self._lock = threading.Lock()
        self._confined: bool | None = None

    @property
    def folder(self) -> Path:
        """The working folder: put a cell's inputs here, find its outputs here."""
        return self._held.folder

    @property
    def confined(self) -> bool | None:
        """Whether the kernel itself refuses new processes and sockets. None before the first cell."""
        return self._confined

    def run(self, code: str) -> CellResult:
        """Runs one cell. One at a time: another thread waits.

        Raises:
            TypeError: `code` is not a str.
            ValueError: the sandbox is closed, or was made in another process.
            RuntimeError (SandboxError): the interpreter does not start; the message has what it said.
        """
        if not isinstance(code, str):
            raise ArgumentTypeError(message("PythonSandbox.run", "code", type(code).__name__, "a str"))
        with self._lock:
            if not self._finalizer.alive or self._held.owner != os.getpid():
                got = "a closed one" if not self._finalizer.alive else "one of another process"
                raise ArgumentValueError(message("PythonSandbox.run", "sandbox", got, "an open one of this process"))
            if self._held.process is None:
                self._start()
            try:
                return self._exchange(code)
            except BaseException:
                self._held.kill()  # its reply would be taken for the next cell's
                raise

    def close(self) -> None:
        """Ends the interpreter and removes the folder. May be called again."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> "PythonSandbox":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._held.channel = ours
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment |= {"HOME": str(self.folder), "TMPDIR": str(self.folder), "LANG": "C.UTF-8", "PATH": os.defpath}
        environment |= {"PYTHONUSERBASE": site.getuserbase(), "PYTHONDONTWRITEBYTECODE": "1"}
        # The order of a set's strings is the same in each run; one thread needs the least address space.
        environment |= {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        kernel = str(Path(__file__).with_name("kernel.py"))
        with theirs, tempfile.TemporaryFile() as errors:
            command = [sys.executable, kernel, str(theirs.fileno()), str(os.getpid()), self._limits]
            self._held.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, cwd=self.folder,
                env=environment, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
            theirs.close()
            try:
                self._confined = self._receive(time.monotonic() + _START_SECONDS)["confined"]
            except (OSError, EOFError) as error:
                status = self._held.kill()
                errors.seek(0)
                said = errors.read(4000).decode(errors="replace").strip()
                got = f"{'no reply' if isinstance(error, OSError) else 'an end'} (exit status {status}): {said}"
                hint = "is memory_bytes too small?"
                raise SandboxError(message("PythonSandbox", "interpreter", got, "one that starts", hint)) from error

    def _exchange(self, code: str) -> CellResult:
        deadline = time.monotonic() + self._seconds
        data = json.dumps(code).encode()
        assert self._held.channel is not None
        try:
            self._held.channel.settimeout(self._seconds)
            self._held.channel.sendall(struct.pack("!I", len(data)) + data)
            reply = self._receive(deadline)
        except TimeoutError:
            self._held.kill()
            return CellResult(text=_lost(f"the cell took more than {self._seconds:g} s"), status="timeout")
        except (OSError, EOFError):
            status = self._held.kill() or 0
            return CellResult(text=_lost(f"the interpreter {_end(status)}"), status="died")
        return CellResult(text=reply["text"], status="ok" if reply["ok"] else "error")

    def _receive(self, deadline: float) -> dict[str, Any]:
        """A frame. Raises EOFError for an end, or for what is no frame; TimeoutError after the deadline."""
        (size,) = struct.unpack("!I", self._read(4, deadline))
        if size > 24 * self._output + 4096:
            raise EOFError("a cell wrote into the channel")
        try:
            return json.loads(self._read(size, deadline))
        except ValueError as error:
            raise EOFError("a cell wrote into the channel") from error

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._held.channel is not None
        data = bytearray()
        while len(data) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._held.channel.settimeout(left)
            part = self._held.channel.recv(size - len(data))
            if not part:
                raise EOFError("the interpreter is gone")
            data += part
        return bytes(data)


def _end(status: int) -> str:
    if status == -signal.SIGXCPU:
        return "used up its processor time"
    if status == -signal.SIGKILL:  # by the system, or by us because of an odd frame
        return "closed its channel or was killed"
    return f"ended by signal {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def _lost(reason: str) -> str:
    return f"[{reason}; it was restarted: variables are gone, files are kept]\n"
