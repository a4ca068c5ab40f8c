"""The page of a tiny sweep: its numbers are those of the results, and in a browser it works."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import patchsweep as ps
from patchsweep.errors import BadInput
from patchsweep.report import page_data
from patchsweep.report.figures import Wanted, _figures, plot
from patchsweep.report.page import page, write_page
from patchsweep.report.terminal import header, provenance
from patchsweep.results import Results
from patchsweep.sites import Status, unit_name
from tiny import build, pairs_of, rows, tokenizer

METRICS = ["logit_diff", "prob", "kl"]
SETTINGS: dict[str, Any] = {
    "components": ["head_z", "mlp_out"],
    "metrics": METRICS,
    "direction": "both",
    "windows": [2],
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    model = ps.wrap(build(), tokenizer())
    out = tmp_path_factory.mktemp("page") / "tiny.zarr"
    return ps.sweep(model, pairs_of(model, rows(3)), out=out, **SETTINGS)


@pytest.fixture(scope="module")
def text(results: Results) -> str:
    return page(results)


@pytest.mark.parametrize("weights", ["random, 2-bit", ""])
def test_weights_are_named(tmp_path: Path, weights: str) -> None:
    """Wherever the model is: in the attributes, in the terminal, on the page and in figures."""
    model = replace(ps.wrap(build(), tokenizer(), "tiny"), weights=weights)
    settings = SETTINGS | {"components": ["mlp_out"], "windows": []}
    results = ps.sweep(model, pairs_of(model, rows(1)), out=tmp_path / "x.zarr", **settings)
    called = "tiny: random, 2-bit" if weights else "tiny"
    assert results.attrs["weights"] == weights
    assert results.model == called
    assert header(results)["model"] == called
    assert "weights" not in provenance(results)
    assert called in page(results)
    assert weights in results.plot().axes[0].get_title()


def embedded(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def largest(effect: Any, axis: int) -> np.ndarray:
    """The value of largest absolute size along an axis, sign kept; NaN does not count unless there
    is nothing else, or only zeros beside it."""
    x = np.moveaxis(np.asarray(effect, dtype=np.float64), axis, -1)
    out = np.empty(x.shape[:-1])
    for at in np.ndindex(*out.shape):
        known = x[at][np.isfinite(x[at])]
        best = known[np.abs(known).argmax()] if known.size else np.nan
        out[at] = np.nan if not best and known.size < x[at].size else best
    return out


def components(data: Any) -> Any:
    """Those of the first alignment."""
    return data["alignments"][0]["components"]


def floats(values: Any) -> np.ndarray:
    return np.array(values, dtype=np.float64)  # None is NaN


def test_the_numbers_are_those_of_the_results(results: Results, text: str) -> None:
    """From the end, since the prompts are of unequal length, and by index."""
    data = embedded(text)
    assert data["pairs"] == data["pairs_here"] == 3
    names = [shown["name"] for shown in data["alignments"]]
    assert names == ["from the end", "by index, from the start"]
    for align, shown in zip(("end", "start"), data["alignments"], strict=True):
        assert [c["name"] for c in shown["components"]] == ["head_z", "mlp_out"]
        for c in shown["components"]:
            assert len(c["ways"]) == 2
            for way, metric in product(c["ways"], METRICS):
                found, asked = way["metrics"][metric], (c["name"], metric, way["direction"])
                check_over_pairs(results, found, asked, align)
                if align == "start":
                    check_pairs(results.to_xarray(c["name"]), found, metric, way["direction"])
        windows = shown["components"][1]["ways"][0]["metrics"]["kl"]["windows"]["2"]
        true = results.windows("mlp_out", 2, "kl", "denoise", align=align)
        for mine, whole in zip(windows, true, strict=True):
            np.testing.assert_allclose(floats(mine), whole, rtol=1e-4)


def check_over_pairs(results: Results, found: Any, asked: tuple[str, ...], align: str) -> None:
    effect = results.effect(*asked, align=align)
    low, high = results.interval(*asked, align=align)
    for key, true in (("effect", effect.values), ("low", low), ("high", high)):
        np.testing.assert_allclose(floats(found[key]), true.ravel(), rtol=1e-4)
    places = {str(p): i for i, p in enumerate(effect.position.values)}
    cells = [
        np.ravel_multi_index(
            (c.layer, getattr(c, "head", 0), places[str(c.position)]), effect.shape
        )
        for c in results.detections(*asked, align=align).itertuples()
    ]
    assert found["detections"] == cells


def check_pairs(ds: Any, found: Any, metric: str, direction: str) -> None:
    at = {"direction": direction}
    per_pair = ds[f"{metric}_effect"].sel(at).values.reshape(3, -1)
    shares = floats(found["changes"]) / floats(found["span"])[:, None]
    np.testing.assert_allclose(shares, per_pair, rtol=3e-4, atol=1e-9)
    raw = ds[metric].sel(at).values.reshape(3, -1)
    changes = floats(found["changes"])
    off = np.abs(changes + floats(found["destination"])[:, None] - raw)
    assert (off <= 1e-4 * np.abs(changes) + 1e-6)[np.isfinite(raw)].all()
    assert np.array_equal(np.isfinite(raw), np.isfinite(changes))
    status = ds[f"{metric}_status"].sel(at).values.reshape(3, -1)
    words = [[found["phrases"][x] for x in one] for one in found["statuses"]]
    assert words == [[STATUS[s] for s in one] for one in status]


STATUS = {1: "exact", 2: "structural", 4: "outside"}


def test_the_table_in_the_page_is_the_tidy_table(results: Results, text: str) -> None:
    found = re.search(r'href="data:application/gzip;base64,([^"]*)"', text)
    assert found
    table = pd.read_csv(io.BytesIO(gzip.decompress(base64.b64decode(found[1]))))
    frame = results.to_frame()
    assert list(table.columns) == list(frame.columns)
    assert len(table) == len(frame)
    for metric in METRICS:
        np.testing.assert_allclose(table[metric], frame[metric], rtol=1e-6)


@pytest.mark.parametrize("limit", ["TABLE_NUMBERS", "TABLE_BYTES"])
def test_a_large_table_is_left_out(
    results: Results, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"patchsweep.report.page.{limit}", 100)
    text = page(results)
    assert "base64" not in text
    assert f"The tidy table ({len(results.to_frame()) + outside(results):,} rows)" in text


def outside(results: Results) -> int:
    return sum(results.counts(c, "kl")[Status.OUTSIDE] for c in results.components)


def test_a_large_grid_keeps_what_is_largest(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_data, "OVER_PAIRS", 2 * 72 * page_data.NUMBERS * 6)  # aligned twice
    monkeypatch.setattr(page_data, "OF_PAIRS", 2 * 2 * 72 * 6)
    heads, mlp = components(page_data.page_data(results))
    assert len(mlp["positions"]) * 3 <= 36
    assert len(heads["units"]) == 2 < heads["all"]["units"]
    assert len(heads["units"]) * len(heads["positions"]) * 3 <= 48
    best = results.top("head_z", "logit_diff", "denoise").iloc[0]
    number = heads["units"].index(int(best["head"])), heads["positions"].index(str(best.position))
    shape = (3, len(heads["units"]), len(heads["positions"]))
    effect = floats(heads["ways"][0]["metrics"]["logit_diff"]["effect"]).reshape(shape)
    assert effect[best.layer][number] == pytest.approx(best.effect, rel=1e-4)


def test_no_page_is_large(text: str) -> None:
    """By the size of a number here, without the text that every page has."""
    data = embedded(text)
    every = [c for shown in data["alignments"] for c in shown["components"]]
    cells = 2 * len(METRICS) * sum(len(c["ways"][0]["metrics"]["kl"]["effect"]) for c in every)
    numbers = cells * (page_data.NUMBERS + data["pairs_here"])
    size = len(json.dumps(data["alignments"], separators=(",", ":")))
    assert size / numbers * (page_data.OVER_PAIRS + page_data.OF_PAIRS) < 4e6
    assert len(text) - size < 60_000


def test_sets_alone(tmp_path: Path) -> None:
    """No map, so no script; but every set by every metric, and a figure of them with intervals."""
    model = ps.wrap(build(2), tokenizer())
    both = {"a pair of heads": ["head_z.0.1@3", "head_z.1.2@4"], "one": ["mlp_out.0@2"]}
    given: dict[str, Any] = {"sets": both, "metrics": METRICS[:2], "direction": "both"}
    results = ps.sweep(model, pairs_of(model, rows(2)), out=tmp_path / "r.zarr", **given)
    text = page(results)
    assert "<script" not in text
    for direction, metric in product(["denoise", "noise"], METRICS[:2]):
        assert f"<h2>Sets, {direction}: largest effects on {metric}</h2>" in text
        for cell in results.top("sets", metric, direction).itertuples():
            assert f'<td class="">{cell.set}</td>' in text
            assert f"{cell.effect:+.3f}" in text
    names = {file.name for file in plot(results, tmp_path, ("svg",), Wanted())}
    assert names == {"sets-logit_diff.svg", "sets-prob.svg"}
    axes = next(figure for name, figure in _figures(results, Wanted()) if name == "sets-prob").axes[
        0
    ]
    drawn = [bar.get_width() for bars in axes.containers[1::2] for bar in bars]
    effects = [results.effect("sets", "prob", d).values[0, 0] for d in ("denoise", "noise")]
    np.testing.assert_allclose(drawn, np.concatenate(effects))


def test_every_source_has_its_windows_and_sets(tmp_path: Path) -> None:
    """And its own tokens: no corrupt prompt was run."""
    model = ps.wrap(build(2), tokenizer())
    mean = {"mean": {"prompts": "clean", "by": "position"}}
    given: dict[str, Any] = {"source": ["zero", mean], "direction": "noise", "windows": [2]}
    given |= {"sets": {"one": ["mlp_out.0@2"]}, "components": ["mlp_out"]}
    pairs = pairs_of(model, rows(2))
    named = [replace(p, origin=name) for p, name in zip(pairs, ("ioi", "p.jsonl"), strict=True)]
    results = ps.sweep(model, named, out=tmp_path / "r.zarr", **given)
    # Where pairs are from is for titles: the same sweep goes on without it.
    ps.sweep(model, pairs, out=tmp_path / "r.zarr", resume=True, **given)
    text = page(results)
    assert f"<h1>{model.name}, ioi + p.jsonl, 2 pairs</h1>" in text
    [component] = components(embedded(text))
    sums = []
    for way in component["ways"]:
        asked = "mlp_out", 2, "logit_diff", "noise", way["source"]
        joint, total = results.windows(*asked)
        assert np.array_equal(joint[0, 2], results.effect("sets", *asked[2:])[0, 0, 2])
        found = way["metrics"]["logit_diff"]["windows"]["2"]
        for mine, true in zip(found, (joint, total), strict=True):
            np.testing.assert_allclose(floats(mine), true, rtol=1e-4)
        sums.append(total)
        assert f"<h2>Sets, noise, from {way['source']}: largest" in text
    assert not np.array_equal(*sums)
    names = {file.name for file in plot(results, tmp_path, formats=("svg",))}
    for source in ("zero", "mean"):
        assert f"mlp_out-logit_diff-noise-{source}-window_2_joint.svg" in names
        assert f"sets-logit_diff-{source}.svg" in names
    assert component["tokens"]["corrupt"] == component["tokens"]["clean"]
    assert results.store.read("prompts/corrupt_text").tolist() != component["tokens"]["clean"]


def test_hostile_names_do_not_leave_the_data(tmp_path: Path) -> None:
    """A model's name, and a token, that would close the script element."""
    model = ps.wrap(build(2), Hostile(), "</script><b>")
    pairs = pairs_of(ps.wrap(build(2), tokenizer()), rows(1))
    text = page(ps.sweep(model, pairs, components=["mlp_out"], out=tmp_path / "r.zarr"))
    assert components(embedded(text))[0]["tokens"]["clean"][0][0] == "</script><b>"
    assert text.count("</script>") == 2
    assert "<b>" not in text


class Hostile:
    def decode(self, tokens: list[int]) -> str:  # noqa: ARG002
        return "</script><b>"


def test_a_place_that_cannot_be_written(results: Results, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    with pytest.raises(BadInput, match=r"cannot write .*; choose another --out"):
        write_page(results, tmp_path / "file" / "report.html")


def test_results_plot(results: Results) -> None:
    figure = results.plot("head_z", "prob", "noise", "layer_position")
    drawn = figure.axes[0].images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(drawn, largest(results.effect("head_z", "prob", "noise"), 1))
    assert "n = 3 pairs" in figure.axes[0].get_title()
    assert results.plot().axes[0].get_xlabel() == unit_name("head_z")
    with pytest.raises(BadInput, match="no view 'x' in these results: use one of layer_head"):
        results.plot(view="x")


def test_layers_in_parts_change_nothing(
    results: Results, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "head_z", "kl", "noise"
    whole = [*results.interval(*asked), results.p_values(*asked)]
    monkeypatch.setattr("patchsweep.results.effects.AT_ONCE", 1)
    parts = [*results.interval(*asked), results.p_values(*asked)]
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    again = components(page_data.page_data(results))[0]["ways"][0]["metrics"]["kl"]
    found = components(embedded(text))[0]["ways"][0]["metrics"]["kl"]
    for key in ("low", "changes", "status", "statuses"):
        assert found[key] == again[key]


# In a browser.

PROBE = """
<script>
const steps = STEPS;
const rowsOf = (id) => [...document.querySelectorAll(`#${id} tr`)].map((tr) =>
  [...tr.children].map((cell) => cell.textContent));
const found = steps.map(({ choose, over }) => {
  for (const [id, value] of Object.entries(choose)) {
    const select = document.getElementById(id);
    select.value = String(value);
    select.dispatchEvent(new Event("change"));
  }
  const marks = [...document.querySelectorAll("#map [data-i], #map [data-w]")];
  const mark = marks[over];
  mark.scrollIntoView({ block: "center" });
  const box = mark.getBoundingClientRect();
  const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  hit.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
  return { marks: marks.map((m) => m.dataset.i ?? m.dataset.w),
    fills: marks.map((m) => m.getAttribute("fill") ?? m.getAttribute("class")),
    caption: document.getElementById("caption").textContent,
    head: document.querySelector("#hover h3").textContent, rows: rowsOf("hover"),
    detections: rowsOf("detections").length,
    points: document.querySelectorAll("#scatter circle").length };
});
const keys = ["ArrowRight", "ArrowDown"].map((key) => {
  const press = new KeyboardEvent("keydown", { key, bubbles: true });
  document.querySelector("#map svg").dispatchEvent(press);
  return document.querySelector("#hover h3").textContent;
});
const requests = performance.getEntriesByType("resource").length;
document.body.append(Object.assign(document.createElement("pre"),
  { id: "found", textContent: JSON.stringify({ found, keys, requests }) }));
</script>
"""


def browse(text: str, folder: Path) -> tuple[str, list[str]]:
    """The document after its scripts, and what they wrote to the console."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium, which is not installed (Debian: apt-get install chromium)")
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options += ["--disable-background-networking", f"--user-data-dir={folder / 'profile'}"]
    options += ["--enable-logging=stderr", "--window-size=1300,1600", "--virtual-time-budget=5000"]
    command = [CHROMIUM, *options, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


STEPS: list[dict[str, Any]] = [
    {"choose": {}, "over": 5},
    {"choose": {"metric": "kl", "way": 1}, "over": 5},
    {"choose": {"pair": 1, "view": "position"}, "over": 10},
    {"choose": {"fixed": 2}, "over": 10},
    {"choose": {"pair": "all", "component": 1, "view": "window 2 1", "way": 0}, "over": 9},
]


def test_in_a_browser(results: Results, text: str, tmp_path: Path) -> None:
    """Switches and hover show what the results say; nothing is asked of a network."""
    probe = PROBE.replace("STEPS", json.dumps(STEPS))
    document, console = browse(text.replace("</body>", f"{probe}</body>"), tmp_path)
    assert console == []
    said = re.search(r'<pre id="found">(.*?)</pre>', document, re.S)
    assert said
    told = json.loads(html.unescape(said[1]))
    assert told["requests"] == 0
    first, second, third, fourth, window = told["found"]

    effect = results.effect("head_z", "logit_diff", "denoise").values
    layers, heads, width = effect.shape
    best = np.abs(np.nan_to_num(effect)).argmax(2).ravel() + np.arange(layers * heads) * width
    assert list(map(int, first["marks"])) == best.tolist()
    assert_row(first, results, "denoise", int(best[5]))
    assert first["head"].startswith("head_z, head 1.1, position ")
    assert first["detections"] == 1 + len(results.detections("head_z", "logit_diff", "denoise"))
    assert_hottest(first, text, largest(effect, 2))
    other = results.effect(
        "head_z", "prob", "denoise"
    ).values  # what the first metric is set against
    assert first["points"] == int(((effect != 0) | (other != 0))[np.isfinite(effect + other)].sum())

    assert_row(second, results, "noise", int(second["marks"][5]))
    assert "on kl" in second["caption"] and "noise, n = 3 pairs" in second["caption"]
    assert second["fills"] != first["fills"]

    one = results.to_xarray("head_z").kl_effect.sel(direction="noise").values[1]
    assert "pair 1 of 3" in third["caption"]
    assert len(third["marks"]) == layers * width
    assert_hottest(third, text, largest(one, 1))
    assert number(third, "kl", 3) == pytest.approx(one.ravel()[int(third["marks"][10])], rel=1e-3)
    cell = np.ravel_multi_index((10 // width, 2, 10 % width), effect.shape)
    assert int(fourth["marks"][10]) == cell
    assert number(fourth, "kl", 3) == pytest.approx(one.ravel()[cell], rel=1e-3)

    assert [head.split(", position")[0] for head in told["keys"]] == [
        "mlp_out, layers 1 to 2",
        "mlp_out, layers 0 to 1",
    ]
    joint, total = results.windows("mlp_out", 2, "kl", "denoise")
    assert number(window, "kl", 1) == pytest.approx(joint.ravel()[9], rel=1e-3)
    assert number(window, "kl", 2) == pytest.approx(total.ravel()[9], rel=1e-3)
    assert_hottest(window, text, total)
    assert window["points"] == int(((joint != 0) | (total != 0))[np.isfinite(joint + total)].sum())


EVERY = """
<script>
const options = (id) => [...document.getElementById(id).options].map((o) => o.value);
const choose = (id, value) => {
  const select = document.getElementById(id);
  select.value = value;
  select.dispatchEvent(new Event("change"));
};
const walk = ([id, ...more], then) => {
  for (const value of options(id)) {
    choose(id, value);
    if (more.length) walk(more, then); else then();
  }
};
const seen = [];
walk(["align", "component", "way", "pair", "shown", "view", "fixed"], () => {
  const mark = document.querySelector("#map [data-i], #map [data-w]");
  mark.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
  seen.push([document.getElementById("caption").textContent, document.getElementById("audit")
    .textContent, [...document.querySelectorAll("#hover td")].map((x) => x.textContent).join(" ")]);
});
document.body.append(Object.assign(document.createElement("pre"),
  { id: "found", textContent: JSON.stringify(seen) }));
</script>
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"prefilter": {"keep": 4, "audit": 4}, "edges": "eap"},
        {"estimate": True, "direction": "denoise"},
        {"source": ["zero", "resample"], "direction": "noise", "positions": "all"},
    ],
    ids=["prefilter", "estimate", "sources"],
)
def test_everything_that_can_be_chosen(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of a prefilter with edges, of estimates alone, of sources without and with a run."""
    model = ps.wrap(build(2), tokenizer())
    pairs = pairs_of(model, rows(2))
    given = {"components": ["head_z", "mlp_out"], "metrics": ["logit_diff"], **settings}
    results = ps.sweep(model, pairs, out=tmp_path / "r.zarr", **given)
    text = page(results)
    data = embedded(text)
    document, console = browse(text.replace("</body>", f"{EVERY}</body>"), tmp_path)
    assert console == []
    said = re.search(r'<pre id="found">(.*?)</pre>', document, re.S)
    assert said
    seen = json.loads(html.unescape(said[1]))
    asked = "head_z", "logit_diff", components(data)[0]["ways"][0]["direction"]
    first = components(data)[0]["ways"][0]["metrics"]["logit_diff"]
    assert not any("NaN" in word or "undefined" in word for words in seen for word in words)
    if "prefilter" in settings:
        verdict = results.audit(*asked)
        assert verdict
        assert seen[0][1] == f"Prefilter: {verdict.audit.statement}."
        assert html.escape(results.top_edges("logit_diff", "denoise", 1)[0][0]) in document
        assert "estimated" in first["phrases"].values()
    if "estimate" in settings:
        assert components(data)[0]["shown"] == "estimate"
        assert seen[0][0].startswith("Estimated effect of head_z")
        estimate = results.estimated_effect(*asked).values
        np.testing.assert_allclose(floats(first["estimate"]), estimate.ravel(), rtol=1e-4)
    if "source" in settings:
        assert [way["name"] for way in components(data)[0]["ways"]] == [
            "noise, from zero",
            "noise, from resample",
        ]
        assert "(patched − destination, logits)" in seen[0][0]
        assert first["span"] is None
        figures = {name for name, _ in _figures(results, Wanted())}
        assert {f"head_z-logit_diff-noise-{s}-layer_head" for s in ("zero", "resample")} < figures
        change = results.effect(*asked, "zero").values
        np.testing.assert_allclose(floats(first["effect"]), change.ravel(), rtol=1e-4)


def assert_hottest(step: Any, text: str, values: np.ndarray) -> None:
    """The colour of the highest value of a map, whose limit is the largest absolute one."""
    colours: list[str] = embedded(text)["colours"]
    share = np.nanmax(values) / np.nanmax(np.abs(values))
    found = step["fills"][int(np.nanargmax(values))]
    assert found == colours[int(np.floor(32 + 32 * share + 0.5))]


def number(step: Any, metric: str, column: int) -> float:
    (row,) = [row for row in step["rows"] if row[0] == metric]
    return float(row[column])


def assert_row(step: Any, results: Results, direction: str, cell: int) -> None:
    """All metrics of the cell under the pointer."""
    for metric in METRICS:
        effect = results.effect("head_z", metric, direction).values.ravel()[cell]
        assert number(step, metric, 3) == pytest.approx(effect, rel=1e-3)


def test_the_browser_test_sees_errors_and_requests(tmp_path: Path) -> None:
    policy = re.search(r"<meta http-equiv.*?>", page_source(), re.S)
    assert policy
    bad = f"{policy[0]}<img src='http://127.0.0.1:9/x.png'><script>absent()</script>"
    _, console = browse(bad, tmp_path)
    assert any("absent is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)


def page_source() -> str:
    return (Path(page_data.__file__).parent / "page.html").read_text(encoding="utf-8")
