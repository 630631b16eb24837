"use strict";
// Line and area charts as SVG, drawn at the width they have on the page.

const HEIGHT = 210, MARGIN = { top: 10, right: 12, bottom: 26, left: 46 };
const SMOOTH_FROM = 30; // points; below that a curve is shown as it is

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "circle", "rect", "title"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") node.style.cssText = value;
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function format(value, unit) {
  if (unit === "share") return Number((100 * value).toPrecision(3)) + " %";
  const size = Math.abs(value);
  let text;
  if (size !== 0 && size < 0.001) text = value.toExponential(1).replace("e-", "e−");
  else if (size >= 1000) text = Math.round(value).toLocaleString("en");
  else text = String(Number(value.toPrecision(3)));
  return unit === "seconds" ? text + " s" : text;
}

function ticks(low, high, count) {
  const step0 = (high - low) / count, power = 10 ** Math.floor(Math.log10(step0));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= step0 * 0.999);
  const marks = [];
  for (let mark = Math.ceil(low / step - 1e-9) * step; mark <= high + step * 1e-6; mark += step) marks.push(Math.abs(mark) < step * 1e-9 ? 0 : mark);
  return marks;
}

// The mean of each point's neighbourhood.
function smoothed(points) {
  const reach = Math.max(2, Math.round(points.length / 25));
  return points.map(([x], place) => {
    const near = points.slice(Math.max(0, place - reach), place + reach + 1);
    return [x, near.reduce((total, [, y]) => total + y, 0) / near.length];
  });
}

function stack(series) {
  const base = new Map();
  return series.map((one) => {
    const lower = one.points.map(([x]) => [x, base.get(x) || 0]);
    const upper = one.points.map(([x, y]) => [x, (base.get(x) || 0) + y]);
    upper.forEach(([x, y]) => base.set(x, y));
    return { ...one, lower, upper };
  });
}

class LineChart {
  constructor(chart, tip, last) {
    this.chart = chart;
    this.tip = tip;
    this.last = last; // of the horizontal axis, which all charts share
    this.series = chart.stacked ? stack(chart.series) : chart.series;
    this.places = [...new Set(chart.series.flatMap((one) => one.points.map(([x]) => x)))].sort((a, b) => a - b);
    this.svg = element("svg", { role: "img", tabindex: "0", height: HEIGHT, "aria-label": this.description() });
    this.node = element("figure", {},
      element("figcaption", {}, element("h3", {}, chart.title), element("p", {}, chart.note)), this.svg, this.legend());
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  description() {
    const ends = this.chart.series.map(({ name, points }) => {
      const value = (place) => format(points.at(place)[1], this.chart.unit);
      return `${name}: ${value(0)} at first, ${value(-1)} at the end`;
    });
    return `${this.chart.title}. ${ends.join("; ")}.`;
  }

  legend() {
    const rows = this.chart.series.map((one, place) => element("li", {},
      element("span", { class: one.dots ? "swatch dot" : "swatch", style: `background: var(--c${place % 8})` }), one.name));
    return element("ul", { class: "legend", hidden: this.chart.series.length < 2 }, ...rows);
  }

  scales() {
    const values = this.series.flatMap((one) => (one.upper || one.points).map(([, y]) => y));
    let low = Math.min(...values), high = Math.max(...values);
    if (this.chart.stacked || low > 0 && low < 0.6 * high) low = 0;
    if (this.chart.unit === "share") { low = 0; high = high > 0.5 ? 1 : high; }
    if (high === low) { high += Math.abs(high) || 1; }
    const marks = ticks(low, high, 4), step = marks[1] - marks[0];
    if (marks[0] - low > step * 1e-6) marks.unshift(marks[0] - step);
    if (high - marks.at(-1) > step * 1e-6) marks.push(marks.at(-1) + step);
    [low, high] = [marks[0], marks.at(-1)];
    const inner = { width: this.width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    this.x = (value) => MARGIN.left + (this.last ? value / this.last : 0.5) * inner.width;
    this.y = (value) => MARGIN.top + (1 - (value - low) / (high - low)) * inner.height;
    return marks;
  }

  path(points) {
    return points.map(([x, y], place) => `${place ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("");
  }

  draw() {
    this.width = this.svg.clientWidth;
    if (!this.width) return;
    const marks = this.scales();
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    const parts = [];
    for (const mark of marks) {
      parts.push(element("line", { class: "grid", x1: MARGIN.left, x2: this.width - MARGIN.right, y1: this.y(mark), y2: this.y(mark) }));
      parts.push(element("text", { x: MARGIN.left - 8, y: this.y(mark) + 4, "text-anchor": "end" }, format(mark, this.chart.unit)));
    }
    const columns = ticks(0, Math.max(this.last, 1), Math.max(2, Math.floor(this.width / 90)));
    for (const mark of columns.filter((one) => Number.isInteger(one) && one <= this.last)) parts.push(element("text", { x: this.x(mark), y: HEIGHT - 6, "text-anchor": "middle" }, String(mark)));
    this.series.forEach((one, place) => parts.push(...this.line(one, `var(--c${place % 8})`)));
    this.cursor = element("line", { class: "cursor", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom, visibility: "hidden" });
    this.svg.replaceChildren(...parts, this.cursor);
  }

  line(one, color) {
    if (one.upper) {
      return [element("path", { class: "area", style: `fill: ${color}`, d: this.path(one.upper) + this.path([...one.lower].reverse()).replace("M", "L") + "Z" })];
    }
    const noisy = !one.dots && one.points.length >= SMOOTH_FROM;
    const parts = [];
    if (noisy) parts.push(element("path", { class: "raw", style: `stroke: ${color}`, d: this.path(one.points) }));
    parts.push(element("path", { class: "curve", style: `stroke: ${color}`, d: this.path(noisy ? smoothed(one.points) : one.points) }));
    if (one.dots || one.points.length === 1) {
      parts.push(...one.points.map(([x, y]) => element("circle", { cx: this.x(x), cy: this.y(y), r: 4, style: `fill: ${color}` })));
    }
    return parts;
  }

  point(event) {
    const at = event.clientX - this.svg.getBoundingClientRect().left;
    let best = 0;
    this.places.forEach((place, index) => { if (Math.abs(this.x(place) - at) < Math.abs(this.x(this.places[best]) - at)) best = index; });
    this.show(best);
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const from = this.current === undefined ? (moves[event.key] > 0 ? -1 : this.places.length) : this.current;
    this.show(Math.min(this.places.length - 1, Math.max(0, from + moves[event.key])));
  }

  show(index) {
    this.current = index;
    const place = this.places[index], x = this.x(place);
    for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, x);
    this.cursor.setAttribute("visibility", "visible");
    const rows = this.chart.series.flatMap((one, color) => {
      const hit = one.points.find(([at]) => at === place);
      if (!hit) return [];
      const swatch = element("span", { class: one.dots ? "swatch dot" : "swatch", style: `background: var(--c${color % 8})` });
      return [element("tr", {}, element("td", {}, swatch, one.name), element("td", {}, format(hit[1], this.chart.unit)))];
    });
    const box = this.svg.getBoundingClientRect();
    this.tip.show([element("div", { class: "head" }, `rollout ${Number(place.toFixed(2))}`), element("table", {}, ...rows)],
      box.left + x, box.top + MARGIN.top);
  }

  leave() {
    this.current = undefined;
    if (this.cursor) this.cursor.setAttribute("visibility", "hidden");
    this.tip.hide();
  }
}

class Tip {
  constructor(node) { this.node = node; }

  show(children, left, top) {
    this.node.replaceChildren(...children);
    this.node.hidden = false;
    const size = this.node.getBoundingClientRect(), edge = document.documentElement.clientWidth;
    const side = left + 14 + size.width > edge - 8 ? left - size.width - 14 : left + 14;
    this.node.style.left = `${Math.max(8, side) + window.scrollX}px`;
    this.node.style.top = `${top + window.scrollY}px`;
  }

  hide() { this.node.hidden = true; }
}
