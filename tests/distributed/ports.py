"""Free ports for distributed jobs that run in parallel."""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _EACH = 12_000, 1_000  # below what systems hand out by themselves, which a job beside this one may be given
_tried = itertools.count()


def free_port() -> int:
    """Return a port that nobody uses, of those that belong to this worker of the tests."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = _FIRST + _EACH * worker + next(_tried) % _EACH
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
