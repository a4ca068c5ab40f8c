"""What a patch changes: differences of activations, and of attention patterns computed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patchsweep.attribution.estimators import THROUGH_PATTERNS
from patchsweep.attribution.gradients import Observed, Place
from patchsweep.attribution.patterns import How, log_pattern, scores, weigh
from patchsweep.attribution.runs import Frames, Passes
from patchsweep.passes import Values
from patchsweep.plan.layout import Layouts
from patchsweep.sae import SAE

FIXED = ("atp_qk", "atp_star")  # estimators that compute patterns again


def patterns_again(name: str, estimator: str) -> bool:
    """Whether a component is estimated by the change of patterns, computed again."""
    return name == "head_pattern" or (name in THROUGH_PATTERNS and estimator in FIXED)


def place_of(layouts: Layouts, name: str, estimator: str) -> str:
    """The component at whose place a change is felt: of patterns z, which is linear in them."""
    return "head_z" if patterns_again(name, estimator) else layouts.place(name)


def seen_by(layouts: Layouts, name: str, estimator: str) -> tuple[str, ...]:
    """The components whose activations an estimate needs of both runs."""
    if patterns_again(name, estimator):
        return "head_q", "head_k", "head_v"
    return (layouts.place(name),)


@dataclass(frozen=True, eq=False)
class Changes:
    """The changes that patches of one direction make, from what was observed of both runs."""

    passes: Passes
    observed: Observed
    values: Values
    frames: Frames

    def effect(
        self, name: str, estimator: str, layer: int, gradient: Mapping[Place, Tensor]
    ) -> Tensor:
        """The estimated change of the metric [pair, position, unit] of patching each position
        alone, from ∂m/∂a at the component's place [token, unit, width]."""
        place = place_of(self.passes.plan.layouts, name, estimator)
        g = gradient[place, layer][self.frames.own]
        if name == "head_k" and estimator in FIXED:
            return self._key_fix(layer, g)
        if name == "sae_feature":
            g = (g.flatten(2) @ self._sae(g).decoder.T)[..., None]
        effect: Tensor = (self.change(name, estimator, layer) * g).sum(-1)
        return effect

    def shift(self, name: str, estimator: str, layer: int) -> Tensor:
        """What patching all positions adds at the place, [pair, position, unit, width]."""
        change = self.change(name, estimator, layer)
        if name != "sae_feature":
            return change
        place = self.passes.plan.layouts.place(name), layer
        written = change[..., 0] @ self._sae(change).decoder
        by_unit: Tensor = written.unflatten(-1, self.observed.activations[place].shape[1:])
        return by_unit

    def change(self, name: str, estimator: str, layer: int) -> Tensor:
        """a(source) − a(destination) [pair, position, unit, width], 0 where nothing is patched; of
        patterns that of z, [pair, position, head, d_head]."""
        found: Tensor
        if patterns_again(name, estimator):
            found = self._of_patterns(name, layer)
        elif self._kind == "run":
            moved = name in ("head_q", "head_k")
            source = self.frames.rotated if moved else self.frames.source
            found = self._activation(name, layer, source) - self._before(name, layer)
        elif self._kind == "vector":
            found = self._given(name, layer).expand_as(self._before(name, layer))
        else:
            found = self._given(name, layer) - self._before(name, layer)
        return found.masked_fill(~self.frames.patched[..., None, None], 0)

    @property
    def _kind(self) -> str:
        return self.passes.plan.sources[self.passes.wave.source].kind

    def _activation(self, name: str, layer: int, tokens: Tensor) -> Tensor:
        """[pair, position, unit, width] of tokens [pair, position]."""
        found: Tensor = self.observed.activations[self.passes.plan.layouts.place(name), layer][
            tokens
        ]
        if name != "sae_feature":
            return found
        features: Tensor = self._sae(found).encode(found.flatten(2).flatten(0, 1))
        return features.view(*tokens.shape, -1, 1)

    def _sae(self, like: Tensor) -> SAE:
        assert self.values.sae is not None
        return self.values.sae.to(like.device, like.dtype)

    def _before(self, name: str, layer: int) -> Tensor:
        return self._activation(name, layer, self.frames.destination)

    def _given(self, name: str, layer: int) -> Tensor:
        """[pair, position, unit, width or 1]: a value that takes no run, or a vector to add."""
        like = self._before(name, layer)
        units = torch.arange(like.shape[2], device=like.device)
        position = torch.arange(like.shape[1], device=like.device).repeat_interleave(len(units))
        source = self.passes.wave.source
        given = self.values.constant(source, name, layer, units.repeat(like.shape[1]), position)
        if given is None:
            return torch.zeros_like(like)
        return given.to(like).view(1, like.shape[1], len(units), -1)

    def _source(self, name: str, layer: int) -> Tensor:
        """The activation that a patch puts there, [pair, position, unit, width]."""
        return self._before(name, layer) + self.change(name, "atp", layer)

    def _of_patterns(self, name: str, layer: int) -> Tensor:
        """The change of z that patterns make (AtP*'s query fix): those of the source's
        queries over the destination's keys, or the source's own rows."""
        how, key, value = self._attention(layer)
        before = log_pattern(scores(self._before("head_q", layer), key, how), how).exp()
        if name == "head_q":
            after = log_pattern(scores(self._source("head_q", layer), key, how), how).exp()
        elif self._kind == "run":
            own = [self._activation(c, layer, self.frames.source) for c in ("head_q", "head_k")]
            after = log_pattern(scores(own[0], own[1], how), how).exp()
        else:
            after = torch.zeros_like(before)
        return weigh(after - before, value)

    def _key_fix(self, layer: int, g: Tensor) -> Tensor:
        """[pair, position, kv_head]: one key replaced in every row of attention that sees it.

        AtP*'s key fix in closed form. With Δ the change of a score, w = P·expm1(Δ) is that of the
        row's normaliser, and P′ − P weighs G = g·v to w/(1 + w) · (G of the key − Σ P·G).
        """
        how, key, value = self._attention(layer)
        query = self._before("head_q", layer)
        before = scores(query, key, how)
        change = scores(query, self._source("head_k", layer), how) - before
        log_p = log_pattern(before, how)
        p = log_p.exp()
        # expm1 keeps small changes exact, the other form those of keys that had no weight.
        w = torch.where(change < 1, p * torch.expm1(change), (log_p + change).exp() - p)
        share = torch.where(w.isinf(), 1.0, w / (1 + w))
        g = g.masked_fill(~self.frames.there[..., None, None], 0)
        of_key = torch.einsum(
            "rqhd,rkhd->rhqk", g, value.repeat_interleave(g.shape[2] // value.shape[2], 2)
        )
        of_row = (p * of_key).sum(-1, keepdim=True)
        found = (share * (of_key - of_row)).sum(2)
        by_kv: Tensor = found.unflatten(1, (key.shape[2], -1)).sum(2).transpose(1, 2)
        return by_kv.masked_fill(~self.frames.patched[..., None], 0)

    def _attention(self, layer: int) -> tuple[How, Tensor, Tensor]:
        """How a layer attends, and the destination's keys and values."""
        return (
            self.observed.how[layer],
            self._before("head_k", layer),
            self._before("head_v", layer),
        )
