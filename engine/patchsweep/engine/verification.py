"""Are results true? Some of their cells again, by the judge: full forwards with plain hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchsweep import results as results_of
from patchsweep.device import exactly
from patchsweep.engine.append import cut
from patchsweep.engine.planning import load_autoencoder, plan_sweep
from patchsweep.engine.prepare import digest, files_of, prepare
from patchsweep.errors import BadInput
from patchsweep.inputs import found as whereabouts
from patchsweep.inputs import shortened
from patchsweep.judge import Cell, Cells, Judge, averages, unseen
from patchsweep.model import PACKAGED, Model, load_model
from patchsweep.pairs import Pair
from patchsweep.passes import Context, Function, as_it_is, given_functions, load_function
from patchsweep.plan import Ints, Plan
from patchsweep.results import Results
from patchsweep.sites import EDGES, RUN, SETS, Block, Status
from patchsweep.spec import Metric, Sweep, parse_settings
from patchsweep.store import stored_pairs

# Largest difference of two ways to compute the same, as a share of the value where that is above 1.
TOLERANCE = {"float64": 1e-6, "float32": 2e-4, "float16": 5e-2, "bfloat16": 2e-1}
STRUCTURAL_SHARE = 4  # of so many cells that are run again one more is a structural one
STEPS = ("rank", "accuracy")  # these may differ by one where two tokens are as likely


@dataclass(frozen=True)
class Verified:
    """What was found: how many `cells` were run again, and `structural` ones beside them; the
    largest of `differences` by metric (of values above 1 relative to them), and the `tolerance`;
    the components that cannot be held against the model, and were `left_out`."""

    cells: int
    structural: int
    differences: dict[str, float]
    tolerance: float
    left_out: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether no difference exceeds the tolerance; NaN never holds."""
        return all(d <= self.tolerance for d in self.differences.values())


def verify(
    results: Results | str | Path,
    cells: int = 20,
    model: Model | str | None = None,
    seed: int = 0,
    *,
    trust: bool = False,
    functions: Mapping[str, Function] | None = None,
) -> Verified:
    """Run some random `cells`, so many, drawn by `seed`, again as hooked full forwards of the
    model, and compare them with `results`, opened or their path.

    They share no code with either backend. Structural cells are run too, a quarter as many: they
    must be the baseline. Every metric of every chosen cell is compared. What results name is not
    run because they name it: their model, or a name to load it by, is given as `model`, unless a
    package ships it, and the functions of their callable metrics as `functions`, by their names
    package.module:name. With `trust`, for results of one's own, both are loaded by those names;
    paths are from the working directory on. BadInput for another model than the results', for files
    of vectors, means, probes or an autoencoder that have changed, and where there is nothing to
    compare.
    """
    for name, given, least in (("cells", cells, 1), ("seed", seed, 0)):
        if given < least:
            raise BadInput(f"{name} is {given}: use a whole number, at least {least}")
    found = results if isinstance(results, Results) else results_of.open(results)
    attrs = found.attrs
    said = attrs["spec"]
    said = shortened(said, whereabouts)
    settings = parse_settings({k: v for k, v in said.items() if k in Sweep.model_fields})
    known = dict(functions or {})
    if not trust:
        _check_trusted(found, settings, model is not None, known)
    if not isinstance(model, Model):
        model = load_model(model or _model_of(attrs), attrs["model_dtype"])
    if model.fingerprint != attrs["model_fingerprint"]:
        raise BadInput(f"{found.path} holds the results of another model: give that one")
    sae = load_autoencoder(settings)
    pairs = stored_pairs(found.store)
    plan = plan_sweep(
        model.dimensions,
        pairs,
        settings,
        model.device,
        attrs["token_budget"],
        sae,
        cut=cut(found.store, len(pairs)),
    )
    if plan.hash != attrs["plan_hash"]:
        other = "with another autoencoder, or " if sae else ""
        raise BadInput(
            f"{found.path} was planned {other}by another version of patchsweep, "
            f"{attrs['versions']['patchsweep']}: verify it with that one"
        )

    hf_model = model.hf_model
    with given_functions(known), exactly(hf_model), torch.no_grad():
        judge = Judge(hf_model, pairs[0].clean, plan.dimensions.layers)
        forward = as_it_is(hf_model, plan.layouts.longest)
        patched = plan.layouts.patched(plan.grids)
        takes = partial(averages, judge, plan.layouts)
        values = prepare(forward, plan, settings, model.tokenizer, sae, averages=takes)
        judge.sae = values.sae
        left_out = unseen(judge, plan.layouts, patched)
        files = files_of(settings)
        if files and digest(values, plan, model.tokenizer) != attrs["values"]:
            raise BadInput(
                f"{found.path}: a file that it was made with is not what it was then, "
                f"{' or '.join(files)}: put that back"
            )
        again = Cells(judge, plan.layouts, values, settings.metrics, _called)
        without = {*left_out, *((SETS, EDGES, *plan.layouts.paths) if left_out else ())}
        run = _drawn(found, plan, cells, seed, without, RUN)
        if not run:
            raise BadInput(f"{found.path} has no cells that could be run again")
        few = max(1, cells // STRUCTURAL_SHARE)
        structural = _drawn(found, plan, few, seed, without, (Status.STRUCTURAL,))
        worst = dict.fromkeys(found.metrics, 0.0)
        for drawn in (*run, *structural):
            block, chosen = drawn
            values_of = [again.again(_cell(found, plan, block, c)) for c in chosen]
            for name in found.metrics:
                stored = _block(found, block, name)[chosen]
                apart = _apart(name, np.array([v[name] for v in values_of]), stored)
                worst[name] = float(np.maximum(worst[name], apart.max()))
    counts = [sum(len(chosen) for _, chosen in some) for some in (run, structural)]
    return Verified(counts[0], counts[1], worst, TOLERANCE[attrs["model_dtype"]], left_out)


def _model_of(attrs: Mapping[str, Any]) -> str:
    """What to load the model of results by. BadInput if that is a name without its folder."""
    name: str = attrs["spec"].get("model") or attrs["model"]
    here = whereabouts(name)
    if here != name and not Path(here).exists():
        raise BadInput(
            f"the results say their model's name alone, {here}, which is not in the working "
            "directory: say where it is with --model"
        )
    return here


def _called(m: Metric, logits: Tensor, pair: Pair) -> float:
    """A user's own metric of one patched run."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    value = load_function(m.path)(logits.to(exact), Context([pair], np.array([2], np.int8)))
    return float(value[0])


def _check_trusted(
    found: Results, settings: Sweep, has_model: bool, functions: Mapping[str, Function]
) -> None:
    """BadInput for what would run because the results name it."""
    name = found.attrs["spec"].get("model") or found.attrs["model"]
    paths = [m.path for m in settings.metrics if m.name == "callable" and m.path not in functions]
    what = ""
    if not has_model and name not in PACKAGED:
        what = f"the model {name!r} (give it with model=)"
    elif paths:
        what = f"the function {paths[0]} (give it with functions=)"
    elif settings.remote:
        what = "remote: true, and would send the prompts to another machine"
    if what:
        raise BadInput(f"{found.path} names {what}: if these results are your own, add --trust")


def _apart(
    name: str, again: NDArray[np.floating], stored: NDArray[np.floating]
) -> NDArray[np.floating]:
    """How far values of a metric are apart, as a share of those above 1; NaN where only one of two
    is a number."""
    size = np.maximum(1, np.abs(stored))
    with np.errstate(invalid="ignore"):  # what is infinite in one of them is NaN
        apart = np.abs(again - stored) / size
    if name.startswith(STEPS):
        apart = np.maximum(apart - 1 / size, 0)
    equal = (again == stored) | (np.isnan(again) & np.isnan(stored))
    return np.where(equal, 0, apart)


def _drawn(
    found: Results, plan: Plan, cells: int, seed: int, without: set[str], status: Sequence[int]
) -> list[tuple[Block, Ints]]:
    """Cells of these statuses, each as likely as any other, as flat indices into their block."""
    blocks = [b for wave in plan.waves for b in wave.blocks if b.component not in without]
    name = f"{found.metrics[0]}_status"
    some = [np.flatnonzero(np.isin(_block(found, b, name), status)) for b in blocks]
    counts = np.cumsum([len(s) for s in some])
    total = int(counts[-1]) if len(counts) else 0
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(cells, total), replace=False))
    of = np.searchsorted(counts, drawn, side="right")
    return [
        (blocks[i], some[i][drawn[of == i] - counts[i]])  # from the end
        for i in np.unique(of)
    ]


def _cell(found: Results, plan: Plan, block: Block, cell: int) -> Cell:
    """A cell of a block by its coordinates."""
    shape = [len(range(*s.indices(n))) for s, n in _extent(found, block)]
    pair, layer, unit, entry = np.unravel_index(cell, shape)[3:]
    return Cell(
        component=block.component,
        direction=plan.directions[block.direction],
        source=block.source,
        sample=block.sample,
        pair=block.pairs[pair],
        layer=int(layer),
        unit=block.units[unit],
        entry=block.positions[entry],
    )


def _extent(found: Results, block: Block) -> list[tuple[slice, int]]:
    """A block's part of its arrays, with their sizes."""
    grid = found.store.grids[block.component]
    return list(zip(block.region(grid), grid.shape, strict=True))


def _block(found: Results, block: Block, name: str) -> NDArray[np.generic]:
    region = block.region(found.store.grids[block.component])
    return found.store.read(f"{block.component}/{name}", region).ravel()
