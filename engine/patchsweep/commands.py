"""The commands: what each is given, and what it prints."""

from __future__ import annotations

import os
import sys
import textwrap
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from patchsweep.errors import BadInput

if TYPE_CHECKING:
    from patchsweep.spec import Spec


TRACEBACK = "--traceback"
app = App(
    name="patchsweep",
    help="Exact activation-patching sweeps: every head x position x layer, fast, into Zarr.",
    help_epilogue=f"Every command takes {TRACEBACK}: where a failure came from, in full.",
    help_format="markdown",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
Overrides = Annotated[
    list[str] | None, Parameter(name="--set", negative=(), consume_multiple=False)
]
Flag = Annotated[bool, Parameter(negative=(), show_default=False)]


class DoesNotHold(Exception):
    """Results that were checked are not what they should be."""


@app.command
def demo(*, out: Path = Path("results/demo")) -> None:
    """The main job on a real model that a package ships: no network.

    Sweeps head_z, mlp_out and resid_pre of SmolLM2-135M-Instruct (4-bit, de-quantised) over 8 IOI
    pairs and 8 facts, and measures how many times faster that was than full forwards.

    Example: patchsweep demo --out results/demo

    Parameters
    ----------
    out
        Folder for the results and figures; earlier results of the demo are replaced.
    """
    from patchsweep.demo import demo as run_demo

    run_demo(out, _console())


@app.command
def run(
    spec: Path,
    /,
    *,
    out: str | None = None,
    overrides: Overrides = None,
    resume: Flag = False,
    append: Flag = False,
    overwrite: Flag = False,
) -> None:
    """Run the sweep that a spec file says.

    Example: patchsweep run examples/ioi.yaml --out ioi.zarr --set prompts.n=16

    Example: accelerate launch -m patchsweep run examples/ioi.yaml

    Parameters
    ----------
    spec
        A .yaml or .toml file.
    out
        Results folder, or a URL such as s3://bucket/ioi.zarr, in place of the spec's.
    overrides
        key.key=value, in place of what the spec says; may be given several times.
    resume
        Go on where an interrupted run stopped.
    append
        Add the pairs, after those that are there, or the metrics that the spec has more than the
        results; everything else must be equal.
    overwrite
        Replace results that are there.
    """
    from patchsweep.engine import run as run_spec
    from patchsweep.processes import launched, restarted
    from patchsweep.report import show as print_results

    processes = launched()
    flags = {"--resume": resume, "--append": append, "--overwrite": overwrite}
    if len(given := [name for name, said in flags.items() if said]) > 1:
        raise BadInput(f"{' and '.join(given)} exclude each other: give one")
    if processes.first and restarted() and not overwrite:
        again = "patchsweep: started again; the sweep goes on with what was finished"
        print(again, file=sys.stderr, flush=True)
    results = run_spec(
        _spec(spec, overrides, out), resume=resume, overwrite=overwrite, append=append
    )
    if os.environ.get("RANK", "0") == "0":
        print_results(results, _console())


@app.command
def plan(spec: Path, /, *, overrides: Overrides = None) -> None:
    """Say what a sweep will take, without loading weights.

    Example: patchsweep plan examples/ioi.yaml

    Parameters
    ----------
    spec
        A .yaml or .toml file.
    overrides
        key.key=value, in place of what the spec says; may be given several times.
    """
    from patchsweep.engine import plan_spec
    from patchsweep.report import plan_table

    _console().print(plan_table(plan_spec(_spec(spec, overrides, None))))


@app.command
def show(
    results: str,
    /,
    *,
    component: list[str] | None = None,
    metric: list[str] | None = None,
    top: int = 10,
    align: str | None = None,
    provenance: Flag = False,
    json: Flag = False,
) -> None:
    """Warnings, top cells and detections, in the terminal.

    Example: patchsweep show ioi.zarr --component head_z --metric logit_diff --metric kl

    Parameters
    ----------
    results
        A results folder, or a URL: s3://..., gs://..., az://..., file://...
    component
        Only this component; may be given several times.
    metric
        By this metric instead of the first; may be given several times.
    top
        How many cells are listed.
    align
        What a position is over prompts of unequal length: labels, end or start.
    provenance
        How the results were made, too: versions, plan, hashes.
    json
        Print everything as JSON instead.
    """
    from patchsweep.report import Asked, as_json
    from patchsweep.report import show as print_results
    from patchsweep.results import open as open_results

    found = open_results(results)
    asked = Asked(component, metric, top, align, provenance)
    if json:
        print(dumps(as_json(found, asked), ensure_ascii=False, indent=1))
    else:
        print_results(found, _console(), asked)


@app.command
def verify(
    results: str,
    /,
    *,
    cells: int = 20,
    seed: int = 0,
    model: str | None = None,
    trust: Flag = False,
) -> None:
    """Run some random cells again as hooked full forwards of the model, and compare.

    Status 1 if a difference is larger than the results' dtype allows.

    Example: patchsweep verify ioi.zarr --cells 50

    Parameters
    ----------
    results
        A results folder, or a URL: s3://..., gs://..., az://..., file://...
    cells
        How many cells; a quarter as many structural ones are run beside them.
    seed
        Another seed draws other cells.
    model
        Where the model is, if not where the results say.
    trust
        Load the model and import the functions that the results name. For results of your own:
        without it only packaged models are loaded, and no function is imported.
    """
    from patchsweep.engine import verify as verify_results
    from patchsweep.report import comparison_table

    found = verify_results(results, cells, model, seed, trust=trust)
    console = _console()
    console.print(
        f"{found.cells} cells, and {found.structural} structural ones, again as full forwards"
    )
    console.print(comparison_table(found.differences, found.tolerance))
    if found.left_out:
        console.print(f"not compared, hooks do not see them: {', '.join(found.left_out)}")
    if not found.holds:
        raise DoesNotHold(f"{results}: cells differ from full forwards by more than rounding")


@app.command
def check(results: str, /) -> None:
    """Verify a results folder: every finished chunk is there, and as it was written.

    Status 1, and what must be redone, if one is not. Nobody may be writing to it meanwhile.

    Example: patchsweep check ioi.zarr

    Parameters
    ----------
    results
        A results folder, or a URL: s3://..., gs://..., az://..., file://...
    """
    from patchsweep.store import check as check_results

    found = check_results(results)
    for damage in found.damages:
        print(damage)
    if found.damages:
        raise DoesNotHold(found)
    print(found)


@app.command
def plot(
    results: str,
    /,
    *,
    out: Path | None = None,
    component: list[str] | None = None,
    metric: list[str] | None = None,
    direction: list[str] | None = None,
    view: list[str] | None = None,
    format: str = "png",
    align: str | None = None,
) -> None:
    """Draw heatmaps, and one self-contained HTML page to look closer.

    Example: patchsweep plot ioi.zarr --out figures --metric kl --format png,pdf

    Parameters
    ----------
    results
        A results folder, or a URL: s3://..., gs://..., az://..., file://...
    out
        Folder for the figures and report.html; beside the results if left out, of a URL here.
        Figures that it has drawn before are replaced, other files are not.
    component
        Only this component; may be given several times, as may metric, direction and view.
    metric
        By this metric instead of the first.
    direction
        Only this direction: denoise or noise.
    view
        Only this view: layer_position, layer_head (_kv_head, _neuron, _feature), window_3_joint ...
    format
        png, svg, pdf, or several, separated by commas.
    align
        What a position is over prompts of unequal length: labels, end or start.
    """
    from patchsweep.report import Wanted, write_page
    from patchsweep.report import plot as draw
    from patchsweep.results import open as open_results
    from patchsweep.store import beside

    found = open_results(results)
    folder = out or beside(results, f"{Path(found.store.name).stem}-figures")
    wanted = Wanted(component, metric or found.metrics[:1], direction, view, align)
    for path in draw(found, folder, tuple(format.split(",")), wanted):
        print(path)
    print(write_page(found, folder / "report.html"))


@app.command
def export(results: str, table: Path, /, *, overwrite: Flag = False) -> None:
    """Write one row per patching experiment, one column per metric, as Parquet; or, to a .zip, the
    results as they are, in one file that show, plot, export and ps.open read.

    Example: patchsweep export ioi.zarr ioi.parquet

    Parameters
    ----------
    results
        A results folder, or a URL: s3://..., gs://..., az://..., file://...
    table
        The Parquet or .zip file to write.
    overwrite
        Replace a file that is there.
    """
    from patchsweep.results import open as open_results
    from patchsweep.store import pack

    if table.suffix not in (".parquet", ".zip"):
        raise BadInput(f"{table}: unknown kind of file: use .parquet, or .zip for the results")
    found = open_results(results)
    if table.suffix == ".zip":
        pack(results, table, overwrite=overwrite)
    else:
        found.export(table, overwrite=overwrite)
    print(table)


@app.command
def reproduce(
    name: str | None = None,
    /,
    *,
    model: str = "smollm2-135m",
    n: int | None = None,
    out: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: Flag = False,
) -> None:
    """Run an experiment of the papers on a model, and report which of its findings hold there.

    Given again, it goes on where it stopped.

    Example: patchsweep reproduce best-practices-ioi --model gpt2

    Parameters
    ----------
    name
        The experiment; left out, they are listed.
    model
        A packaged model, a local folder, a .gguf file or a Hub id.
    n
        How many pairs of prompts; the experiment's own number if left out.
    out
        Folder for results, report.md, tables and figures; reproduce/NAME-MODEL if left out.
    seed
        Another seed draws other prompts and noise.
    device
        auto, cpu, cuda, cuda:1 or balanced.
    overwrite
        Replace results that are there.
    """
    from patchsweep.reproduce import EXPERIMENTS, default_folder
    from patchsweep.reproduce import reproduce as run_experiment

    console = _console()
    if name is None:
        table = Table(box=None, pad_edge=False)
        for heading in ("name", "experiment", "from", "pairs"):
            table.add_column(heading)
        for each in EXPERIMENTS.values():
            table.add_row(each.name, each.title, each.source, str(each.pairs))
        console.print(table)
        return
    report = run_experiment(name, model, out, n, seed, device, overwrite=overwrite)
    report.show(console)
    print((out or default_folder(name, model)) / "report.md")


@app.command
def tasks() -> None:
    """The prompt tasks that are built in, with an example of each.

    Example: patchsweep tasks
    """
    from patchsweep.model import load_tokenizer
    from patchsweep.tasks import TASKS

    tokenizer = load_tokenizer("smollm2-135m")
    for name, task in TASKS.items():
        pair = task(tokenizer, 1)[0]
        answer, wrong = (
            " ".join(repr(tokenizer.decode([token])) for token in tokens)
            for tokens in (pair.answer, pair.wrong)
        )
        lines = {
            "clean": tokenizer.decode(pair.clean),
            "corrupt": tokenizer.decode(pair.corrupt),
            "answer": f"{answer}, wrong: {wrong}",
            "labels": ", ".join(pair.labels),
        }
        lines |= {option: " | ".join(choices) for option, choices in task.options.items()}
        print(name)
        for heading, text in lines.items():
            print(f"  {heading + ':':13}{textwrap.indent(text, ' ' * 15)[15:]}")


@app.command
def models() -> None:
    """Which families run on which backend, and how each was checked.

    Example: patchsweep models
    """
    from patchsweep.report import FAMILIES, HOW

    table = Table(box=None, pad_edge=False)
    for heading in ("family", "backend", "blocks", "checked to", "particular"):
        table.add_column(heading)
    for family in FAMILIES:
        blocks = "parallel" if family.parallel else "sequential"
        row = (family.name, family.backend, blocks, f"{family.tolerance:g}", family.particular)
        table.add_row(*row)
    console = _console()
    console.print(table)
    console.print(HOW)


def _spec(path: Path, overrides: list[str] | None, out: str | None) -> Spec:
    from patchsweep.spec import load_spec
    from patchsweep.store import path_or_url

    spec = load_spec(path, overrides or [])
    return spec if out is None else spec.model_copy(update={"out": path_or_url(out)})


def _console() -> Console:
    given = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if given else 100)
