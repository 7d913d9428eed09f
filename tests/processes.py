"""Scripts that tests run in other processes, and free ports for them.

A server imports Lightning once, which takes seconds, and each process is forked from it: it starts at once, and
shares nothing with the tests.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

ROOT = Path(__file__).parents[1]
_FIRST, _EACH = 12_000, 1_000  # below the ephemeral ports, which parallel jobs may get
_tried = itertools.count()
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["lightning.pytorch", "lightning_lora.callback", __name__])


def free_port() -> int:
    """Return a free port from the range of this test worker."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = _FIRST + _EACH * worker + next(_tried) % _EACH
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Job:
    """A script in a process of its own, like ``python script arguments``, with variables added to the environment."""

    def __init__(self, script: str | Path, *arguments: object, folder: Path = ROOT, **variables: object) -> None:
        handle, self._printed = tempfile.mkstemp()
        os.close(handle)
        common = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "MASTER_PORT": free_port()}
        environment = {name: str(value) for name, value in (os.environ | common | variables).items()}
        command = [str(script), *map(str, arguments)]
        self.process = _server.Process(target=_main, args=(command, folder, environment, self._printed))
        self.process.start()

    def finish(self, timeout: float = 300.0) -> tuple[int, str]:
        """Wait until the process ends, and return its exit code and all that it printed."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        printed = Path(self._printed).read_text()
        Path(self._printed).unlink()
        if code is None:
            raise TimeoutError(f"not finished after {timeout} seconds: {printed[-5000:]}")
        return code, printed


def run(script: str | Path, *arguments: object, folder: Path = ROOT, **variables: object) -> str:
    """Run a script in one process, which may start others, and return all that they printed."""
    return succeeded(Job(script, *arguments, folder=folder, **variables))


def run_ranks(count: int, script: str | Path, *arguments: object) -> str:
    """Run a script in several processes, with the variables of processes that Lightning starts, and torchrun's."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": count, "NODE_RANK": 0}
    ranks = [Job(script, *arguments, **common, RANK=rank, LOCAL_RANK=rank) for rank in range(count)]
    return succeeded(*ranks)


def succeeded(*jobs: Job) -> str:
    """Return what jobs printed that must end well."""
    outcomes = [job.finish() for job in jobs]
    printed = "\n".join(text for _, text in outcomes)
    assert [code for code, _ in outcomes] == [0] * len(jobs), printed[-10_000:]
    return printed


def _main(command: list[str], folder: Path, environment: dict[str, str], printed: str) -> None:
    """Become the process that the command would start."""
    with open(printed, "wb") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None  # depends on the environment, like the next two
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", "0"))
    torch.set_num_threads(1)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
