"""Results for people.

    terminal.py    `show`, and tables for other commands
    figures.py     still figures
    page.py        one HTML file that opens anywhere; page_data.py: the numbers in it
    families.py    which model families the tests hold

Imports errors, plan, results, sites, statistics, store.
"""

from patchsweep.report.families import FAMILIES, HOW
from patchsweep.report.figures import Wanted, plot, save
from patchsweep.report.page import write_page
from patchsweep.report.terminal import (
    Asked,
    as_json,
    comparison_table,
    plan_table,
    print_pairs,
    print_warnings,
    show,
    top_table,
)

__all__ = [
    "FAMILIES",
    "HOW",
    "Asked",
    "Wanted",
    "as_json",
    "comparison_table",
    "plan_table",
    "plot",
    "print_pairs",
    "print_warnings",
    "save",
    "show",
    "top_table",
    "write_page",
]
