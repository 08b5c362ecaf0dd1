"""A python that has its imports done, for tests whose commands and scripts start others in their turn.

    finish([warm_python(), "-m", "dsdpo", "demo"], ...)

It takes what `python` takes (`-c`, `-m`, a script, `-`) and runs it in a process forked from where torch, transformers
and DeepSpeed are imported, under the caller's environment, folder, mounts and standard streams; dsdpo itself is
imported anew, from PYTHONPATH. In there sys.executable is this program too, so that the ranks of a launcher start at
once as well: importing the libraries would be most of the time of each. It passes SIGINT, SIGTERM and SIGUSR1 on,
takes its process with it when it is killed, and ends as that did, by a signal too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

OURS = ("dsdpo", "tests", "benchmarks")
CLONE_NEWNS = 0x20000
LENGTH = 8  # bytes that say how long a request is
PROGRAM = """\
#!{python} -SE
import json, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({place!r})
request = json.dumps({{"argv": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
disks = os.open("/proc/self/ns/mnt", os.O_RDONLY)
socket.send_fds(server, [len(request).to_bytes({length}, "big")], [0, 1, 2, disks])
server.sendall(request)
code = int(server.recv(16))
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@functools.cache
def warm_python() -> str:
    """The program's path; the process that it asks for others runs until the tests end."""
    from tests.ranks import context

    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    place, program = str(folder / "socket"), folder / "python"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place)
    listening.listen()
    context.Process(target=_serve, args=(listening,), daemon=True).start()
    program.write_text(PROGRAM.format(python=sys.executable, place=place, length=LENGTH))
    program.chmod(0o755)
    ninja = Path(sys.executable).parent / "ninja"  # which is looked for beside sys.executable
    if ninja.exists():
        (folder / "ninja").symlink_to(ninja)
    return str(program)


def warm_dsdpo() -> list[str]:
    """`python -m dsdpo` in such a python."""
    return [warm_python(), "-m", "dsdpo"]


def _serve(listening: socket.socket) -> None:
    """Fork a process for each caller, pass signals on, and tell the caller how it ended."""
    import tests.preload  # noqa: F401 (is there already, or says why not)

    selector = selectors.DefaultSelector()
    selector.register(listening, selectors.EVENT_READ)
    callers: dict[Any, tuple[int, socket.socket]] = {}  # by what is waited for: the caller, or its process's end
    while True:
        for key, _ in selector.select():
            if key.fileobj is listening:
                caller, _ = listening.accept()
                pid = _start(caller)
                ended = os.pidfd_open(pid)
                for waited_for in (caller, ended):
                    callers[waited_for] = (pid, caller)
                    selector.register(waited_for, selectors.EVENT_READ)
                continue
            if key.fileobj not in callers:
                continue
            pid, caller = callers[key.fileobj]
            if key.fileobj is caller:
                number = caller.recv(1)
                os.kill(pid, number[0] if number else signal.SIGKILL)
                if not number:  # killed
                    selector.unregister(caller)
                    del callers[caller]
                continue
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(OSError):
                caller.sendall(str(code).encode())
            if caller in callers:
                selector.unregister(caller)
                del callers[caller]
            selector.unregister(key.fileobj)
            del callers[key.fileobj]
            os.close(int(key.fd))
            caller.close()


def _start(caller: socket.socket) -> int:
    """The process that does what a caller asks for."""
    message, (*streams, disks), _, _ = socket.recv_fds(caller, LENGTH, 4)
    length, request = int.from_bytes(message, "big"), b""
    while len(request) < length:
        request += caller.recv(length - len(request))
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            _become(json.loads(request), streams, disks)
        os._exit(70)
    for descriptor in (*streams, disks):
        os.close(descriptor)
    return pid


def _become(request: dict[str, Any], streams: list[int], disks: int) -> NoReturn:
    """Be the python that the caller wanted to start, to its end."""
    import multiprocessing

    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    if os.fstat(disks).st_ino != os.stat("/proc/self/ns/mnt").st_ino:
        ctypes.CDLL(None, use_errno=True).setns(disks, CLONE_NEWNS)
    os.close(disks)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(place, mode, closefd=False) for place, mode in enumerate("rww"))
    sys.executable, *words = request["argv"]
    sys.executable = os.path.abspath(sys.executable)
    code = 1
    try:
        _run(words[1:] if words[0] == "-u" else words)
        code = 0
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _run(words: list[str]) -> None:
    """What python does with these words."""
    first, rest = words[0], words[1:]
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    beside = str(Path(first).resolve().parent) if first not in ("-c", "-m", "-") else os.getcwd()
    sys.path[:] = [beside, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first in ("-c", "-"):
        text = rest[0] if first == "-c" else sys.stdin.read()
        sys.argv = [first, *(rest[1:] if first == "-c" else rest)]
        exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(first, run_name="__main__")
