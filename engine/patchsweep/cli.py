"""The command line. Exit status: 0 done, 1 failure, 2 wrong use or bad input, 130 interrupted,
143 terminated."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.table import Table

from patchsweep.errors import BadInput

app = App(
    name="patchsweep",
    help="Exact activation-patching sweeps: every head x position x layer, fast, into Zarr.",
    version_flags=["--version"],
    help_format="plaintext",
)
Set = Annotated[list[str] | None, Parameter(name="--set", negative=(), consume_multiple=False)]


class Terminated(BaseException):
    """SIGTERM arrived."""


def main() -> None:
    """Run a command and exit with its status."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_status(sys.argv[1:]))


def _status(arguments: list[str]) -> int:
    kept = "what was finished is kept: go on with --resume"
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (BadInput, CycloptsError) as error:
        return _say(error, 2)
    except KeyboardInterrupt:
        return _say(f"interrupted; {kept}", 130)
    except Terminated:
        return _say(f"terminated; {kept}", 143)
    except Exception as error:
        if "PATCHSWEEP_TRACEBACK" in __import__("os").environ:
            raise
        return _say(f"{type(error).__name__}: {error}", 1)
    return 0


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _say(what: object, status: int) -> int:
    print(f"patchsweep: {' '.join(str(what).split())}", file=sys.stderr)
    return status


@app.command
def demo(out: Path = Path("results/demo")) -> None:
    """The main job on a real model that a package ships: no network.

    Sweeps head_z, mlp_out and resid_pre of SmolLM2-135M over 8 IOI pairs and 8 facts, and measures
    how many times faster that was than full forwards.

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
    *,
    out: Path | None = None,
    set_: Set = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Run the sweep that a spec file says.

    Example: patchsweep run examples/ioi.yaml --out ioi.zarr --set prompts.n=16

    Parameters
    ----------
    spec
        A .yaml or .toml file.
    out
        Results folder, in place of the spec's.
    set_
        key.key=value, in place of what the spec says; may be given several times.
    resume
        Go on where an interrupted run stopped.
    overwrite
        Replace results that are there.
    """
    from patchsweep.engine import run as run_spec
    from patchsweep.report.show import show as print_results

    if resume and overwrite:
        raise BadInput("--resume and --overwrite exclude each other: give one")
    results = run_spec(_spec(spec, set_, out), resume=resume, overwrite=overwrite)
    print_results(results, _console())


@app.command
def plan(spec: Path, *, set_: Set = None) -> None:
    """Say what a sweep will take, without loading weights.

    Example: patchsweep plan examples/ioi.yaml

    Parameters
    ----------
    spec
        A .yaml or .toml file.
    set_
        key.key=value, in place of what the spec says; may be given several times.
    """
    from patchsweep.engine import plan_spec
    from patchsweep.report.show import plan_table

    _console().print(plan_table(plan_spec(_spec(spec, set_, None))))


@app.command
def show(results: Path) -> None:
    """Top cells, detections, warnings and provenance, in the terminal.

    Example: patchsweep show ioi.zarr

    Parameters
    ----------
    results
        A results folder.
    """
    from patchsweep.report.show import show as print_results
    from patchsweep.results import open as open_results

    print_results(open_results(results), _console())


@app.command
def plot(results: Path, *, out: Path | None = None) -> None:
    """Draw heatmaps as PNG and SVG.

    Example: patchsweep plot ioi.zarr --out figures

    Parameters
    ----------
    results
        A results folder.
    out
        Folder for the figures; beside the results if left out.
    """
    from patchsweep.report.figures import plot as draw
    from patchsweep.results import open as open_results

    folder = out or results.with_name(f"{results.stem}-figures")
    for path in draw(open_results(results), folder):
        print(path)


@app.command
def export(results: Path, table: Path) -> None:
    """Write one row per patching experiment, one column per metric, as Parquet.

    Example: patchsweep export ioi.zarr ioi.parquet

    Parameters
    ----------
    results
        A results folder.
    table
        The Parquet file to write.
    """
    from patchsweep.results import open as open_results

    open_results(results).export(table)
    print(table)


@app.command
def tasks() -> None:
    """The prompt tasks that are built in, with an example of each.

    Example: patchsweep tasks
    """
    from patchsweep.loading import load_tokenizer
    from patchsweep.tasks import TASKS, build

    tokenizer = load_tokenizer("smollm2-135m")
    for name in TASKS:
        pair = build(name, tokenizer, 1)[0]
        print(name)
        for run_name in ("clean", "corrupt"):
            print(f"  {run_name + ':':9}{tokenizer.decode(getattr(pair, run_name))}")
        print(f"  {'answer:':9}{tokenizer.decode(pair.answer)!r}", end="")
        print(f", wrong: {tokenizer.decode(pair.wrong)!r}, labels: {', '.join(pair.labels)}")


@app.command
def models() -> None:
    """Which families run on the wavefront, and how each was checked.

    Example: patchsweep models
    """
    from patchsweep.families import FAMILIES, HOW

    table = Table(box=None, pad_edge=False)
    for heading in ("family", "blocks", "components", "checked to"):
        table.add_column(heading)
    for family in FAMILIES:
        table.add_row(family.name, family.blocks, family.components, family.checked)
    console = _console()
    console.print(table)
    console.print(HOW)


def _spec(path: Path, overrides: list[str] | None, out: Path | None):  # type: ignore[no-untyped-def]
    from patchsweep.spec import load_spec

    given = overrides or []
    return load_spec(path, [*given, f"out={out}"] if out else given)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 100)
