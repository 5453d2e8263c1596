// Renders a document: texts side by side, one step in detail, the curve of scores, the tree of forks.
// Used by the playground, its exported file and the report of `rgtg compare`.
import { Curve } from "./curve.js";
import { freshId, h, tokenNodes } from "./dom.js";
import { Inspector } from "./inspector.js";
import { Panel } from "./panel.js";
import { change, chosenIndex, entropy, firstDivergence } from "./guidance.js";
import { MODES, range, scoreAt, valueOf } from "./scale.js";
import { number, signed } from "./text.js";
import { ancestry, branchOf, knownScores, path } from "./trace.js";
import { forkName, Forks } from "./forks.js";

export class Viewer {
  /** `onFork(branch id, token, candidate)` continues from a candidate; without it, no forks can be made. */
  constructor(root, { onFork = null, forkable = null } = {}) {
    this.forkable = forkable;
    this.mode = "change";
    this.marks = false;
    this.panels = [];
    this.leaf = new Map(); // root → its branch that is shown
    this.selected = null; // {root, index}
    this.values = new WeakMap();
    this.inspector = new Inspector({
      onStep: (by) => this.#move(by),
      onFork: onFork && ((candidate) => onFork(this.leaf.get(this.selected.root), this.selected.index, candidate)),
    });
    this.curve = new Curve({ onSelect: (key, index) => this.select(key, index) });
    this.forks = new Forks({ onSelect: (id) => this.showBranch(id) });
    this.legend = h("div", { class: "tv-legend" });
    this.place = h("div", { class: "tv-panels" });
    this.note = h("p", { class: "tv-parting", role: "status" });
    this.hint = h("p", { class: "tv-hint" }, "Choose a token, by click or arrow keys, to see its candidates.");
    this.figures = h("details", { class: "tv-all", on: { toggle: () => this.#fillFigures() } });
    this.element = h("div", { class: "tv" }, this.#toolbar(), this.place, this.note,
      h("div", { class: "tv-below" }, h("div", {}, this.hint, this.inspector.element), h("div", { class: "tv-side" }, this.curve.element, this.forks.element)),
      this.figures);
    this.element.hidden = true;
    root.append(this.element);
  }

  open(document) {
    this.document = document;
    this.element.hidden = false;
    this.leaf = new Map(this.#roots().map((branch) => [branch.id, branch.id]));
    this.selected = null;
    this.inspector.hide();
    this.panels = this.#roots().map((branch, i) => new Panel({
      root: branch.id, kind: branch.side === "unguided" ? "plain" : `line${i % 6}`, onSelect: (index) => this.select(branch.id, index),
    }));
    this.place.replaceChildren(...this.panels.map((panel) => panel.element));
    this.draw();
  }

  /** Draw at the next animation frame. */
  refresh() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  }

  showBranch(id) {
    const root = ancestry(this.document, id)[0];
    const before = this.leaf.get(root.id);
    this.leaf.set(root.id, id);
    const branch = branchOf(this.document, id);
    if (before !== id && branch.parent !== null) this.selected = { root: root.id, index: branch.at };
    else if (this.selected?.root !== root.id) this.selected = this.selected && { root: root.id, index: this.selected.index };
    this.draw();
  }

  select(root, index) {
    this.selected = { root, index };
    this.draw();
  }

  draw() {
    if (!this.document) return;
    const texts = this.panels.map((panel) => this.#text(panel));
    texts.forEach(({ panel, branch, steps, name, text }) => panel.show({ branch, steps, name, text, marks: this.marks }));
    const values = texts.map(({ steps, known }) => steps.map((step, i) => this.#value(step, i, known)));
    const shared = range(this.mode, values.flat());
    texts.forEach(({ panel }, i) => panel.strip.colour(this.mode, values[i], shared));
    this.#drawLegend(shared);
    this.#drawDivergence(texts);
    this.#drawSelection(texts);
    this.#drawCurve(texts);
    const current = this.selected ? this.leaf.get(this.selected.root) : this.leaf.get(this.panels.at(-1).root);
    this.forks.show(this.document, { current, visible: [...this.leaf.values()] });
    this.texts = texts;
    this.#fillFigures();
  }

  #roots() {
    return this.document.branches.filter((branch) => branch.parent === null);
  }

  #text(panel) {
    const id = this.leaf.get(panel.root);
    const branch = branchOf(this.document, id);
    return { panel, branch, steps: path(this.document, id), known: knownScores(this.document, id), name: forkName(this.document, branch), text: branch.text };
  }

  #value(step, index, known) {
    if (this.mode === "score") return valueOf("score", step, index, known);
    if (!this.values.has(step)) this.values.set(step, { change: change(step), entropy: entropy(step.guided_log_probs) });
    return this.values.get(step)[this.mode];
  }

  #toolbar() {
    const group = freshId("mode");
    const choice = (mode) => h("label", { title: MODES[mode].about },
      h("input", { type: "radio", name: group, value: mode, checked: mode === this.mode, on: { change: () => { this.mode = mode; this.draw(); } } }), h("span", {}, MODES[mode].label));
    const spaces = h("label", { class: "tv-check" }, h("input", { type: "checkbox", on: { change: (event) => { this.marks = event.target.checked; this.draw(); } } }), "Show spaces");
    return h("div", { class: "tv-toolbar" },
      h("fieldset", { class: "tv-modes" }, h("legend", {}, "Colour by"), h("div", { class: "tv-segments" }, ...Object.keys(MODES).map(choice))), spaces, this.legend);
  }

  #drawLegend({ low, high, open = false }) {
    const mode = MODES[this.mode];
    const figure = (value) => `${open ? (value < 0 ? "≤ " : "≥ ") : ""}${(mode.diverging ? signed : number)(value)}`;
    this.legend.replaceChildren(
      h("span", { class: "tv-end" }, `${figure(low)} `, h("small", {}, mode.low)),
      h("span", { class: `tv-ramp ${mode.diverging ? "tv-ramp-two" : "tv-ramp-one"}`, role: "img", "aria-label": `colours: ${mode.about}` }),
      h("span", { class: "tv-end" }, `${figure(high)} ${mode.unit} `, h("small", {}, mode.high)));
    this.legend.title = mode.about;
  }

  #drawDivergence(texts) {
    const ids = ({ steps }) => steps.map((step) => step.token_id);
    const done = ({ branch }) => branch.finish_reason !== null;
    const [first, ...others] = texts;
    const found = others.map((text) => firstDivergence(ids(first), ids(text), done(first) && done(text)));
    texts.forEach((text, i) => text.panel.strip.mark({
      divergence: i ? found[i - 1] : texts.length === 2 ? found[0] : null, end: beyond(text), fork: text.branch.parent === null ? null : text.branch.at,
    }));
    this.note.replaceChildren(...(texts.length === 2 ? divergenceNote(found[0], texts, (index) => this.select(texts[1].panel.root, index)) : []));
  }

  #drawSelection(texts) {
    this.hint.hidden = this.selected !== null || !texts.some(({ steps }) => steps.length);
    texts.forEach(({ panel }) => panel.strip.select(panel.root === this.selected?.root ? this.selected.index : null));
    const text = texts.find(({ panel }) => panel.root === this.selected?.root);
    const step = text?.steps[this.selected.index];
    if (!step) {
      this.inspector.hide();
      return;
    }
    const at = this.selected.index;
    const owner = ancestry(this.document, text.branch.id).findLast((branch) => branch.parent === null || branch.at <= at);
    this.inspector.show({
      step, rule: owner.rule, index: at, total: text.steps.length, label: text.branch.label, pending: text.panel.strip.pendingAt(at),
      forkable: this.forkable && ((candidate) => this.forkable(text.branch.id, at, candidate)),
    });
  }

  #drawCurve(texts) {
    const series = texts.map(({ panel, branch, steps, known }) => ({
      key: panel.root, label: branch.label, kind: panel.kind, values: steps.map((step, i) => scoreAt(step, i, known)),
    }));
    this.curve.show(series, this.selected && { key: this.selected.root, index: this.selected.index });
  }

  #move(by) {
    const text = this.texts.find(({ panel }) => panel.root === this.selected?.root);
    const index = this.selected.index + by;
    if (text?.steps[index]) this.select(this.selected.root, index);
  }

  /** All tokens of the selected text as a table, built when it is opened. */
  #fillFigures() {
    const text = this.texts?.find(({ panel }) => panel.root === this.selected?.root) ?? this.texts?.at(-1);
    this.figures.hidden = !text?.steps.length;
    const summary = h("summary", {}, `All tokens of ${text?.name ?? "the text"} as a table`);
    if (!this.figures.open) {
      this.figures.replaceChildren(summary);
      return;
    }
    const heads = ["#", "token", "log π", "log guided", "change", "score", "entropy"];
    const rows = text.steps.map((step, i) => {
      const at = chosenIndex(step);
      const values = [number(step.policy_log_probs[at]), number(step.guided_log_probs[at]), signed(change(step)), number(scoreAt(step, i, text.known)), number(entropy(step.guided_log_probs))];
      return h("tr", {}, h("td", {}, String(i + 1)), h("th", { scope: "row" }, h("bdi", { class: "tv-word" }, ...tokenNodes(text.panel.strip.piecesAt(i), "only"))), ...values.map((value) => h("td", {}, value)));
    });
    this.figures.replaceChildren(summary, h("div", { class: "tv-scroll", tabindex: "0", role: "region", "aria-label": "all tokens" },
      h("table", { class: "tv-table" }, h("caption", { class: "tv-unseen" }, `Tokens of ${text.name}; log-probabilities and entropy in nats`),
        h("thead", {}, h("tr", {}, ...heads.map((head) => h("th", { scope: "col", class: head === "token" && "tv-left" }, head)))), h("tbody", {}, ...rows))));
  }
}

/** Index of the first token beyond the returned text, which ends before a stop text. */
function beyond({ panel, branch, steps }) {
  if (branch.finish_reason !== "stop" || !branch.text || branch.parent !== null) return null;
  const lengths = panel.strip.lengths();
  const end = lengths.findIndex((_, i) => i > 0 && lengths[i - 1] >= branch.text.length);
  return end > 0 && end < steps.length && lengths.at(-1) > branch.text.length ? end : null;
}

function divergenceNote(index, texts, jump) {
  const lengths = texts.map(({ steps }) => steps.length);
  if (!Math.min(...lengths)) return [];
  const finished = texts.every(({ branch }) => branch.finish_reason !== null);
  if (index === null) return [finished ? "Both texts are equal." : "Equal so far."];
  const same = index === 0 ? "The first token differs." : `The first ${index === 1 ? "token is" : `${index} tokens are`} equal.`;
  return [h("span", { class: "tv-diamond", "aria-hidden": "true" }, "◆ "), `${same} `, index < lengths[1] ? h("button", { type: "button", class: "tv-quiet", on: { click: () => jump(index) } }, "show the first difference") : ""];
}
