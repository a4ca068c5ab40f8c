"""How tries ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Until = Callable[[], bool]


@dataclass
class Outcomes:
    """Counts by what was tried and how it ended. `good`: the endings that are promised; `bad`: an
    example of each other one, with what is needed to see it again."""

    good: tuple[str, ...]
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, ending: str, example: str = "") -> None:
        self.counts.setdefault(what, Counter())[ending] += 1
        if ending not in self.good:
            self.bad.setdefault(f"{what}: {ending}", example)

    @property
    def holds(self) -> bool:
        """Whether all ended as promised."""
        return not self.bad

    def __str__(self) -> str:
        return "\n".join(
            [_table(self.counts, self.good), *(f"{k}\n  {v}" for k, v in self.bad.items())]
        )


def _table(counts: Mapping[str, Counter[str]], good: tuple[str, ...]) -> str:
    """As Markdown, a row per kind of try."""
    others = sorted({ending for row in counts.values() for ending in row} - {*good})
    endings = [*good, *others]
    rows = [["tried", "times", *endings], ["---"] * (2 + len(endings))]
    for what, row in counts.items():
        rows.append([what, str(row.total()), *(str(row[ending]) for ending in endings)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
