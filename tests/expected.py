"""What the oracle says of any cell of a sweep."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

import patchsweep as ps
from oracle import heads, oracle
from oracle.families import FAMILIES, Family
from patchsweep.pairs import Pair

SCALE = -1.5  # of steering vectors
LOGIT_COLUMNS = {
    "logit_diff", "logit_diff_sum", "logit", "logprob", "prob", "prob_diff", "rank", "accuracy_k5",
    "kl", "kl_reverse", "total_variation", "relative_prob", "sequence_logprob",
}  # fmt: skip
# What is zero in both runs where its neuron is silent in both.
SPARSE = ("neuron", "sae_feature")
# What has no say where a query sees one key.
OF_SEVERAL_KEYS = ("head_q", "head_pattern")


@dataclass(frozen=True)
class Autoencoder:
    """What the oracle needs of one, written down again in plain terms."""

    at: str
    layer: int
    encoder: torch.Tensor
    bias: torch.Tensor
    decoder: torch.Tensor

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.encoder.to(x) + self.bias.to(x))


@dataclass(frozen=True)
class Case:
    """A sweep: its family, pairs and settings.

    `model`: one that is there already, else a random one of the family is built. `tolerance`: 0 for
    the family's. Inner metrics read the layer in the middle, an autoencoder stands in `sae_layer`.
    """

    family: str
    pairs: list[Pair]
    settings: dict[str, Any]
    layers: int = 3
    seed: int = 1
    sae_at: str = ""
    sae_layer: int = 2
    overrides: dict[str, Any] = field(default_factory=dict)
    model: ps.Model | None = None
    tolerance: float = 0.0

    @property
    def middle(self) -> int:
        return self.layers // 2


@dataclass
class Expected:
    """The oracle's answer to any cell of a case."""

    case: Case
    hf_model: Any
    family: Family
    sae: Autoencoder | None

    def __post_init__(self) -> None:
        self.run = cache(self._run)
        self.mean = cache(self._mean)
        self.sources: dict[Any, Any] = {}

    def prompt(self, pair: int, source: str, sample: int) -> heads.Prompt:
        """The run that a source sets a pair against."""
        p = self.case.pairs[pair]
        if source == "other":
            return heads.Prompt(p.corrupt)
        if source == "resample":
            return heads.Prompt(self.resampled()[sample][pair])
        if source.startswith("sigma="):
            return heads.Prompt(p.clean, self.noise(pair, float(source[6:]), sample))
        return heads.Prompt(p.others[source])

    def noise(self, pair: int, sigma: float, sample: int) -> torch.Tensor:
        given = self.case.settings["corrupt"]["gaussian"]
        noised = [self.noised(p) for p in self.case.pairs]
        used = [p.clean[i] for p, at in zip(self.case.pairs, noised, strict=True) for i in at]
        if given.get("std", "tokens") == "table":
            used = list(range(self.hf_model.config.vocab_size))
        table = self.hf_model.get_input_embeddings()(torch.tensor(used)).double().numpy()
        noise = np.zeros((len(self.case.pairs[pair].clean), table.shape[1]))
        for slot, position in enumerate(noised[pair]):
            own = self.case.pairs[pair].clean
            rng = np.random.default_rng([given.get("seed", 0), sample, slot, *own])
            noise[position] = rng.standard_normal(table.shape[1]) * sigma * table.std()
        return torch.from_numpy(noise)

    def noised(self, pair: Pair) -> list[int]:
        tokens = self.case.settings["corrupt"]["gaussian"].get("tokens", "differ")
        if tokens == "differ":
            return [
                i for i, (a, b) in enumerate(zip(pair.clean, pair.corrupt, strict=True)) if a != b
            ]
        return sorted({t % len(pair) for t in tokens})

    def given(self, source: str) -> dict[str, Any]:
        """The options of a source."""
        said = self.case.settings["source"]
        said = said if isinstance(said, list) else [said]
        return next(s[source] for s in said if isinstance(s, dict) and source in s)

    def resampled(self) -> list[list[tuple[int, ...]]]:
        given, pairs = self.given("resample"), self.case.pairs
        seed = given.get("seed", 0)

        def drawn(sample: int, own: tuple[int, ...]) -> tuple[int, ...]:
            def score(other: tuple[int, ...]) -> str:
                return hashlib.sha256(f"{seed} {sample} {own} {other}".encode()).hexdigest()

            return min({q.clean for q in pairs if len(q.clean) == len(own)} - {own}, key=score)

        return [[drawn(n, p.clean) for p in pairs] for n in range(given.get("samples", 1))]

    def _mean(self, component: str, layer: int) -> torch.Tensor:
        """[position or 1, unit, width]"""
        given = self.given("mean")
        seen = [
            heads.activations(
                self.hf_model, self.family, heads.Prompt(getattr(p, given["prompts"])), (), self.sae
            )[component, layer].double()
            for p in self.case.pairs
        ]
        if given.get("by") == "all":
            return torch.cat(seen).mean(0)[None]
        longest = max(map(len, seen))
        return torch.stack(
            [torch.stack([x[i] for x in seen if i < len(x)]).mean(0) for i in range(longest)]
        )

    def patches(
        self, pair: int, direction: str, own: str, sample: int, sites: Sequence[Any]
    ) -> list[heads.Patch]:
        """`sites`: (component, layer, unit, clean positions, source or None: the sweep's own)."""
        p = self.case.pairs[pair]
        align = p.alignment
        out = []
        for component, layer, unit, positions, named in sites:
            source = named or own
            for i in positions:
                at = i
                other_position = int(align[i]) if source == "other" else i
                if direction == "denoise":
                    at = int(align[i]) if own == "other" else i
                if at < 0 or other_position < 0:
                    continue
                value: Any
                if source == "zero":
                    value, src = torch.zeros(()), at
                elif source == "mean":
                    table = self.mean(component, layer)
                    value, src = table[min(at, len(table) - 1), unit], at
                elif source == "vector":
                    value, src = heads.Add(self.case.settings["_vector"] * SCALE), at
                elif direction == "denoise" and not named:
                    value, src = heads.Prompt(p.clean), i
                else:
                    value, src = self.prompt(pair, source, sample), other_position
                if isinstance(value, torch.Tensor) and component not in ("sae_feature",):
                    value = value.to(self.hf_model.dtype)
                out.append(heads.Patch(component, layer, unit, {at: src}, value))
        return out

    def _run(
        self, pair: int, direction: str, source: str, sample: int, sites: tuple[Any, ...]
    ) -> tuple[torch.Tensor, dict[tuple[str, int], torch.Tensor]]:
        p = self.case.pairs[pair]
        destination = heads.Prompt(p.clean)
        if direction in ("denoise", "corrupt"):
            destination = self.prompt(pair, source, sample)
        patches = self.patches(pair, direction, source, sample, sites)
        args = (self.hf_model, self.family, destination, patches, self.sae)
        return heads.forward(*args, known=self.sources)

    def values(
        self, pair: int, direction: str, source: str, sample: int, sites: Any
    ) -> dict[str, Any]:
        """Every metric of a patched run, by column."""
        p = self.case.pairs[pair]
        found, inside = self._run(pair, direction, source, sample, sites)
        clean, _ = self.run(pair, "clean", source, sample, ())
        read = len(found) - max(1, len(p.continuation))
        out = self.logit_metrics(p, found[read], clean[p.read])
        if "relative_prob" in self.case.settings["metrics"]:
            corrupt, _ = self.run(pair, "corrupt", source, sample, ())
            at = len(corrupt) - max(1, len(p.continuation))
            out["relative_prob"] = oracle.relative_prob(found[read], corrupt[at], p.answer, p.wrong)
        if p.continuation:
            out["sequence_logprob"] = oracle.sequence_logprob(found, p.continuation, read)
        if len(found) == len(clean):
            out["kl_at_-2"] = oracle.kl(clean[p.read - 1], found[read - 1])
            at = self.case.middle
            stream, z = inside["resid_post", at], inside["head_z", at]
            if ("head_pattern", at) in inside:
                out[f"attention_{at}_1_-1_1"] = inside["head_pattern", at][read, 1, 1]
            probe = probe_direction(self.hf_model).to(stream)
            out[f"probe_resid_post_{at}_-1"] = stream[read, 0] @ probe
            out[f"probe_head_z_{at}_2_-2"] = z[read - 1, 2].sum()
            if ("neuron", at) in inside:
                out[f"neuron_{at}_3_-1"] = inside["neuron", at][read, 3, 0]
            if self.sae is not None:
                out["sae_feature_2_-1"] = inside["sae_feature", self.sae.layer][read, 2, 0]
        out["spread"] = found[read].max() - found[read].min()
        return out

    def knows_reach(
        self, columns: Sequence[str], component: str, source: str, sites: Sequence[Any]
    ) -> bool:
        """Whether a patch that can change what is read does so in random models, in the bits at
        least: what is read are logits, and attention is as wide as the config says. Sets may have
        sites that undo what others do; a mean may be of equal values; a parallel block's MLP does
        not read its attention, which plans do not know."""
        if source == "mean":
            return False
        if component == "sets" and "<" in str(self.case.settings.get("sets")):
            return False
        if not set(columns) <= LOGIT_COLUMNS or self.case.family not in FAMILIES:
            return False
        return not any(
            component in SPARSE
            or (component in OF_SEVERAL_KEYS and 0 in positions)
            or (component == "mlp_out" and self.family.parallel)
            for component, _, _, positions, _ in sites
        )

    def reaches(self, pair: int, direction: str, source: str, sample: int, sites: Any) -> bool:
        """Whether a patched run's logits are other ones, where the answer is read and after it."""
        args = (pair, "corrupt" if direction == "denoise" else "clean", source, sample)
        patched, _ = self._run(pair, direction, source, sample, sites)
        destination, _ = self.run(*args, ())
        last = max(1, len(self.case.pairs[pair].continuation))
        return not torch.equal(patched[-last:], destination[-last:])

    def logit_metrics(self, pair: Pair, logits: Any, clean: Any) -> dict[str, Any]:
        return {
            "logit_diff": oracle.logit_diff(logits, pair.answer, pair.wrong),
            "logit_diff_sum": oracle.logit_diff(logits, pair.answer, pair.wrong, "sum"),
            "logit": oracle.logit(logits, pair.answer),
            "logprob": oracle.logprob(logits, pair.answer),
            "prob": oracle.prob(logits, pair.answer),
            "prob_diff": oracle.prob_diff(logits, pair.answer, pair.wrong),
            "rank": oracle.rank(logits, pair.answer),
            "accuracy_k5": oracle.accuracy(logits, pair.answer, 5),
            "kl": oracle.kl(clean, logits),
            "kl_reverse": oracle.kl(logits, clean),
            "total_variation": oracle.total_variation(clean, logits),
        }


def spread(logits: torch.Tensor, context: ps.Context) -> torch.Tensor:
    """A user's metric: how far the logits reach."""
    assert len(context.pairs) == len(context.run) == len(logits)
    return logits.max(-1).values - logits.min(-1).values


def probe_direction(hf_model: Any) -> torch.Tensor:
    """What a probe of the residual stream is held against."""
    width = hf_model.config.hidden_size
    return torch.linspace(-1, 1, width, dtype=torch.float64) / width**0.5


def d_head(hf_model: Any) -> int:
    config = hf_model.config
    wide = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
    return int(wide or config.hidden_size // config.num_attention_heads)
