// A chart of the score after each token: one line per text, with the values of the trace.
import { h, svg } from "./dom.js";
import { ticks } from "./scale.js";
import { number } from "./text.js";

const HEIGHT = 190;
const LEFT = 46;
const RIGHT = 12;
const TOP = 12;
const BOTTOM = 26;

export class Curve {
  /** `onSelect(key, index)` is called when the user clicks a token of a line. */
  constructor({ onSelect }) {
    this.onSelect = onSelect;
    this.series = [];
    this.picture = h("div", { class: "tv-plot" });
    this.key = h("div", { class: "tv-key", "aria-hidden": "true" });
    this.element = h("figure", { class: "tv-curve", hidden: true },
      h("figcaption", {}, h("h3", {}, "Score along the text"), this.key), this.picture);
    this.width = 0;
    new ResizeObserver(() => {
      const width = Math.round(this.picture.clientWidth);
      if (width && width !== this.width) { this.width = width; this.#draw(); }
    }).observe(this.picture);
  }

  /** Draw lines `{key, label, kind, values}`, null for a token without a score; `at` is the selected `{key, index}`. */
  show(series, at) {
    this.series = series.filter((line) => line.values.some((value) => value !== null));
    this.at = at;
    this.element.hidden = this.series.length === 0;
    if (this.element.hidden) return;
    this.key.replaceChildren(...this.series.map((line) => h("span", { class: `tv-line-${line.kind}` }, h("i"), h("bdi", {}, line.label))));
    if (this.width) this.#draw();
  }

  #draw() {
    if (!this.series.length) return;
    const values = this.series.flatMap((line) => line.values.filter((value) => value !== null));
    const length = Math.max(...this.series.map((line) => line.values.length), 2);
    const [low, high] = padded(values);
    const x = (i) => LEFT + (i / (length - 1)) * (this.width - LEFT - RIGHT);
    const y = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    const label = this.series.map((line) => `${line.label}: ${summary(line.values)}`).join("; ");
    const chart = svg("svg", {
      role: "img", "aria-label": `Score by token. ${label}`, width: this.width, height: HEIGHT,
      viewBox: `0 0 ${this.width} ${HEIGHT}`, on: { click: (event) => this.#pick(event, x, length) },
    }, ...this.#axes(x, y, low, high, length), ...this.series.map((line) => drawLine(line, x, y)), ...this.#selection(x, y));
    this.picture.replaceChildren(chart);
  }

  #axes(x, y, low, high, length) {
    const right = this.width - RIGHT;
    const across = ticks(low, high, 4).flatMap((value) => [
      svg("line", { class: "tv-grid", x1: LEFT, x2: right, y1: y(value), y2: y(value) }),
      svg("text", { class: "tv-tick", x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, number(value, decimals(high - low))),
    ]);
    const along = ticks(1, length, Math.max(3, Math.floor(this.width / 70))).filter((value) => Number.isInteger(value)).map((value) =>
      svg("text", { class: "tv-tick", x: x(value - 1), y: HEIGHT - 8, "text-anchor": "middle" }, String(value)));
    return [...across, ...along];
  }

  #selection(x, y) {
    const line = this.at && this.series.find((one) => one.key === this.at.key);
    const value = line?.values[this.at.index];
    if (!this.at || this.at.index === null) return [];
    const rule = svg("line", { class: "tv-here", x1: x(this.at.index), x2: x(this.at.index), y1: TOP, y2: HEIGHT - BOTTOM });
    if (value === null || value === undefined) return [rule];
    return [rule, svg("circle", { class: `tv-dot tv-line-${line.kind}`, cx: x(this.at.index), cy: y(value), r: 4.5 })];
  }

  #pick(event, x, length) {
    const across = event.clientX - event.currentTarget.getBoundingClientRect().left;
    const index = Math.round(((across - LEFT) / (x(length - 1) - LEFT)) * (length - 1));
    const line = this.series.find((one) => one.key === this.at?.key) ?? this.series[this.series.length - 1];
    this.onSelect(line.key, Math.min(Math.max(index, 0), line.values.length - 1));
  }
}

function drawLine(line, x, y) {
  let pen = "M";
  const points = line.values.map((value, i) => {
    if (value === null) { pen = "M"; return ""; }
    const point = `${pen}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
    return point;
  });
  return svg("path", { class: `tv-path tv-line-${line.kind}`, d: points.join("") });
}

function padded(values) {
  const low = values.reduce((a, b) => Math.min(a, b));
  const high = values.reduce((a, b) => Math.max(a, b));
  const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

function decimals(span) {
  return span >= 20 ? 0 : span >= 2 ? 1 : span >= 0.2 ? 2 : 3;
}

function summary(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? `from ${number(known[0])} to ${number(known[known.length - 1])} over ${values.length} tokens` : "no scores";
}
