"""AND, OR and a backup in a model whose circuits are known: what each direction finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from patchsweep.model import wrap
from patchsweep.reproduce.experiment import Finding, Setting, Table
from patchsweep.results import Results
from patchsweep.sites import parse_site
from patchsweep.tasks.known_circuits import KNOWN, KNOWN_SETS, Effect, circuit_pairs, known_circuits

FOUND = 0.05  # a smaller effect finds nothing
LABELS = ("WORD", "END")
CALLED = {
    "embed@WORD": "first word",
    "embed@END": "second word",
    "head_z.0.0@END": "head 0.0",
    "head_z.0.1@END": "head 0.1",
    "head_z.0.2@END": "head 0.2",
    "neuron.1.42@END": "neuron 1.42",
}
# What Heimersheim & Nanda call the parts of the two gates.
AND = ("head_z.0.0@END", "embed@END", "neuron.1.42@END")
OR = ("head_z.0.1@END", "head_z.0.2@END")


def sweeps(setting: Setting) -> dict[str, Results]:
    """Every circuit of the known model, all cells in both directions, and its sets of sites."""
    hf_model, tokenizer = known_circuits()
    own = replace(setting, model=wrap(hf_model, tokenizer, "known-circuits"))
    return {
        name: own.sweep(
            f"gates-{name}",
            pairs,
            components=["embed", "head_z", "neuron", "mlp_out"],
            positions=list(LABELS),
            sets={called: known.sites for called, known in KNOWN_SETS.get(name, {}).items()},
            direction="both",
        )
        for name, pairs in circuit_pairs(tokenizer).items()
    }


def effect(results: Results, site: str) -> Effect:
    """The effect of one site on the logit difference, in both directions."""
    at = parse_site(site)
    cell = at.layer or 0, at.unit or 0, LABELS.index(str(at.position))
    denoise, noise = (
        results.effect(at.component, "logit_diff", direction).values[cell]
        for direction in ("denoise", "noise")
    )
    return Effect(float(denoise), float(noise))


def of_set(results: Results, name: str) -> Effect:
    """The effect of sites that are patched together."""
    where = results.grid("sets").positions.index(name)
    denoise, noise = (
        results.effect("sets", "logit_diff", direction).values[0, 0, where]
        for direction in ("denoise", "noise")
    )
    return Effect(float(denoise), float(noise))


def table(found: Mapping[str, Results]) -> Table:
    """What is known to matter, and what was measured there."""
    rows = []
    for circuit, results in found.items():
        rows += [
            _row(circuit, CALLED.get(site, site), known, effect(results, site))
            for site, known in KNOWN[circuit].items()
        ]
        rows += [
            _row(circuit, name, known.effect, of_set(results, name))
            for name, known in KNOWN_SETS.get(circuit, {}).items()
        ]
    columns = ("circuit", "patched", "denoise", "noise", "by hand: denoise", "by hand: noise")
    return Table("A model with known circuits", columns, tuple(rows))


def _row(circuit: str, called: str, known: Effect, measured: Effect) -> tuple[str, ...]:
    return circuit, called, *(f"{round(value, 2) + 0.0:+.2f}" for value in (*measured, *known))


def findings(found: Mapping[str, Results]) -> Iterator[Finding]:
    """What the gates say of the two directions."""
    last = AND[-1:]
    yield _gate(
        "AND: noising finds all parts, denoising only the last", found["and"], AND, last, AND
    )
    yield _gate("OR: denoising finds every part, noising none", found["or"], OR, OR, ())
    first, second = (
        tuple(site for site in AND if abs(effect(found[name], site).denoise) > FOUND)
        for name in ("and_first", "and_second")
    )
    yield Finding(
        "AND: corrupting one word at a time, denoising shows which part reads which",
        "the Nobel Peace Prize example",
        f"first word: {_names(first)}; second word: {_names(second)}",
        AND[0] in first and AND[1] not in first and AND[1] in second and AND[0] not in second,
    )
    left = 1 - of_set(found["or"], "both heads").noise
    yield Finding(
        "a backup makes up for about 0.7 of what was removed (here by construction)",
        "backup heads",
        f"made up for when both heads are noised: {left:.2f}",
        abs(left - 0.7) < FOUND,
    )


def _gate(
    claim: str, results: Results, parts: tuple[str, ...], denoise: object, noise: object
) -> Finding:
    effects = {site: effect(results, site) for site in parts}
    by = [tuple(site for site, e in effects.items() if abs(e[d]) > FOUND) for d in range(2)]
    return Finding(
        claim,
        "AND and OR gates",
        f"denoising finds {_names(by[0])}; noising {_names(by[1])}",
        by == [denoise, noise],
    )


def _names(sites: tuple[str, ...]) -> str:
    return ", ".join(CALLED[site] for site in sites) or "none"
