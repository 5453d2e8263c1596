// A text as a strip of coloured tokens; one can be selected, and the first that differs from the other text is marked.
import { h, onKeys, tokenNodes } from "./dom.js";
import { chosenIndex } from "./guidance.js";
import { MODES, place } from "./scale.js";
import { candidateText, signed, number, spoken, TokenReader } from "./text.js";

export class Strip {
  /** `onSelect(index)` is called when the user selects a token. */
  constructor({ label, onSelect }) {
    this.onSelect = onSelect;
    this.tokens = []; // {node, pieces, pending, key}
    this.selected = null;
    this.reader = new TokenReader();
    this.element = h("div", {
      class: "tv-strip", role: "group", "aria-label": label, dir: "auto",
      on: {
        click: (event) => this.#clicked(event),
        keydown: onKeys({
          ArrowRight: () => this.#go(this.#current() + 1),
          ArrowLeft: () => this.#go(this.#current() - 1),
          ArrowDown: () => this.#go(this.#beside(1)),
          ArrowUp: () => this.#go(this.#beside(-1)),
          Home: () => this.#go(0),
          End: () => this.#go(this.tokens.length - 1),
          Enter: () => this.#go(this.#current()),
          " ": () => this.#go(this.#current()),
        }),
      },
    });
    this.plain = null;
  }

  /** Show steps, keeping the nodes of those already shown; `text` is shown if there are no steps. */
  show(steps, { text = "", marks = false } = {}) {
    if (marks !== this.marks) this.#truncate(0);
    this.marks = marks;
    const same = this.tokens.findIndex((token, i) => !steps[i] || token.step !== steps[i]);
    if (same >= 0) this.#truncate(same);
    for (const step of steps.slice(this.tokens.length)) this.#append(step);
    this.#showPlain(steps.length ? "" : text);
    this.element.setAttribute("role", steps.length ? "listbox" : "group"); // so that screen readers read a text without steps as text
    const focusable = this.selected ?? 0;
    this.tokens.forEach((token, i) => { token.node.tabIndex = i === focusable ? 0 : -1; });
  }

  /** Colour every token by its value, and give it a label with the value. */
  colour(mode, values, range) {
    this.tokens.forEach(({ node, pieces }, i) => {
      const at = place(mode, values[i], range);
      node.classList.toggle("tv-up", at !== null && (at > 0 || !MODES[mode].diverging));
      node.classList.toggle("tv-down", at !== null && at < 0);
      node.style.setProperty("--at", at === null ? "0" : Math.abs(at).toFixed(3));
      const figure = values[i] === null ? "no figure" : MODES[mode].diverging ? signed(values[i]) : number(values[i]);
      node.setAttribute("aria-label", `${i + 1}: ${spoken(pieces)}, ${MODES[mode].label.toLowerCase()} ${figure}`);
      node.title = `${spoken(pieces)}  ${MODES[mode].label.toLowerCase()} ${figure} ${MODES[mode].unit}`.trim();
    });
  }

  /** Mark the first token that differs from the other text, the tokens beyond the returned text, and the fork. */
  mark({ divergence = null, end = null, fork = null }) {
    this.tokens.forEach(({ node }, i) => {
      node.classList.toggle("tv-parts", i === divergence);
      node.classList.toggle("tv-beyond", end !== null && i >= end);
      node.classList.toggle("tv-forked", i === fork);
    });
  }

  select(index, focus = false) {
    const before = this.tokens[this.selected ?? -1];
    before?.node.setAttribute("aria-selected", "false");
    this.selected = index !== null && index < this.tokens.length ? index : null;
    this.tokens.forEach((token, i) => { token.node.tabIndex = i === (this.selected ?? 0) ? 0 : -1; });
    const now = this.tokens[this.selected ?? -1];
    now?.node.setAttribute("aria-selected", "true");
    if (focus) now?.node.focus();
  }

  /** Bytes of an incomplete character before this token. */
  pendingAt(index) {
    return this.tokens[index]?.pending ?? [];
  }

  piecesAt(index) {
    return this.tokens[index]?.pieces ?? [];
  }

  /** Length of the text up to and including each token, in characters. */
  lengths() {
    let total = 0;
    return this.tokens.map(({ pieces }) => {
      total += pieces.reduce((sum, piece) => sum + piece.text.length, 0);
      return total;
    });
  }

  #append(step) {
    const pending = [...this.reader.pending];
    const [bytes, text] = candidateText(step, chosenIndex(step));
    const pieces = this.reader.read(bytes, text);
    const node = h("span", { class: "tv-token", role: "option", "aria-selected": "false", "data-at": this.tokens.length }, ...tokenNodes(pieces, this.marks));
    this.tokens.push({ node, pieces, pending, step, after: [...this.reader.pending] });
    this.element.append(node);
  }

  #truncate(length) {
    for (const token of this.tokens.splice(length)) token.node.remove();
    this.reader = new TokenReader(this.tokens[length - 1]?.after ?? []);
    if (this.selected !== null && this.selected >= length) this.selected = null;
  }

  #showPlain(text) {
    this.plain?.remove();
    this.plain = text ? h("span", { class: "tv-untokened" }, text) : null;
    if (this.plain) this.element.append(this.plain);
  }

  #current() {
    const focused = this.tokens.findIndex((token) => token.node === document.activeElement);
    return focused >= 0 ? focused : this.selected ?? 0;
  }

  /** The token below or above the current one. */
  #beside(direction) {
    const here = this.tokens[this.#current()].node.getBoundingClientRect();
    const middle = here.left + here.width / 2;
    let best = this.#current();
    let least = Infinity;
    this.tokens.forEach(({ node }, i) => {
      const there = node.getBoundingClientRect();
      const lines = direction * (there.top - here.top);
      if (lines < here.height / 2) return;
      const distance = 4 * lines + Math.abs(there.left + there.width / 2 - middle);
      if (distance < least) [best, least] = [i, distance];
    });
    return best;
  }

  #go(index) {
    if (index < 0 || index >= this.tokens.length) return;
    this.onSelect(index);
    this.tokens[index].node.focus();
  }

  #clicked(event) {
    const node = event.target.closest("[data-at]");
    if (node) this.#go(Number(node.dataset.at));
  }
}
