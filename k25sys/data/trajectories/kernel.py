"""The process behind `PythonSandbox`: confines itself, then runs the cells that it is sent. Knows nothing of k25sys.

Run as a script: kernel.py FD PARENT LIMITS. Requests and replies on FD are frames: four bytes of length, then JSON.
"""

import ast
import builtins
import contextlib
import ctypes
import errno
import io
import json
import linecache
import os
import platform
import resource
import signal
import struct
import sys
import traceback
import types
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 1, 38, 22, 2
_CLONE_THREAD = 0x10000
# Per machine: its number in audit.h, then those of clone and clone3, then of what is refused: fork, vfork, execve,
# execveat, socket, as far as there are such calls.
_SYSCALLS = {
    "x86_64": (0xC000003E, 56, 435, (57, 58, 59, 322, 41)),
    "aarch64": (0xC00000B7, 220, 435, (221, 281, 198)),
}
_REFUSED = ("os.fork", "os.exec", "os.posix_spawn", "os.system", "os.spawn", "os.kill", "pty.spawn", "subprocess.Popen")
# What changes files, by audit event: the positions of its paths and of the folder that each is relative to.
_PATHS = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
    "os.truncate": ((0, None),),
    "shutil.rmtree": ((0, 1),),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Captured(io.TextIOBase):
    """Standard output and error of a cell: the first `limit` characters, and how many came after."""

    def __init__(self, limit: int) -> None:
        self._limit, self._kept, self._parts, self._dropped = limit, 0, [], 0

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str, /) -> int:
        """Keeps what there is room for."""
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        part = text[: self._limit - self._kept]
        if part:
            self._parts.append(part)
        self._kept += len(part)
        self._dropped += len(text) - len(part)
        return len(text)

    def text(self) -> str:
        """All that was kept."""
        more = f"\n[{self._dropped} characters more]\n" if self._dropped else ""
        return "".join(self._parts) + more


class Cells:
    """Runs cells in one namespace, that of a module __main__."""

    def __init__(self, limit: int) -> None:
        self._limit, self._number = limit, 0
        module = types.ModuleType("__main__")
        module.__dict__["__builtins__"] = builtins
        sys.modules["__main__"] = module
        self._names = module.__dict__

    def run(self, code: str) -> dict[str, Any]:
        """What the cell printed, then the repr of its last expression or the traceback."""
        self._number += 1
        file = f"<cell {self._number}>"
        linecache.cache[file] = (len(code), None, f"{code}\n".splitlines(keepends=True), file)
        printed, shown, ok = Captured(self._limit), Captured(self._limit), True
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                value = self._execute(code, file)
                if value is not None:
                    self._names["_"] = value
                    shown.write(f"{value!r}\n")
            except BaseException as error:  # SystemExit too: a cell does not end its interpreter by exit()
                ok = False
                shown.write(_traceback(error))
        text = printed.text()
        text += "\n" * bool(text and not text.endswith("\n")) + shown.text()
        return {"ok": ok, "text": text.encode("utf-8", "replace").decode()}

    def _execute(self, code: str, file: str) -> Any:
        tree = ast.parse(code, file)
        last = tree.body[-1] if tree.body else None
        if not isinstance(last, ast.Expr) or code.rstrip().endswith(";"):
            exec(compile(tree, file, "exec"), self._names)
            return None
        tree.body.pop()
        exec(compile(tree, file, "exec"), self._names)
        return eval(compile(ast.Expression(last.value), file, "eval"), self._names)


def _traceback(error: BaseException) -> str:
    """The traceback with the frames of cells only: those of libraries would name folders of this machine."""
    whole = traceback.TracebackException(type(error), error, error.__traceback__, compact=True)
    todo = [whole]
    while todo:
        part = todo.pop()
        part.stack = traceback.StackSummary.from_list([f for f in part.stack if f.filename.startswith("<cell ")])
        todo += [link for link in (part.__cause__, part.__context__) if link]
    return "".join(whole.format())


def _guard(folder: str) -> None:
    """From here on Python refuses to change files outside `folder`, to start or signal processes, and sockets."""

    def is_inside(path: Any, base: Any, *, follow: bool) -> bool:
        if isinstance(path, int):
            return True  # a file that is open already
        path = os.fsdecode(path)
        if isinstance(base, int) and base >= 0:
            path = os.path.join(f"/proc/self/fd/{base}", path)
        head, tail = os.path.split(os.path.abspath(path))
        path = os.path.realpath(path) if follow else os.path.join(os.path.realpath(head), tail)
        return path == os.devnull or os.path.commonpath([path, folder]) == folder

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            allowed = not flags & _WRITES or is_inside(path, None, follow=True)
        elif event in _PATHS:
            pairs = [
                (arguments[p], None if b is None or b >= len(arguments) else arguments[b]) for p, b in _PATHS[event]
            ]
            allowed = all(is_inside(path, base, follow=False) for path, base in pairs)
        else:
            allowed = not event.startswith((*_REFUSED, "socket."))
        if not allowed:
            what = f" of {arguments[0]!r}" if event == "open" or event in _PATHS else ""
            raise PermissionError(errno.EPERM, f"not allowed in this sandbox: {event}{what}")

    sys.addaudithook(hook)


def _confine(libc: ctypes.CDLL) -> bool:
    """Has the kernel refuse new processes, other programs and sockets. False where it has no such filter."""
    if platform.machine() not in _SYSCALLS or sys.byteorder != "little":
        return False
    arch, clone, clone3, refused = _SYSCALLS[platform.machine()]
    load, equal, has_bit, leave = 0x20, 0x15, 0x45, 0x06
    allow, deny, absent = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    size = 3 + len(refused) + 7
    at_allow, at_deny, at_absent = size - 3, size - 2, size - 1
    lines = [(load, None, None, 4), (equal, 2, at_deny, arch), (load, None, None, 0)]
    lines += [(equal, at_deny, 3 + i + 1, number) for i, number in enumerate(refused)]
    here = len(lines)  # threads are welcome; of clone3 the flags cannot be read, and libc falls back on clone
    lines += [(equal, at_absent, here + 1, clone3), (equal, here + 2, at_allow, clone), (load, None, None, 16)]
    lines += [(has_bit, at_allow, at_deny, _CLONE_THREAD)]
    lines += [(leave, None, None, value) for value in (allow, deny, absent)]
    assert len(lines) == size
    program = b"".join(
        struct.pack("HBBI", code, *(0 if to is None else to - i - 1 for to in (yes, no)), value)
        for i, (code, yes, no, value) in enumerate(lines)
    )
    buffer = ctypes.create_string_buffer(program, len(program))
    filters = ctypes.create_string_buffer(struct.pack("HP", size, ctypes.addressof(buffer)))
    return (
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and libc.prctl(_PR_SET_SECCOMP, _FILTER, filters, 0, 0) == 0
    )


def _read(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(fd, size - len(data))
        if not part:
            os._exit(0)  # the parent is gone, or is done with this process
        data += part
    return data


def _send(fd: int, reply: dict[str, Any]) -> None:
    data = json.dumps(reply).encode()
    data = struct.pack("!I", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def _main() -> None:
    fd, parent, limits = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)
    kinds = {"memory": resource.RLIMIT_AS, "cpu": resource.RLIMIT_CPU, "file": resource.RLIMIT_FSIZE}
    for kind, number in kinds.items():
        # Past the soft limit of processor time comes SIGXCPU, past the hard one SIGKILL, which would not tell why.
        resource.setrlimit(number, (limits[kind], limits[kind] + (kind == "cpu")))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    confined = _confine(libc)
    if not confined:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # counts the user's processes; does not bind root
    folder = os.getcwd()
    sys.path[0] = ""  # the working folder, as in an interactive Python
    sys.argv = [""]
    cells = Cells(limits["output"])
    _guard(folder)
    _send(fd, {"confined": confined})
    while True:
        (size,) = struct.unpack("!I", _read(fd, 4))
        _send(fd, cells.run(json.loads(_read(fd, size))))


if __name__ == "__main__":
    _main()
