"""What a reader of results must know before believing them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from patchsweep.results.columns import same_token
from patchsweep.results.effects import layer_parts
from patchsweep.results.together import Together
from patchsweep.sites import COMPONENTS, RUN, SETS, Status
from patchsweep.statistics import diagnostics, known_mean
from patchsweep.store import scored


class Diagnosed(Together):
    """Warnings: what is not done, not finite, or not what it seems."""

    @cached_property
    def inner_metrics(self) -> list[str]:
        """The metrics that read inside the model: their cells are not about the answer."""
        from patchsweep.spec import INNER  # imports pydantic

        said = self.attrs["spec"].get("metrics", [])
        return [
            m
            for m, given in zip(self.metrics, said, strict=False)
            if set(given) & INNER and isinstance(given, dict)
        ]

    def warnings(self) -> list[str]:
        """What a reader of these results must know, one line for every cause, worst first."""
        found = _Found()
        _unfinished(self, found)
        _pairs(self, found)
        _metrics(self, found)
        for component in self.components:
            _component(self, component, found)
        return found.lines()


# Every cause in the order of what is said, with what to do about it.
CAUSES = {
    "older": "--resume takes it over",
    "not done": "continue with --resume",
    "not finite": "try dtype: float32, half precision overflows",
    "doubts": "",
    "clean run": "prompts: {only_correct: true} leaves such pairs out",
    "unlikely": "effects say how answer and wrong compare, not what the model says",
    "small": "leave those pairs out, or read effects over pairs only",
    "saturated": "read logit_diff beside it",
    "index": "ask for each, for labels, or for indices from the end",
    "same token": "their columns share it: sweep such pairs apart",
    "few": "20 or more are usual",
    "stream windows": "keep windows to attn_out and mlp_out",
    "disagree": "report both",
    "never": "leave it out, or add a continuous metric",
    "joint": "patch them as sets to tell",
    "and or": "do not judge them by one direction alone",
    "negative": "without them the performance recovered looks better than it is",
    "rounding": "do not read them",
}
AT_MOST = 3  # things that a line says of one cause
FEW = 20  # pairs


class _Found:
    """What was found, by cause: for every text of whom it is said."""

    def __init__(self) -> None:
        self._said: dict[str, dict[str, list[str]]] = {cause: {} for cause in CAUSES}
        self._runs: dict[str, tuple[int, int, float]] = {}

    def add(self, cause: str, lines: Iterable[str], subject: str = "") -> None:
        for line in lines:
            self._said[cause].setdefault(line, []).append(subject)

    def count(self, metric: str, under: int, runs: int, floor: float) -> None:
        """Runs that are no further from the baseline than a null patch is, and all."""
        before = self._runs.get(metric, (0, 0, 0.0))
        self._runs[metric] = (before[0] + under, before[1] + runs, max(before[2], floor))

    def lines(self) -> list[str]:
        out = []
        self.add("rounding", diagnostics.below_noise(self._runs))
        for cause, advice in CAUSES.items():
            items = [
                f"{', '.join(subjects)}: {text}" if any(subjects) else text
                for text, subjects in self._said[cause].items()
            ]
            if cause == "doubts":
                out += items
            elif items:
                more = f"; and {len(items) - AT_MOST} more" if len(items) > AT_MOST else ""
                out.append("; ".join(items[:AT_MOST]) + more + (f"; {advice}" if advice else ""))
        return out


def _unfinished(results: Diagnosed, found: _Found) -> None:
    """What is not done yet, or not finite, or not known for sure."""
    if not results.store.vouched:
        found.add("older", ["of an older version, which notices less of what is damaged"])
    for name in results.store.grids:
        done = results.store.done(name)
        missing = int((~done).sum())
        found.add("not done", [f"{missing} of {done.size} blocks not done"] * bool(missing), name)
    marks = {}
    if results.store.estimators:
        marks["estimates of {} not done"] = results.store.estimated()
    if scored(results.attrs):
        marks["edges of {} not scored"] = results.store.scored()
    for text, done in marks.items():
        if pairs := _missing(results, done):
            found.add("not done", [text.format(_count(pairs, "pair"))])
    for name in results.components:
        for metric in results.metrics:
            if bad := results.counts(name, metric)[Status.NOT_FINITE]:
                found.add("not finite", [f"{metric} is not finite in {_count(bad, 'cell')}"], name)


def _missing(results: Diagnosed, done: NDArray[np.bool_]) -> int:
    """How many pairs have something that is not done [source, sample, pair] yet."""
    sources = results.attrs["sources"]
    missing = [~of[: said["samples"]].all(0) for of, said in zip(done, sources, strict=True)]
    return int(np.any(missing, axis=0).sum())


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _pairs(results: Diagnosed, found: _Found) -> None:
    """What the prompts are like: their wording, their answers, their positions, how many."""
    found.add("doubts", results.attrs.get("doubts", []))
    clean = {m: known_mean(results.baseline(m)[0, 0]) for m in results.metrics}
    if "logit_diff" in clean:
        found.add("clean run", diagnostics.wrong_answers(clean["logit_diff"]))
    if "rank" in clean:
        found.add("unlikely", diagnostics.unlikely_answers(clean["rank"]))
    found.add("index", diagnostics.by_index(results.asked_by_index, results.lengths))
    shown = {c for c in results.components if results.columns(c).align == "labels"}
    found.add("same token", same_token(results.labels) if shown else [])
    found.add("few", diagnostics.few_pairs(len(results.lengths), FEW))
    stream = [c for c in results.components if c in COMPONENTS and COMPONENTS[c].enters == "stream"]
    if windows := [c for c in stream if results.window_sizes(c)]:
        text = f"windows of {', '.join(windows)}: adjacent layers patch the same thing"
        found.add("stream windows", [text])


def _metrics(results: Diagnosed, found: _Found) -> None:
    """What the metrics of the unpatched runs can show, by the first source."""
    ends = {m: known_mean(results.baseline(m)[:, 0], 1) for m in results.metrics}
    for metric, (clean, corrupt) in ends.items():
        if results.normalised(0):
            found.add("small", diagnostics.small_denominators(clean - corrupt), metric)
        for direction in results.grid(results.components[0]).directions:
            if metric.startswith(("prob", "logprob")) and not metric.startswith("prob_diff"):
                destination = corrupt if direction == "denoise" else clean
                found.add("saturated", diagnostics.saturated(metric, destination, direction))


def _component(results: Diagnosed, component: str, found: _Found) -> None:
    """The diagnoses of one component, by the first source."""
    grid, columns = results.grid(component), results.columns(component)
    name = results.cell_namer(component)
    outcomes = [m for m in results.metrics if m not in results.inner_metrics]
    by_direction = []
    for direction in grid.directions:
        over = {m: results.over_pairs(component, m, direction, None, columns) for m in outcomes}
        for metric in outcomes:
            _runs(results, component, metric, direction, found)
        if component == SETS or not outcomes:
            continue
        subject = f"{component}, {direction}"
        effects = {m: o.effect for m, o in over.items()}
        ran = np.any([o.status == Status.EXACT for o in over.values()], axis=0)
        by_direction.append(effects[outcomes[0]])
        found.add("disagree", diagnostics.disagreement(effects, ran, name), subject)
        found.add("negative", diagnostics.negative(effects[outcomes[0]], name), subject)
        joint = results.attrs.get("joint", {}).get(component, {}).get(direction)
        if joint and COMPONENTS[component].enters != "stream":
            text = diagnostics.backup(joint["joint"], joint["singles"], direction)
            found.add("joint", text, subject)
    if grid.directions == ("denoise", "noise") and len(by_direction) == 2:
        denoise, noise = by_direction
        found.add("and or", diagnostics.and_or(denoise, noise, name), component)


def _runs(results: Diagnosed, component: str, metric: str, direction: str, found: _Found) -> None:
    """What the runs of a component changed in a metric at all."""
    grid = results.grid(component)
    floor = known_mean(results.noise_floor(metric)[int(direction == "denoise"), 0])
    runs = changed = under = 0
    for part in layer_parts(grid):
        region = (grid.directions.index(direction), 0, slice(None), slice(None), part)
        status = results.store.read(f"{component}/{metric}_status", region)
        ran = np.isin(status, RUN).any(0)
        size = np.abs(results.changes(component, metric, direction, None, part)[0])
        runs += int(ran.sum())
        changed += int((ran & (size > 0)).sum())
        under += int((ran & (size <= floor[:, None, None, None])).sum())
    if metric.startswith(("rank", "accuracy")):
        subject = f"{component}, {direction}"
        found.add("never", diagnostics.never_changed(metric, changed, runs), subject)
    else:
        found.count(metric, under, runs, float(np.nanmax(floor, initial=0.0)))
