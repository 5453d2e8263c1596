// One decoding step: its candidates with the figures of policy and scorers, recomputed for other values of beta.
import { freshId, h, tokenNodes, unseen } from "./dom.js";
import { agrees, candidateRows, chosenIndex, entropy, guidedLogProbs } from "./guidance.js";
import { candidateText, number, percent, signed, spoken, TokenReader } from "./text.js";

const SHOWN = 25;

export class Inspector {
  /** `onStep(by)` selects a neighbouring token; `onFork(candidate index)` continues from a candidate (null: not possible). */
  constructor({ onStep, onFork }) {
    this.onStep = onStep;
    this.onFork = onFork;
    this.betas = null; // values of the sliders; null: those the step was drawn with
    this.title = h("h3", { id: freshId("step") });
    this.about = h("p", { class: "tv-soft" });
    this.sliders = h("div", { class: "tv-sliders" });
    this.note = h("p", { class: "tv-note", role: "status" });
    this.table = h("div", { class: "tv-scroll", tabindex: "0", role: "region", "aria-label": "candidates of the token" });
    const move = (by, text, name) => h("button", { type: "button", class: "tv-quiet", "aria-label": name, on: { click: () => this.onStep(by) } }, text);
    this.element = h("section", { class: "tv-inspector", "aria-labelledby": this.title.id, hidden: true },
      h("header", {}, this.title, h("span", { class: "tv-steps" }, move(-1, "←", "previous token"), move(1, "→", "next token"))),
      this.about, this.sliders, this.note, this.table);
  }

  /** Show a step, with the sliders at the betas it was drawn with. */
  show({ step, rule, index, total, label, pending, forkable }) {
    const again = this.step === step;
    Object.assign(this, { step, rule, pending, forkable });
    if (!again) { this.betas = null; this.all = false; }
    this.sound = agrees(step, rule);
    this.element.hidden = false;
    const chosen = this.#pieces(chosenIndex(step));
    this.title.replaceChildren(`Token ${index + 1} of ${total}, ${label}: `, h("bdi", { class: "tv-word" }, ...tokenNodes(chosen, "only")));
    if (!again) this.#makeSliders();
    this.#refresh();
  }

  hide() {
    this.element.hidden = true;
    this.step = null;
  }

  #pieces(index) {
    return new TokenReader(this.pending).read(...candidateText(this.step, index));
  }

  #makeSliders() {
    const steered = this.step.scores !== null;
    this.inputs = [];
    if (!steered || !this.sound) {
      this.sliders.replaceChildren();
      return;
    }
    const rows = this.rule.betas.map((beta, j) => this.#slider(beta, j));
    this.reset = h("button", { type: "button", class: "tv-quiet", on: { click: () => this.#put(null) } }, "as drawn");
    this.sliders.replaceChildren(...rows, this.reset);
  }

  #slider(beta, j) {
    const name = this.rule.betas.length > 1 ? `β of ${this.rule.scorers[j]}` : "β";
    const most = Math.max(8, Math.ceil(2 * Math.abs(beta)));
    const id = freshId("beta");
    const range = h("input", { type: "range", id, min: beta < 0 ? -most : 0, max: most, step: "any", value: beta });
    range.value = beta;
    const exact = h("input", { type: "number", step: "any", value: beta, "aria-label": `${name}, exactly` });
    const move = (from) => () => {
      const value = from.valueAsNumber;
      if (!Number.isFinite(value)) return;
      const betas = this.betas ?? [...this.rule.betas];
      betas[j] = from === range ? Math.round(value * 100) / 100 : value;
      this.#put(betas);
    };
    range.addEventListener("input", move(range));
    exact.addEventListener("input", move(exact));
    this.inputs.push({ range, exact });
    return h("div", { class: "tv-slider" }, h("label", { for: id }, h("bdi", {}, name)), range, exact);
  }

  #put(betas) {
    this.betas = betas;
    const values = betas ?? this.rule.betas;
    this.inputs.forEach(({ range, exact }, j) => {
      if (document.activeElement !== range) range.value = values[j];
      if (document.activeElement !== exact) exact.value = values[j];
    });
    this.#refresh();
  }

  #refresh() {
    const changed = this.betas !== null && this.betas.some((beta, j) => beta !== this.rule.betas[j]);
    const rule = changed ? { ...this.rule, betas: this.betas } : this.rule;
    if (this.reset) this.reset.disabled = !changed;
    const rows = candidateRows(this.step, this.sound ? rule : null);
    this.about.textContent = this.#facts(rule, rows);
    this.note.textContent = this.#explain(changed, rule);
    this.table.replaceChildren(this.#tableOf(rows));
  }

  #facts(rule, rows) {
    const held = rows.reduce((sum, row) => sum + row.policy, 0);
    const guided = this.sound ? guidedLogProbs(this.step, rule) : this.step.guided_log_probs;
    return `${rows.length} candidates with ${percent(Math.min(held, 1))} of the policy’s probability. `
      + `Entropy of the ${this.step.scores ? "guided " : ""}step: ${number(entropy(guided))} nats.`;
  }

  #explain(changed, rule) {
    if (!this.step.scores) return "This token was drawn unguided.";
    if (!this.sound) return "This step cannot be recomputed here; the figures are those of the server.";
    const how = rule.greedy || rule.temperature === 0 ? "the largest log π + β·r is taken"
      : rule.temperature === 1 ? "π·exp(β·r)/Z over these candidates" : `[π·exp(β·r)]^(1/${number(rule.temperature)})/Z over these candidates`;
    if (!changed) return `Move β to recompute this step with another strength, without calling the model: ${how}.`;
    const best = candidateRows(this.step, rule)[0];
    return `Recomputed here from the stored trace, without calling the model: ${how}. `
      + `Most likely now: ${spoken(this.#pieces(best.index))}, ${percent(best.guided)}. The text itself does not change.`;
  }

  #tableOf(rows) {
    const several = this.step.scores_of_each !== null && this.rule.scorers.length === this.step.scores_of_each.length;
    const names = several ? this.rule.scorers : ["score"];
    const steered = this.step.scores !== null;
    const heads = ["token", "policy", ...(steered ? [...names, several ? "Σ β·r" : "β × score", "guided"] : ["among these"]), "rank"];
    const shown = this.all ? rows : rows.filter((row, i) => i < SHOWN || row.chosen);
    const head = h("tr", {}, ...heads.map((one) => h("th", { scope: "col" }, h("bdi", {}, one))), this.onFork && h("th", { scope: "col" }, unseen("continue")));
    const more = rows.length > shown.length && h("button", { type: "button", class: "tv-quiet", on: { click: () => { this.all = true; this.#refresh(); } } }, `show all ${rows.length}`);
    return h("div", {}, h("table", { class: "tv-table" },
      h("caption", { class: "tv-unseen" }, "Candidates by guided probability; probabilities under policy and guidance, score, and change of rank"),
      h("thead", {}, head), h("tbody", {}, ...shown.map((row) => this.#row(row, several, steered)))), more);
  }

  #row(row, several, steered) {
    const pieces = this.#pieces(row.index);
    const bar = (value, kind) => h("td", { class: `tv-bar tv-${kind}`, vars: { p: value.toFixed(4) } }, percent(value));
    const scores = several ? row.each : [row.score];
    return h("tr", { class: row.chosen && "tv-chosen", "aria-current": row.chosen && "true" },
      h("th", { scope: "row" }, h("bdi", { class: "tv-word" }, ...tokenNodes(pieces, "only")), row.chosen && h("span", { class: "tv-badge" }, "drawn")),
      bar(row.policy, "policy"),
      steered && scores.map((score) => h("td", {}, number(score))),
      steered && h("td", {}, signed(row.steering)),
      bar(row.guided, "guided"),
      h("td", { class: "tv-rank" }, rankNodes(row)),
      this.onFork && h("td", {}, this.#forkButton(row, pieces)));
  }

  #forkButton(row, pieces) {
    const reason = this.forkable ? this.forkable(row.index) : null;
    return h("button", {
      type: "button", class: "tv-fork", disabled: reason !== null, title: reason ?? "continue from this token",
      "aria-label": `continue from ${spoken(pieces)}`, on: { click: () => this.onFork(row.index) },
    }, "↳");
  }
}

function rankNodes(row) {
  if (row.move === 0) return [String(row.guidedRank)];
  const direction = row.move > 0 ? "up" : "down";
  return [`${row.policyRank} → ${row.guidedRank} `, h("span", { class: `tv-move tv-move-${direction}` },
    row.move > 0 ? "▲" : "▼", unseen(direction, " "), String(Math.abs(row.move)))];
}
