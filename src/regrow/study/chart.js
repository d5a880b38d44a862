"use strict";
// A small chart: lines, dots with whiskers, axes, and the nearest point under the pointer. Text is only ever set as text.

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, text) {
  const made = name in { svg: 1, g: 1, path: 1, line: 1, circle: 1, text: 1, rect: 1, clipPath: 1, title: 1 }
    ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const PREFIXES = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** A number in at most `digits` digits: 1.5G, 240k, 0.35, 2.0e-4. */
function shown(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  for (const [unit, letter] of PREFIXES) {
    if (size >= unit * (letter === "k" ? 10 : 1)) return Number((value / unit).toPrecision(digits)) + letter;
  }
  if (size > 0 && size < 1e-3) return value.toExponential(Math.max(0, digits - 2));
  return String(Number(value.toPrecision(Math.max(digits, String(Math.trunc(size)).length))));
}

/** Round numbers in [low, high]: 1, 2 or 5 times a power of ten apart. */
function linearTicks(low, high, wanted) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-12) + 1e-300 && ticks.length < 50; i++) ticks.push(i * step);
  return ticks;
}

/** Ticks of a logarithmic axis: 1, 2, 5 in each decade, or decades alone if there are many. */
function logTicks(low, high, wanted) {
  const ticks = [], decades = Math.log10(high / low);
  if (decades < 0.7) return linearTicks(low, high, wanted);
  const every = decades * 3 <= wanted * 1.5 ? [1, 2, 5] : [1], skip = Math.max(1, Math.ceil(decades / wanted));
  for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++) {
    for (const m of every) {
      const tick = m * 10 ** p;
      if (tick >= low && tick <= high && (every.length > 1 || p % skip === 0)) ticks.push(tick);
    }
  }
  return ticks;
}

/** Least and greatest; Math.min takes no long lists. */
function extremes(values) {
  let low = Infinity, high = -Infinity;
  for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  return [low, high];
}

/** The range of numbers, with a margin, and of one number too. */
function range(values, log) {
  const [low, high] = extremes(values);
  if (log) return low === high ? [low / 1.5, high * 1.5] : [low * (low / high) ** 0.06, high * (high / low) ** 0.06];
  const pad = low === high ? Math.abs(low) * 0.1 || 1 : (high - low) * 0.05;
  return [low - pad, high + pad];
}

/**
 * Draw a chart into `host`, replacing what is there.
 *   lines: [{points: [[x, y], ...], kind, label, onClick}]
 *   dots:  [{x, y, low, high, kind, name, label, onClick}]
 *   log: whether x is logarithmic; xTitle, yTitle, name; yFrom: points whose y sets the vertical range (all by default)
 */
function drawChart(host, { lines = [], dots = [], log = false, xTitle, yTitle, name, yFrom, empty }) {
  host.replaceChildren();
  const usable = ([x, y]) => x !== null && y !== null && x !== undefined && y !== undefined && (!log || x > 0);
  lines = lines.map((l) => ({ ...l, points: l.points.filter(usable) })).filter((l) => l.points.length);
  dots = dots.filter((d) => usable([d.x, d.y]));
  const all = lines.flatMap((l) => l.points).concat(dots.map((d) => [d.x, d.y]));
  if (!all.length) {
    host.append(element("div", { class: "empty" }, empty || "nothing to draw here"));
    return;
  }
  const width = Math.max(200, host.clientWidth), height = Math.max(140, host.clientHeight);
  const box = { left: 52, right: width - 16, top: 10, bottom: height - 40 };
  const xs = all.map((p) => p[0]), [x0, x1] = log ? range(xs, true) : [Math.min(0, extremes(xs)[0]), extremes(xs)[1] || 1];
  const heights = (yFrom ? yFrom(lines) : []).filter((y) => y !== null && y !== undefined);
  const ys = heights.length ? heights : all.map((p) => p[1]), [lowest, highest] = extremes(ys);
  // an interval over two seeds can be wider than all differences: it may then run out of the picture
  const reach = 0.3 * (highest - lowest) || Infinity, within = (y) => Math.max(lowest - reach, Math.min(highest + reach, y));
  const ends = dots.flatMap((d) => [d.low, d.high]).filter((y) => y !== null && y !== undefined).map(within);
  const [y0, y1] = range(ys.concat(ends), false);
  const part = log ? (x) => Math.log(x / x0) / Math.log(x1 / x0) : (x) => (x - x0) / (x1 - x0);
  const atX = (x) => box.left + part(x) * (box.right - box.left);
  const atY = (y) => box.bottom - ((y - y0) / (y1 - y0)) * (box.bottom - box.top);

  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name });
  const clip = element("clipPath", { id: `clip-${host.id}` });
  clip.append(element("rect", { x: box.left, y: box.top, width: box.right - box.left, height: box.bottom - box.top }));
  svg.append(clip);
  for (const y of linearTicks(y0, y1, Math.max(3, (box.bottom - box.top) / 50))) {
    svg.append(element("line", { class: "grid", x1: box.left, x2: box.right, y1: atY(y), y2: atY(y) }));
    svg.append(element("text", { x: box.left - 6, y: atY(y) + 4, "text-anchor": "end" }, shown(y, 4)));
  }
  for (const x of (log ? logTicks : linearTicks)(x0, x1, Math.max(3, (box.right - box.left) / 75))) {
    svg.append(element("line", { class: "base", x1: atX(x), x2: atX(x), y1: box.bottom, y2: box.bottom + 4 }));
    svg.append(element("text", { x: atX(x), y: box.bottom + 16, "text-anchor": "middle" }, shown(x, 3)));
  }
  svg.append(element("line", { class: "base", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  svg.append(element("text", { class: "title", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, xTitle));
  const vertical = { class: "title", "text-anchor": "middle", transform: `translate(11 ${(box.top + box.bottom) / 2}) rotate(-90)` };
  svg.append(element("text", vertical, yTitle));

  const inside = element("g", { "clip-path": `url(#clip-${host.id})` });
  const targets = [];
  for (const line of lines) {
    const at = line.points.map(([x, y]) => [atX(x), atY(y)]);
    const path = at.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
    const drawn = element("path", { class: `line ${line.kind}`, d: path });
    inside.append(drawn);
    if (line.label) at.forEach(([x, y], i) => targets.push({ x, y, drawn, of: line, value: line.points[i] }));
  }
  svg.append(inside);
  for (const dot of dots) {
    const [x, y] = [atX(dot.x), atY(dot.y)];
    if (dot.low !== undefined && dot.low !== null) {
      inside.append(element("line", { class: `whisker ${dot.kind}`, x1: x, x2: x, y1: atY(dot.low), y2: atY(dot.high) }));
    }
    svg.append(element("circle", { class: `dot ${dot.kind}`, cx: x, cy: y, r: 5 }));
    if (dot.name) { // below to the left, where no point can be: only the frontier has names
      const left = x - 7 * dot.name.length < box.left;
      svg.append(element("text", { class: "name", x: x + (left ? -4 : -7), y: y + 17, "text-anchor": left ? "start" : "end" }, dot.name));
    }
    targets.push({ x, y, of: dot, value: [dot.x, dot.y] });
  }
  host.append(svg);
  follow(host, svg, targets.filter((t) => t.y >= box.top - 1 && t.y <= box.bottom + 1), { width, height, xTitle, yTitle });
}

/** Light up what is nearest to the pointer, say what it is, and open it on a click. */
function follow(host, svg, targets, { width, height, xTitle, yTitle }) {
  const tip = document.getElementById("tip"), ring = element("circle", { class: "reach", r: 7, visibility: "hidden" });
  let lit = null;
  svg.append(ring);
  const leave = () => {
    if (lit && lit.drawn) lit.drawn.classList.remove("lit");
    lit = null;
    ring.setAttribute("visibility", "hidden");
    tip.hidden = true;
  };
  const move = (event) => {
    const frame = svg.getBoundingClientRect();
    const px = ((event.clientX - frame.left) * width) / frame.width, py = ((event.clientY - frame.top) * height) / frame.height;
    let best = null, least = 40 ** 2;
    for (const t of targets) {
      const distance = (t.x - px) ** 2 + (t.y - py) ** 2;
      if (distance < least) [best, least] = [t, distance];
    }
    leave();
    if (!best) return;
    lit = best;
    if (lit.drawn) lit.drawn.classList.add("lit");
    ring.setAttribute("cx", best.x);
    ring.setAttribute("cy", best.y);
    ring.setAttribute("visibility", "visible");
    tip.textContent = `${best.of.label}\n${xTitle} ${shown(best.value[0], 4)}\n${yTitle} ${shown(best.value[1], 5)}`;
    tip.hidden = false;
    const right = event.clientX + 14 + tip.offsetWidth > document.documentElement.clientWidth;
    tip.style.left = `${Math.max(4, right ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14)}px`;
    tip.style.top = `${Math.max(4, event.clientY - 14 - tip.offsetHeight)}px`;
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("click", () => { if (lit && lit.of.onClick) { const open = lit.of.onClick; leave(); open(); } });
}
