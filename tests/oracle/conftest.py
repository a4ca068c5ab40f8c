"""The families that most tests of `heads.py` go through."""

from __future__ import annotations

import pytest

from oracle.cases import Case, build
from oracle.families import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return build(request.param)
