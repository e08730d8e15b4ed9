"""Programs that begin at once: forked from a server that has already imported what they import.

A new interpreter imports torch, Lightning and diffusers for ten seconds before it does anything, and the tests start
hundreds. Here the standard library's fork server imports them once for each test process. A program that is forked has
its own environment, working folder, process group and output, and dies of signals as any other; but its hash seed is
that of its server, and what the modules read from the environment while they were imported is what they read there.
The tests of the launch itself start interpreters.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

PRELOADED = "preloaded"  # the module that imports what programs import
_context = multiprocessing.get_context("forkserver")
_outputs: list[str | None] = [None, None]  # files of this program's output; None: that of the test process


def _begin(script: str, arguments: list[str], settings: dict[str, Any]) -> None:
    """In the new process: becomes the program."""
    multiprocessing.set_start_method(None, force=True)  # its own children are not the server's
    os.setpgid(0, settings["group"])
    os.environ.clear()
    os.environ.update(settings["environment"])
    os.chdir(settings["folder"])
    for descriptor, file in enumerate(settings["outputs"], start=1):
        if file is not None:
            _outputs[descriptor - 1] = file
            opened = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(opened, descriptor)
            os.close(opened)
    of_module = script == "-m"
    sys.argv = arguments if of_module else [script, *arguments]
    sys.path[:0] = [
        "" if of_module else str(Path(script).parent),
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    from lightning.fabric.strategies.launchers import subprocess_script as of_fabric
    from lightning.pytorch.strategies.launchers import subprocess_script as of_lightning

    for finalizer in weakref.finalize._registry:
        finalizer.atexit = False  # what modules made while they were imported is the server's
    forkserver._forkserver.ensure_running = lambda: None  # the one that this process comes from serves it as well
    for launcher in (of_fabric, of_lightning):  # of the other processes of a training
        launcher.subprocess = sys.modules[__name__]
    try:
        if of_module:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a child of multiprocessing would leave out


class Popen:
    """subprocess.Popen for [sys.executable, script, arguments ...], or -m and a module instead of the script.

    Output goes to files and never blocks.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
        text: bool = True,
        start_new_session: bool = False,
    ):
        self.args = list(map(str, command))
        self._piped: list[IO[str] | None] = [
            tempfile.NamedTemporaryFile("r") if stream == subprocess.PIPE else None  # noqa: SIM115
            for stream in (stdout, stderr)
        ]
        files = [
            piped.name if piped else kept if stream is None else getattr(stream, "name", os.devnull)
            for stream, piped, kept in zip((stdout, stderr), self._piped, _outputs, strict=True)
        ]
        if stderr == subprocess.STDOUT:
            files[1] = files[0]
        settings = {
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or os.getcwd()),
            "outputs": files,
            "group": 0 if start_new_session else os.getpgrp(),
        }
        executable, script, *arguments = self.args
        assert executable == sys.executable, f"not a Python program: {command}"
        self._process = _context.Process(target=_begin, args=(script, arguments, settings))
        _start(self._process)

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        self.wait(timeout)
        out, err = (piped and piped.read() for piped in self._piped)
        for piped in filter(None, self._piped):
            piped.close()
        return out, err

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *unused: object) -> None:
        self.wait()


PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL
TimeoutExpired = subprocess.TimeoutExpired


def run(
    command: Sequence[Any], timeout: float = 240, capture_output: bool = True, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """subprocess.run with captured text; a program that is too slow is killed with all that it started."""
    process = Popen(command, stdout=PIPE, stderr=PIPE, start_new_session=True, **settings)
    try:
        out, err = process.communicate(timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def _start(process: Any) -> None:
    """Starts a process, and the server at the first time, which must find what it is to import."""
    before = os.environ.get("PYTHONPATH")
    root = Path(__file__).resolve().parents[2]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests" / "helpers")])
    forkserver.set_forkserver_preload([PRELOADED])
    try:
        process.start()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
