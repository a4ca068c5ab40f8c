"""Models of all families and a few prompts, for the tests of `heads.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from oracle import heads, oracle
from oracle.families import FAMILIES, Family, prompts
from oracle.heads import Patch, Prompt

LAYERS = 3
LENGTH = 9
LAST = LENGTH - 1
LAYER = 1
EVERYWHERE = {p: p for p in range(LENGTH)}
CLEAN, CORRUPT = (Prompt(ids) for ids in prompts(np.random.default_rng(0), 50, LENGTH, LENGTH))
# Tokens of the clean run two positions further on.
LONGER = Prompt((7, 11, *CLEAN.ids))
OTHER = Prompt(tuple(reversed(CORRUPT.ids)))


@dataclass(frozen=True)
class Case:
    """A model, and what every test wants to know of it."""

    model: PreTrainedModel
    family: Family
    counts: Mapping[str, int]  # units by component

    def logits(self, *patches: Patch, of: Prompt = CORRUPT) -> Tensor:
        return heads.logits(self.model, self.family, of, patches)

    def seen(
        self, of: Prompt, component: str, *patches: Patch, layer: int = LAYER, sae: object = None
    ) -> Tensor:
        args = (self.model, self.family, of, patches, component, layer, sae)
        return heads.activation(*args)  # type: ignore[arg-type]

    def effect(self, *patches: Patch) -> float:
        return distance(self.logits(*patches), self.logits())

    def units(self, component: str) -> list[int | None]:
        if component not in heads.HAS_UNITS:
            return [None]
        return list(range(self.counts[component]))

    def components(self) -> list[str]:
        absent = {"resid_mid"} if self.family.parallel else set()
        absent |= {"neuron"} if self.family.down is None else set()
        absent |= set() if self.family.qkv else set(heads.PROJECTED)
        known = (*oracle.COMPONENTS, "embed", "head_q", "head_k", "head_v", "head_pattern")
        return [c for c in (*known, "neuron", *heads.PROJECTED) if c not in absent]

    def whole(self, component: str, source: Prompt = CLEAN, layer: int = LAYER) -> list[Patch]:
        """Every unit at every position."""
        return [Patch(component, layer, u, EVERYWHERE, source) for u in self.units(component)]


def build(name: str) -> Case:
    family = FAMILIES[name]
    model = family.build(LAYERS, seed=1)
    seen = heads.activations(model, family, CLEAN)
    return Case(model, family, {c: x.shape[1] for (c, layer), x in seen.items() if layer == LAYER})


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def layer_of(component: str) -> int:
    return 0 if component == "embed" else LAYER


def swapped(ids: tuple[int, ...], position: int, token: int) -> tuple[int, ...]:
    return (*ids[:position], token, *ids[position + 1 :])
