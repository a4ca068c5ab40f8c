"""Indirect object identification by path patching, from the logits backwards: heads to the
logits, to the queries of the name movers, to the values of the S-inhibition heads (Wang et al.)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from patchsweep.reproduce import pictures, published, roles
from patchsweep.reproduce.experiment import (
    Experiment,
    Finding,
    Report,
    Setting,
    Table,
    answered,
    baselines,
)
from patchsweep.reproduce.heads import text
from patchsweep.reproduce.path_steps import (
    ATTENDS,
    CALLED,
    LAST,
    STEPS,
    THROUGH,
    Classes,
    Looks,
    Step,
    steps_of,
)
from patchsweep.reproduce.pictures import Picture
from patchsweep.reproduce.published import List, compare
from patchsweep.reproduce.resampled import sure
from patchsweep.reproduce.roles import CLASSES, INHIBITION, MOVERS, NEGATIVE
from patchsweep.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "ioi-paths"
RULE = (
    "A head is detected when its effect is more than 2 standard deviations from the mean over all "
    "heads in layers below the last receiver's. Of the heads that a step detects as positive, on "
    "either path, the receivers of the next are those that attend so in the clean run: name movers "
    "from END to IO more than to S1 and S2, S-inhibition heads to S2 more than to IO and S1. What "
    "is said of such heads holds when it is true of more than half of them."
)
# Class -> what is said of the heads that were detected, and where.
CLAIMS = {
    MOVERS: (
        "heads that act on the logits and help are name movers, attending from END to IO more than "
        "to S1 and S2",
        "§3.1",
    ),
    NEGATIVE: ("so are those that act on the logits against the answer", "§3.1"),
    INHIBITION: (
        "heads that act on the queries of these and help are S-inhibition heads, attending from "
        "END to S2 more than to IO and S1",
        "§3.2",
    ),
    LAST: (
        "heads that act on the values of these at S2 and help are duplicate token or induction "
        f"heads, attending from S2 to S1 or to the token after it (at least {roles.ATTENDED:.0%})",
        "§3.3",
    ),
}


def run(setting: Setting) -> Report:
    """Three steps, each from the heads that the one before found, and from the published ones if
    the model is theirs; then what the heads that were found attend to."""
    pairs = setting.pairs("ioi", corruption="abc")
    known = published.circuit(published.model_of(setting.model)) or {}
    detected: dict[str, tuple[str, ...]] = {}
    found: dict[str, tuple[str, ...]] = {}
    looked: dict[str, Results] = {}
    steps: list[Step] = []
    for kind, finds in STEPS.items():
        here = steps_of(setting, pairs, kind, found, known)
        steps += here
        own = [step for step in here if not step.published]
        for sign, of in ((1, finds), *([(-1, NEGATIVE)] if kind.negative else [])):
            detected[of] = tuple(head for step in own for head in step.detected(sign))
            if detected[of]:
                looked[of] = roles.looked(setting, detected[of], f"attention-{of}")
        looks = _looks(looked, detected)
        found[finds] = tuple(head for head in detected[finds] if ATTENDS[finds](looks[head]))
    first = steps[0]
    title = "Indirect object identification by path patching"
    return Report(
        title,
        (
            f"Model: {setting.subject}.",
            "What one head puts out with all three names replaced by random ones goes to the "
            "receivers of the clean run (noise). Heads between hold what they put out in the clean "
            "run; MLPs between are computed anew (through MLPs, as Wang et al. do it) or held as "
            "well (through nothing). The receivers of a step are patched together.",
            "Effects on the logit difference: 0 = clean run, 1 = the other run; positive: the head "
            "helps. Change is what Wang et al. measure: (patched − clean) / clean.",
            RULE,
            *_shared(setting),
            *_not_run(steps),
            answered(first.results),
            _published_line(setting, known),
        ),
        (
            baselines({"all three names": first.results}, ["logit_diff"]),
            _detections(steps),
            *([_against(steps, known)] if known else []),
            *map(_effects, steps),
            _attention(detected, looks),
        ),
        {"steps": _figure((title, *setting.caption), steps)},
        sure(lambda drawn, _: _findings(detected, _looks(drawn, detected)), looked, setting.n),
    )


def _shared(setting: Setting) -> list[str]:
    d = setting.model.dimensions
    shared = f"Values are those of key-value heads, shared by {d.heads // d.kv_heads} heads each."
    return [shared] if d.heads > d.kv_heads else []


def _not_run(steps: Sequence[Step]) -> list[str]:
    ran = {step.kind for step in steps if not step.published}
    return [
        f"No {CALLED[kind.of]} were found above the first layer: no step to their {kind.name}."
        for kind in STEPS
        if kind not in ran
    ]


def _published_line(setting: Setting, known: Classes) -> str:
    if not known:
        return published.applies(NAME, setting.model)[1]
    of = "; ".join(f"{CLASSES[kind]} {text(heads)}" for kind, heads in known.items())
    return f"Published heads, those of Wang et al. 2022: {of}."


def _detections(steps: Sequence[Step]) -> Table:
    """What each step detects, through MLPs and through nothing, and how these correlate."""
    rows = []
    for step in steps:
        by = {through: step.heads(through) for through in THROUGH}
        both = np.stack([heads.effect[: step.below].ravel() for heads in by.values()])
        alike = np.asarray(np.corrcoef(both))[0, 1]
        for heads in by.values():
            names = heads.corruption, text(heads.negative), text(heads.positive)
            rows.append((step.title, " ".join(step.receivers), *names, f"{alike:.3f}"))
    columns = ("step", "receivers", "path", "negative", "positive")
    return Table("Detected heads by step", (*columns, "correlation of both"), tuple(rows))


def _effects(step: Step) -> Table:
    """The heads that a step detects, by their effect; with both measures."""
    by = {through: step.heads(through) for through in THROUGH}
    far = by["mlps"].detected | by["nothing"].detected
    cells = np.argwhere(far)
    order = np.argsort(-np.abs(by["mlps"].effect[far]), kind="stable")
    rows = []
    for layer, n in cells[order]:
        row = [f"{layer}.{n}"]
        for through, heads in by.items():
            mark = " *" if heads.detected[layer, n] else ""
            row += [f"{heads.effect[layer, n]:+.3f}{mark}"]
            row += [f"{step.relative(through)[layer, n]:+.1%}"]
        rows.append(tuple(row))
    columns = [f"{what}, {how}" for how in THROUGH.values() for what in ("effect", "change")]
    title = step.title[0].upper() + step.title[1:]
    return Table(f"{title} (* detected)", ("head", *columns), tuple(rows))


def _against(steps: Sequence[Step], known: Classes) -> Table:
    """The published classes against what each step detects through MLPs."""
    rows = []
    for step in steps:
        heads = step.heads("mlps")
        positive, negative = (
            frozenset(head for kind in kinds for head in known[kind])
            for kinds in (step.kind.positive, step.kind.negative)
        )
        said = List("", "abc", "STR", "logit_diff", positive, negative)
        c = compare(said, heads.positive, heads.negative)
        of = ", ".join(CLASSES[kind] for kind in (*step.kind.positive, *step.kind.negative))
        rows.append((step.title, of, text(c.found), text(c.missing), text(c.extra)))
    columns = ("step", "classes", "found here", "missing here", "only here")
    return Table("Against Wang et al. 2022", columns, tuple(rows))


def _looks(looked: Mapping[str, Results], detected: Classes) -> Looks:
    return {
        h: look for of in looked for h, look in roles.looks_of(looked[of], detected[of]).items()
    }


def _attention(detected: Classes, looks: Looks) -> Table:
    """What the detected heads attend to in the clean run."""
    called = {finds: kind.name for kind, finds in STEPS.items()} | {NEGATIVE: "logits, negative"}
    rows = [
        (called[of], head, *(f"{share:.3f}" for share in looks[head].values()))
        for of, heads in detected.items()
        for head in heads
    ]
    columns = [
        f"{query} to {'after S1' if key == roles.AFTER else key}" for query, key in roles.LOOKS
    ]
    return Table("Attention of the detected heads", ("step", "head", *columns), tuple(rows))


def _findings(detected: Classes, looks: Looks) -> Iterator[Finding]:
    """What Wang et al. say of the heads that each step detects: of each claim whether more than
    half of them attend so; not decided where there are none."""
    for of, (claim, where) in CLAIMS.items():
        heads = detected[of]
        such = [head for head in heads if ATTENDS[of](looks[head])]
        others = [head for head in heads if head not in such]
        measured = f"{text(such)}; others: {text(others)}"
        yield Finding(claim, where, measured, len(such) > len(others) if heads else None)


def _figure(title: Sequence[str], steps: Sequence[Step]) -> Figure:
    """Layer × head, a row of pictures for every way, a column for every step."""
    rows = []
    for through, how in THROUGH.items():
        found = [(step, step.heads(through)) for step in steps]
        columns = tuple(map(str, range(found[0][1].effect.shape[1])))
        rows.append(
            [
                Picture(
                    f"{step.title.removeprefix('heads to the ')},\n{how}",
                    heads.effect,
                    "0 = clean run, 1 = the other",
                    columns,
                    heads.detected,
                )
                for step, heads in found
            ]
        )
    said = "framed: beyond 2 SD of the mean effect; grey: below no receiver"
    return pictures.figure([*title, said], rows)


EXPERIMENT = Experiment(
    NAME,
    "indirect object identification by path patching",
    "Wang et al. 2022, §3",
    16,
    run,
)
