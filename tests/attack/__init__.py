"""Attacks on patchsweep: `scripts/attack` runs all, the tests a few of each.

A section is a module with `attack(folder, seed, until) -> Outcomes`: it goes on until `until()`
says that it is enough, at least once, and counts how each try ended. Modules here whose names do
not begin with an underscore, `table` apart, are sections.
"""
