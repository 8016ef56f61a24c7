"""The sandbox of programs: a session's state, every way in which a cell may go wrong, and nothing left behind."""

import contextlib
import gc
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from k25sys.data.trajectories import PythonSandbox
from k25sys.data.trajectories.sandbox import CellResult
from k25sys.errors import ArgumentTypeError, ArgumentValueError, SandboxError


@pytest.fixture
def sandbox() -> Iterator[PythonSandbox]:
    with PythonSandbox(cell_seconds=60, output_characters=1000) as sandbox:
        yield sandbox


def processes_of(folder: Path) -> list[int]:
    """Numbers of living processes whose working folder is `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry / "cwd").startswith(str(folder)):
                found.append(int(entry.name))
    return found


def test_a_session(sandbox: PythonSandbox) -> None:
    assert sandbox.run("x = 3\nprint('seen')\nx + 1") == CellResult(text="seen\n4\n", status="ok")
    assert sandbox.run("x, _").text == "(3, 4)\n"
    assert sandbox.run("x;").text == sandbox.run("").text == sandbox.run("# nothing").text == ""
    assert sandbox.run("import sys\nprint('a', end='')\nprint('b', file=sys.stderr)\n'c'").text == "ab\n'c'\n"
    assert sandbox.run("print('no end of line', end='')\n5").text == "no end of line\n5\n"
    result = sandbox.run("import numpy as np\nfrom PIL import Image\nImage.new('L', (4, 2), 7).save('a.png')\n"
                         "np.array(Image.open('a.png')).sum()")  # fmt: skip
    assert "56" in result.text
    assert (sandbox.folder / "a.png").is_file()
    pickled = "class A: pass\nimport pickle\ntype(pickle.loads(pickle.dumps(A()))) is A"
    assert sandbox.run(pickled).text == "True\n"
    thread = "import threading\nt = threading.Thread(target=print, args=('t',))\nt.start(); t.join()"
    assert sandbox.run(thread).text == "t\n"
    assert sandbox.run("'\\ud800'; print('\\ud800')") == CellResult(text="?\n", status="ok")
    assert sandbox.confined in (True, False)


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("def f(:", "SyntaxError: invalid syntax"),
        ("'\0'", "SyntaxError: source code string cannot contain null bytes"),
        ("exit()", "SystemExit: None"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("input()", "EOFError: EOF when reading a line"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("x = bytearray(1 << 40)", "MemoryError"),
        ("open('big', 'wb').write(bytes(65 << 20))", "OSError: [Errno 27] File too large"),
        ("class A:\n    def __repr__(self): return 1 / 0\nA()", "ZeroDivisionError: division by zero"),
        ("class E(Exception):\n    def __str__(self): return 1 / 0\nraise E", "E: <exception str() failed>"),
    ],
)
def test_an_exception_is_text_and_the_session_lives_on(sandbox: PythonSandbox, code: str, last: str) -> None:
    sandbox.run("kept = 1")
    result = sandbox.run(code)
    assert result.status == "error"
    if "null" not in last:  # a ValueError before Python 3.12
        assert result.text.rstrip().rpartition("\n")[2].replace("__main__.", "").startswith(last)
    assert sandbox.run("kept").text == "1\n"


def test_a_traceback_shows_the_cells_lines_and_no_folders_of_libraries(sandbox: PythonSandbox) -> None:
    sandbox.run("import json\ndef f(text):\n    return json.loads(text)")
    text = sandbox.run("try:\n    f('{')\nexcept ValueError as error:\n    raise KeyError('k') from error").text
    assert 'File "<cell 1>", line 3, in f\n    return json.loads(text)' in text
    assert "direct cause" in text
    assert 'File "/' not in text


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.execv('/bin/true', ['true'])",
        "open({outside!r}, 'w')",
        "import pathlib; pathlib.Path({outside!r}).unlink()",
        "import os; os.rename({outside!r}, 'mine')",
        "import os; os.symlink({outside!r}, 'link'); open('link', 'w')",
        "import os; os.chmod({outside!r}, 0)",
        "import os; os.truncate({outside!r}, 0)",
        "import shutil; shutil.rmtree({folder!r})",
    ],
)
def test_what_would_reach_outside_is_refused(sandbox: PythonSandbox, tmp_path: Path, code: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("whole")
    result = sandbox.run(code.format(outside=str(outside), folder=str(tmp_path)))
    assert (result.status, "not allowed in this sandbox" in result.text) == ("error", True), result.text
    assert outside.read_text() == "whole"
    assert outside.stat().st_mode & 0o600 == 0o600
    assert len(processes_of(sandbox.folder)) == 1


def test_the_kernel_refuses_native_code_too(sandbox: PythonSandbox) -> None:
    native = "import ctypes\nlibc = ctypes.CDLL(None)\nprint(libc.fork(), libc.socket(2, 1, 0), libc.vfork())"
    assert sandbox.run("0").text == "0\n"
    if not sandbox.confined:
        pytest.skip("this system has no seccomp filters")
    assert sandbox.run(native).text == "-1 -1 -1\n"
    bomb = "import os\nfor _ in range(10000):\n    try: libc.fork()\n    except OSError: pass"
    assert sandbox.run(bomb).status == "ok"
    assert len(processes_of(sandbox.folder)) == 1


def test_files_within_the_folder_may_change(sandbox: PythonSandbox) -> None:
    code = (
        "import os, shutil, tempfile\nos.makedirs('a/b')\nopen('a/b/c', 'w').close()\nos.rename('a/b/c', 'a/d')\n"
        "os.chdir('a')\nopen('e', 'w').close()\nos.chdir('..')\nshutil.rmtree('a')\nopen(os.devnull, 'w').close()\n"
        "with tempfile.TemporaryDirectory() as t: open(t + '/x', 'w').close()\nos.listdir()"
    )
    assert sandbox.run(code).text == "[]\n"


def test_output_is_bounded(sandbox: PythonSandbox) -> None:
    text = sandbox.run("for _ in range(10000): print('a' * 1000)\n'b' * 5000").text
    assert text.startswith("a" * 999)
    assert "\n[10009000 characters more]\n'bbb" in text
    assert text.endswith("bb\n[4003 characters more]\n")
    assert len(text) < 2100
    assert sandbox.run("raise ValueError('😀' * 100000)").text.count("😀") > 800


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os._exit(3)", "ended with exit status 3"),
        ("import ctypes; ctypes.string_at(0)", "ended by signal SIGSEGV"),
        ("import signal; signal.raise_signal(signal.SIGKILL)", "was killed"),
        ("import os; os.closerange(3, 200)", "closed its channel"),
        (
            "import os\nfor fd in range(3, 200):\n    try: os.write(fd, b'~' * 100)\n    except OSError: pass",
            "was killed",
        ),
    ],
)
def test_an_interpreter_that_dies_is_replaced(sandbox: PythonSandbox, code: str, said: str) -> None:
    sandbox.run("x = 1\nopen('kept', 'w').close()")
    result = sandbox.run(code)
    assert (result.status, said in result.text) == ("died", True), result.text
    assert sandbox.run("import os\nos.listdir(), 'x' in dir()").text == "(['kept'], False)\n"
    assert len(processes_of(sandbox.folder)) == 1


def test_one_that_hangs_is_killed() -> None:
    with PythonSandbox(cell_seconds=0.5) as sandbox:
        result = sandbox.run("while True: pass")
        assert (result.status, "took more than 0.5 s" in result.text) == ("timeout", True)
        assert processes_of(sandbox.folder) == []
        assert sandbox.run("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
                           "while True: pass").status == "timeout"  # fmt: skip
        assert sandbox.run("1").text == "1\n"


def test_processor_time_and_memory_are_limited() -> None:
    with PythonSandbox(cell_seconds=60, cpu_seconds=1, memory_bytes=512 << 20) as sandbox:
        result = sandbox.run("while True: pass")
        assert (result.status, "used up its processor time" in result.text) == ("died", True)
        assert "MemoryError" in sandbox.run("x = []\nwhile True: x.append(bytearray(1 << 24))").text
        assert sandbox.run("del x; 1").text == "1\n"


def test_the_environment_is_not_the_parents(sandbox: PythonSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "1")
    known = {"LD_LIBRARY_PATH", "PYTHONPATH", "HOME", "TMPDIR", "LANG", "PATH", "PYTHONUSERBASE", "LC_CTYPE"}
    known |= {"PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    assert set(eval(sandbox.run("import os; sorted(os.environ)").text)) <= known


def test_nothing_is_left_behind() -> None:
    sandbox = PythonSandbox()
    sandbox.run("import os\nos.makedirs('a/b')\nos.chmod('a', 0)")
    folder = sandbox.folder
    assert processes_of(folder)
    sandbox.close()
    sandbox.close()
    assert not folder.exists()
    assert processes_of(folder) == []
    with pytest.raises(ArgumentValueError, match="a closed one"):
        sandbox.run("1")
    forgotten = PythonSandbox()
    forgotten.run("1")
    folder = forgotten.folder
    del forgotten
    gc.collect()
    assert not folder.exists()
    assert processes_of(folder) == []


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_the_interpreter_dies_with_its_parent(end: str) -> None:
    code = (
        "import os, threading, time\nfrom k25sys.data.trajectories.sandbox import PythonSandbox\n"
        "s = PythonSandbox(cell_seconds=600)\ns.run('1')\n"
        "print(s._held.process.pid, s.folder, flush=True)\n"
        "started = s.folder / 'started'\n"
        'code = \'open("started", "w").close()\\nwhile True: pass\'\n'
        + ("threading.Thread(target=s.run, args=(code,), daemon=True).start()\n" if end else "")
        + ("while not started.exists(): time.sleep(0.01)\n" if end else "")
        + end
    )
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    pid, folder = parent.stdout.split()
    if end:
        with contextlib.suppress(ProcessLookupError):
            # It was told to die before its parent was reaped; a pidfd becomes readable when it has.
            select.select([os.pidfd_open(int(pid))], [], [], 60)
        subprocess.run(["rm", "-r", folder], check=True)  # a parent that is killed outright cannot remove it
    assert processes_of(Path(folder)) == []
    assert not Path(folder).exists()


def test_threads_take_turns(sandbox: PythonSandbox) -> None:
    def run(number: int) -> str:
        return sandbox.run(f"x = sum(range(200000))\n{number}").text

    with ThreadPoolExecutor(8) as pool:  # the interpreter dies with the thread that starts it, thus at the pool's end
        assert list(pool.map(run, range(16))) == [f"{number}\n" for number in range(16)]


def test_bad_arguments(sandbox: PythonSandbox) -> None:
    with pytest.raises(ArgumentTypeError, match="code"):
        sandbox.run(b"1")  # type: ignore[arg-type]
    with pytest.raises(ArgumentValueError, match="cell_seconds"):
        PythonSandbox(cell_seconds=0)
    with pytest.raises(ArgumentValueError, match="cell_seconds"):
        PythonSandbox(cell_seconds=float("nan"))
    with pytest.raises(ArgumentTypeError, match="memory_bytes"):
        PythonSandbox(memory_bytes=1e9)  # type: ignore[arg-type]
    with pytest.raises(ArgumentValueError, match="output_characters"):
        PythonSandbox(output_characters=0)


def test_an_interpreter_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with PythonSandbox() as sandbox:
        with pytest.raises(SandboxError, match="exit status 1"):
            sandbox.run("1")
        assert processes_of(sandbox.folder) == []
