"""Where patched-in values come from: the entries of the results' source dimension. Pure.

A pair's clean run is set against an *other* run (its corrupt prompt, a further prompt, the clean
prompt with noised embeddings, another pair's prompt), or a value takes no run at all: zero, a mean,
a vector that is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import BadInput
from patchsweep.inputs import RUNS
from patchsweep.pairs import Pair, resolve_positions
from patchsweep.spec import Gaussian, Mean, Resample, Sweep, Vector

Ints = NDArray[np.int64]
Kind = Literal["run", "zero", "mean", "vector"]


@dataclass(frozen=True, eq=False)
class Other:
    """The run that a pair's clean run is set against.

    align [clean position]: the position here that stands for it, −1 if there is none. noised: the
    positions whose embeddings carry noise.
    """

    clean: tuple[int, ...]
    tokens: tuple[int, ...]
    align: Ints
    noised: tuple[int, ...] = ()

    @cached_property
    def parallel(self) -> bool:
        """Whether both runs have the same positions."""
        same = len(self.clean) == len(self.tokens)
        return same and bool((self.align == np.arange(len(self.clean))).all())

    @cached_property
    def differs(self) -> NDArray[np.bool_]:
        """[clean position]: where the embeddings of the two runs differ; everywhere if they are not
        parallel."""
        if not self.parallel:
            return np.ones(len(self.clean), bool)
        differs = np.not_equal(self.clean, self.tokens)
        differs[list(self.noised)] = True
        return differs


@dataclass(frozen=True)
class Source:
    """One entry of the source dimension.

    others [sample][pair] are its runs, for kind "run". `sigma` scales their noise, in standard
    deviations of the embeddings. `given` is what the spec said.
    """

    name: str
    kind: Kind
    others: tuple[tuple[Other, ...], ...] = ()
    sigma: float = 0.0
    given: Gaussian | Mean | Resample | Vector | None = field(default=None, compare=False)

    @property
    def samples(self) -> int:
        return max(1, len(self.others))


def resolve(settings: Sweep, pairs: Sequence[Pair]) -> tuple[Source, ...]:
    """The sources of a sweep. BadInput if the pairs lack what one of them needs, and for more than
    RUNS runs."""
    _check_runs(settings, len(pairs))
    out: list[Source] = []
    for name, given in settings.sources:
        if name == "other" and isinstance(settings.corrupt, Gaussian):
            out += [_gaussian(settings.corrupt, sigma, pairs) for sigma in settings.corrupt.sigma]
        elif isinstance(given, Mean):
            out.append(Source(name, "mean", given=given))
        elif isinstance(given, Vector):
            out.append(Source(name, "vector", given=given))
        elif isinstance(given, Resample):
            out.append(Source(name, "run", _resampled(given, pairs), given=given))
        elif name == "zero":
            out.append(Source(name, "zero"))
        else:
            out.append(
                Source(name, "run", (tuple(_other(p, i, name) for i, p in enumerate(pairs)),))
            )
    if "denoise" in settings.directions:
        for source in out:
            if source.kind != "run" or isinstance(source.given, Resample):
                raise BadInput(
                    f"source {source.name} patches the clean run, there is nothing to restore: "
                    "set direction: noise"
                )
    return tuple(out)


def _check_runs(settings: Sweep, pairs: int) -> None:
    noise = settings.corrupt if isinstance(settings.corrupt, Gaussian) else None
    runs = 0
    for name, given in settings.sources:
        if name == "other" and noise:
            runs += pairs * len(noise.sigma) * noise.samples
        else:
            runs += pairs * (given.samples if isinstance(given, Resample) else 1)
    if runs > RUNS:
        raise BadInput(
            f"{runs:,} pairs x samples, over all sources: a sweep has at most {RUNS:,}: ask for "
            "fewer, or several sweeps"
        )


def _other(pair: Pair, number: int, name: str) -> Other:
    if name != "other":
        if name not in pair.others:
            known = ", ".join(["other", "zero", "mean", "resample", "vector", *pair.others])
            raise BadInput(f"pair {number} has no prompt '{name}' as a source: use one of {known}")
        return Other(pair.clean, pair.others[name], np.arange(len(pair)))
    if not pair.corrupt:
        raise BadInput(
            f"pair {number} has no corrupt prompt: add one, or use a source that needs none "
            "(zero, mean, resample, vector, corrupt: gaussian)"
        )
    return Other(pair.clean, pair.corrupt, pair.alignment)


def _gaussian(given: Gaussian, sigma: float, pairs: Sequence[Pair]) -> Source:
    """The clean prompts with noise on the embeddings of some tokens."""
    if given.tokens == "differ":
        if any(not p.corrupt or p.align is not None for p in pairs):
            raise BadInput(
                "corrupt: gaussian.tokens: differ needs corrupt prompts of equal length: name the "
                "tokens instead, e.g. tokens: [S2]"
            )
        noised = [np.not_equal(p.clean, p.corrupt) for p in pairs]
    else:
        members = resolve_positions(pairs, given.tokens).members
        noised = [row.any(0)[: len(p)] for row, p in zip(members, pairs, strict=True)]
    for i, row in enumerate(noised):
        if not row.any():
            raise BadInput(f"pair {i} has none of the tokens to put noise on: see gaussian.tokens")
    others = tuple(
        Other(p.clean, p.clean, np.arange(len(p)), tuple(np.flatnonzero(row).tolist()))
        for p, row in zip(pairs, noised, strict=True)
    )
    return Source(f"sigma={sigma:g}", "run", (others,) * given.samples, sigma, given)


def _resampled(given: Resample, pairs: Sequence[Pair]) -> tuple[tuple[Other, ...], ...]:
    """Each sample sets a pair against another clean prompt of the same length: that whose hash with
    the pair's own is lowest. So a draw hangs on these two prompts, the seed and the sample, not on
    where they stand in the list, and stays when others leave it."""
    known: dict[int, dict[tuple[int, ...], bytes]] = {}
    for pair in pairs:
        known.setdefault(len(pair), {})[pair.clean] = repr(pair.clean).encode()
    out = []
    for sample in range(given.samples):
        row = []
        for i, pair in enumerate(pairs):
            fit = {p: text for p, text in known[len(pair)].items() if p != pair.clean}
            if not fit:
                raise BadInput(
                    f"pair {i}: resample needs another pair of the same length with another clean "
                    "prompt: add pairs, or use mean"
                )
            mine = sha256(f"{given.seed} {sample} {pair.clean} ".encode())
            drawn = min(fit, key=lambda p: _lengthened(mine, fit[p]))
            row.append(Other(pair.clean, drawn, np.arange(len(pair))))
        out.append(tuple(row))
    return tuple(out)


def _lengthened(begun: Any, text: bytes) -> bytes:
    """The hash of what it was begun with and of `text`."""
    whole = begun.copy()
    whole.update(text)
    found: bytes = whole.digest()
    return found
