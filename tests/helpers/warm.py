"""A Python that starts at once: what tests launch is forked from a process that has imported torch
and the other large libraries already, and nothing of bpo.

`python()` is a program to be called in place of sys.executable, for `-m`, `-c` and scripts. What it
runs has the caller's arguments, folder, environment, streams, signals and exit code, is killed when
the caller kills it, and has the same program for its sys.executable, so that the kernels and
launched processes that it starts come at once as well. Beside its imports it shares the hash seed
with the others. Tests that kill what they launch, or look at what it imports, use sys.executable.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# Neither matplotlib nor ipykernel.kernelapp: as they are imported they look at variables that are
# a kernel's own.
LIBRARIES = ("torch", "transformers.trainer", "transformers.models.llava.modeling_llava",
             "transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama",
             "peft", "trl.trainer.dpo_trainer", "trl.trainer.sft_trainer", "datasets", "pandas",
             "scipy.stats", "papermill", "nbconvert", "ipywidgets")
# Looked at when a library is imported or Python starts, so they must be those of the first process.
READ_EARLY = ("HF_", "TRANSFORMERS_", "OMP_", "MKL_", "CUDA_", "PYTHON")


@functools.cache
def python() -> str:
    """The program; sys.executable itself where forking a process with torch in it is not sound."""
    if sys.platform != "linux" or Path("/dev/nvidiactl").exists():
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    client = [sys.executable, "-IS", str(Path(__file__).with_name("warm_client.py"))]
    program, address = folder / "python", folder / "socket"
    program.write_text(f'#!/bin/sh\nexec {shlex.join([*client, str(address)])} "$0" "$@"\n')
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)
        server = subprocess.Popen([sys.executable, __file__], stdin=listener,
                                  stdout=subprocess.DEVNULL, start_new_session=True)
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.kill)
    return str(program)


def serve() -> list[str]:
    """Forks a process for each caller; returns in those processes, with their arguments."""
    listener, parent = socket.socket(fileno=os.dup(0)), os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    while os.getppid() == parent:
        if select.select([listener], [], [], 2)[0]:
            caller, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return supervise(caller)
            caller.close()
    os._exit(0)


def supervise(caller: socket.socket) -> list[str]:
    """Forks the process itself, sends it the caller's signals, and the caller its exit code;
    returns in that process."""
    head, streams, *_ = socket.recv_fds(caller, 8, 3)
    with caller.makefile("rb") as file:
        program, arguments, folder, environment = json.loads(file.read(int.from_bytes(head)))
    ended, ends = os.pipe()
    os.set_blocking(ends, False)
    signal.set_wakeup_fd(ends)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = os.fork()
    if child == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for stream, number in zip(streams, range(3), strict=True):
            os.dup2(stream, number)
        for opened in (*streams, ended, ends, caller.detach()):
            os.close(opened)
        os.setsid()
        become(program, folder, environment)
        return arguments
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    while ended not in (ready := select.select([caller, ended], [], [])[0]):
        sent = caller in ready and caller.recv(1)
        os.kill(child, sent[0] if sent else signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    caller.sendall(code.to_bytes(2, signed=True))
    os._exit(0)


def become(program: str, folder: str, environment: dict[str, str]) -> None:
    """Gives this process the caller's folder and environment."""
    import numpy

    early = {n for n in os.environ.keys() | environment.keys() if n.startswith(READ_EARLY)}
    differing = [n for n in early - {"PYTHONPATH"} if os.environ.get(n) != environment.get(n)]
    assert not differing, f"{differing} differ from those of the tests: use sys.executable"
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.executable = program
    theirs = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*filter(None, theirs), *(p for p in sys.path[1:] if p not in own)]
    numpy.random.seed()


def run(arguments: list[str]) -> None:
    if arguments[0] == "-u":
        arguments = arguments[1:]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
    if arguments[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv[:] = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.path.insert(0, "")
        sys.argv[:] = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(arguments[0]).parent))
        sys.argv[:] = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    for name in LIBRARIES:
        importlib.import_module(name)
    run(serve())
