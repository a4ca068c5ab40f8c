"""The terminal report and the figures, on small stores with planted effects."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

import patchsweep as ps
import patchsweep.results
from estimates import built
from inputs import Letters, three
from patchsweep.errors import BadInput
from patchsweep.pairs import Pair
from patchsweep.report.figures import Wanted, plot
from patchsweep.report.terminal import Asked, _effect, header, show
from patchsweep.results import Results
from patchsweep.results.heatmaps import column_names, views
from patchsweep.sites import Grid, Status, blocks
from patchsweep.store import Store

SENTENCE = "<bos> When Mary and John went to the store , gave a drink Anna Paul $x$ [/b]"
WORDS = (*SENTENCE.split(), "\n")
IDS = {word: i for i, word in enumerate(WORDS)}
LAYERS, HEADS = 30, 9
PROMPT = "<bos> When {} and {} went to the store , {} gave a drink to"


def prompt(a: str, b: str, subject: str, tail: str = "") -> tuple[int, ...]:
    words = PROMPT.format(a, b, subject).split() + ([tail] if tail else [])
    return tuple(IDS[word] for word in words)


def token_text(token: int) -> str:
    word = WORDS[token]
    return word if word in ("<bos>", "\n") else f" {word}"


ONE = [Pair(prompt("Mary", "John", "John"), prompt("Mary", "John", "Mary"), (2,), (4,))]
SEVERAL = [
    *ONE,
    Pair(prompt("Anna", "Paul", "Paul"), prompt("Anna", "Paul", "Anna"), (13,), (14,)),
    Pair(prompt("$x$", "[/b]", "[/b]", "\n"), prompt("$x$", "[/b]", "$x$", "\n"), (15,), (16,)),
]


def make(
    path: Path, pairs: list[Pair], label: str = "", metrics: tuple[str, ...] = ("logit_diff",)
) -> Results:
    """Heads and MLPs with planted effects: 0.9 at 9.6 and position 10, −0.5 at 12.3 at the end."""
    width = max(map(len, pairs))
    positions: tuple[int, ...] | tuple[str, ...] = (label,) if label else tuple(range(width))
    grids = [
        Grid(component, ("denoise", "noise"), len(pairs), LAYERS, units, positions, 2, units, 99)
        for component, units in (("head_z", HEADS), ("mlp_out", 1))
    ]
    attrs = {
        "spec": {"direction": "both"},
        "prompts": ["ioi"],
        "model": "tiny",
        "sources": [{"name": "other", "normalised": True}],
        "model_fingerprint": "f" * 64,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "zarr": "3.1.6"},
        "host": "somewhere",
        "threads": 2,
        "measured": {"seconds": 12.5, "cells_per_second": 314.159},
    }
    store = Store.create(path, grids, metrics, pairs, token_text, attrs, "float32")
    base = np.array([[3.0] * len(pairs), [-1.0] * len(pairs)])
    store.write_baseline(
        0,
        0,
        range(len(pairs)),
        dict.fromkeys(metrics, base),
        dict.fromkeys(metrics, base * 0 + 1e-6),
    )
    rng = np.random.default_rng(0)
    for grid in grids:
        effect = rng.normal(0, 0.02, grid.shape).astype(np.float32)
        effect[..., :3] = 0
        if not label:
            effect[:, :, :, :, 9, 6 % grid.units, 10] = 0.9
            effect[:, :, :, :, 12, 3 % grid.units, 14] = -0.5
        status = np.where(effect == 0, Status.STRUCTURAL, Status.EXACT).astype(np.uint8)
        values = np.empty_like(effect)
        values[0], values[1] = -1 + 4 * effect[0], 3 - 4 * effect[1]
        for i, pair in enumerate(pairs if not label else []):
            values[:, :, :, i, ..., len(pair) :] = np.nan
            status[:, :, :, i, ..., len(pair) :] = Status.OUTSIDE
        for block in blocks(grid):
            part = block.region(grid)
            store.write_block(
                block, dict.fromkeys(metrics, values[part]), dict.fromkeys(metrics, status[part])
            )
    return patchsweep.results.open(path)


def shown(results: Results, asked: Asked | None = None) -> str:
    out = io.StringIO()
    show(results, Console(file=out, width=80, color_system=None), asked)
    return out.getvalue()


def test_show_fits_80_columns_and_says_what_matters(tmp_path: Path) -> None:
    results = make(tmp_path / "r.zarr", ONE)
    text = shown(results)
    assert max(map(len, text.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "prompts 1 pair of 15 tokens (ioi)" in lines
    assert "head_z 6,480 cells exact, 1,620 structural" in lines
    assert "logit_diff 3 -1 1.0e-06" in lines
    assert "9.6 10 ' John/ Mary' 2.600 +0.900" in lines
    assert "9.6 10 ' John/ Mary' -0.6000 +0.900" in lines  # noise: 3 − 4 · 0.9
    assert "12.3 14 ' to' -3 -0.500" in lines
    assert "12 14 ' to' -3 -0.500" in lines
    assert any(line.startswith("Beyond 2 SD of the mean effect:") for line in lines)
    assert "head_z, denoise: negative: 12.3@14" in " ".join(lines)
    assert "f" * 60 not in text
    more = shown(results, Asked(provenance=True))
    lines = [" ".join(line.split()) for line in more.splitlines()]
    assert "measured seconds 12.5, cells_per_second 314.2" in lines
    assert "f" * 60 in more


def test_show_lists_warnings_and_keeps_odd_tokens(tmp_path: Path) -> None:
    odd = [Pair(prompt("$x$", "[/b]", "[/b]", "\n"), prompt("$x$", "[/b]", "$x$", "\n"), (1,))]
    path = tmp_path / "r.zarr"
    results = make(path, odd)
    (path / "completion" / "head_z" / "c" / "0").unlink()
    text = shown(results)
    assert "- head_z: 1 of 2 blocks not done; continue with --resume" in text
    assert "' [/b]/ $x$'" in text


def test_an_effect_of_nothing_has_no_sign() -> None:
    assert [_effect(x).plain for x in (-1e-9, 0.0, -0.0006, 2)] == [
        "0.000",
        "0.000",
        "-0.001",
        "+2.000",
    ]


def test_plot_writes_every_view(tmp_path: Path) -> None:
    results = make(tmp_path / "r.zarr", SEVERAL, metrics=("logit_diff", "prob"))
    files = plot(results, tmp_path / "figures", ("svg",), Wanted())
    names = {file.name for file in files}
    # Two metrics, two directions; heads have two views, MLPs one.
    assert len(files) == len(names) == 2 * 2 * 3
    assert "head_z-logit_diff-denoise-layer_head.svg" in names
    assert "mlp_out-prob-noise-layer_position.svg" in names
    assert all(file.stat().st_size > 5000 for file in files)


def test_the_planted_cell_is_red_in_the_figure(tmp_path: Path) -> None:
    results = make(tmp_path / "r.zarr", ONE)
    file = tmp_path / "head_z-logit_diff-denoise-layer_head.png"
    assert file in plot(results, tmp_path, formats=("png",))
    pixels = image.imread(file)[..., :3]
    heatmap = pixels[:, : pixels.shape[1] * 3 // 4]  # without the colour bar
    red = (heatmap[..., 0] > 0.3) & (heatmap[..., 1] < 0.1)
    rows, columns = np.nonzero(red)
    assert red.sum() > 50
    assert np.ptp(rows) < pixels.shape[0] / LAYERS
    assert np.ptp(columns) < pixels.shape[1] / HEADS


def test_a_picture_has_the_largest_with_its_sign(tmp_path: Path) -> None:
    """NaN does not count, but for where all others are 0: what was not run may have an effect."""
    results = make(tmp_path / "r.zarr", ONE)
    columns = results.columns("head_z")
    found = results.over_pairs("head_z", "logit_diff", "denoise", None, columns)
    found.effect[:] = 0
    found.effect[1, 2, [3, 4]] = 0.1, -0.7
    found.effect[1, 2, 5] = found.effect[2, 3, 6] = np.nan
    by_head, by_position = views(results, "head_z", found, columns)
    assert by_head.values[1, 2] == -0.7 and by_head.cells is not None
    assert by_head.cells[1, 2].tolist() == [1, 2, 4]
    assert np.isnan(by_head.values[2, 3])
    assert by_position.values[1, [3, 4]].tolist() == [0.1, -0.7]
    assert np.isnan(by_position.values[1, 5]) and np.isnan(by_position.values[2, 6])
    assert "1.2@4\N{NO-BREAK SPACE}-0.70, 1.2@3\N{NO-BREAK SPACE}+0.10" in by_head.note


def test_what_is_in_too_few_pairs_has_no_marks(tmp_path: Path) -> None:
    """Also where their interval excludes 0."""
    results = make(tmp_path / "r.zarr", [*SEVERAL, SEVERAL[-1]])

    def marked(min_pairs: int) -> set[int]:
        figure = results.plot("mlp_out", align="start", min_pairs=min_pairs)
        dots = np.concatenate([of.get_offsets() for of in figure.axes[0].collections])
        return set(dots[:, 0].astype(int).tolist())

    assert marked(2) - marked(3) == {15}  # two of four pairs are that long


def test_heads_that_share_keys_and_values_are_spoken_of_once(tmp_path: Path) -> None:
    def said(family: str, *components: str) -> dict[str, str]:
        model = ps.wrap(built(family)[0], Letters())
        out = tmp_path / "-".join([family, *components])
        return header(ps.sweep(model, three()[:1], components=components, out=out))

    assert said("llama", "head_k", "head_v")["shared"] == (
        "3 query heads share every key and value head: a patch of head_k or head_v reaches all 3"
    )
    assert said("llama", "head_v")["shared"].endswith("a patch of head_v reaches all 3")
    assert "shared" not in said("llama", "head_q")
    assert "shared" not in said("gpt2", "head_k")


def test_positions_are_named_by_tokens_that_all_pairs_share(tmp_path: Path) -> None:
    def named(results: Results, align: str | None = None) -> tuple[str, ...]:
        columns = results.columns("mlp_out", align)
        found = results.over_pairs("mlp_out", "logit_diff", "denoise", None, columns)
        return column_names(results, "mlp_out", columns, found.pairs)

    one = named(make(tmp_path / "a.zarr", ONE))
    assert one[1] == "·When  1"
    assert one[10] == "·John/·Mary  10"
    several = make(tmp_path / "b.zarr", SEVERAL)
    by_index = named(several, "start")
    assert by_index[1] == "·When  1"
    assert by_index[10] == "10"
    assert by_index[15] == "\\n  15  n=1"
    assert named(several)[0] == "<bos>  -16  n=1"  # of unequal length without labels: from the end


def test_all_positions_at_once(tmp_path: Path) -> None:
    results = make(tmp_path / "r.zarr", SEVERAL, label="all")
    names = {file.name for file in plot(results, tmp_path, formats=("png",))}
    assert "head_z-logit_diff-noise-layer_head.png" in names
    assert "head_z-logit_diff-noise-layer_position.png" not in names
    assert "mlp_out-logit_diff-noise-layer_position.png" in names
    assert max(map(len, shown(results).splitlines())) <= 80


def test_plot_refuses_a_place_it_cannot_write(tmp_path: Path) -> None:
    results = make(tmp_path / "r.zarr", ONE)
    (tmp_path / "file").write_text("keep")
    with pytest.raises(BadInput, match=r"cannot write figures to .*; choose another --out"):
        plot(results, tmp_path / "file" / "figures")
