// The curves of a report, to be explored. `report` is the content of report.json; `view` says how curves look and what axes
// are called. Names come from records: they are set as text and attributes, and never parsed as HTML.
"use strict";
const [report, view] = ["report", "view"].map((id) => JSON.parse(document.getElementById(id).textContent));
const SVG = document.querySelector("svg").namespaceURI;
const MARKS = { s: [4, 45], "^": [3, -90], D: [4, 0], v: [3, 90], "<": [3, 180], ">": [3, 0], p: [5, -90] }; // corners, turn
const HEIGHT = 300, LEFT = 52, RIGHT = 12, TOP = 26, BOTTOM = 42, REACH = 45; // pixels; REACH: from the pointer to a point
const byId = (id) => document.getElementById(id);
const tooltip = byId("tooltip");
const on = { designs: new Set(), samplings: new Set(), metrics: new Set(), costs: new Set(), shown: new Set() };

function element(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Three significant digits, more where there are more before the point: as the tables. */
function number(value) {
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value) || 1)));
  const places = { minimumFractionDigits: Math.min(digits, 20), maximumFractionDigits: Math.min(digits, 20) };
  return value.toLocaleString("en", places);
}

/** A marker of a design, as matplotlib's of the same letter. */
function mark(look, x, y, size) {
  if (!(look.marker in MARKS)) return element("circle", { cx: x, cy: y, r: size, fill: look.color, class: "mark" });
  const [corners, turn] = MARKS[look.marker];
  const places = Array.from({ length: corners }, (_, corner) => {
    const angle = (Math.PI / 180) * (turn + (360 / corners) * corner);
    return `${x + 1.25 * size * Math.cos(angle)},${y + 1.25 * size * Math.sin(angle)}`;
  });
  return element("polygon", { points: places.join(" "), fill: look.color, class: "mark" });
}

/** A scale from values to pixels, with ticks so far apart; logarithmic where values above zero span a factor of four or more. */
function scale(values, from, to, apart, given) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const log = low > 0 && high / low >= 4;
  const [forth, back] = log ? [Math.log, Math.exp] : [(value) => value, (value) => value];
  const margin = 0.05 * (forth(high) - forth(low) || Math.abs(forth(high)) || 1);
  [low, high] = [forth(low) - margin, forth(high) + margin];
  const place = (value) => from + ((forth(value) - low) / (high - low)) * (to - from);
  let ticks = given;
  if (!ticks && log) {
    const decades = Array.from({ length: 40 }, (_, index) => index - 20);
    const all = decades.flatMap((decade) => [1, 2, 5].map((digit) => Number(`${digit}e${decade}`)));
    ticks = all.filter((tick) => back(low) <= tick && tick <= back(high));
    if (ticks.length > 12) ticks = ticks.filter((tick) => Number.isInteger(Number(Math.log10(tick).toFixed(6))));
  } else if (!ticks) {
    const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((digit) => digit * power >= rough);
    const first = Math.ceil(low / step);
    ticks = Array.from({ length: Math.floor(high / step) - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(6)));
  }
  const most = Math.max(2, Math.abs(to - from) / apart), every = Math.ceil(ticks.length / most);
  return { place, ticks: ticks.filter((_, index) => index % every === 0) };
}

/** The points that no other one betters in cost and quality, the cheapest first. */
function paretoFront(points, better) {
  const sign = better === "higher" ? -1 : 1;
  let best = Infinity;
  return [...points]
    .sort((one, other) => one.x - other.x || sign * (one.y - other.y))
    .filter((point) => sign * point.y < best && ((best = sign * point.y), true));
}

function describe(point, metric) {
  const { x, y, row, values } = point;
  const lines = [row.label, `NFE ${row.nfe}, ${row.steps} step${row.steps === 1 ? "" : "s"}`, `${metric} ${number(y)}`];
  const { interval, over } = row.metrics[metric];
  if (values.length > 1) lines.push(`${over}: ${values.map(number).join(", ")}`);
  if (interval && values.length > 2) lines.push(`95 % interval: ${interval.map(number).join(" to ")}`);
  for (const cost of view.costs.slice(1)) {
    const spent = row.costs[cost.key];
    if (spent !== null) lines.push(`${number(spent * cost.factor)} ${cost.unit}`);
  }
  return lines.join("\n");
}

/** One panel: a metric against a cost. */
function chart(metric, cost, width) {
  const spent = (row) => (cost.key === "nfe" ? row.nfe : row.costs[cost.key]);
  const points = report.points
    .filter((row) => on.designs.has(view.looks[row.label].design) && on.samplings.has(view.looks[row.label].sampling))
    .filter((row) => metric in row.metrics && row.metrics[metric].mean !== null && spent(row) !== null)
    .map((row) => ({ row, x: spent(row) * cost.factor, y: row.metrics[metric].mean, values: row.metrics[metric].values }));
  const better = view.metrics[metric];
  const name = `${metric}${better ? ` (${better} is better)` : ""}`;
  const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", tabindex: 0, "aria-label": `${name} against ${cost.title}` });
  svg.append(element("text", { x: 4, y: 14, class: "title" }, name));
  svg.append(element("text", { x: width / 2, y: HEIGHT - 6, "text-anchor": "middle" }, cost.title));
  if (!points.length) {
    svg.append(element("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle", class: "tick" }, "nothing measured or chosen"));
    return svg;
  }
  const seeds = on.shown.has("seeds");
  const budgets = cost.key === "nfe" ? [...new Set(points.map((point) => point.x))].sort((one, other) => one - other) : null;
  const x = scale(points.map((point) => point.x), LEFT, width - RIGHT, 45, budgets);
  const y = scale(points.flatMap((point) => (seeds ? [point.y, ...point.values] : [point.y])), HEIGHT - BOTTOM, TOP, 24);
  const text = (tick) => tick.toLocaleString("en", { maximumSignificantDigits: 6 });
  for (const tick of x.ticks) {
    svg.append(element("line", { x1: x.place(tick), x2: x.place(tick), y1: TOP, y2: HEIGHT - BOTTOM, class: "grid" }));
    svg.append(element("text", { x: x.place(tick), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle", class: "tick" }, text(tick)));
  }
  for (const tick of y.ticks) {
    svg.append(element("line", { x1: LEFT, x2: width - RIGHT, y1: y.place(tick), y2: y.place(tick), class: "grid" }));
    svg.append(element("text", { x: LEFT - 6, y: y.place(tick) + 4, "text-anchor": "end", class: "tick" }, text(tick)));
  }
  const path = (places) => {
    const [first, ...others] = places.map(([across, up]) => `${x.place(across)},${y.place(up)}`);
    return ["M" + first, ...(others.length ? others : [first])].join("L"); // a single place is a dot
  };
  if (on.shown.has("front") && better) {
    const front = paretoFront(points, better).map((point) => [point.x, point.y]);
    svg.append(element("path", { d: path(front), class: front.length > 1 ? "front" : "front alone" }));
  }
  const series = new Map(points.map((point) => [point.row.label, element("g", { class: "series" })]));
  for (const [label, group] of series) {
    const look = view.looks[label], own = points.filter((point) => point.row.label === label);
    const dashes = look.dashes ? { "stroke-dasharray": look.dashes } : {};
    const same = new Set(own.map((point) => point.row.seeds.join())).size === 1;
    if (seeds && own.some((point) => point.values.length > 1)) {
      const alike = same && own.length > 1 && own.every((point) => point.values.length === own[0].values.length);
      for (let seed = 0; alike && seed < own[0].values.length; seed++) {
        const line = path(own.map((point) => [point.x, point.values[seed]]));
        group.append(element("path", { d: line, stroke: look.color, class: "seed", ...dashes }));
      }
      for (const point of own) {
        for (const value of point.values.length > 1 ? point.values : []) {
          group.append(element("circle", { cx: x.place(point.x), cy: y.place(value), r: 1.7, fill: look.color, class: "dot" }));
        }
      }
    }
    group.append(element("path", { d: path(own.map((point) => [point.x, point.y])), stroke: look.color, ...dashes }));
    group.append(...own.map((point) => mark(look, x.place(point.x), y.place(point.y), look.dashes ? 3.4 : 4.4)));
    svg.append(group);
  }
  const near = element("circle", { r: 8, class: "near", visibility: "hidden" });
  svg.append(near);

  function show(point) {
    tooltip.hidden = !point;
    near.setAttribute("visibility", point ? "visible" : "hidden");
    for (const [label, group] of series) group.classList.toggle("faded", Boolean(point) && label !== point.row.label);
    if (!point) return;
    near.setAttribute("cx", x.place(point.x));
    near.setAttribute("cy", y.place(point.y));
    tooltip.textContent = describe(point, metric);
    const box = svg.getBoundingClientRect(), ratio = box.width / width;
    const across = box.left + ratio * x.place(point.x) + 14, most = document.documentElement.clientWidth - tooltip.offsetWidth - 8;
    tooltip.style.left = `${Math.max(8, Math.min(across, most)) + window.scrollX}px`;
    tooltip.style.top = `${box.top + ratio * y.place(point.y) + 16 + window.scrollY}px`;
  }
  function nearest(event) {
    const box = svg.getBoundingClientRect(), ratio = width / box.width;
    const away = (point) =>
      Math.hypot(x.place(point.x) - ratio * (event.clientX - box.left), y.place(point.y) - ratio * (event.clientY - box.top));
    const found = points.reduce((one, other) => (away(other) < away(one) ? other : one));
    show(away(found) < REACH ? found : null);
  }
  let chosen = -1;
  svg.addEventListener("pointermove", nearest);
  svg.addEventListener("pointerdown", nearest);
  svg.addEventListener("pointerleave", () => show(null));
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: points.length - 1 }[event.key];
    if (step) show(points[(chosen = (Math.max(chosen, step === 1 ? -1 : 0) + step) % points.length)]);
    else if (event.key === "Escape") show(null);
  });
  return svg;
}

function draw() {
  tooltip.hidden = true;
  const charts = byId("charts");
  const metrics = Object.keys(view.metrics).filter((metric) => on.metrics.has(metric));
  const panels = metrics.flatMap((metric) => view.costs.filter((cost) => on.costs.has(cost.key)).map((cost) => [metric, cost]));
  charts.replaceChildren(...panels.map(() => document.createElement("div")));
  panels.forEach(([metric, cost], index) => {
    charts.children[index].append(chart(metric, cost, Math.max(240, charts.children[index].clientWidth)));
  });
}

/** A box to tick in a group of them. */
function tickBox(group, key, title, ticked, look) {
  const label = document.createElement("label"), box = document.createElement("input");
  box.type = "checkbox";
  box.checked = ticked;
  const set = () => on[group][box.checked ? "add" : "delete"](key);
  set();
  box.addEventListener("change", () => (set(), draw()));
  label.append(box);
  if (look) {
    const swatch = element("svg", { width: 24, height: 12, "aria-hidden": true });
    const line = { d: "M0,6L24,6", stroke: look.color, "stroke-width": 2, ...(look.dashes ? { "stroke-dasharray": look.dashes } : {}) };
    swatch.append(element("path", line), ...(look.marker ? [mark(look, 12, 6, 4)] : []));
    label.append(swatch);
  }
  label.append(title);
  byId(group).append(label);
  return box;
}

function start() {
  const looks = Object.values(view.looks);
  const unique = (key) => looks.filter((look, index) => looks.findIndex((other) => other[key] === look[key]) === index);
  const boxes = unique("design").map((look) => tickBox("designs", look.design, look.design, true, { ...look, dashes: "" }));
  if (boxes.length > 3) {
    const all = document.createElement("button");
    all.type = "button";
    all.textContent = "all / none";
    all.addEventListener("click", () => {
      const none = boxes.every((box) => box.checked);
      for (const box of boxes) if (box.checked === none) box.click();
    });
    byId("designs").append(all);
  }
  const samplings = unique("sampling");
  for (const look of samplings) {
    const grey = { color: "currentColor", dashes: look.dashes };
    tickBox("samplings", look.sampling, look.sampling, true, samplings.length > 1 ? grey : null);
  }
  for (const metric of Object.keys(view.metrics)) tickBox("metrics", metric, metric, metric === report.metric);
  for (const cost of view.costs) tickBox("costs", cost.key, cost.title, cost.shown);
  const repeated = new Set(report.points.flatMap((row) => Object.values(row.metrics).map((metric) => metric.over)));
  const kinds = [...repeated].filter(Boolean).map((over) => over.replace(/^.* /, "").replace(/s$/, ""));
  if (kinds.length) tickBox("shown", "seeds", `each ${[...new Set(kinds)].join(" or ")}`, true);
  if (looks.length > 1) tickBox("shown", "front", "Pareto front", true);
  byId("shown").hidden = byId("shown").children.length === 1;
  byId("key").textContent = view.key;
  byId("explore").hidden = false;
  draw();
  let width = window.innerWidth;
  window.addEventListener("resize", () => window.innerWidth !== width && ((width = window.innerWidth), draw()));
  for (const picture of document.querySelectorAll("main img")) {
    const button = document.createElement("button"), enlarged = byId("enlarged");
    button.type = "button";
    button.title = "Enlarge";
    picture.replaceWith(button);
    button.append(picture);
    button.addEventListener("click", () => {
      enlarged.firstChild.src = picture.src;
      enlarged.firstChild.alt = picture.alt;
      enlarged.showModal();
    });
    enlarged.addEventListener("click", () => enlarged.close());
  }
}
start();
