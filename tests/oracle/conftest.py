"""The families that most tests of `heads.py` go through."""

from __future__ import annotations

import pytest

from oracle.cases import Case, build
from oracle.families import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


@pytest.fixture(scope="module", params=("llama", "gpt2", "gemma2", "phi", "gpt_oss"))
def few(request: pytest.FixtureRequest) -> Case:
    """Of what the oracle does in the same way for every family."""
    return build(request.param)
