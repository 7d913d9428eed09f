"""Options that several commands share."""

from __future__ import annotations

import argparse


def add_any_base(parser: argparse.ArgumentParser) -> None:
    """Let a command that compares an adapter's base with the one at hand be told not to."""
    parser.add_argument(
        "--any-base",
        dest="check_base",
        action="store_false",
        help="accept a base of other values than those that the adapter was trained on",
    )
