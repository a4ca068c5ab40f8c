"""What patching finds in a model whose circuits are known. Usage: python known_circuits.py [FOLDER]

Effects, 0 (nothing changed) to 1 (the other run's behaviour), on the logit difference and, in the
last two columns, on the probability of the answer. Cells and edges below 0.05 in all four are left
out.
"""

import sys
from itertools import product
from pathlib import Path

import numpy as np

import patchsweep as ps
from patchsweep.tasks.known_circuits import (
    KNOWN_PATHS,
    KNOWN_SETS,
    circuit_pairs,
    known_circuits,
)

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results/known-circuits")
COLUMNS = list(product(["logit_diff", "prob"], ["denoise", "noise"]))
UNITS = {
    "embed": "embed",
    "head_z": "head_z.{}.{}",
    "neuron": "neuron.{}.{}",
    "mlp_out": "mlp_out.{}",
}
NAMES = ("THE", "WORD", "END")

hf_model, tokenizer = known_circuits()
model = ps.wrap(hf_model, tokenizer, "known-circuits")


def show(name: str, effects: np.ndarray) -> None:
    print(f"  {name:26}" + "".join(f"{effect:+10.2f}" for effect in effects))


for circuit, pairs in circuit_pairs(tokenizer).items():
    joint = {name: list(known.sites) for name, known in KNOWN_SETS.get(circuit, {}).items()}
    paths = {
        name: {"senders": p.senders, "receivers": p.receivers, "positions": [p.label]}
        for name, p in KNOWN_PATHS.get(circuit, {}).items()
    }
    results = ps.sweep(
        model,
        pairs,
        components=list(UNITS),
        sets=joint,
        edges={"exact": {"positions": "each"}},
        paths=paths,
        direction="both",
        metrics=["logit_diff", "prob"],
        out=folder / f"{circuit}.zarr",
        overwrite=True,
    )
    print(f"\n{circuit}")
    print(f"  {'':26}" + "".join(f"{direction:>10}" for _, direction in COLUMNS))
    for component, form in UNITS.items():
        effects = np.stack(
            [results.effect(component, *column).values for column in COLUMNS], axis=-1
        )
        for layer, unit, position in np.argwhere(np.abs(effects).max(-1) > 0.05):
            name = f"{form.format(layer, unit)}@{NAMES[position]}"
            show(name, effects[layer, unit, position])
    if joint:
        effects = np.stack([results.effect("sets", *column).values for column in COLUMNS], axis=-1)
        for name, effect in zip(joint, effects[0, 0], strict=True):
            show(name, effect)
    changes = []
    for metric, direction in COLUMNS:
        clean, corrupt = results.baseline(metric).mean((1, 2, 3))
        span = clean - corrupt if direction == "denoise" else corrupt - clean
        changes.append(results.edges(metric, direction) / span)
    for place in np.argwhere(np.nan_to_num(np.abs(changes)).max(0) > 0.05):
        edge = [change[tuple(place)] for change in changes]
        at = edge[0].coords
        show(f"{at['sender'].item()}->{at['receiver'].item()}@{NAMES[place[0]]}", np.array(edge))
    for name in paths:
        show(name, np.array([results.effect(f"set.{name}", *c).values.item() for c in COLUMNS]))
