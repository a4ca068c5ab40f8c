"""What a self-test looks at: prompts of a sweep, and some cells of every component."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from patchsweep.pairs import Pair
from patchsweep.plan import Plan, make_plan
from patchsweep.plan.layout import Variant
from patchsweep.sites import SETS, Site
from patchsweep.spec import Sweep

CELLS = 8  # per component
VARIANT = Variant(0, 0, 0)


@dataclass(frozen=True, eq=False)
class Probe:
    """What a self-test compares: `plan` runs some cells of the components on one pair of prompts,
    one site each; `prompts` are those whose baselines are compared beside."""

    plan: Plan
    components: tuple[str, ...]
    sites: tuple[Site, ...]
    prompts: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        [pair] = self.plan.pairs
        return f"{self.plan.hash} {pair.clean} {pair.corrupt} {self.prompts} {self.components}"


def make_probe(plan: Plan) -> Probe:
    """What a self-test of a sweep with this plan compares."""
    layouts = plan.layouts
    others = {o.tokens for s in plan.sources for row in s.others for o in row}
    runs = sorted({p.clean for p in plan.pairs} | others, key=lambda t: (len(t), t))
    components = tuple(layouts.patched(plan.grids))
    pair = _pair(plan.pairs, runs[-1])
    rng = np.random.default_rng(0)
    candidates = [site for name in components for site in _drawn(plan, name, len(pair), rng)]

    def planned(sites: Sequence[Site]) -> Plan:
        settings = Sweep(sets={str(i): (s,) for i, s in enumerate(sites)}, direction="noise")
        return make_plan([pair], settings, plan.dimensions, 1 << 62, layouts.features)

    exists = planned(candidates).layouts.layout(SETS, VARIANT).exists[0, 0]
    sites = []
    for name in components:
        mine = [s for s, there in zip(candidates, exists, strict=True) if there]
        sites += [s for s in mine if s.component == name][:CELLS]
    # Where no cell can change anything, the plan of one of them has the baselines.
    return Probe(planned(sites or candidates[:1]), components, tuple(sites), (runs[-1], runs[0]))


def _pair(pairs: Sequence[Pair], longest: tuple[int, ...]) -> Pair:
    """The longest prompt against the other one of its pair; or where that has another length, one
    that differs from the first token on where tokens allow."""
    for p in pairs:
        if longest in (p.clean, p.corrupt) and len(p.clean) == len(p.corrupt):
            return Pair(p.clean, p.corrupt, p.answer, p.wrong or p.answer)
    other = tuple(reversed(longest))
    if other == longest:
        other = ((longest[0] + 1) % max(2, longest[0] + 1), *longest[1:])
    return Pair(longest, other, pairs[0].answer, pairs[0].wrong or pairs[0].answer)


def _drawn(plan: Plan, name: str, length: int, rng: np.random.Generator) -> Iterator[Site]:
    """Sites of a component, no layer twice before every layer was drawn."""
    layers, seen = plan.layouts.layers(name), set()
    for i in range(16 * CELLS):
        if i % len(layers) == 0:
            order = rng.permutation(layers)
        # The tail reads the last token; cells there reach it from every layer.
        at = length - 1 if rng.random() < 0.5 else int(rng.integers(length))
        layer = int(order[i % len(layers)])
        site = Site(name, layer, int(rng.integers(plan.layouts.units(name))), at)
        if site not in seen:
            seen.add(site)
            yield site
