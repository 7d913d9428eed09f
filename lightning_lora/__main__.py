"""``python -m lightning_lora`` is the ``lightning-lora`` command."""

from __future__ import annotations

import sys

from lightning_lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
