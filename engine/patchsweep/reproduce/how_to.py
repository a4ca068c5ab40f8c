"""How to use and interpret activation patching: directions, metrics, circuits as curves, noise
levels, and the gates that each direction misses (Heimersheim & Nanda)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from patchsweep.reproduce import gates, pictures, published
from patchsweep.reproduce.experiment import Experiment, Finding, Report, Setting, Table, answered
from patchsweep.reproduce.mlps import COLOURS
from patchsweep.reproduce.pictures import Picture
from patchsweep.reproduce.resampled import sure
from patchsweep.results import Curve, Results, drawing
from patchsweep.sites import DIRECTIONS, Direction
from patchsweep.statistics import Array, beyond_sd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "how-to"
METRICS = ("logit_diff", "logit", "logprob", "prob", "rank", "kl")
SIGMAS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)  # standard deviations of the embeddings
SIZES = (1, 2, 5, 10, 20, 50, 100)
# Ranking of a circuit's heads -> the name of its sweep, whether they must have a positive effect.
RANKINGS = {
    "largest effects": ("circuit", False),
    "largest positive effects": ("circuit-positive", True),
}
LITTLE, MUCH = 0.25, 0.75  # shares of the logit difference


def run(setting: Setting) -> Report:
    """Heads in both directions by six metrics, two circuits, several noise levels; then gates."""
    pairs = setting.pairs("ioi")
    results = setting.sweep(
        "heads",
        pairs,
        components=["head_z"],
        positions="all",
        direction="both",
        metrics=list(METRICS),
    )
    circuits = {
        called: _circuit(setting, name, results, positive)
        for called, (name, positive) in RANKINGS.items()
    }
    curves = _curves(circuits)
    noise = _noise_levels(setting)
    toy = gates.sweeps(setting)
    title = "How to use and interpret activation patching"
    return Report(
        title,
        (
            f"Model: {setting.subject}.",
            "IOI, S2 replaced. Every head patched at all positions at once, clean into corrupt "
            "(denoise) and corrupt into clean (noise).",
            "Effects: 0 = destination, 1 = source, of every metric. Detected: beyond 2 standard "
            "deviations of the mean over all heads.",
            "Circuits: the heads ranked by denoising on the logit difference.",
            answered(results),
            published.applies(NAME, setting.model)[1],
            "Gates: a small model whose circuits were set by hand, in float64.",
        ),
        (
            _metric_table(results),
            _head_table(results),
            _curve_table(curves),
            _noise_table(noise),
            gates.table(toy),
        ),
        {
            "metrics": _heads_figure((title, *setting.caption), results),
            "circuit": _curve_figure((title, *setting.caption), curves),
        },
        (
            *sure(_findings, {"heads": results, **circuits, "noise": noise}, setting.n),
            *gates.findings(toy),
        ),
    )


def _findings(found: Mapping[str, Results], _: Sequence[int]) -> Iterator[Finding]:
    yield from _metric_findings(found["heads"])
    yield _negative_finding(_curves({name: found[name] for name in RANKINGS}))
    yield _noise_finding(found["noise"])


def _curves(circuits: Mapping[str, Results]) -> dict[str, Curve]:
    """Performance against the number of heads, best first, by ranking."""
    return {name: results.circuit("logit_diff") for name, results in circuits.items()}


def _circuit(setting: Setting, name: str, heads: Results, positive: bool) -> Results:
    """Circuits of the best heads, of all or only of those that help."""
    cells = heads.top("head_z", "logit_diff", "denoise", max(SIZES)).itertuples()
    ranking = [f"head_z.{c.layer}.{c.head}" for c in cells if c.effect > 0 or not positive]
    return setting.sweep(
        name,
        setting.pairs("ioi"),
        positions="all",
        direction="both",
        circuit={"ranking": ranking, "sizes": [k for k in SIZES if k <= len(ranking)]},
    )


def _noise_levels(setting: Setting) -> Results:
    """The corrupt runs of several noise levels on S2; what is patched into them does not matter."""
    gaussian = setting.gaussian(["S2"])["gaussian"] | {"sigma": list(SIGMAS)}
    return setting.sweep(
        "noise-levels",
        setting.pairs("ioi"),
        corrupt={"gaussian": gaussian},
        sets={"last MLP": [f"mlp_out.{setting.model.dimensions.layers - 1}@END"]},
        metrics=["logit_diff", "prob"],
    )


def _effect(results: Results, metric: str, direction: Direction) -> Array:
    return results.effect("head_z", metric, direction).values[..., 0]


def _negative(effect: Array) -> int:
    return int((beyond_sd(effect) & (effect < 0)).sum())


def _metric_table(results: Results) -> Table:
    rows = []
    for direction in DIRECTIONS:
        for metric in METRICS:
            effect = _effect(results, metric, direction)
            size = np.where(np.isfinite(effect), np.abs(effect), -1)
            layer, head = np.unravel_index(size.argmax(), effect.shape)
            far = beyond_sd(effect)
            rows.append(
                (
                    direction,
                    metric,
                    f"{layer}.{head} ({effect[layer, head]:+.3f})",
                    str(int((far & (effect > 0)).sum())),
                    str(_negative(effect)),
                    f"{_unchanged(results, metric, direction):.0%}",
                )
            )
    columns = ("direction", "metric", "largest effect", "detected, positive", "negative")
    return Table(
        "Heads by direction and metric", (*columns, "runs that changed nothing"), tuple(rows)
    )


def _head_table(results: Results) -> Table:
    """A row per head that any metric detects, by its effect on the logit difference; a column per
    metric."""
    rows = []
    for direction in DIRECTIONS:
        effects = np.stack([_effect(results, metric, direction) for metric in METRICS])
        far = np.stack([beyond_sd(effect) for effect in effects])
        layers, numbers = np.nonzero(far.any(0))
        order = np.argsort(-np.abs(effects[0, layers, numbers]), kind="stable")
        for layer, head in zip(layers[order], numbers[order], strict=True):
            shown = (
                f"{value:+.3f}{' *' if detected else ''}"
                for value, detected in zip(
                    effects[:, layer, head], far[:, layer, head], strict=True
                )
            )
            rows.append((direction, f"{layer}.{head}", *shown))
    title = "Effects of the heads that any metric detects, a column per metric"
    return Table(f"{title} (* detects it)", ("direction", "head", *METRICS), tuple(rows))


def _unchanged(results: Results, metric: str, direction: Direction) -> float:
    """The share of patched runs whose metric is exactly the destination's."""
    moved = results.changes("head_z", metric, direction)[0]
    return float((moved == 0).mean())


def _metric_findings(results: Results) -> Iterator[Finding]:
    by = {m: _negative(_effect(results, m, "denoise")) for m in ("logit_diff", "prob")}
    yield Finding(
        "denoising, probability hides negative heads that the logit difference shows",
        "metrics",
        f"negative heads detected: logit difference {by['logit_diff']}, probability {by['prob']}",
        by["logit_diff"] > by["prob"],
    )
    still = {m: _unchanged(results, m, "denoise") for m in ("logit_diff", "rank")}
    yield Finding(
        "discrete metrics see nothing of small changes (here: rank leaves more runs unchanged than "
        "the logit difference)",
        "metrics",
        f"denoised runs unchanged: rank {still['rank']:.0%}, logit difference "
        f"{still['logit_diff']:.0%}",
        still["rank"] > still["logit_diff"],
    )
    sides = [_effect(results, "logit_diff", direction) for direction in DIRECTIONS]
    found = [{tuple(cell) for cell in np.argwhere(beyond_sd(side))} for side in sides]
    yield Finding(
        "denoising and noising find different heads",
        "sufficiency and necessity",
        f"logit difference: denoising detects {len(found[0])}, noising {len(found[1])}, both "
        f"{len(found[0] & found[1])}",
        found[0] != found[1],
    )


def _negative_finding(curves: Mapping[str, Curve]) -> Finding:
    every, positive = (float(curve.faithfulness.max()) for curve in curves.values())
    alone = [f"{curve.recovered.max():.2f}" for curve in curves.values()]
    return Finding(
        "leaving negative components out makes the recovered performance look better than it is "
        "(here: beyond 1, where they are noised with all others)",
        "circuits",
        f"most recovered, all other heads noised: by the largest effects {every:.2f}, by the "
        f"largest positive effects {positive:.2f} (these alone denoised: {' and '.join(alone)})",
        positive > max(every, 1.0),
    )


def _curve_table(curves: Mapping[str, Curve]) -> Table:
    rows = [
        (name, str(size), f"{faithful:.3f}", f"{recovered:.3f}")
        for name, curve in curves.items()
        for size, faithful, recovered in zip(
            curve.sizes, curve.faithfulness, curve.recovered, strict=True
        )
    ]
    columns = ("ranking", "heads", "all others noised", "these alone denoised")
    return Table("Logit difference recovered by circuit size", columns, tuple(rows))


def _left(noise: Results, metric: str) -> Array:
    """The share of the clean run's metric that every noise level leaves, [sigma]."""
    clean, corrupt = noise.baseline(metric).mean((2, 3))
    return np.asarray(corrupt / clean)


def _noise_table(noise: Results) -> Table:
    corrupt = noise.baseline("logit_diff")[1]
    right = (corrupt > 0).mean((1, 2))
    rows = tuple(
        (f"{sigma:g}", f"{left:.2f}", f"{prob:.2f}", f"{share:.0%}")
        for sigma, left, prob, share in zip(
            SIGMAS, _left(noise, "logit_diff"), _left(noise, "prob"), right, strict=True
        )
    )
    columns = ("sigma", "logit difference left", "probability left", "runs still right")
    return Table("Gaussian noise on S2 by its level", columns, rows)


def _noise_finding(noise: Results) -> Finding:
    left = _left(noise, "logit_diff")
    said = (f"{sigma:g}: {share:.2f}" for sigma, share in zip(SIGMAS, left, strict=True))
    return Finding(
        f"how well noise corrupts depends on its level (here: from under {LITTLE:.0%} of the logit "
        f"difference removed to over {MUCH:.0%})",
        "footnote 1",
        "share of the clean logit difference left, by sigma: " + ", ".join(said),
        bool(left.max() > 1 - LITTLE and left.min() < 1 - MUCH),
    )


def _heads_figure(title: Sequence[str], results: Results) -> Figure:
    rows = []
    for direction in DIRECTIONS:
        effects = {m: _effect(results, m, direction) for m in METRICS}
        heads = tuple(map(str, range(effects["logit_diff"].shape[1])))
        unit = "0 = destination, 1 = source"
        rows.append(
            [
                Picture(f"{direction}, {metric}", effect, unit, heads, beyond_sd(effect))
                for metric, effect in effects.items()
            ]
        )
    said = "effect of every head, layer × head; framed: beyond 2 SD of the mean effect"
    return pictures.figure([*title, said], rows)


def _curve_figure(title: Sequence[str], curves: Mapping[str, Curve]) -> Figure:
    """Performance against the number of heads, both ways, for every ranking."""
    drawing.needed()
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = drawn.subplots()
    for level in (0, 1):
        axes.axhline(level, color="0.7", linewidth=0.8)
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        shown = (
            (curve.recovered, "-", "these alone denoised"),
            (curve.faithfulness, "--", "all others noised"),
        )
        for values, style, how in shown:
            axes.plot(
                curve.sizes,
                values,
                linestyle=style,
                marker="o",
                markersize=3,
                color=colour,
                label=f"{name}, {how}",
            )
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set_xlabel("heads in the circuit")
    axes.set_ylabel("logit difference recovered\n(0 = corrupt run, 1 = clean run)")
    axes.legend(fontsize=7, handlelength=3)
    drawn.suptitle("\n".join([*title, "IOI, circuits of heads"]), fontsize=9)
    return drawn


EXPERIMENT = Experiment(
    NAME,
    "directions, metrics, circuits as curves, noise levels, gates",
    "Heimersheim & Nanda 2024",
    16,
    run,
)
