"""Indirect object identification by path patching, from the logits backwards: heads to the
logits, to the queries of the name movers, to the values of the S-inhibition heads (Wang et al.)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from patchsweep.reproduce.heads import Heads, text
from patchsweep.reproduce.path_steps import CALLED, LAST, STEPS, THROUGH, Classes, Step, steps_of
from patchsweep.reproduce.pictures import Picture
from patchsweep.reproduce.published import List, compare, ordered
from patchsweep.reproduce.resampled import sure
from patchsweep.reproduce.roles import CLASSES, INHIBITION, MOVERS, NEGATIVE
from patchsweep.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "ioi-paths"
RULE = (
    "A head is detected when its effect is more than 2 standard deviations from the mean over all "
    "heads in layers below the last receiver's. The receivers of a step are the heads that the one "
    "before detects as positive through MLPs, less those that an earlier one found."
)
Looks = Mapping[str, Mapping[tuple[str, str], float]]


def run(setting: Setting) -> Report:
    """Three steps, each from the heads that the one before found, and from the published ones if
    the model is theirs; then what the heads that were found attend to."""
    pairs = setting.pairs("ioi", corruption="abc")
    known = published.circuit(published.model_of(setting.model)) or {}
    found: dict[str, tuple[str, ...]] = {}
    steps: list[Step] = []
    for kind, finds in STEPS.items():
        here = steps_of(setting, pairs, kind, found, known)
        steps += here
        own = [step.heads("mlps") for step in here if not step.published]
        earlier = {head for heads in found.values() for head in heads}
        found[finds] = tuple(h for heads in own for h in heads.positive if h not in earlier)
    first = steps[0]
    found[NEGATIVE] = first.heads("mlps").negative
    tables, findings = _attention(setting, first, found)
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
            *tables,
        ),
        {"steps": _figure((title, *setting.caption), steps)},
        findings,
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
        both = [heads.effect[: step.below].ravel() for heads in by.values()]
        alike = np.asarray(np.corrcoef(*both))[0, 1]
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


def _attention(
    setting: Setting, first: Step, found: Classes
) -> tuple[list[Table], tuple[Finding, ...]]:
    """What the heads of every step attend to in the clean run, and whether they are what Wang et
    al. say."""
    heads = ordered([*{head for of in found.values() for head in of}])
    if not heads:
        return [], ()
    looked = roles.looked(setting, heads)
    looks = roles.looks_of(looked, heads)
    called = {finds: kind.name for kind, finds in STEPS.items()} | {NEGATIVE: "logits, negative"}
    rows = [
        (called[finds], head, *(f"{share:.3f}" for share in looks[head].values()))
        for finds, of in found.items()
        for head in of
    ]
    columns = [
        f"{query} to {'after S1' if key == roles.AFTER else key}" for query, key in roles.LOOKS
    ]
    table = Table("Attention of the detected heads", ("step", "head", *columns), tuple(rows))
    own = {"logits": first.results, "attention": looked}

    def claims(drawn: Mapping[str, Results], _: Sequence[int]) -> Iterator[Finding]:
        step = replace(first, results=drawn["logits"])
        return _findings(step.heads("mlps"), found, roles.looks_of(drawn["attention"], heads))

    return [table], sure(claims, own, setting.n)


def _findings(first: Heads, found: Classes, looks: Looks) -> Iterator[Finding]:
    """What Wang et al. say of the heads that each step finds."""
    most = {head: roles.most(look) for head, look in looks.items()}
    negative = tuple(head for head in found[NEGATIVE] if most[head] == "IO")
    yield _all(
        "the heads that act on the logits and help attend from END to IO more than to S1 and S2 "
        "(name movers)",
        "§3.1",
        {head: most[head] == "IO" for head in found[MOVERS]},
    )
    yield Finding(
        "others act on the logits against it, and attend so as well (negative name movers)",
        "§3.1",
        f"negative {text(first.negative)}; attend so {text(negative)}",
        bool(first.negative and negative) and negative == found[NEGATIVE],
    )
    yield _all(
        "the heads that act on the queries of these attend from END to S2 more than to IO and S1 "
        "(S-inhibition)",
        "§3.2",
        {head: most[head] == "S2" for head in found[INHIBITION]},
    )
    yield _all(
        "the heads that act on the values of these at S2 attend from there to S1 (duplicate "
        f"token) or to the token after it (induction; here: at least {roles.ATTENDED:.0%})",
        "§3.3",
        {head: roles.repeats(looks[head]) is not None for head in found[LAST]},
    )


def _all(claim: str, where: str, heads: Mapping[str, bool]) -> Finding:
    """Whether all heads are such; not decided where there are none."""
    those, others = ([h for h, such in heads.items() if such is wanted] for wanted in (True, False))
    return Finding(
        claim, where, f"{text(those)}; others: {text(others)}", not others if heads else None
    )


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
