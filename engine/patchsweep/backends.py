"""Which way a model's runs are computed: the wavefront where it is exact, nnsight elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

import patchsweep_kernels
from patchsweep import selftest
from patchsweep.attention import attention_is
from patchsweep.errors import NotOnWavefront
from patchsweep.forward import Forward, as_it_is, take_apart
from patchsweep.loading import cache
from patchsweep.model import Model
from patchsweep.plan import Plan
from patchsweep.prepare import check_neurons
from patchsweep.sae import SAE
from patchsweep.selftest import SelfTest
from patchsweep.sites import SETS
from patchsweep.spec import Sweep
from patchsweep.stacked import as_full_forwards
from patchsweep.wave import Carry, wavefront

if TYPE_CHECKING:
    from patchsweep.interventions import Interventions


@dataclass(frozen=True)
class Backend:
    """How runs are computed, and why so: `record` is what the results keep."""

    forward: Forward
    carry: Carry
    record: dict[str, Any]


@contextmanager
def opened(
    model: Model, plan: Plan, settings: Sweep, sae: SAE | None, fingerprint: str
) -> Iterator[Backend]:
    """The backend of a sweep, ready inside. With `backend: auto` the wavefront if the model passes
    its self-test (once for a model of this `fingerprint`), else nnsight. NotOnWavefront if the
    wavefront was asked for and cannot do it; BadInput if neither can."""
    reason = "asked for"
    if settings.backend != "nnsight":
        with ExitStack() as stack:
            try:
                stack.enter_context(attention_is(model.hf_model))
                forward = take_apart(model.hf_model, plan.layouts.longest, plan.layouts.shortest)
                check_neurons(forward, plan, settings.metrics)
                tested = _tested(forward, plan, sae, fingerprint)
            except NotOnWavefront as error:
                if settings.backend == "wavefront":
                    raise
                reason = str(error)
            else:
                what = "passed the self-test" if settings.backend == "auto" else reason
                record = {"backend": "wavefront", "backend_reason": what}
                yield Backend(forward, wavefront, {**record, "self_test": asdict(tested)})
                return
    with through_nnsight(model, plan, settings, reason) as (backend, interventions):
        components = plan.layouts.patched([name for name in plan.grids if name != SETS])
        interventions.check(plan.layouts, components, settings.metrics)
        yield backend


def taken(plan: Plan, backend: str) -> Plan:
    """A plan with what it takes on a backend; auto is counted as the wavefront."""
    return as_full_forwards(plan) if backend == "nnsight" else plan


def _tested(forward: Forward, plan: Plan, sae: SAE | None, fingerprint: str) -> SelfTest:
    """The self-test, or what it found before on the same model, prompts and components by the same
    code."""
    folder = kept_in()
    said = [fingerprint, str(forward.device), _code(), torch.__version__, transformers.__version__]
    said += [selftest.what(plan), str(sae and (sae.layer, sae.at, float(sae.encoder.sum())))]
    file = folder and folder / f"{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]}.json"
    if file and file.exists():
        with suppress(ValueError, TypeError):
            return SelfTest(**json.loads(file.read_text()))
    found = selftest.check(forward, plan, sae)
    if file:
        with suppress(OSError):  # then it is done again
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(asdict(found)))
            unfinished.rename(file)
    return found


def kept_in() -> Path | None:
    """Where self-tests that were passed are kept; None for nowhere."""
    return cache("selftests")


@lru_cache
def _code() -> str:
    """Identifies what computes: every source file of the engine and of the kernels."""
    found = hashlib.sha256()
    for package in (Path(__file__).parent, Path(patchsweep_kernels.__file__).parent):
        for file in sorted(package.rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()


@contextmanager
def through_nnsight(
    model: Model, plan: Plan, settings: Sweep, reason: str
) -> Iterator[tuple[Backend, Interventions]]:
    """Full forwards of the model as it is, and what they can patch. BadInput if it is not
    causal."""
    # nnsight takes a second and some memory, which most sweeps do not need.
    from patchsweep.interventions import open_interventions

    with ExitStack() as stack:
        if any(m.name == "attention" for m in settings.metrics):
            # Only this implementation returns the probabilities.
            stack.enter_context(attention_is(model.hf_model, "eager"))
        forward = as_it_is(model.hf_model, plan.layouts.longest)
        padded = plan.layouts.padded
        carry = open_interventions(forward, model.dimensions, plan.token_budget, padded)
        if settings.remote:
            carry = carry.on_ndif(model)
        yield Backend(forward, carry, {"backend": "nnsight", "backend_reason": reason}), carry
