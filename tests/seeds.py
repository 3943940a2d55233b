"""Where the random numbers of the tests start, and how many cases the random ones try.

Every run has a seed (`make test PYTEST_SEED=7`): it orders the tests (pytest-randomly), draws hypothesis's examples,
and moves every generator made here: no test may rest on one lucky random model. Within a run the same number gives
the same random numbers. Numbers that were stored with a fixed seed use torch and numpy directly.
"""

import os

import numpy as np
import torch

# `make test-thorough` sets it
THOROUGH = os.environ.get("LGVIT_TESTS") == "thorough"


def seed(number: int = 0) -> int:
    """The `number`-th seed of this run; `conftest.py` sets the variable for this process and all that it starts."""
    return int(os.environ.get("LGVIT_TEST_SEED", "0")) + number


def seeded(number: int = 0) -> None:
    """Start torch's own generator at the `number`-th seed of this run."""
    torch.manual_seed(seed(number))


def generator(number: int = 0) -> torch.Generator:
    """A generator of torch at the `number`-th seed of this run."""
    return torch.Generator().manual_seed(seed(number))


def rng(number: int = 0) -> np.random.Generator:
    """A generator of numpy at the `number`-th seed of this run."""
    return np.random.default_rng(seed(number))


def examples(usual: int) -> int:
    """How many examples a property is tried on: `usual`, or twenty times as many in `make test-thorough`."""
    return 20 * usual if THOROUGH else usual
