"""Seeds, the environment, and which tests are left out: `gpu` without CUDA, `slow` unless -m is
given."""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hypothesis import HealthCheck, settings

import patchsweep as ps
from patchsweep.backends import choice as backends

# Examples drawn from a fixed seed and never judged by the clock: the same result on every run.
by_the_clock = [HealthCheck.too_slow]
settings.register_profile(
    "patchsweep", derandomize=True, deadline=None, suppress_health_check=by_the_clock
)
settings.load_profile("patchsweep")

# What a shell, a launcher or a service around the tests may have set, which they and the processes
# that they start would heed.
LEFT = re.compile(
    "COLUMNS|FORCE_COLOR|TTY_.*|PYTHON(WARNINGS|SAFEPATH)|TRANSFORMERS_VERBOSITY"
    "|(TORCHELASTIC|ACCELERATE|MASTER)_.*|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)"
)


def pytest_configure(config: pytest.Config) -> None:
    for name in filter(LEFT.fullmatch, list(os.environ)):
        del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"  # nobody asks the Hub
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # it has read its environment already
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """One thread: several tests run at once, and small matrices gain nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> ps.Model:
    """The trained model, loaded once: a sweep leaves it as it was."""
    return ps.load_model("smollm2-135m")


@pytest.fixture(autouse=True)
def _self_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test checks its models itself; what was found before is not believed."""
    monkeypatch.setattr(backends, "kept_in", lambda: None)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The generators that a test does not seed itself. numpy: `np.random.default_rng(seed)`."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def whole(
    request: pytest.FixtureRequest,
    model: ps.Model,
    pairs: list[ps.Pair],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The results of a module's own model and pairs under its SETTINGS; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "r.zarr"
    ps.sweep(model, pairs, out=out, **request.module.SETTINGS)
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return shutil.copytree(whole, tmp_path / "r.zarr")
