"""Types of numeric options: plain numbers in code, ranges that jsonargparse checks on the command line.

With them ``--lora.rank=0`` is a one-line usage error; ``LoRAConfig`` checks the same ranges for everybody else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    NonNegativeInt = int
    PositiveInt = int
    PositiveFloat = float
    Probability = float
else:
    try:
        from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt, restricted_number_type

        Probability = restricted_number_type("Probability", float, [(">=", 0.0), ("<", 1.0)])
    except ImportError:  # the command line is an extra
        NonNegativeInt, PositiveInt, PositiveFloat, Probability = int, int, float, float

__all__ = ["NonNegativeInt", "PositiveFloat", "PositiveInt", "Probability"]
