"""Random sequences of operations keep the base, the adapters and the output as they should be: a short run."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.fuzz import Sequences

SEQUENCES, STEPS = 100, 6

QUICK = settings(
    max_examples=SEQUENCES,
    stateful_step_count=STEPS,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],  # `make fuzz` looks for the shortest sequence, which takes minutes
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_random_sequences_of_operations_keep_base_adapters_and_output() -> None:
    run_state_machine_as_test(Sequences, settings=QUICK)
