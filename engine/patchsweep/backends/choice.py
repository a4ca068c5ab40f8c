"""Which way a model's runs are computed: the wavefront where it is exact, nnsight elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedModel

import patchsweep_kernels
from patchsweep.backends import selftest
from patchsweep.backends.probe import make_probe
from patchsweep.backends.selftest import SelfTest, Truth
from patchsweep.backends.stacked import as_full_forwards
from patchsweep.device import out_of_memory
from patchsweep.errors import BadInput, NotOnWavefront, as_line
from patchsweep.model import Model, cache
from patchsweep.passes import (
    Carry,
    Forward,
    as_it_is,
    attention_is,
    layers_of,
    matrices,
    take_apart,
    wavefront,
)
from patchsweep.plan import Plan
from patchsweep.processes import log
from patchsweep.sae import SAE
from patchsweep.spec import Metric, Sweep

if TYPE_CHECKING:
    from patchsweep.backends.interventions import Interventions


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
    """The backend of a sweep, ready inside, that passed the self-test (once for a model of this
    `fingerprint`). With `backend: auto` the wavefront if that can run the model, else nnsight.
    BadInput if what was asked for, or neither, can run it."""
    tests, reason = _SelfTests(model, plan, sae, fingerprint), "asked for"
    with ExitStack() as stack:
        if settings.backend != "nnsight":
            tests.ask_for("wavefront")
            try:
                backend = stack.enter_context(_on_wavefront(model, plan, settings, tests))
            except Exception as error:
                if settings.backend == "wavefront" and isinstance(error, BadInput):
                    raise
                reason = _why_not(model, error)
                if settings.backend == "wavefront":
                    raise NotOnWavefront(reason) from error
                log.warning("auto takes nnsight: %s", reason)
            else:
                yield backend
                return
        tests.ask_for("nnsight")
        yield stack.enter_context(_tested_nnsight(model, plan, settings, reason, tests))


@contextmanager
def _on_wavefront(
    model: Model, plan: Plan, settings: Sweep, tests: _SelfTests
) -> Iterator[Backend]:
    with attention_is(model.hf_model):
        forward = take_apart(model.hf_model, plan.layouts.longest, plan.layouts.shortest)
        _check_neurons(forward, plan, settings.metrics)
        found = tests.passed("wavefront", forward, wavefront)
        reason = "passed the self-test" if settings.backend == "auto" else "asked for"
        yield Backend(forward, wavefront, _record("wavefront", reason, found))


@contextmanager
def _tested_nnsight(
    model: Model, plan: Plan, settings: Sweep, reason: str, tests: _SelfTests
) -> Iterator[Backend]:
    with ExitStack() as stack:
        reached: list[int] = []
        try:
            stack.enter_context(_followed(model.hf_model, reached))
            opening = through_nnsight(model, plan, settings, reason)
            backend, carry = stack.enter_context(opening)
            components = plan.layouts.patched(plan.grids)
            carry.check(plan.layouts, components, settings.metrics)
            found = tests.passed("nnsight", backend.forward, carry)
        except Exception as error:
            if out_of_memory(error):
                raise
            where = f" in layer {reached[-1]}" if reached else ""
            name = type(model.hf_model).__name__
            said = f"{name} cannot be run through nnsight{where}: {as_line(error)}"
            if isinstance(error, BadInput):
                said = str(error)
            # What was tried first, too.
            raise BadInput(said + (f" ({reason})" if reason != "asked for" else "")) from error
        yield replace(backend, record=_record("nnsight", reason, found))


def _record(backend: str, reason: str, found: SelfTest) -> dict[str, Any]:
    return {"backend": backend, "backend_reason": reason, "self_test": asdict(found)}


def _why_not(model: Model, error: Exception) -> str:
    """Why the wavefront cannot be taken, in one line. What is out of memory is no such reason."""
    if out_of_memory(error):
        raise error
    if isinstance(error, NotOnWavefront):
        return str(error)
    name = type(model.hf_model).__name__
    said = str(error) if isinstance(error, BadInput) else f"{name}: {as_line(error)}"
    return f"{said}: it cannot run on the wavefront"


@contextmanager
def _followed(hf_model: PreTrainedModel, reached: list[int]) -> Iterator[None]:
    """Inside, the layers that were called are written down."""
    with ExitStack() as stack:
        for index, layer in enumerate(layers_of(hf_model)):
            note: Any = partial(lambda i, *_: reached.append(i), index)
            stack.callback(layer.register_forward_pre_hook(note).remove)
        yield


def taken(plan: Plan, backend: str) -> Plan:
    """A plan with what it takes on a backend; auto is counted as the wavefront."""
    return as_full_forwards(plan) if backend == "nnsight" else plan


class _SelfTests:
    """The self-tests of a sweep's model: what the judge says, asked once, and what was found before
    on the same model, prompts and components by the same code."""

    def __init__(self, model: Model, plan: Plan, sae: SAE | None, fingerprint: str) -> None:
        self.model, self.sae, self.fingerprint = model, sae, fingerprint
        self.probe = make_probe(plan)
        self.truth: Truth | None = None

    def ask_for(self, backend: str) -> None:
        """Ask the judge, of the model as it came, unless the backend has passed before."""
        if self.truth is None and self._before(backend) is None:
            self.truth = selftest.ask(self.model.hf_model, self.probe, self.sae)

    def passed(self, backend: str, forward: Forward, carry: Carry) -> SelfTest:
        """What the self-test found. BadInput if the backend does not pass it."""
        if found := self._before(backend):
            return found
        assert self.truth is not None
        if backend == "wavefront":
            selftest.check_masks(self.truth)
        how = {"wavefront": " on the wavefront", "nnsight": " through nnsight"}[backend]
        found = selftest.compare(forward, carry, self.truth, self.sae, how)
        if file := self._file(backend):
            with suppress(OSError):  # then it is done again
                file.parent.mkdir(parents=True, exist_ok=True)
                unfinished = file.with_suffix(f".{os.getpid()}")
                unfinished.write_text(json.dumps(asdict(found)))
                unfinished.rename(file)
        return found

    def _before(self, backend: str) -> SelfTest | None:
        file = self._file(backend)
        if file and file.exists():
            with suppress(ValueError, TypeError):
                return SelfTest(**json.loads(file.read_text()))
        return None

    def _file(self, backend: str) -> Path | None:
        sae = self.sae and (self.sae.layer, self.sae.at, float(self.sae.encoder.sum()))
        said = [self.fingerprint, str(self.model.device), _code(), backend, str(sae)]
        said += [torch.__version__, transformers.__version__, str(self.probe)]
        name = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]
        folder = kept_in()
        return folder and folder / f"{name}.json"


def kept_in() -> Path | None:
    """Where self-tests that were passed are kept; None for nowhere."""
    return cache("selftests")


@lru_cache
def _code() -> str:
    """Identifies what computes: every source file of the engine and of the kernels."""
    found = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(str(patchsweep_kernels.__file__)).parent):
        for file in sorted(package.rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()


@contextmanager
def through_nnsight(
    model: Model, plan: Plan, settings: Sweep, reason: str
) -> Iterator[tuple[Backend, Interventions]]:
    """Full forwards of the model as it is, and what they can patch here."""
    # nnsight takes a second and some memory, which most sweeps do not need.
    from patchsweep.backends.interventions import open_interventions

    with ExitStack() as stack:
        if any(m.name == "attention" for m in settings.metrics):
            # Only this implementation returns the probabilities.
            stack.enter_context(attention_is(model.hf_model, "eager"))
        forward = as_it_is(model.hf_model, plan.layouts.longest)
        padded = plan.layouts.padded
        carry = open_interventions(forward, model.dimensions, plan.token_budget, padded)
        used = carry.on_ndif(model) if settings.remote else carry
        yield Backend(forward, used, {"backend": "nnsight", "backend_reason": reason}), carry


def _check_neurons(forward: Forward, plan: Plan, metrics: Sequence[Metric]) -> None:
    """NotOnWavefront if neurons are patched or read, and the wavefront does not see them here."""
    layouts = plan.layouts
    patched = layouts.patched(plan.grids)
    if "neuron" not in patched and not any("neuron" in (m.name, m.component) for m in metrics):
        return
    for layer, down in enumerate(forward.down_projections):
        sizes = [size for module in down.modules() for size in matrices(module)]  # with adapters'
        if not any(layouts.dimensions.neurons in shape for shape in sizes):
            raise NotOnWavefront(
                f"neuron cannot be patched in this model: it shows "
                f"{layouts.dimensions.neurons} neurons, layer {layer} has weights {sizes}"
            )
