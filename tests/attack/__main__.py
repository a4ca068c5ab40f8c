"""python -m attack [SECTION ...] [--hours N] [--seed N]"""

from __future__ import annotations

import argparse
import pkgutil
import random
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import attack

MINUTES = 2.0  # of a section, if nothing else is said


def main() -> int:
    sections = [m.name for m in pkgutil.iter_modules(attack.__path__)]
    sections = [name for name in sections if not name.startswith("_") and name != "table"]
    parser = argparse.ArgumentParser(prog="scripts/attack", description=attack.__doc__)
    parser.add_argument("section", nargs="*", default=sections, help=", ".join(sections))
    parser.add_argument("--hours", type=float, help="of all sections together")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    given = parser.parse_args()
    if unknown := {*given.section} - {*sections}:
        parser.error(f"unknown: {', '.join(unknown)}: use {', '.join(sections)}")
    seconds = 60 * MINUTES if given.hours is None else 3600 * given.hours / len(given.section)
    print(f"seed {given.seed}", flush=True)
    holds = True
    for name in given.section:
        with tempfile.TemporaryDirectory() as folder:
            end = time.monotonic() + seconds
            found = import_module(f"attack.{name}").attack(
                Path(folder), given.seed, lambda end=end: time.monotonic() > end
            )
        print(f"\n## {name}\n\n{found}", flush=True)
        holds = holds and found.holds
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
