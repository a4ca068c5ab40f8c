"""What an experiment of a paper is: what it runs on, and the report that it returns."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from patchsweep.engine import build_pairs, sweep
from patchsweep.errors import BadInput
from patchsweep.model import Model
from patchsweep.pairs import Pair
from patchsweep.report import save
from patchsweep.results import LONGEST_NAME, Results, counted, no_formula
from patchsweep.spec import Prompts
from patchsweep.statistics import diagnostics
from patchsweep.store import Store, check_made, check_outside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGMA = 3.0  # standard deviations of the noise (Meng et al. 2022; Zhang & Nanda 2023)
SAMPLES = 1  # draws of the noise for every pair: the pairs average over it
FINDINGS = "Findings (resampled: the share of resamples of the pairs in which it holds)"
HOLDS = {True: "holds", False: "does not hold", None: "not decided"}


@dataclass(frozen=True)
class Setting:
    """What an experiment runs on: a model, `n` pairs from `seed`, and the folder of its results."""

    model: Model
    n: int
    seed: int
    out: Path
    overwrite: bool = False

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.model.tokenizer

    @property
    def caption(self) -> tuple[str, str]:
        """The model; its size, and how many pairs from which seed: two lines for a figure."""
        d, dtype = self.model.dimensions, str(self.model.hf_model.dtype).removeprefix("torch.")
        heads = f"{d.layers} layers of {d.heads} heads ({d.kv_heads} for keys and values)"
        names = self.model.name[-LONGEST_NAME:], self.model.weights
        drawn = f"{heads}, {dtype}; {counted(self.n)}, seed {self.seed}"
        return ": ".join(filter(None, names)), drawn

    @property
    def subject(self) -> str:
        """The caption in one line."""
        return "; ".join(self.caption)

    def pairs(self, task: str, *, only_correct: bool = False, **options: str) -> list[Pair]:
        """`n` pairs of a built-in task; BadInput as for the prompts of a spec."""
        prompts = Prompts(task=(task, options), n=self.n, seed=self.seed, only_correct=only_correct)
        return build_pairs(prompts, self.tokenizer, self.model)

    def gaussian(self, tokens: Sequence[str | int]) -> dict[str, Any]:
        """The corruption GN, Gaussian noise on these tokens, as a spec has it."""
        options = {"sigma": [SIGMA], "tokens": list(tokens), "samples": SAMPLES, "seed": self.seed}
        return {"gaussian": options}

    @property
    def noise(self) -> str:
        """How `gaussian` noises tokens, in words."""
        deviations = f"{SIGMA:g} standard deviations of these embeddings"
        return f"Gaussian noise of {deviations} (samples a pair: {SAMPLES})"

    def sweep(self, name: str, pairs: Sequence[Pair], **settings: Any) -> Results:
        """A sweep into `out`/`name`.zarr, with the settings of a spec. What is done already is not
        done again; BadInput if the folder holds another sweep and `overwrite` is not set."""
        out = self.out / f"{name}.zarr"
        if out.exists() and not self.overwrite:
            _same_number(Store.open(out), len(pairs))
        return sweep(
            self.model,
            pairs,
            out=out,
            resume=not self.overwrite,
            overwrite=self.overwrite,
            **settings,
        )


@dataclass(frozen=True)
class Table:
    """Rows of text under a title. A CSV file of its own is named after the title."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def csv(self) -> str:
        """As CSV, without formulas."""
        text = io.StringIO()
        rows = [self.columns, *self.rows]
        csv.writer(text).writerows([[no_formula(cell) for cell in row] for row in rows])
        return text.getvalue()


@dataclass(frozen=True)
class Finding:
    """A claim of the paper, where it is made, what was measured here, and whether it holds here;
    None where the measurement decides nothing. sure: in which share of resamples of the pairs it
    holds; None where that was not asked."""

    claim: str
    source: str
    measured: str
    holds: bool | None
    sure: float | None = None


@dataclass(frozen=True)
class Report:
    """What an experiment found. `lines` say how it was run; `figures` are by file name."""

    title: str
    lines: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def write(self, out: Path) -> Path:
        """Write report.md, a CSV file per table and every figure as PNG and SVG into a folder;
        the path of report.md. BadInput if the folder cannot be written, is inside results, or has
        files of these names that were not made here: that begin with another line, or figures of
        others."""
        check_outside(out / "report.md")
        texts = {f"{file_name(table.title)}.csv": table.csv() for table in self.tables}
        texts["report.md"] = markdown(self)
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                check_made(out / name, text.partition("\n")[0].encode())
                (out / name).write_text(text, encoding="utf-8", newline="")
            for name, figure in self.figures.items():
                for suffix in ("png", "svg"):
                    save(figure, out / f"{name}.{suffix}")
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            raise BadInput(f"cannot write to {out}: {reason}; choose another --out") from exc
        return out / "report.md"

    def show(self, console: Console) -> None:
        """Print it in the terminal, without its figures."""
        console.rule(escape(self.title))
        for line in self.lines:
            console.print(Text(line))
        for table in (_findings_table(self.findings), *self.tables):
            if not table.rows:
                continue
            grid = Grid(title=escape(table.title), title_justify="left", box=box.SIMPLE)
            for column in table.columns:
                grid.add_column(escape(column), overflow="fold")
            for row in table.rows:
                grid.add_row(*map(escape, row))
            console.print(grid)


@dataclass(frozen=True)
class Experiment:
    """An experiment of a paper: `source` says which paper and sections, `pairs` how many pairs it
    takes if nothing else is asked for."""

    name: str
    title: str
    source: str
    pairs: int
    run: Callable[[Setting], Report]


def _same_number(store: Store, pairs: int) -> None:
    """BadInput if results hold another number of pairs: noise depends on all of them, so further
    ones cannot be added."""
    held = next(iter(store.grids.values())).pairs
    if held != pairs:
        raise BadInput(
            f"{store.path} holds {counted(held)}, and {pairs} are asked for: "
            "choose another --out, or --overwrite to replace it"
        )


def answered(results: Results) -> str:
    """In how many pairs the clean run answers right, by the logit difference of the results."""
    clean = results.baseline("logit_diff")[0, 0, 0]
    right = int((clean > 0).sum())
    return f"The clean run's logit difference is above 0 in {right} of {counted(len(clean))}."


def saturated(by_name: Mapping[str, Results]) -> list[str]:
    """A line per sweep whose corrupt run leaves a probability nowhere to go."""
    return [
        f"{name}: {line}."
        for name, results in by_name.items()
        for line in diagnostics.saturated("prob", results.baseline("prob")[1], "denoise")
    ]


def baselines(by_name: Mapping[str, Results], metrics: Sequence[str]) -> Table:
    """The metrics of the unpatched runs, mean over pairs and samples, a row per sweep."""
    columns = [f"{metric} {run}" for metric in metrics for run in ("clean", "corrupt")]
    rows = []
    for name, results in by_name.items():
        ends = [results.baseline(metric)[:, 0].mean((1, 2)) for metric in metrics]
        rows.append((name, *(f"{value:.4g}" for pair in ends for value in pair)))
    return Table("Unpatched runs", ("corruption", *columns), tuple(rows))


def markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = [f"# {report.title}", "\n".join(f"- {line}" for line in report.lines)]
    if report.findings:
        parts.append(_markdown_table(_findings_table(report.findings)))
    parts += [_markdown_table(table) for table in report.tables]
    parts += [f"![{name}]({name}.png)" for name in report.figures]
    return "\n\n".join(parts) + "\n"


def file_name(title: str) -> str:
    """A title as the name of a file: letters and digits, everything else a single dash."""
    words = "".join(c.lower() if c.isalnum() and c.isascii() else " " for c in title).split()
    return "-".join(words)


def _findings_table(findings: Sequence[Finding]) -> Table:
    rows = tuple(
        (
            *(f.claim, f.source, f.measured, HOLDS[f.holds]),
            "" if f.sure is None else f"{f.sure:.0%}",
        )
        for f in findings
    )
    columns = ("the paper's claim", "where", "measured here", "here it", "resampled")
    return Table(FINDINGS, columns, rows)


def _markdown_table(table: Table) -> str:
    rows = [table.columns, ("---",) * len(table.columns), *table.rows]
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    return "\n".join([f"## {table.title}", "", *lines])
