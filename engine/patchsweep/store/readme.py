"""README.txt: what results are, and how to compute the effect, for who has only xarray."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from patchsweep.sites import EDGE_DIMENSIONS, EDGES, MEASURED, SETS, Grid, Status
from patchsweep.store import described
from patchsweep.store.ledger import scored

_TEXT = """\
Results of a sweep by patchsweep: runs of a language model in which one activation was replaced.

This file belongs to the results. It is checked with them, and --resume writes it again: keep notes
elsewhere. Zarr says of it that it is no array where all groups are listed; that does no harm.

Groups
------
Of every patched component, a group of arrays: {components}.
{other_groups}
Metrics, in each of them:
{metrics}

<metric>          the metric of the patched run, raw; NaN where nothing was run
<metric>_status   what that value is (below)
{estimates}
Dimensions
----------
direction   denoise: the corrupt run is patched with values of the source; noise: the clean run is
source      where these values come from
sample      samples of the noise, or of the source; one if there are none
pair        pairs of prompts
layer       as the model counts them, from 0
unit        what a layer has several of (the group's attribute unit_name); one entry if nothing
position    token of the clean prompt, from 0; or what the sweep was asked for
In sets, position is the name of a set of sites that were patched together.

Coordinates beside them, but in sets
------------------------------------
token [pair, position]   text of the token, clean/corrupt where the two prompts differ
label [pair, position]   its labels, such as END, joined by ", " where it has several
n_pairs [position]       pairs whose prompt has the position
Of positions that are several tokens (all, groups) token and label are empty.

Status
------
{statuses}

Effect
------
effect = (patched - destination) / (source - destination): 0 nothing changed, 1 as the source run.
Over pairs it is the sum of the numerators over that of the denominators, never a mean of effects.
destination   baseline/<metric> of the run that is patched: corrupt for denoise, clean for noise
source        the same of the other run{without}
Where the status is {structural}, patched = destination exactly. Statuses {measured} count, others
are left out of both sums. (patchsweep itself shows no cell whose status is {estimated} in any
pair, nor one that fewer than half of the pairs have.)

Example, started in this folder
-------------------------------
The effect of {component} on {metric}, over all pairs, [layer, unit, position]:

{example}

Pairs behind each cell: moved.notnull().any("sample").sum("pair")
By label, wherever it lies: moved = moved.where(ds["label"] == "END") before the last line, and
there "position" beside "sample" and "pair" in both sums.
"""


def readme(grids: Sequence[Grid], attrs: Mapping[str, Any]) -> str:
    """The text for results of these grids, `attrs` being those of the root."""
    names = [grid.component for grid in grids]
    estimators = attrs.get("estimators", {})
    ran = [grid for grid in grids if grid.component not in {SETS, EDGES, *estimators}] or list(
        grids
    )
    sources = attrs.get("sources", [])
    without = [s["name"] for s in sources if not s["normalised"]]
    shown = [str(int(status)) for status in MEASURED]
    return _TEXT.format(
        components=", ".join(names),
        other_groups=_other_groups(attrs),
        metrics="\n".join(_metric(attrs, m["name"]) for m in attrs["metrics"]),
        estimates=f"<metric>_estimate, of {', '.join(estimators)}: that value as estimated\n"
        if estimators
        else "",
        statuses="\n".join(f"{status.value}   {_STATUSES[status]}" for status in Status),
        without=_WITHOUT.format(", ".join(without)) if without else "",
        structural=int(Status.STRUCTURAL),
        measured=" ".join(sorted(shown)),
        estimated=int(Status.ESTIMATED),
        component=ran[0].component,
        metric=attrs["metrics"][0]["name"],
        example=_example(ran[0], attrs["metrics"][0]["name"], ran[0].sources[0] not in without),
    )


_WITHOUT = "; {} has none: effect = patched - destination, over pairs its mean"
_STATUSES = {
    Status.NOT_DONE: "not done",
    Status.EXACT: "exact: a patched run was made",
    Status.STRUCTURAL: "structural: equals the destination by construction, nothing was run",
    Status.ESTIMATED: "only estimated: the value is NaN",
    Status.OUTSIDE: "outside the prompt: prompts of other lengths share the array",
    Status.AUDITED: "exact, run by the audit of a prefilter",
    Status.NOT_FINITE: "the metric was not finite",
}


def _other_groups(attrs: Mapping[str, Any]) -> str:
    lines = [
        "baseline: the metrics of the unpatched runs [run, source, sample, pair].",
        "prompts: their tokens, texts and labels.",
    ]
    if scored(attrs):
        lines.append(
            "edges: estimates of edges [direction, source, sample, pair, sender, receiver]."
        )
    elif attrs.get(EDGES):
        lines.append(f"edges: runs with one edge patched [{', '.join(EDGE_DIMENSIONS)}].")
    return "\n".join([*lines, "All others are patchsweep's own books.", ""])


def _metric(attrs: Mapping[str, Any], name: str) -> str:
    what, units = described.metric_of(attrs, name)
    return f"  {name}: {what}" + (f" [{units}]" if units not in (None, "1") else "")


def _example(grid: Grid, metric: str, normalised: bool) -> str:
    """Five lines; what they call `effect` is that of the first direction and source."""
    source, direction = grid.sources[0], grid.directions[0]
    to, by = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    measured = sorted(int(status) for status in MEASURED)
    text = json.dumps
    values, status = text(metric), text(f"{metric}_status")
    lines = [
        "import xarray as xr",
        f'ds = xr.open_zarr(".", group="{grid.component}", consolidated=False)'
        f'.sel(direction="{direction}", source={text(source)})',
        'clean, corrupt = xr.open_zarr(".", group="baseline", consolidated=False)'
        f"[{values}].sel(source={text(source)}).astype(float)",
        f"moved = (ds[{values}] - {to}).where(ds[{status}] != {int(Status.STRUCTURAL)}, 0)"
        f".where(ds[{status}].isin({measured}))",
        'effect = moved.sum(["sample", "pair"]) / '
        f'({by} - {to}).where(moved.notnull()).sum(["sample", "pair"])'
        if normalised
        else 'effect = moved.mean(["sample", "pair"])',
    ]
    return "\n".join(f"    {line}" for line in lines)
