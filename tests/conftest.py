"""Seeds, and which tests are left out: `gpu` without CUDA, `slow` unless -m is given."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings

from patchsweep import backends

# Examples drawn from a fixed seed and never judged by the clock: the same result on every run.
settings.register_profile("patchsweep", derandomize=True, deadline=None)
settings.load_profile("patchsweep")


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """One thread: several tests run at once, and small matrices gain nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _self_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test checks its models itself; what was found before is not believed."""
    monkeypatch.setattr(backends, "kept_in", lambda: None)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The generators that a test does not seed itself. numpy: `np.random.default_rng(seed)`."""
    random.seed(0)
    torch.manual_seed(0)
