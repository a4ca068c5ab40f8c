"""Which runs a sweep has: the cells of every component and the sites of every set. Pure.

A *variant* is a direction with a source and one of its samples. Within one, cells are laid out as
arrays over [pair, layer, entry], an entry being a position (or a group of them) of the clean
prompt; of sets, over [pair, 1, set].

    columns.py   what is known of a variant, a component's runs, the sets' sites, as arrays
    grids.py     which cells are runs, where their rows start and where they join
    ends.py      where what is sent along edges and paths can differ, where what is read matters
    paths.py     which runs a path has
    edges.py     which edges are runs, and the tokens that these begin with
    sets.py      windows and sets as a table of sites; what a model or a pair does not have
"""

from patchsweep.plan.layout.columns import (
    CODES,
    NAMES,
    OWN,
    Features,
    Layout,
    Places,
    Variant,
    injected_tokens,
)
from patchsweep.plan.layout.edges import EdgeTable, Reached
from patchsweep.plan.layout.grids import Layouts
from patchsweep.plan.layout.paths import Climbs, PathTable
from patchsweep.plan.layout.sets import make_layouts

__all__ = [
    "CODES",
    "NAMES",
    "OWN",
    "Climbs",
    "EdgeTable",
    "Features",
    "Layout",
    "Layouts",
    "PathTable",
    "Places",
    "Reached",
    "Variant",
    "injected_tokens",
    "make_layouts",
]
