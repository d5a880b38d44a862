// The page: what is visible, which chart shows what, the table and the details. Drawing is in chart.js.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const state = { hidden: new Set(), words: [], task: 0, axis: "step", metric: null, sort: "loss", down: false };

const AXES = { step: "step", tokens: "tokens", flops: "FLOPs", seconds: "seconds" };
const METRICS = [
  ["curve", "mlm_loss", "MLM loss (training)"], ["evaluations", "eval_mlm_loss", "MLM loss (held out)"],
  ["curve", "nsp_loss", "NSP loss (training)"], ["evaluations", "eval_nsp_loss", "NSP loss (held out)"],
  ["evaluations", "eval_mlm_accuracy", "MLM accuracy (held out)"], ["curve", "tokens_per_second", "tokens per second"],
  ["curve", "learning_rate", "learning rate"], ["curve", "grad_norm", "gradient norm"], ["curve", "data_wait", "share of time waiting for data"],
];
const COLUMNS = [
  ["id", "run"], ["size", "size"], ["family", "family"], ["density", "density"], ["block", "block"], ["n", "n"], ["pr", "pr"],
  ["lr", "learning rate"], ["seed", "seed"], ["steps", "steps"], ["loss", "MLM loss"], ["flops", "FLOPs"], ["seconds", "seconds"],
  ["tokens", "tokens"], ["memory", "peak memory"], ["coverage", "coverage"],
];
const TEXT = new Set(["id", "size", "family"]);

const kind = (family) => { const i = data.families.indexOf(family); return i >= 0 && i < 8 ? `s${i}` : "other"; };

function words(run) {
  const named = { b: run.block, d: run.density, n: run.n, pr: run.pr, lr: run.lr, seed: run.seed, steps: run.steps, size: run.size, method: run.method };
  const exact = new Set(Object.entries(named).filter(([, v]) => v !== null).map(([k, v]) => `${k}=${v}`.toLowerCase()));
  return { exact, text: `${run.label} ${run.id}`.toLowerCase() };
}
for (const run of data.runs) run.words = words(run);

/** "b=1" must not find "b=16"; a word without "=" is looked for anywhere. */
const matches = (run) => state.words.every((w) => w.includes("=") ? run.words.exact.has(w) || run.words.text.split(" ").includes(w) : run.words.text.includes(w));
const visible = (run) => run.task === state.task && !state.hidden.has(run.family) && matches(run);

function head() {
  byId("title").textContent = data.title;
  document.title = data.title;
  byId("version").textContent = data.version;
  const time = (seconds) => seconds < 7200 ? `${shown(seconds / 60)} minutes` : `${shown(seconds / 3600)} hours`;
  const sum = (name) => data.runs.reduce((total, run) => total + (run[name] || 0), 0);
  byId("summary").textContent = `${data.runs.length} runs of ${data.groups.length} configurations, ${shown(sum("tokens"))} tokens, ` +
    `${shown(sum("flops"))} FLOPs, ${time(sum("seconds"))} of training`;
  byId("notes").hidden = !data.notes.length;
  byId("notes").append(...data.notes.map((note) => element("li", {}, note)));
  byId("task-label").hidden = data.tasks.length < 2;
  byId("task").append(...data.tasks.map((task, i) => element("option", { value: i }, task)));
  byId("legend").append(...data.families.map((family) => {
    const button = element("button", { type: "button", class: kind(family), "aria-pressed": "true" }, family);
    button.addEventListener("click", () => {
      state.hidden.has(family) ? state.hidden.delete(family) : state.hidden.add(family);
      button.setAttribute("aria-pressed", String(!state.hidden.has(family)));
      draw();
    });
    return button;
  }));
}

/** The least loss for at most a cost: it holds until the next point on the frontier. */
const stairs = (points) => points.flatMap(([x, y], i) => i ? [[x, points[i - 1][1]], [x, y]] : [[x, y]]);

function pareto(cost, host, xTitle) {
  const shownGroups = new Set(data.runs.filter(visible).map((run) => run.group));
  const usable = (g) => g.task === state.task && g.loss && g[cost] > 0;
  const point = (g) => [g[cost], g.loss.mean];
  const ascending = (a, b) => a[cost] - b[cost];
  const chosen = data.groups.filter((g, i) => g.best && usable(g) && shownGroups.has(i)).sort(ascending);
  const lines = [];
  const frontier = data.groups.filter((g) => usable(g) && g.frontier[cost]).sort(ascending);
  if (frontier.length > 1 && chosen.length) lines.push({ points: stairs(frontier.map(point)), kind: "frontier" });
  for (const key of new Set(chosen.map((g) => `${g.family}|${g.steps}`))) {
    // one per size: several configurations of a size would make the line run to and fro
    const sizes = new Map();
    for (const g of chosen.filter((g) => `${g.family}|${g.steps}` === key)) {
      if (!sizes.has(g.size) || g.loss.mean < sizes.get(g.size).loss.mean) sizes.set(g.size, g);
    }
    const members = [...sizes.values()].sort(ascending);
    if (members.length > 1) lines.push({ points: members.map(point), kind: `thin ${kind(members[0].family)}` });
  }
  // a size is named where the frontier comes to it
  const named = new Set(frontier.filter((g, i) => !i || g.size !== frontier[i - 1].size));
  const dots = chosen.map((g) => {
    const half = g.loss.half_width, runs = data.runs.filter((run) => run.group === data.groups.indexOf(g));
    return {
      x: g[cost], y: g.loss.mean, low: half === null ? null : g.loss.mean - half, high: half === null ? null : g.loss.mean + half,
      kind: kind(g.family), name: named.has(g) ? g.size : "",
      label: `${g.label}\n${g.loss.n} seed${g.loss.n > 1 ? "s" : ""}${half === null ? "" : `, ± ${shown(half)}`}`, onClick: () => details(runs[0]),
    };
  });
  drawChart(byId(host), { lines, dots, log: true, xTitle, yTitle: "held-out MLM loss", name: `Loss against ${xTitle}`, empty: `no run here has a loss and ${xTitle}` });
}

function curves() {
  const [part, name, title] = state.metric;
  const lines = data.runs.filter((run) => visible(run) && run[part][name]).map((run) => ({
    points: (run[part][state.axis] || []).map((x, i) => [x, run[part][name][i]]),
    kind: kind(run.family), label: `${run.label}, seed ${run.seed}`, onClick: () => details(run),
  }));
  // The fall at the start is much larger than all differences after it: it runs out of the picture.
  const settled = (drawn) => drawn.flatMap((line) => line.points.slice(Math.floor(line.points.length / 10)).map((p) => p[1]));
  drawChart(byId("curves"), { lines, xTitle: AXES[state.axis], yTitle: title, name: `${title} by ${AXES[state.axis]}`, yFrom: settled, empty: `no run here logged this by ${AXES[state.axis]}` });
}

function topology() {
  byId("topology").hidden = !data.runs.some((run) => run.updates.step);
  for (const name of ["coverage", "churn", "fresh_removed"]) {
    const lines = data.runs.filter((run) => visible(run) && run.updates[name]).map((run) => ({
      points: run.updates.step.map((x, i) => [x, run.updates[name][i]]),
      kind: kind(run.family), label: `${run.label}, seed ${run.seed}`, onClick: () => details(run),
    }));
    drawChart(byId(name), { lines, xTitle: "step", yTitle: "share", name });
  }
}

function patternChoice() {
  const having = data.runs.filter((run) => Object.keys(run.patterns).length);
  byId("patterns").hidden = !having.length;
  byId("pattern-run").append(...having.map((run) => element("option", { value: data.runs.indexOf(run) }, `${run.label}, seed ${run.seed}`)));
}

function pictures() {
  const run = data.runs[byId("pattern-run").value];
  if (!run) return;
  byId("pictures").replaceChildren(...Object.entries(run.patterns).map(([layer, moments]) => {
    const row = element("div", { class: "layer" });
    const most = Math.max(1e-9, ...moments.flatMap((moment) => moment.counts.flat()));
    row.append(element("span", {}, layer.replace("bert.encoder.layer.", "layer ")));
    row.append(...moments.map((moment) => {
      const figure = element("figure");
      figure.append(picture(moment.counts, most, `${layer}, step ${moment.step}`), `step ${shown(moment.step)}`);
      return figure;
    }));
    return row;
  }));
}

function picture(counts, most, name) {
  const canvas = element("canvas", { width: counts[0].length, height: counts.length, role: "img", "aria-label": name });
  byId("pictures").append(canvas); // its colour is known only in the page
  const pen = canvas.getContext("2d");
  pen.fillStyle = getComputedStyle(canvas).color;
  counts.forEach((row, y) => row.forEach((count, x) => { pen.globalAlpha = count / most; pen.fillRect(x, y, 1, 1); }));
  return canvas;
}

function table(columns, rows) {
  const made = element("table"), top = element("tr"), body = element("tbody");
  top.append(...columns.map((column) => element("th", {}, column)));
  body.append(...rows.map((row) => {
    const line = element("tr");
    line.append(...row.map((cell) => element("td", typeof cell === "number" ? { class: "number" } : {}, typeof cell === "number" ? shown(cell, 4) : cell ?? "–")));
    return line;
  }));
  if (columns.length) made.createTHead().append(top);
  made.append(body);
  return made;
}

function claims() {
  byId("claims").append(...data.claims.map((claim) => {
    const box = element("details"), title = element("summary"), scroll = element("div", { class: "scroll" }), list = element("ul");
    title.append(element("strong", {}, claim.id), element("span", { class: `verdict ${claim.verdict}` }, claim.verdict), claim.text);
    if (claim.rows.length) scroll.append(table(claim.columns, claim.rows));
    list.append(...claim.findings.map((text) => element("li", {}, text)));
    list.append(...claim.missing.map((text) => element("li", { class: "missing" }, `missing: ${text}`)));
    box.append(title, scroll, list);
    return box;
  }));
}

function tableHead() {
  const row = element("tr");
  row.append(...COLUMNS.map(([key, title]) => {
    const cell = element("th", TEXT.has(key) ? { scope: "col" } : { scope: "col", class: "number" }), button = element("button", { type: "button", "data-key": key }, title);
    button.addEventListener("click", () => {
      state.down = state.sort === key && !state.down;
      state.sort = key;
      runsTable();
    });
    cell.append(button);
    return cell;
  }));
  byId("runs").tHead.append(row);
}

function compare(a, b) {
  const of = { size: (run) => run.weights, family: (run) => data.families.indexOf(run.family) }[state.sort] || ((run) => run[state.sort]);
  const [x, y] = [of(a), of(b)];
  if (x === null || y === null) return (x === null) - (y === null); // what is not known stays below, either way up
  const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
  return state.down ? -order : order;
}

function runsTable() {
  const chosen = data.runs.filter(visible).sort(compare);
  byId("count").textContent = `${chosen.length} of ${data.runs.length} runs.`;
  for (const cell of byId("runs").tHead.rows[0].cells) {
    const sorted = cell.firstChild.dataset.key === state.sort;
    cell.setAttribute("aria-sort", sorted ? (state.down ? "descending" : "ascending") : "none");
  }
  byId("runs").tBodies[0].replaceChildren(...chosen.map((run) => {
    const row = element("tr", { tabindex: "0" });
    row.append(...COLUMNS.map(([key]) => {
      const type = key === "family" ? `swatch ${kind(run.family)}` : TEXT.has(key) ? "" : "number";
      return element("td", { class: type }, key === "id" ? run.id.slice(0, 10) : shown(run[key], key === "loss" ? 5 : 4));
    }));
    row.addEventListener("click", () => details(run));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") details(run); });
    return row;
  }));
}

/** Nested mappings as "a.b" and a text; deep ones are cut off. */
function flat(mapping, prefix = "", depth = 0) {
  return Object.entries(mapping).flatMap(([key, value]) =>
    value !== null && typeof value === "object" && !Array.isArray(value) && depth < 3
      ? flat(value, `${prefix}${key}.`, depth + 1)
      : [[prefix + key, typeof value === "number" ? shown(value, 6) : typeof value === "string" ? value : JSON.stringify(value).slice(0, 400)]]);
}

function details(run) {
  byId("details-title").textContent = `${run.label}, seed ${run.seed}`;
  const parts = [["What came out", run.final], ["What differs from the defaults", run.spec], ["Machine", run.machine], ["Versions", run.versions], ["Configuration", run.config], ["Layers at the last update", run.layers]];
  byId("details-body").replaceChildren(element("p", { class: "hint" }, `run ${run.id}`), ...parts.filter(([, part]) => Object.keys(part).length).flatMap(([title, part]) => [element("h3", {}, title), table([], flat(part))]));
  byId("details").showModal();
}

function machines() {
  const found = new Set(data.runs.filter((run) => run.task === state.task && run.seconds !== null).map((run) => JSON.stringify(run.machine)));
  byId("machines").hidden = found.size < 2;
  byId("machines").textContent = `The seconds come from ${found.size} different machines or settings of threads: they are no fair comparison.`;
}

function charts() {
  pareto("flops", "pareto-flops", "FLOPs");
  pareto("seconds", "pareto-seconds", "seconds");
  curves();
  topology();
}

function draw() {
  charts();
  machines();
  runsTable();
}

function wire() {
  byId("filter").addEventListener("input", (event) => { state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean); draw(); });
  byId("task").addEventListener("change", (event) => { state.task = Number(event.target.value); draw(); });
  byId("pattern-run").addEventListener("change", pictures);
  const logged = METRICS.filter(([part, name]) => data.runs.some((run) => run[part][name]));
  state.metric = logged[0] || METRICS[0];
  byId("metric").append(...logged.map(([, , title], i) => element("option", { value: i }, title)));
  byId("metric").addEventListener("change", (event) => { state.metric = logged[event.target.value]; curves(); });
  for (const button of byId("axis").children) {
    button.addEventListener("click", () => {
      state.axis = button.dataset.axis;
      for (const other of byId("axis").children) other.setAttribute("aria-pressed", String(other === button));
      curves();
    });
  }
  let width = document.documentElement.clientWidth;
  window.addEventListener("resize", () => {
    if (document.documentElement.clientWidth === width) return; // a phone's address bar changes only the height
    width = document.documentElement.clientWidth;
    charts();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", pictures);
}

head();
tableHead();
wire();
claims();
patternChoice();
draw();
pictures();
