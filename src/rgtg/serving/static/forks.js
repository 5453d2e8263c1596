// The tree of texts and their forks.
import { h, onKeys, tokenNodes } from "./dom.js";
import { chosenIndex } from "./guidance.js";
import { candidateText, number, spoken, TokenReader } from "./text.js";
import { path } from "./trace.js";

export class Forks {
  /** `onSelect(id)` is called when the user selects a text. */
  constructor({ onSelect }) {
    this.onSelect = onSelect;
    this.list = h("ul", { role: "tree", "aria-label": "texts and their forks" });
    this.list.addEventListener("click", (event) => {
      const item = event.target.closest("[data-id]");
      if (item) this.#go(item);
    });
    this.list.addEventListener("keydown", onKeys({
      ArrowDown: () => this.#go(this.#items()[this.#place() + 1]),
      ArrowUp: () => this.#go(this.#items()[this.#place() - 1]),
      ArrowLeft: () => this.#go(this.#focused()?.parentElement.closest("[data-id]")),
      ArrowRight: () => this.#go(this.#focused()?.querySelector("[data-id]")),
      Home: () => this.#go(this.#items()[0]),
      End: () => this.#go(this.#items().at(-1)),
      Enter: () => this.#go(this.#focused()),
      " ": () => this.#go(this.#focused()),
    }));
    this.element = h("section", { class: "tv-forks", hidden: true }, h("h3", {}, "Forks"), this.list);
  }

  show(document, shown) {
    const forks = document.branches.some((branch) => branch.parent !== null);
    this.element.hidden = !forks;
    if (!forks) {
      this.list.replaceChildren();
      return;
    }
    const focused = this.list.contains(window.document.activeElement);
    const roots = document.branches.filter((branch) => branch.parent === null);
    this.list.replaceChildren(...roots.map((branch) => this.#item(document, branch, shown, 1)));
    if (focused) this.list.querySelector('[tabindex="0"]')?.focus();
  }

  #item(document, branch, shown, level) {
    const children = document.branches.filter((one) => one.parent === branch.id);
    const here = shown.current === branch.id;
    return h("li", {
      role: "treeitem", "aria-level": level, "aria-selected": String(shown.visible.includes(branch.id)), "data-id": branch.id,
      tabindex: here ? 0 : -1, "aria-expanded": children.length ? "true" : null, class: here && "tv-current",
    }, h("span", { class: "tv-node" }, nodeLabel(document, branch)),
    children.length > 0 && h("ul", { role: "group" }, ...children.map((one) => this.#item(document, one, shown, level + 1))));
  }

  #items() {
    return [...this.list.querySelectorAll("[data-id]")];
  }

  #focused() {
    return window.document.activeElement?.closest("[data-id]") ?? null;
  }

  #place() {
    return this.#items().indexOf(this.#focused());
  }

  #go(item) {
    if (!item) return;
    this.onSelect(Number(item.dataset.id));
    this.list.querySelector(`[data-id="${item.dataset.id}"]`)?.focus();
  }
}

function nodeLabel(document, branch) {
  const steps = path(document, branch.id);
  const last = steps.at(-1);
  const at = last ? chosenIndex(last) : -1;
  const score = last?.scores && at >= 0 ? h("span", { class: "tv-soft" }, ` ${number(last.scores[at])}`) : null;
  if (branch.parent === null) return [h("bdi", {}, branch.label), score];
  const before = path(document, branch.parent)[branch.at];
  const instead = branch.token_id === before.token_id ? h("span", { class: "tv-soft" }, " again") : [h("span", { class: "tv-soft" }, " for "), tokenWord(before, before.token_id)];
  return [`${branch.at + 1}: `, tokenWord(before, branch.token_id), instead, score];
}

function tokenWord(step, id) {
  return h("bdi", { class: "tv-word" }, ...tokenNodes(read(step, id), "only"));
}

function read(step, id) {
  return new TokenReader().read(...candidateText(step, step.candidate_ids.indexOf(id)));
}

/** The name of a branch, with its fork in words. */
export function forkName(document, branch) {
  if (branch.parent === null) return branch.label;
  const before = path(document, branch.parent)[branch.at];
  return `${branch.label}, from token ${branch.at + 1} on with ${spoken(read(before, branch.token_id)).replace(/^“ +(?=[^”])/, "“")}`;
}
