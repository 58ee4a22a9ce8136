// The live page: requests the changes since the last answer, stores them, and redraws what they affect. All text is inserted as text, never as HTML.
"use strict";

const EVERY_MS = 1000;
const MARKS_A_SECOND = 1500; // a plot with twice as many marks is drawn at most every other second
const BARS_UP_TO = 300; // with more points, only the frontier has error bars
const SYMBOLS = { o: "circle", s: "square", "^": "triangle-up", D: "diamond", v: "triangle-down" };
const OTHER_KIND = "#b3b3b3";
const about = JSON.parse(document.getElementById("about").textContent);
const sections = { points: {}, trainings: {}, before: {}, spans: {}, frontier: {}, counts: {}, failed: {}, timeline: {}, at_work: {} };
let cursor = "", drive = {}, chosen = null, trainings = [], loaded = false, restored = false;
const shownCurves = new Map(), curves = new Set(); // the curves read so far; of which trainings they are whole
const CURVES = 12, CURVE_COLOURS = ["#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999933"];

const at = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const usd = (dollars) => (dollars === null || dollars === undefined ? "" : `, $${dollars.toFixed(2)}`);
const short = (key) => key.slice(0, 12);
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");
const title = (objective) => objective.label.replace(/, (higher|lower) is better/, "");
const label = (text) => plain(text).replace(/, (higher|lower) is better/, " ($1 is better)");

function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const two = (number) => String(number).padStart(2, "0");
  return whole < 7200 ? `${Math.floor(whole / 60)}:${two(whole % 60)}` : `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
}

function element(tag, content, attributes = {}) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...[content].flat());
  return node;
}

// Fills a table. A column name that begins with # marks a numeric column; a cell is text or an element.
function fill(table, columns, rows, empty) {
  const numeric = columns.map((name) => (name.startsWith("#") ? { class: "number" } : {}));
  const head = element("thead", element("tr", columns.map((name, i) => element("th", name.replace("#", ""), { scope: "col", ...numeric[i] }))));
  const body = element("tbody", rows.map((row) => element("tr", row.map((cell, i) => element("td", cell, numeric[i])))));
  table.replaceChildren(...(rows.length ? [head, body] : [element("tbody", element("tr", element("td", empty, { class: "soft" })))]));
}

function layout(more) {
  const line = ink("--line"), axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  const { xaxis, yaxis, ...others } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink("--ink"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: 55, r: 15, t: 10, b: 45 }, hoverlabel: { align: "left", bgcolor: ink("--page"), font: { size: 12, color: ink("--ink") } }, uirevision: "kept",
    legend: { orientation: "h", y: -0.22 }, xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...others,
  };
}

// The buttons are listed one by one, because Plotly's default set has one that uploads the plot.
const BUTTONS = [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];
const CONFIG = { displaylogo: false, responsive: true, plotlyServerURL: "", modeBarButtons: BUTTONS };
const colourOf = (model) => ((about.looks[model] || ["#000000"])[0] === "#000000" ? ink("--ink") : about.looks[model][0]);
const symbolOf = (model) => SYMBOLS[(about.looks[model] || ["", "o"])[1]];

function interval([value, low, high, n, spread, undecided]) {
  return `${percent(value)} (95%: ${percent(low)} to ${percent(high)}, n = ${n}${undecided ? `, ${undecided} undecided` : ""}${spread === null ? "" : `; ${percent(spread)} sd between seeds`})`;
}

const brief = ([value, low, high, , , undecided]) => `${percent(value)} (${(100 * low).toFixed(1)} to ${percent(high)}${undecided ? `, ${undecided} undecided` : ""})`;

function hoverOf(row, same) {
  const lines = [`<b>point ${row.number}: ${plain(row.model)}</b>`, plain(row.settings)];
  for (const one of about.objectives) lines.push(`${plain(title(one))} ${interval(row.metrics[one.name])}`);
  if (same.length) lines.push(`the same adapters: point${same.length > 1 ? "s" : ""} ${same.slice(0, 8).join(", ")}${same.length > 8 ? ", …" : ""}`);
  lines.push(`seeds ${row.seeds.join(", ")}; cost alone ${plain(row.cost)}`);
  for (const [part, key] of Object.entries(row.keys)) lines.push(`${part} ${short(key)}`);
  return lines.join("<br>");
}

function errorBars(metrics, colour) {
  const bars = { type: "data", symmetric: false, thickness: 0.8, width: 0, color: colour };
  return { ...bars, array: metrics.map(([value, , high]) => high - value), arrayminus: metrics.map(([value, low]) => value - low) };
}

function marks(rows, model, look) {
  const [first, last] = [about.objectives[0].name, about.objectives.at(-1).name], two = about.objectives.length > 1;
  const colour = colourOf(model), ofX = rows.map((row) => row.metrics[first]), ofY = rows.map((row) => row.metrics[last]);
  return {
    type: "scatter", mode: "markers", x: two ? ofX.map(([value]) => value) : rows.map((row) => row.number), y: ofY.map(([value]) => value),
    ...(look.bars ? { error_y: errorBars(ofY, colour), ...(two ? { error_x: errorBars(ofX, colour) } : {}) } : {}),
    marker: {
      symbol: rows.map((row) => symbolOf(model) + (row.defended ? "" : "-open")), size: look.size, color: colour, opacity: look.opacity,
      line: { color: colour, width: 1.5 },
    },
    customdata: rows.map((row) => row.number), text: rows.map((row) => hoverOf(row, look.same[row.number] || [])), hovertemplate: "%{text}<extra></extra>", name: model, legendgroup: model, showlegend: false,
  };
}

function drawFrontier() {
  const all = Object.values(sections.points), lowest = {}, firstOf = (row) => `${row.model}/${row.same_as === null ? row.number : row.same_as}`;
  for (const row of all) lowest[firstOf(row)] = Math.min(row.number, lowest[firstOf(row)] ?? row.number);
  const rows = all.filter((row) => lowest[firstOf(row)] === row.number), same = {}, front = sections.frontier[""] || { by_model: {}, all: [] };
  const two = about.objectives.length > 1, [first, last] = [about.objectives[0], about.objectives.at(-1)];
  const traces = [], bars = rows.length <= BARS_UP_TO;
  for (const row of all) if (row.same_as !== null) (same[row.same_as] = same[row.same_as] || []).push(row.number);
  for (const model of Object.keys(about.looks)) {
    const on = new Set(front.by_model[model] || []), own = rows.filter((row) => row.model === model);
    const best = own.filter((row) => on.has(row.number)).sort((a, b) => a.metrics[first.name][0] - b.metrics[first.name][0]);
    const shape = first.label.includes("higher") ? "vh" : "hv", line = { color: colourOf(model), width: 2, shape: two ? shape : "linear" };
    if (own.length) traces.push(marks(own.filter((row) => !on.has(row.number)), model, { bars, same, size: 7, opacity: 0.45 }));
    if (two && best.length) {
      const corners = { x: best.map((row) => row.metrics[first.name][0]), y: best.map((row) => row.metrics[last.name][0]) };
      traces.push({ type: "scatter", mode: "lines", ...corners, line, name: `${plain(model)}: frontier`, legendgroup: model, hoverinfo: "skip" });
    }
    if (best.length) traces.push(marks(best, model, { bars: true, same, size: 10, opacity: 1 }));
    const before = sections.before[model];
    if (two && before && before[first.name] && before[last.name]) {
      const [x, y] = [before[first.name], before[last.name]], text = `<b>${plain(model)} before fine-tuning</b><br>${plain(title(first))} ${interval(x)}<br>${plain(title(last))} ${interval(y)}`;
      traces.push({
        type: "scatter", mode: "markers", x: [x[0]], y: [y[0]], error_x: errorBars([x], colourOf(model)), error_y: errorBars([y], colourOf(model)),
        marker: { symbol: "star", size: 15, color: colourOf(model), line: { color: ink("--ink"), width: 1 } }, text: [text], hovertemplate: "%{text}<extra></extra>",
        name: `${plain(model)} before fine-tuning`, legendgroup: model,
      });
    }
  }
  const picked = rows.filter((row) => (front.picked || []).includes(row.number));
  if (picked.length) {
    const ring = { symbol: "circle-open", size: 20, color: ink("--ink"), line: { color: ink("--ink"), width: 2 } };
    traces.push({
      type: "scatter", mode: "markers", x: two ? picked.map((row) => row.metrics[first.name][0]) : picked.map((row) => row.number), y: picked.map((row) => row.metrics[last.name][0]),
      marker: ring, customdata: picked.map((row) => row.number), text: picked.map((row) => hoverOf(row, same[row.number] || [])), hovertemplate: "%{text}<extra></extra>", name: "picked",
    });
  }
  const whole = traces.length ? {} : { range: [0, 1] }; // an empty plot would go from -100% to 400%
  const xaxis = two ? { title: { text: label(first.label) }, tickformat: ".1~%", ...whole } : { title: { text: "point" } };
  Plotly.react("frontier", traces, layout({ xaxis, yaxis: { title: { text: label(last.label) }, tickformat: ".1~%", ...whole }, hovermode: "closest" }), CONFIG);
  at("frontier").setAttribute("aria-label", rows.length ? `Scatter plot of ${rows.length} points: ${last.label}, against ${two ? first.label : "the point's number"}. The table below has its frontier.` : noPoint());
  const notes = ["Large marks: not dominated by any other point of the model. Filled: defended; hollow: not defended. Bars: 95% intervals. Stars: before fine-tuning."];
  if (picked.length) notes.push(`Ring: picked with ebbline pick (${picked.map((row) => `point ${row.number}`).join(", ")}).`);
  if (!bars) notes.push(`With more than ${BARS_UP_TO} points only the frontier has bars.`);
  if (all.length > rows.length) notes.push(`${all.length - rows.length} more points are not drawn, because their adapters are the same as another point's.`);
  if (about.of > 2) notes.push(`The plot shows the first two of ${about.of} objectives; dominance uses all of them.`);
  at("frontier-note").textContent = rows.length ? notes.join(" ") : noPoint();
  drawFrontierTable(front);
  at("hypervolume").textContent = rows.length ? `${front.hypervolume.toFixed(3)} of 1` : "–";
}

// The server reads the points after the page has opened.
function noPoint() {
  return sections.frontier[""] ? "No point has finished yet." : "The points are being read.";
}

function drawFrontierTable(front) {
  const best = Object.values(front.by_model).flat().map((number) => sections.points[number]).filter(Boolean), everywhere = new Set(front.all);
  const rows = best.slice(0, 500).map((row) => {
    const button = element("button", `${row.number}${everywhere.has(row.number) ? " *" : ""}`, { type: "button", "aria-label": `show point ${row.number}` });
    button.addEventListener("click", () => choose(row.number));
    return [button, row.model, row.settings, ...about.objectives.map(({ name }) => brief(row.metrics[name])), row.seeds.length, row.cost];
  });
  const columns = ["point", "model", "settings", ...about.objectives.map(title), "#seeds", "cost alone"];
  fill(at("frontier-table"), columns, rows, noPoint());
}

async function choose(number) {
  chosen = number;
  remember();
  const answer = await fetch(`/point.json?number=${number}`);
  if (!answer.ok || chosen !== number) return;
  const row = await answer.json();
  const rows = [["model", row.model], ["settings", row.settings], ["state", row.status + (row.same_as === null ? "" : `; its adapters are the same as those of point ${row.same_as}`)], ["seeds", row.seeds.join(", ")], ["cost alone", row.cost]];
  if (row.projected_share !== null) rows.push(["changed", `${percent(row.projected_share)} of modules`]);
  if (row.reason) rows.push(["reason", row.reason]);
  for (const [name, metric] of Object.entries(row.all_metrics)) rows.push([name, interval(metric)]);
  const facts = element("table", element("tbody", rows.map(([name, value]) => element("tr", [element("th", name, { scope: "row" }), element("td", value)]))));
  const story = row.story.map((one) => element("tr", [element("th", one.stage, { scope: "row" }), element("td", one.cost), element("td", element("code", one.key)), element("td", element("code", one.command))]));
  const stages = element("details", [element("summary", `its ${story.length} stages, what each cost, and how to run it again`), element("div", element("table", element("tbody", story)), { class: "scroll" })]);
  at("point-head").textContent = `Point ${row.number}`;
  at("point-body").replaceChildren(facts, stages);
}

function drawFacts() {
  const live = drive.live, counts = sections.counts[""], now = drive.now || 0;
  let state = drive.driver ? "driven" : "not running";
  if (live && drive.driver) state = now - live.at > 10 ? `driven; its last report was ${clock(now - live.at)} ago` : `has run for ${clock(live.at - live.started)}`;
  else if (live && !live.ended) state = "its driver was killed; run the same command to continue";
  else if (live) state = { done: "ended", request: "stopped on request", budget: "out of budget", gain: "ended: the frontier grew too slowly", error: "ended with an error" }[live.ended];
  at("state").textContent = state;
  at("state").title = drive.driver || "";
  at("headline").textContent = headline(state, live, counts);
  if (counts) {
    const others = Object.entries(counts.points).filter(([name, count]) => count && name !== "done").map(([name, count]) => `, ${count} ${name}`);
    at("points").textContent = `${counts.points.done}${about.limit ? ` of ${about.limit}` : ""} done${others.join("")}`;
  }
  at("gpus").textContent = live && drive.driver ? `${live.gpus.busy} of ${live.gpus.total}` : "none";
  const hours = live && live.gpus.logical ? "logical GPU-hours" : "GPU-hours";
  at("spent").textContent = live ? `${live.spent.gpu_hours.toPrecision(3)} ${hours}${usd(live.spent.usd)}` : counts ? counts.spent : "–";
  at("left").textContent = live && drive.driver ? `about ${clock(live.left_s)}${live.pace_text ? `; ${live.pace_text}` : ""}` : "–";
  at("predicted").textContent = live && live.predicted
    ? `${clock(live.taken.driving_s)} of ${clock(live.predicted.wall_s)}, ${live.taken.gpu_hours.toPrecision(3)} of ${live.predicted.gpu_hours.toPrecision(3)} ${hours}${usd(live.predicted.usd)}` : "–";
}

// One sentence that a person understands from across the room.
function headline(state, live, counts) {
  if (!counts) return "Loading …";
  const done = `${counts.points.done}${about.limit ? ` of ${about.limit}` : ""} points`;
  const failed = counts.points.failed ? `, ${counts.points.failed} failed` : "";
  if (live && drive.driver) return `Running: ${done}${failed}, about ${clock(live.left_s)} left for what has started`;
  if (!counts.points.done) return live ? `${state[0].toUpperCase()}${state.slice(1)}: no point has finished${failed}` : "Not run yet";
  return `${live && live.ended === "done" ? "Finished" : `${state[0].toUpperCase()}${state.slice(1)}`}: ${done}${failed}`;
}

function drawQueue() {
  const live = drive.live, rows = [];
  const kinds = Object.entries(live ? live.stages : {}).sort(([a], [b]) => about.kinds.indexOf(a) - about.kinds.indexOf(b));
  for (const [kind, counts] of kinds) {
    const total = Object.values(counts).reduce((sum, count) => sum + count, 0), bar = element("div", [], { class: "bar", "aria-hidden": "true" });
    for (const state of ["done", "reused", "running", "failed"]) {
      const piece = element("i", [], { class: state });
      piece.style.width = `${(100 * counts[state]) / Math.max(1, total)}%`;
      bar.append(piece);
    }
    rows.push([kind, bar, ...[counts.done, counts.reused, counts.running, counts.waiting + counts.ready, counts.failed].map((count) => String(count || ""))]);
  }
  fill(at("queue"), ["stage", "", "#done", "#in store", "#running", "#waiting", "#failed"], rows, "There is no record of this study's stages: it has not been run, or only by an earlier version of ebbline.");
  at("queue-key").hidden = rows.length === 0;
  const work = drive.driver && live ? live.running.slice(0, 100) : [], now = drive.now || 0;
  fill(at("work"), ["stage", "where", "#GPUs", "#running for", "#of about", "progress"], work.map((one) => [one.label, one.host, String(one.gpus), clock(now - one.started), clock(one.expected_s), one.progress_text]), "No stage is running.");
  const hosts = (drive.driver && live ? live.hosts : []).slice(0, 200).map((host) => {
    const bar = element("div", element("i", [], { class: "running" }), { class: "bar", "aria-hidden": "true" });
    bar.firstChild.style.width = `${(100 * host.busy) / Math.max(1, host.gpus)}%`;
    return [host.name, bar, `${host.busy} of ${host.gpus}`];
  });
  fill(at("hosts"), ["host", "", "#GPUs at work"], hosts, "The study is not running, so it has no GPUs.");
}

function drawFailures() {
  const points = (sections.failed[""] || { latest: [] }).latest, stages = drive.live ? drive.live.failures : [];
  const rows = stages.map((one) => [one.label, "failed", one.reason, element("code", one.command)]);
  const listed = new Set(stages.map((one) => one.command).filter(Boolean));
  for (const one of points) if (!listed.has(one.command)) rows.push([one.what, one.status, one.reason, element("code", one.command)]);
  fill(at("failures"), ["what", "status", "reason", "command to rerun it"], rows, "None.");
}

function drawGantt() {
  const timeline = sections.timeline[""] || { total: 0, first: 0, running: [] }, running = new Set(timeline.running);
  for (const name of Object.keys(sections.spans)) if (!running.has(name) && !(Number(name) >= timeline.first)) delete sections.spans[name];
  const spans = Object.values(sections.spans), now = drive.now || 0;
  const hosts = new Set(spans.flatMap((span) => span.lanes.map((lane) => lane.replace(/ \w+ \d+$/, ""))));
  const shownAs = (lane) => (hosts.size > 1 ? lane : lane.match(/\w+ \d+$/)[0]);
  const lanes = [...new Set(spans.flatMap((span) => span.lanes))].map(shownAs).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const kindOf = (span) => (about.colours[span.kind] ? span.kind : "other"), named = new Set(spans.map(kindOf)), traces = [];
  for (const kind of [...about.kinds, "other"].filter((name) => named.has(name))) {
    const until = (span) => (span.ended === null ? now : span.ended);
    const bars = spans.filter((span) => kindOf(span) === kind).flatMap((span) => span.lanes.map((lane) => ({ ...span, lane: shownAs(lane), until: until(span) })));
    const grey = /^0?\.\d+$/.test(about.colours[kind] || "") ? Math.round(255 * Number(about.colours[kind])) : null;
    traces.push({
      type: "bar", orientation: "h", base: bars.map((bar) => new Date(1000 * bar.started)), x: bars.map((bar) => 1000 * Math.max(0.05, bar.until - bar.started)), y: bars.map((bar) => bar.lane),
      marker: {
        color: grey === null ? about.colours[kind] || OTHER_KIND : `rgb(${grey},${grey},${grey})`, line: { color: ink("--page"), width: 0.5 },
        pattern: { shape: bars.map((bar) => ({ failed: "x", lost: "/", running: "." })[bar.outcome] || "") },
      },
      text: bars.map((bar) => `<b>${plain(bar.label)}</b><br>${clock(bar.until - bar.started)}${bar.expected_s ? ` of about ${clock(bar.expected_s)}` : ""}, ${bar.outcome}<br>${bar.kind} ${short(bar.key)}`),
      textposition: "none", hovertemplate: "%{text}<extra></extra>", name: kind,
    });
  }
  const height = Math.max(140, 90 + 22 * lanes.length), legend = { orientation: "h", y: 1, yanchor: "bottom", x: 0 };
  at("gantt").style.height = `${height}px`;
  at("gantt").hidden = spans.length === 0;
  const yaxis = { categoryorder: "array", categoryarray: lanes.slice().reverse(), type: "category" };
  if (spans.length) Plotly.react("gantt", traces, layout({ xaxis: { type: "date" }, yaxis, barmode: "overlay", bargap: 0.15, height, showlegend: true, legend, margin: { l: 90, r: 15, t: 30, b: 35 } }), CONFIG);
  const shown = timeline.total - timeline.first;
  at("gantt-note").textContent = !spans.length ? "This study has no timeline: nothing has run yet, or it ran with an earlier version of ebbline."
    : `${timeline.total > shown ? `The latest ${shown} of ` : ""}${timeline.total} stages that ended${timeline.running.length ? `, and ${timeline.running.length} at work` : ""}. Crossed: failed; striped: lost and retried; dotted: at work.`;
  at("gantt").setAttribute("aria-label", `Gantt chart: ${at("gantt-note").textContent}`);
}

function drawTrainings() {
  const running = sections.at_work[""] || {}, entries = { ...Object.fromEntries(Object.entries(sections.trainings).map(([key, row]) => [key, row.label])) };
  for (const [key, name] of Object.entries(running)) entries[key] = `${name} (runs)`;
  const select = at("training"), listed = new Set([...select.options].map((option) => option.value));
  for (const option of [...select.options]) if (entries[option.value] && option.text !== entries[option.value]) option.text = entries[option.value];
  for (const [key, name] of Object.entries(entries)) if (!listed.has(key)) select.append(element("option", name, { value: key }));
  const by = at("curve-by"), values = {};
  for (const { axes } of Object.values(sections.trainings)) for (const [axis, value] of Object.entries(axes)) (values[axis] ||= new Set()).add(value);
  for (const [axis, different] of Object.entries(values)) if (different.size > 1 && ![...by.options].some((option) => option.value === axis)) by.append(element("option", axis, { value: axis }));
  if (!trainings.length && select.options.length) trainings = [Object.keys(running)[0] || select.options[0].value];
  for (const option of select.options) option.selected = trainings.includes(option.value);
  at("curve").hidden = !trainings.length;
  if (!trainings.length) at("curve-note").textContent = "No training has begun yet.";
  if (trainings.some((key) => running[key] || !curves.has(key))) drawCurves();
}

// An exponential moving average, corrected for its start as in Adam; a value that is not known stays unknown.
function smoothed(values, weight) {
  let sum = 0, mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}

async function drawCurves() {
  const wanted = trainings.slice(0, CURVES), asked = wanted.join(), running = sections.at_work[""] || {};
  await Promise.all(wanted.filter((key) => running[key] || !curves.has(key)).map(async (key) => {
    const answer = await fetch(`/curve.json?key=${encodeURIComponent(key)}`);
    if (!answer.ok) return;
    const curve = await answer.json();
    shownCurves.set(key, curve);
    if (curve.ended) curves.add(key);
  }));
  if (asked !== trainings.slice(0, CURVES).join()) return;
  const what = at("curve-of").value, weight = Number(at("smoothing").value), names = {}, traces = [];
  const by = at("curve-by").value, groups = []; // trainings of one value have one colour and one entry in the legend
  for (const option of at("training").options) names[option.value] = option.text;
  for (const [index, key] of wanted.entries()) {
    const curve = shownCurves.get(key), name = plain(names[key] || short(key));
    if (!curve || !curve.values[what].some((value) => value !== null)) continue;
    const known = sections.trainings[key], group = by === "training" ? name : known ? `${by} ${plain(known.axes[by])}` : "runs";
    const isFirst = !groups.includes(group);
    if (isFirst) groups.push(group);
    const place = by === "training" ? index : groups.indexOf(group);
    traces.push({
      type: "scatter", mode: curve.steps.length > 60 ? "lines" : "lines+markers", x: curve.steps, y: smoothed(curve.values[what], weight),
      line: { color: place ? CURVE_COLOURS[(place - 1) % CURVE_COLOURS.length] : ink("--accent") },
      name: group, legendgroup: group, showlegend: isFirst, hovertemplate: `step %{x}: %{y:.4g}<extra>${name}</extra>`,
    });
  }
  at("curve").hidden = !traces.length;
  const axes = { xaxis: { title: { text: "step" } }, yaxis: { title: { text: at("curve-of").selectedOptions[0].text }, rangemode: "tozero" } };
  if (traces.length) Plotly.react("curve", traces, layout({ ...axes, hovermode: "x unified", showlegend: traces.length > 1, margin: { l: 55, r: 15, t: 10, b: 40 } }), CONFIG);
  const notes = wanted.map((key) => shownCurves.get(key)).filter(Boolean).map((curve) => curve.note);
  at("curve-note").textContent = [wanted.length === 1 ? notes[0] : `${wanted.length} trainings`, trainings.length > CURVES ? `the first ${CURVES} are drawn` : "", traces.length ? "" : "no such values were recorded"].filter(Boolean).join("; ");
  const first = shownCurves.get(wanted[0]), losses = first ? first.values.loss : [];
  at("curve").setAttribute("aria-label", losses.length ? `Line plot of ${traces.length} trainings. The loss of the first goes from ${losses[0].toFixed(3)} to ${losses.at(-1).toFixed(3)} over ${first.steps.at(-1)} steps.` : "This training has reported no step yet.");
}

// What a person has selected is in the address, so a reload or a shared link on this machine keeps it.
function remember() {
  const kept = new URLSearchParams();
  if (chosen !== null) kept.set("point", chosen);
  if (trainings.length) kept.set("trainings", trainings.map(short).join("."));
  if (at("curve-of").value !== "loss") kept.set("curve", at("curve-of").value);
  if (at("curve-by").value !== "training") kept.set("by", at("curve-by").value);
  if (Number(at("smoothing").value)) kept.set("smoothing", at("smoothing").value);
  history.replaceState(null, "", `#${kept}`);
}

function restore() {
  const kept = new URLSearchParams(location.hash.slice(1)), starts = (kept.get("trainings") || "").split(".").filter((start) => /^[0-9a-f]{12}$/.test(start));
  const keys = [...Object.keys(sections.trainings), ...Object.keys(sections.at_work[""] || {})];
  trainings = starts.map((start) => keys.find((key) => key.startsWith(start))).filter(Boolean);
  if ([...at("curve-of").options].some((option) => option.value === kept.get("curve"))) at("curve-of").value = kept.get("curve");
  drawTrainings(); // lists the axes
  if ([...at("curve-by").options].some((option) => option.value === kept.get("by"))) at("curve-by").value = kept.get("by");
  if (kept.get("smoothing")) at("smoothing").value = kept.get("smoothing");
  if (/^\d+$/.test(kept.get("point") || "")) choose(Number(kept.get("point")));
}

const drawnAt = new Map(), outdated = new Set(); // when each plot was drawn, and the plots with changes that are not drawn yet
const DRAWN_BY = [
  [drawFrontier, ["points", "frontier", "before"]],
  [drawGantt, ["spans", "timeline"]],
  [drawTrainings, ["trainings", "at_work"]],
];

// A plot is redrawn when its sections have changed; plots of running stages are also redrawn as time passes. Large plots are redrawn less often.
function draw(changed) {
  drawFacts();
  drawQueue();
  drawFailures();
  const runs = ((sections.timeline[""] || {}).running || []).length > 0, time = performance.now();
  for (const [drawPlot, names] of DRAWN_BY) {
    const marks = Object.keys(sections[names[0]]).length, due = time - (drawnAt.get(drawPlot) || -Infinity) >= EVERY_MS * (marks / MARKS_A_SECOND - 0.5);
    if (changed === null || names.some((name) => name in changed)) outdated.add(drawPlot);
    if (changed === null || (due && (outdated.has(drawPlot) || (runs && drawPlot !== drawFrontier)))) {
      outdated.delete(drawPlot);
      drawnAt.set(drawPlot, time);
      drawPlot();
    }
  }
}

function addListeners() {
  // Plotly adds event handling to a plot when it first draws it.
  at("frontier").on("plotly_click", (event) => event.points[0].customdata !== undefined && choose(event.points[0].customdata));
  at("training").addEventListener("change", () => {
    trainings = [...at("training").selectedOptions].map((option) => option.value);
    remember();
    drawCurves();
  });
  for (const id of ["curve-of", "curve-by", "smoothing"]) at(id).addEventListener("input", () => { remember(); drawCurves(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { draw(null); drawCurves(); });
}

function problem(text) {
  at("problem").hidden = !text;
  at("problem").textContent = text;
}

async function update() {
  let answer = null;
  try {
    answer = await (await fetch(`/data.json?since=${cursor}`)).json();
  } catch (error) {
    problem("The page's server does not answer; restart `ebbline dashboard`. The page shows the last known state.");
  }
  setTimeout(update, answer && answer.more ? 0 : document.hidden ? 10 * EVERY_MS : EVERY_MS);
  if (answer === null) return;
  if (answer.fresh) for (const name of Object.keys(sections)) sections[name] = {};
  for (const [section, rows] of Object.entries(answer.changed)) Object.assign(sections[section], rows);
  ({ cursor, drive } = answer);
  problem(answer.error);
  if (!restored && sections.frontier[""]) {
    restored = true;
    restore();
  }
  draw(loaded ? answer.changed : null);
  if (!loaded) addListeners();
  loaded = true;
}

update();
