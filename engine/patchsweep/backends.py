"""Which way a model's runs are computed: the wavefront where it is exact, nnsight elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from patchsweep import selftest
from patchsweep.attention import attention_is
from patchsweep.errors import NotOnWavefront
from patchsweep.forward import Forward, as_it_is, take_apart
from patchsweep.interventions import Interventions, open_interventions
from patchsweep.model import Model
from patchsweep.plan import Plan
from patchsweep.sae import SAE
from patchsweep.sites import SETS
from patchsweep.spec import Sweep
from patchsweep.wave import Carry, wavefront


@dataclass(frozen=True)
class Backend:
    """How runs are computed, and why so: `record` is what the results keep."""

    forward: Forward
    carry: Carry
    record: dict[str, Any]


@contextmanager
def opened(model: Model, plan: Plan, settings: Sweep, sae: SAE | None) -> Iterator[Backend]:
    """The backend of a sweep, ready inside. With `backend: auto` the wavefront if the model passes
    its self-test, else nnsight. NotOnWavefront if the wavefront was asked for and cannot do it;
    BadInput if neither can."""
    reason = "asked for"
    if settings.backend != "nnsight":
        with ExitStack() as stack:
            try:
                stack.enter_context(attention_is(model.hf_model))
                forward = take_apart(model.hf_model, plan.layouts.longest, plan.layouts.shortest)
                tested = selftest.check(forward, plan, sae)
            except NotOnWavefront as error:
                if settings.backend == "wavefront":
                    raise
                reason = str(error)
            else:
                what = "passed the self-test" if settings.backend == "auto" else reason
                record = {"backend": "wavefront", "backend_reason": what}
                yield Backend(forward, wavefront, {**record, "self_test": asdict(tested)})
                return
    with through_nnsight(model, plan, settings, reason) as backend:
        assert isinstance(backend.carry, Interventions)
        components = plan.layouts.patched([name for name in plan.grids if name != SETS])
        backend.carry.check(plan.layouts, components, settings.metrics)
        yield backend


@contextmanager
def through_nnsight(model: Model, plan: Plan, settings: Sweep, reason: str) -> Iterator[Backend]:
    """Full forwards of the model as it is. BadInput if it is not causal."""
    with ExitStack() as stack:
        if any(m.name == "attention" for m in settings.metrics):
            # Only this implementation returns the probabilities.
            stack.enter_context(attention_is(model.hf_model, "eager"))
        forward = as_it_is(model.hf_model, plan.layouts.longest)
        carry = open_interventions(forward, model.dimensions, plan.token_budget)
        yield Backend(forward, carry, {"backend": "nnsight", "backend_reason": reason})
