"""Experiments of the papers on activation patching: one command each, on any model.

    experiment.py   what an experiment is, and its report
    ioi.py, ioi_paths.py, greater_than.py, docstring.py, facts.py, windows.py, arithmetic.py,
    how_to.py: one each
    heads.py        heads by corruption and metric; mlps.py: MLPs by layer and window
    places.py       facts by place in the prompt
    path_steps.py   heads by path patching, step by step
    movers.py       what name movers attend to; roles.py: classes of heads
    gates.py        AND, OR and a backup in the model whose circuits are known
    claims.py       what the papers claim, and whether it holds here
    published.py    the heads that the papers list
    resampled.py    how often a finding holds when pairs are drawn again
    pictures.py     heatmaps side by side

Imports engine, errors, inputs, model, pairs, report, results, sites, spec, statistics, store,
tasks.
"""

from __future__ import annotations

from pathlib import Path

from patchsweep.errors import BadInput, shown
from patchsweep.inputs import LARGEST, PAIRS, usable
from patchsweep.model import load_model
from patchsweep.reproduce import (
    arithmetic,
    docstring,
    facts,
    greater_than,
    how_to,
    ioi,
    ioi_paths,
    windows,
)
from patchsweep.reproduce.experiment import Experiment, Report, Setting
from patchsweep.results import drawing
from patchsweep.store import check_outside
from patchsweep.tasks import nearest

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        ioi.EXPERIMENT,
        ioi_paths.EXPERIMENT,
        greater_than.EXPERIMENT,
        docstring.EXPERIMENT,
        facts.EXPERIMENT,
        windows.EXPERIMENT,
        arithmetic.EXPERIMENT,
        how_to.EXPERIMENT,
    )
}

__all__ = ["EXPERIMENTS", "Experiment", "Report", "Setting", "default_folder", "find", "reproduce"]


def find(name: str) -> Experiment:
    """The experiment of this name; BadInput if there is none."""
    if name not in EXPERIMENTS:
        raise BadInput(f"unknown experiment '{name}': {nearest(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]


def default_folder(name: str, model: str) -> Path:
    """Where an experiment's results go if nothing else is said."""
    return Path("reproduce") / f"{name}-{Path(model).name}"


def reproduce(
    name: str,
    model: str = "smollm2-135m",
    out: str | Path | None = None,
    n: int | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    *,
    overwrite: bool = False,
) -> Report:
    """Run an experiment of the papers on a model, and write its results and report to `out`.

    out: reproduce/<name>-<model> if left out. n: pairs of prompts, the experiment's own number if
    left out. What an earlier run has finished is not done again, unless `overwrite` is set.
    BadInput for an unknown experiment, and as `load_model` and `sweep` do.
    """
    experiment = find(name)
    if n is not None and not 1 <= n <= PAIRS:
        raise BadInput(f"n is {shown(n)}: ask for at least 1 pair, and at most {PAIRS:,}")
    if not 0 <= seed <= LARGEST:
        raise BadInput(f"seed is {shown(seed)}: use a whole number from 0 to 2^63 - 1")
    usable(model)
    drawing.needed()
    folder = Path(out) if out is not None else default_folder(name, model)
    check_outside(folder / "report.md")
    loaded = load_model(model, dtype, device)
    setting = Setting(loaded, n or experiment.pairs, seed, folder, overwrite)
    report = experiment.run(setting)
    report.write(folder)
    return report
