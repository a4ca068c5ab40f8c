"use strict";
// Shows what the page's data hold. A cell is a number in [layer, unit, position], flattened.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const LONGEST = 20; // characters of a token on an axis

// What is chosen.
const components = () => data.alignments[+$("align").value].components;
const component = () => components()[+$("component").value];
const way = () => component().ways[+$("way").value];
const pair = () => ($("pair").value === "all" ? -1 : +$("pair").value);
const metric = () => $("metric").value;
const width = () => component().positions.length;
const place = (cell) => {
  const c = component(), p = cell % width(), rest = (cell - p) / width();
  return { layer: Math.floor(rest / c.units.length), unit: rest % c.units.length, position: p };
};

function element(name, attributes = {}, text = "") {
  const svg = ["svg", "rect", "text", "circle", "line", "path", "pattern"].includes(name);
  const e = svg ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  if (text !== "") e.textContent = text;
  return e;
}

function fill(id, options) { // [value, label] each; what was chosen stays if it is still there
  const select = $(id), before = select.value;
  select.replaceChildren(...options.map(([value, label]) => element("option", { value }, label)));
  if (options.some(([value]) => String(value) === before)) select.value = before;
  select.parentElement.style.display = options.length > 1 ? "" : "none";
}

const number = (x, digits = 4) => (x === null || x === undefined ? "–"
  : x !== 0 && Math.abs(x) < 1e-3 ? x.toExponential(digits - 1) : String(+x.toPrecision(digits)));
const signed = (x, digits = 4) => (x > 0 ? "+" : "") + number(x, digits);
const quoted = (t) => (t ? JSON.stringify(t) : "");

function values(name) { // the shown number of every cell: an effect, or an estimate of it
  const m = way().metrics[name], p = pair();
  if (p < 0) return m[$("shown").value];
  return m.changes[p].map((x) => (x === null ? null : m.span === null ? x
    : m.span[p] === 0 ? null : x / m.span[p]));
}

function tokens(position) {
  const t = component().tokens;
  if (pair() < 0) return t.all[position];
  const [a, b] = [t.clean[pair()][position], t.corrupt[pair()][position]];
  return a === b ? a : `${a}/${b}`;
}

function drawable(token) { // its spaces visible, its line breaks escaped, not too long
  const text = quoted(token).slice(1, -1).replaceAll('\\"', '"').replaceAll(" ", "·");
  return text.length > LONGEST ? `${text.slice(0, LONGEST - 1)}…` : text;
}

function cellName(cell) {
  const c = component(), at = place(cell), layer = c.layers[at.layer];
  return c.unit ? `${layer}.${c.units[at.unit]}` : `${layer}`;
}

// What a picture shows: rows × columns of a number, a cell or a window each.
function picture() {
  const c = component(), view = $("view").value, positions = c.positions.map((name, i) => {
    const label = c.labels[i] ? `${c.labels[i]} ${name}` : name;
    const few = pair() < 0 && c.counts[i] < data.pairs ? `  n=${c.counts[i]}` : "";
    return (tokens(i) ? `${drawable(tokens(i))}  ${label}` : label) + few;
  });
  if (view.startsWith("window")) {
    const [, size, which] = view.split(" "), grid = way().metrics[metric()].windows[size];
    return { rows: grid[+which].map((_, i) => i), columns: positions, y: "first layer",
      x: "position",
      at: (i, j) => ({ value: grid[+which][i][j], window: `${size} ${i} ${j}` }) };
  }
  const v = values(metric()), byUnit = view === "unit", fixed = +$("fixed").value;
  const others = byUnit ? width() : c.units.length;
  const at = (i, j) => {
    let best = null; // the largest; what was not run may have an effect where the others have none
    const size = (cell) => (v[cell] === null ? Number.MIN_VALUE : Math.abs(v[cell]));
    for (let k = 0; k < others; k++) {
      if (fixed >= 0 && k !== fixed) continue;
      const cell = (i * c.units.length + (byUnit ? j : k)) * width() + (byUnit ? k : j);
      if (best === null || size(cell) > size(best)) best = cell;
    }
    return { value: v[best], cell: best };
  };
  return { rows: c.layers, columns: byUnit ? c.units : positions, y: "layer",
    x: byUnit ? c.unit : "position", at };
}

const scaleText = () => way().scale[metric()];
const chosenPairs = () => (pair() < 0 ? (data.pairs === 1 ? "n = 1 pair" : `n = ${data.pairs} pairs`)
  : `pair ${pair()} of ${data.pairs}`);

function drawMap() {
  const p = picture(), all = p.rows.map((_, i) => p.columns.map((_, j) => p.at(i, j)));
  const known = all.flat().map((x) => x.value).filter((x) => x !== null && x !== undefined);
  const limit = Math.max(...known.map(Math.abs), 0) || 1, middle = (data.colours.length - 1) / 2;
  const look = ({ value, cell }) => {
    if (value === null || value === undefined) return { class: "missing" };
    const m = way().metrics[metric()], idle = cell !== undefined && m.phrases[(pair() < 0
      ? m.status : m.statuses[pair()])[cell]].endsWith("structural") && value === 0;
    return { fill: idle ? "url(#idle)" : data.colours[Math.round(middle + (middle * value) / limit)] };
  };
  const room = Math.max(320, Math.min(560, $("panels").clientWidth - 790)); // beside the numbers
  const w = Math.max(7, Math.min(30, room / p.columns.length));
  const h = Math.max(7, Math.min(p.rows.length < 8 ? 40 : 18, 520 / p.rows.length));
  const long = Math.max(...p.columns.map((x) => String(x).length)), turned = long * 7 > w;
  const left = 46, below = (turned ? long * 6.5 + 8 : 16) + 20;
  const right = left + w * p.columns.length, bottom = 6 + h * p.rows.length;
  const svg = element("svg", { width: right + 96, height: bottom + below, role: "img",
    tabindex: 0 });
  const text = (x, y, content, more = {}) =>
    svg.append(element("text", { x, y, ...more }, content));
  const hatch = element("pattern", { id: "idle", width: 6, height: 6, patternUnits: "userSpaceOnUse" });
  hatch.append(element("rect", { width: 6, height: 6, fill: data.colours[middle] }),
    element("path", { d: "M0,6 L6,0", class: "hatch" }));
  svg.append(hatch);
  all.forEach((row, i) => row.forEach((cell, j) => svg.append(element("rect", {
    x: left + j * w, y: bottom - (i + 1) * h, width: w, height: h, ...look(cell),
    ...("cell" in cell ? { "data-i": cell.cell } : { "data-w": cell.window }) }))));
  const [rowTick, columnTick] = [11 / h, 12 / w].map((k) => (i) => i % Math.ceil(k) === 0);
  p.rows.forEach((name, i) => rowTick(i) && text(left - 5, bottom - (i + 0.5) * h + 4, name,
    { "text-anchor": "end" }));
  p.columns.forEach((name, j) => {
    const x = left + (j + 0.5) * w, y = bottom + 12;
    if (!columnTick(j)) return;
    if (turned) text(x + 4, y - 4, name, { "text-anchor": "end", "xml:space": "preserve",
      transform: `rotate(-90 ${x + 4} ${y - 4})` });
    else text(x, y, name, { "text-anchor": "middle" });
  });
  text((left + right) / 2, bottom + below - 4, p.x, { "text-anchor": "middle" });
  text(12, bottom / 2, p.y, { "text-anchor": "middle", transform: `rotate(-90 12 ${bottom / 2})` });
  const bar = Math.min(bottom - 6, 260), step = bar / data.colours.length;
  data.colours.forEach((fillColour, k) => svg.append(element("rect", { x: right + 16,
    y: 6 + bar - (k + 1) * step, width: 14, height: step + 0.5, fill: fillColour })));
  [limit, 0, -limit].forEach((x, k) => text(right + 35, 12 + (k * (bar - 6)) / 2, number(x)));
  $("map").replaceChildren(svg);
  const c = component(), what = $("view").selectedOptions[0].textContent;
  const window = $("view").value.startsWith("window"); // which are run, all of them
  const estimated = $("shown").value === "estimate" && pair() < 0 && !window;
  $("caption").textContent = `${estimated ? "Estimated effect" : "Effect"} of ${c.name} on `
    + `${metric()} (${scaleText()}); ${way().name}, ${chosenPairs()}, ${what}`
    + (known.length === all.flat().length ? "" : c.estimator && !estimated
      ? "; grey: not run, only estimated" : "; grey: no value, or in too few pairs")
    + (svg.querySelector('[fill="url(#idle)"]') ? "; hatched: cannot differ, not run" : "");
  svg.setAttribute("aria-label", $("caption").textContent);
}

function drawScatter() {
  const view = $("view").value, window = view.startsWith("window");
  const nothing = !window && data.metrics.length === 1; // that it could be set against
  $("scatter").parentElement.style.display = nothing ? "none" : "";
  if (nothing) return;
  let points;
  if (window) {
    const [, size] = view.split(" "), [joint, sum] = way().metrics[metric()].windows[size];
    points = joint.flatMap((row, i) => row.map((y, j) => [sum[i][j], y,
      { "data-w": `${size} ${i} ${j}` }]));
  } else {
    const x = values($("against").value);
    points = values(metric()).map((y, i) => [x[i], y, { "data-i": i }]);
  }
  points = points.filter(([x, y]) => x !== null && y !== null && (x !== 0 || y !== 0));
  const side = 300, pad = 66, whole = side + pad + 16; // room for -1.23e-5
  const svg = element("svg", { width: whole, height: side + 46 });
  const range = (k) => points.reduce(([a, b], q) => [Math.min(a, q[k]), Math.max(b, q[k])], [0, 0]);
  const scale = (k) => {
    const [a, b] = range(k), room = (b - a) * 0.04 || 1;
    return [(v) => (v - a + room) / (b - a + 2 * room), a, b];
  };
  const [fx, x0, x1] = scale(0), [fy, y0, y1] = scale(1);
  const X = (v) => pad + side * fx(v), Y = (v) => 4 + side * (1 - fy(v));
  svg.append(element("rect",
    { x: pad, y: 4, width: side, height: side, class: "frame" }),
    element("line", { x1: X(0), x2: X(0), y1: 4, y2: 4 + side }),
    element("line", { x1: pad, x2: pad + side, y1: Y(0), y2: Y(0) }),
    ...points.map(([x, y, on]) => element("circle", { cx: X(x), cy: Y(y), r: 2.6,
      "fill-opacity": 0.55, ...on })));
  const text = (x, y, content, more) => svg.append(element("text", { x, y, ...more }, content));
  const ticks = (a, b, at, apart) => // 0 where there is room
    [a, ...([a, b].every((end) => Math.abs(at(end) - at(0)) > apart) ? [0] : []), b];
  for (const v of ticks(x0, x1, X, 45)) text(X(v), side + 18, number(v, 3), { "text-anchor": "middle" });
  for (const v of ticks(y0, y1, Y, 14)) text(pad - 4, Y(v) + 4, number(v, 3), { "text-anchor": "end" });
  const [xName, yName] = window ? ["sum of single layers", "patched together"]
    : [$("against").value, metric()];
  text(pad + side / 2, side + 36, xName, { "text-anchor": "middle" });
  text(11, side / 2, yName, { "text-anchor": "middle", transform: `rotate(-90 11 ${side / 2})` });
  $("scatter").replaceChildren(svg);
  $("against-caption").textContent = `${yName} against ${xName}: ${points.length} `
    + `${window ? "windows" : "cells"}, without those that are 0 in both`;
}

function table(columns, rows, numeric) {
  const t = element("table");
  const cell = (name, x, j) => element(name, j >= numeric ? { class: "n" } : {}, x);
  for (const [k, row] of [columns, ...rows].entries()) {
    const tr = element("tr");
    tr.append(...row.map((x, j) => cell(k ? "td" : "th", x, j)));
    t.append(tr);
  }
  return t;
}

function metricRow(name, cell) {
  const m = way().metrics[name], p = pair();
  const estimate = m.estimate ? [signed(m.estimate[cell])] : [];
  if (p < 0) {
    const ends = [m.low[cell], m.high[cell]];
    const ci = ends[0] === null ? "–" : ends.map((x) => signed(x, 3)).join(" … ");
    return [name, m.phrases[m.status[cell]], number(m.patched[cell]), signed(m.effect[cell]), ci,
      ...estimate];
  }
  const change = m.changes[p][cell], patched = change === null ? null : m.destination[p] + change;
  const effect = change === null || !m.span ? change : m.span[p] ? change / m.span[p] : null;
  return [name, m.phrases[m.statuses[p][cell]], number(patched), signed(effect), "–", ...estimate];
}

function cellHead(cell) {
  const c = component(), at = place(cell);
  return `${c.name}${c.unit ? `, ${c.unit}` : ", layer"} ${cellName(cell)}, position `
    + `${c.positions[at.position]} ${quoted(tokens(at.position))}`;
}

function tell({ i, w }) { // the numbers of a cell, or of a window
  if (i !== undefined) {
    const how = component().estimator, estimate = how ? ["estimate"] : [];
    $("hover").replaceChildren(element("h3", {}, cellHead(+i)), element("p", { class: "note" },
      `${way().name}, ${chosenPairs()}${how ? `, estimate by ${how}` : ""}`),
    table(["metric", "status", "patched", "effect", "95 % interval", ...estimate],
      data.metrics.map((name) => metricRow(name, +i)), 2));
  } else if (w !== undefined) {
    const [size, first, p] = w.split(" ").map(Number);
    const rows = data.metrics.map((name) => [name, ...way().metrics[name].windows[size]
      .map((grid) => signed(grid[first][p]))]);
    $("hover").replaceChildren(element("h3", {}, `${component().name}, layers ${first} to `
      + `${first + size - 1}, position ${component().positions[p]} ${quoted(tokens(p))}`),
    table(["metric", "patched together", "sum of single layers"], rows, 1));
  }
}

let at = null; // row and column that the arrow keys have come to

function goOn(event) {
  const step = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const { rows, columns } = picture(), ends = [rows.length - 1, columns.length - 1];
  at = at ? at.map((x, k) => Math.max(0, Math.min(ends[k], x + step[k]))) : [ends[0], 0];
  const marks = $("map").querySelectorAll("[data-i], [data-w]");
  const mark = marks[at[0] * columns.length + at[1]];
  $("map").querySelector(".at")?.classList.remove("at");
  mark.classList.add("at");
  tell(mark.dataset);
}

function drawDetections() {
  const m = way().metrics[metric()], rows = m.detections.slice(0, 100).map((cell) => {
    const [, status, patched, effect, interval] = metricRow(metric(), cell);
    const at = place(cell).position, t = component().tokens.all[at];
    const where = `${component().positions[at]} ${quoted(t)}`;
    return [cellName(cell), where, status, patched, effect, interval];
  });
  const more = m.detections.length - rows.length;
  $("detections").replaceChildren(element("p", { class: "note" }, `${component().name}, `
    + `${metric()}, ${way().name}, over all pairs: ${m.detections.length} `
    + `${m.detections.length === 1 ? "cell" : "cells"}`
    + (more ? `, the largest ${rows.length} of them here` : "")), ...(rows.length ? [table(
    [component().unit ? `layer.${component().unit}` : "layer", "position", "status", "patched",
      "effect", "95 % interval"], rows, 3)] : []));
}

function refresh() {
  fill("align", data.alignments.map((a, i) => [i, a.name]));
  fill("component", components().map((c, i) => [i, c.name]));
  const c = component(), name = c.unit, all = ["all", `all ${data.pairs}, ${way().normalised
    ? "ratio of means" : "mean"}`];
  fill("way", c.ways.map((w, i) => [i, w.name]));
  fill("metric", data.metrics.map((m) => [m, m]));
  fill("against", data.metrics.filter((m) => m !== metric()).map((m) => [m, m]));
  const pairs = data.pairs === 1 ? 0 : data.pairs_here;
  fill("pair", [all, ...Array.from({ length: pairs }, (_, i) => [i, `pair ${i}`])]);
  fill("shown", [[c.shown, c.shown], ...(c.estimator && c.shown === "effect"
    ? [["estimate", "estimated effect"]] : [])]);
  const windows = Object.keys(pair() < 0 ? way().metrics[metric()].windows : {});
  fill("view", [...(name ? [["unit", `layer × ${name}`]] : []), ["position", "layer × position"],
    ...windows.flatMap((size) => [[`window ${size} 0`, `windows of ${size} layers, together`],
      [`window ${size} 1`, `windows of ${size} layers, sum of single layers`]])]);
  const names = { unit: c.positions, position: c.units }[$("view").value] ?? [];
  const other = $("view").value === "unit" ? "position" : name;
  $("rest").textContent = other;
  fill("fixed", [[-1, names.length > 1 ? `largest |effect| of all ${other}s` : "all"],
    ...(names.length > 1 ? names.map((n, i) => [i, `${other} ${n}`]) : [])]);
  const kept = [["units", `${name}s`], ["positions", "positions"]].filter(([k]) =>
    c[k].length < c.all[k]).map(([k, word]) => `${c[k].length} of ${c.all[k]} ${word}`);
  $("kept").textContent = [
    data.alignments.length > 1 ? "The prompts are of different lengths: over pairs, positions go "
      + `${data.alignments[+$("align").value].name}.` : "",
    kept.length ? `Of ${c.name} the page holds ${kept.join(" and ")}: those of largest effect.` : "",
    data.pairs_here < data.pairs ? `Of single pairs it holds the first ${data.pairs_here} of `
      + `${data.pairs}; all pairs are in what is over pairs.` : ""].join(" ").trim();
  $("audit").textContent = way().audit[metric()] ? `Prefilter: ${way().audit[metric()]}.` : "";
  drawMap();
  drawScatter();
  drawDetections();
  $("hover").replaceChildren(element("p", { class: "note" }, "Point at a cell for its numbers, or go there with the arrow keys."));
  at = null;
}

for (const select of document.querySelectorAll("select")) select.addEventListener("change", refresh);
window.addEventListener("resize", drawMap);
for (const id of ["map", "scatter"]) $(id).addEventListener("mouseover", (event) =>
  tell(event.target.dataset));
$("map").addEventListener("keydown", goOn);
refresh();
