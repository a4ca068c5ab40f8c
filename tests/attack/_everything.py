"""Small sweeps that have, together, every part that results can have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import patchsweep as ps
from dictionaries import draw
from tiny import build, pairs_of, rows, tokenizer


@dataclass(frozen=True)
class Sweep:
    """A sweep, whole in `out`. `earlier`: by name, the files of a similar one, with a pair less:
    of the same names, with other bits, as another run would have left them."""

    name: str
    model: ps.Model
    pairs: list[ps.Pair]
    settings: dict[str, Any]
    out: Path
    earlier: Mapping[str, bytes]

    def again(self, out: Path) -> None:
        ps.sweep(self.model, self.pairs, out=out, resume=True, **self.settings)


def sweeps(folder: Path) -> Iterator[Sweep]:
    """All of them, done."""
    model = ps.wrap(build().double(), tokenizer())
    for name, (made, settings) in {
        "prefilter, edges, windows": (rows(2), ESTIMATED),
        "sources, samples, features": (_of_six(3), of_features(folder)),
        "circuit, sets, alignment": ([_longer(row) for row in rows(2, seed=1)], OF_SETS),
    }.items():
        pairs = pairs_of(model, made)
        out = folder / f"{re.sub(r'[^a-z]+', '-', name)}.zarr"
        other = folder / f"other-{out.name}"
        ps.sweep(model, pairs[:-1], out=other, **settings)
        ps.sweep(model, pairs, out=out, **settings)
        earlier = {key: path.read_bytes() for key, path in files(other).items()}
        yield Sweep(name, model, pairs, settings, out, earlier)


ESTIMATED: dict[str, Any] = {
    "components": ["head_z", "mlp_out"],
    "metrics": ["logit_diff", "prob"],
    "windows": [2],
    "prefilter": {"keep": "20%", "audit": 2},
    "edges": "eap",
    "direction": "both",
    "token_budget": 400,
}
OF_SETS: dict[str, Any] = {
    "components": ["resid_pre"],
    "metrics": ["logit_diff"],
    "circuit": {"ranking": ["head_z.0.0", "mlp_out.1"], "sizes": [1]},
    "sets": {"two": ["mlp_out.0@2", "head_z.1.1@END"]},
    "token_budget": 400,
}


def of_features(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    weights = {"W_enc": rng.normal(size=(16, 5)), "W_dec": rng.normal(size=(5, 16))}
    weights = draw("b_enc") | weights | {"b_dec": rng.normal(size=16), "b_enc": rng.normal(size=5)}
    file = folder / "dictionary.safetensors"
    save_file({name: w.astype(np.float32) for name, w in weights.items()}, file)
    mean = {"mean": {"prompts": "clean", "by": "all"}}
    return {
        "components": ["mlp_out", "sae_feature"],
        "metrics": ["logit_diff"],
        "source": ["zero", mean, {"resample": {"samples": 2}}],
        "direction": "noise",
        "positions": ["END"],
        "sae": {"file": str(file), "layer": 1, "at": "mlp_out"},
        "token_budget": 400,
    }


def _of_six(count: int) -> list[dict[str, Any]]:
    """Of equal length, as other pairs' values are patched in."""
    return [row for row in rows(40) if len(row["clean"].split()) == 6][:count]


def _longer(row: dict[str, Any]) -> dict[str, Any]:
    """A corrupt prompt with a token more in front, aligned from the end."""
    size = len(row["clean"].split())
    return {**row, "corrupt": f"Q {row['corrupt']}", "align": [[i, i + 1] for i in range(size)]}


def files(out: Path) -> dict[str, Path]:
    """Every file below a folder, by name."""
    return {p.relative_to(out).as_posix(): p for p in sorted(out.rglob("*")) if p.is_file()}
