"""The nnsight backend: patched runs as interventions on full forwards of the model as it is.

For families outside the wavefront's reach and for checking it: the model runs with its own
attention, on its own devices; runs are stacked along the batch dimension as sequences of one length
(nnsight's own batching pads on the left and would shift learned positions).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from nnsight import CONFIG, NNsight, TransformersModel  # type: ignore[import-untyped]
from nnsight.intervention.source import SourceNotAvailable  # type: ignore[import-untyped]
from torch import Tensor, nn

from patchsweep.backends.modules import Spot, find_spots, first_of
from patchsweep.backends.stacked import Batch, batches
from patchsweep.errors import BadInput
from patchsweep.model import Model
from patchsweep.passes import BORDER, Forward, PatternRead, Seen, Tap
from patchsweep.plan import Dimensions
from patchsweep.plan.layout import Layouts
from patchsweep.plan.schedule import Embedding, Schedule, Step
from patchsweep.spec import INNER, Metric

# Patched everywhere: what goes into a layer, what comes out of it, what the embedding returns.
ANYWHERE = (*BORDER, "embed")
ROTATED = ("mean", "vector")  # kinds of sources that the wavefront takes after the rotation
UNKNOWN = "the names and order of its query, key and value projections are not known"
WHY = {
    "head_q": UNKNOWN,
    "head_k": UNKNOWN,
    "head_v": UNKNOWN,
    "head_z": "no module takes what attention returns, and it is not called by its usual name",
    "head_pattern": "patterns are seen by the wavefront only",
    "neuron": "its MLP does not end in one linear map",
    "resid_mid": "its attention and MLP read the same residual stream (parallel blocks)",
}


@dataclass(frozen=True, eq=False)
class Interventions:
    """Runs the schedules of waves as batches of about `tokens` tokens: a `passes.Carry`.

    `spots` [layer] say by place where an activation is; `layers` and `embedding` are paths.
    """

    spots: Sequence[Mapping[str, Spot]]
    layers: Sequence[str]
    embedding: str
    model: NNsight
    tokens: int
    remote: bool = False

    def on_ndif(self, model: Model) -> Interventions:
        """The same, run on NDIF's copy of the model. BadInput without credentials."""
        if not CONFIG.API.APIKEY:
            raise BadInput(
                "remote: true needs a key for NDIF: set NDIF_API_KEY, or leave remote out"
            )
        there = TransformersModel(model.hf_model, task="text-generation", tokenizer=model.tokenizer)
        return replace(self, model=there, remote=True)

    def lacks(self, layouts: Layouts, name: str) -> bool:
        """Whether the model does not show where this component is."""
        place = layouts.place(name)
        layers = layouts.layers(name)
        return place not in ANYWHERE and any(place not in self.spots[i] for i in layers)

    def check(self, layouts: Layouts, components: Sequence[str], metrics: Sequence[Metric]) -> None:
        """BadInput for what cannot be patched or read this way in this model."""
        for name in components:
            if self.lacks(layouts, name):
                why = WHY.get(layouts.place(name), "no module holds it alone")
                raise BadInput(f"{name} cannot be patched through nnsight in this model: {why}")
        for source in layouts.sources:
            if source.kind in ROTATED and {"head_q", "head_k"} & set(components):
                raise BadInput(
                    f"source {source.name}: through nnsight queries and keys are patched before "
                    "they are rotated, a mean or a vector is meant after: take them from zero or "
                    "another run, or use the wavefront"
                )
        for m in metrics:
            if m.name == "attention" and "pattern" not in self.spots[m.layer]:
                raise BadInput(
                    f"{m.column}: this model's attention does not return its probabilities"
                )
            read = m.component if m.name == "probe" else m.name
            if m.name in INNER - {"attention"} and self.lacks(layouts, read):
                raise BadInput(f"{m.column}: {read} cannot be read through nnsight in this model")

    @torch.no_grad()
    def __call__(
        self,
        forward: Forward,
        schedule: Schedule,
        seen: Callable[[int, Step], Seen],
        embedding: Callable[[Embedding], Tap | None],
    ) -> Tensor:
        """The last layer's output where logits are read, [row, read, d_model]."""
        out: Tensor | None = None
        for batch in batches(schedule, self.tokens):
            steps = [batch.step(layer) for layer in range(schedule.layers + 1)]
            what = [seen(layer, step) for layer, step in enumerate(steps)]
            hidden = self._run(forward, batch, what, embedding(batch.embedding))
            reads = torch.from_numpy(schedule.reads[batch.new]).clamp(min=0)
            first = torch.from_numpy(steps[-1].row_tokens.first[batch.new])
            found = hidden[(first[:, None] + reads).to(hidden.device)]
            if out is None:
                out = found.new_empty(len(schedule.row_pair), *found.shape[1:])
            out[torch.from_numpy(batch.new).to(out.device)] = found
        assert out is not None
        return out.to(forward.device)

    def _run(
        self, forward: Forward, batch: Batch, what: Sequence[Seen], embedding: Tap | None
    ) -> Tensor:
        """The last layer's output for all tokens of a batch, [token, d_model]."""
        tokens = torch.from_numpy(batch.tokens).to(forward.device)
        layers = [self.model.get(path) for path in self.layers]
        inputs = called(tokens) | ({"remote": True} if self.remote else {})
        with self.model.trace(**inputs) as tracer:
            if embedding is not None:
                _overwrite(self.model.get(self.embedding).output, embedding, forward.device)
            for layer, envoy in enumerate(layers):
                _at_border(envoy.input, what[layer], forward.devices[layer])
                self._inside(envoy, self.spots[layer], what[layer])
            hidden = first_of(layers[-1].output)
            _at_border(hidden, what[-1], forward.devices[-1])
            out: Tensor = hidden.flatten(0, 1).save()
            tracer.stop()
        return out

    def _inside(self, layer: Any, spots: Mapping[str, Spot], what: Seen) -> None:
        """What happens in one layer, in the order of its modules."""
        places = [p for p in what.taps if p in spots] + ["pattern"] * bool(what.pattern_reads)
        for place in sorted(places, key=lambda p: spots[p].order):
            spot = spots[place]
            module = layer.get(spot.module)
            if place == "pattern":
                _read_patterns(module.output[1], what.pattern_reads)
            else:
                _tapped(_at(module, spot), spot, what.taps[place])


@torch.no_grad()
def open_interventions(
    forward: Forward, dimensions: Dimensions, tokens: int, padded: Iterable[tuple[int, int]] = ()
) -> Interventions:
    """Find where a model holds its activations. BadInput if what it computes depends on how long a
    prompt is, for prompts that are `padded` from a length to another."""
    for length, longer in padded:
        ids = torch.arange(longer, device=forward.device)[None] % dimensions.vocab
        a, b = (forward.hf_model(**called(i)).logits[:, :length] for i in (ids[:, :length], ids))
        if not _alike(a, b):
            raise BadInput(
                f"{type(forward.hf_model).__name__} computes positions that depend on the prompt's "
                f"length (here {length} and {longer} tokens): sweep pairs of one length each"
            )
    paths = {module: name for name, module in forward.hf_model.named_modules()}
    layers, model = [paths[layer] for layer in forward.layers], _wrapped(forward.hf_model)
    spots = [
        {place: spot for place, spot in some.items() if _reached(model.get(path), spot)}
        for path, some in zip(layers, find_spots(forward, dimensions), strict=True)
    ]
    return Interventions(
        spots=spots,
        layers=layers,
        embedding=paths[forward.hf_model.get_input_embeddings()],
        model=model,
        tokens=tokens,
    )


def _wrapped(hf_model: nn.Module) -> NNsight:
    with warnings.catch_warnings():
        # Of submodules that are called as something of its own; their paths stay.
        warnings.filterwarnings("ignore", "Module '.*' has a submodule named")
        return NNsight(hf_model)


def _reached(layer: Any, spot: Spot) -> bool:
    """Whether nnsight gets at a spot of this layer."""
    return spot.side != "attention" or _attention_of(layer.get(spot.module)) is not None


def _attention_of(module: Any) -> Any:
    """The call of the attention function in a module's forward, by the name that transformers
    gives it there; None if there is none."""
    try:
        source = module.source
    except SourceNotAvailable:
        return None
    calls = [name for name in source.names if re.fullmatch(r"attention_interface_\d+", name)]
    # The first is where the function is looked up.
    return source.node(calls[-1]) if len(calls) > 1 else None


def _at(module: Any, spot: Spot) -> Any:
    """What lies at a spot while its module runs."""
    if spot.side == "input":
        return module.input
    return first_of((_attention_of(module) if spot.side == "attention" else module).output)


def called(tokens: Tensor) -> dict[str, Any]:
    """The arguments of a forward: tokens [row, position] alone, as a user gives them. Positions and
    masks are the model's own matter."""
    return {"input_ids": tokens, "use_cache": False}


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two computations of the same logits agree, up to rounding in any dtype."""
    share = 1e-2 if a.element_size() < 4 else 1e-4
    known = a.isfinite() & b.isfinite()
    a, b = a[known].double(), b[known].double()
    return torch.allclose(a, b, rtol=share, atol=share * float(a.std()))


def _at_border(hidden: Tensor, what: Seen, device: torch.device) -> None:
    for place in BORDER:
        if place in what.taps:
            _overwrite(hidden, what.taps[place], device)


def _overwrite(x: Tensor, tap: Tap, device: torch.device) -> None:
    """A tap on [batch, position, width], in place. What goes into a layer may not be on its
    `device` yet."""
    tokens = x.to(device).reshape(-1, 1, x.shape[-1])
    tap(tokens)
    if tokens.data_ptr() != x.data_ptr():
        x.copy_(tokens.view_as(x))


def _read_patterns(pattern: Tensor, reads: Sequence[PatternRead]) -> None:
    """Attention probabilities from [batch, head, query, key]."""
    rows = pattern.transpose(1, 2).flatten(0, 1)
    for read in reads:
        read.out(rows[read.tokens, read.head, read.key])


def _tapped(x: Tensor, spot: Spot, tap: Tap) -> None:
    """A tap on what a module takes or returns, in place."""
    view = spot.view(x)
    tokens = view.reshape(-1, *view.shape[2:])
    if spot.scale == 1.0:
        tap(tokens)
    else:
        before = tokens * spot.scale
        after = before.clone()
        tap(after)
        tokens = torch.where(after != before, after / spot.scale, tokens)
    view.copy_(tokens.view(view.shape))
