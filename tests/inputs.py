"""What sweeps of the families' tiny models are given: pairs, components, sources."""

from __future__ import annotations

from typing import Any

import numpy as np

from oracle.families import FAMILIES, prompts
from patchsweep.pairs import Pair
from patchsweep.sites import COMPONENTS


class Letters:
    """A tokenizer as far as a sweep needs one."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(f"<{t}>" for t in tokens)


VOCAB = 50
EXPERTS = [n for n, f in FAMILIES.items() if f.down is None]
# Of latent attention no one module makes queries and keys, so the oracle cannot move them.
MOVABLE = [n for n, f in FAMILIES.items() if f.qkv]
SOME = ("llama", "gpt2", "gpt_neox", "gemma2", "qwen3", "mistral", "opt", "gpt_oss")
MEAN, BY_ALL = {"prompts": "corrupt"}, {"prompts": "clean", "by": "all"}
SOURCES: dict[str, dict[str, Any]] = {
    "pairs": {},
    "noise": {"corrupt": {"gaussian": {"sigma": [1, 3], "samples": 2, "tokens": [1, -2]}}},
    "noise of the table": {"corrupt": {"gaussian": {"std": "table", "seed": 3}}},
    "ablations": {
        "source": ["zero", {"mean": MEAN}, {"resample": {"samples": 2, "seed": 5}}],
        "direction": "noise",
    },
    "mean over all": {"source": [{"mean": BY_ALL}, "second"], "direction": "noise"},
    "many": {"source": ["other", "second"]},
}


def pair_of(rng: np.random.Generator, length: int, n_differ: int, **more: Any) -> Pair:
    clean, corrupt = prompts(rng, VOCAB, length, n_differ)
    _, second = prompts(rng, VOCAB, length, length)
    sets = rng.permutation(np.arange(3, VOCAB))
    a, b = rng.integers(1, 3, 2)
    answer, wrong = (tuple(map(int, s)) for s in (sets[:a], sets[a : a + b]))
    return Pair(clean, corrupt, answer, wrong, **{"others": {"second": second}, **more})


def unequal(rng: np.random.Generator, length: int, more: int) -> Pair:
    """A corrupt prompt with `more` tokens further on, some positions aligned."""
    pair = pair_of(rng, length, length)
    corrupt = tuple(map(int, rng.integers(3, VOCAB, length + more)))
    align = np.where(rng.random(length) < 0.7, np.arange(length) + more, -1)
    align[-1] = length + more - 1
    return Pair(pair.clean, corrupt, pair.answer, pair.wrong, align=tuple(align.tolist()))


def components_of(name: str) -> list[str]:
    """The components of a family that need no autoencoder."""
    family = FAMILIES[name]
    missing = {"sae_feature"} | ({"resid_mid"} if family.parallel else set())
    missing |= {"neuron"} if name in EXPERTS else set()
    return [c for c in COMPONENTS if c not in missing]


def three(seed: int = 7) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [pair_of(rng, length, n) for length, n in ((9, 1), (6, 2), (7, 1))]


def able(name: str, kind: str) -> list[str]:
    """The components that a source has values for."""
    return [
        c for c in components_of(name) if c != "head_pattern" or "mean" not in str(SOURCES[kind])
    ]
