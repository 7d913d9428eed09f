"""Free ports for distributed jobs that run in parallel."""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _EACH = 12_000, 1_000  # below the ephemeral ports, which parallel jobs may get
_tried = itertools.count()


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
