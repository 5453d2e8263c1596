// One text: its name, its tokens, and a line with its score, cost and speed.
import { freshId, h } from "./dom.js";
import { chosenIndex } from "./guidance.js";
import { number } from "./text.js";
import { Strip } from "./strip.js";

const ENDS = { stop: "finished", length: "length limit", content_filter: "abstained", abstained: "abstained", stopped: "stopped by you", error: "failed", ended: "" };

export class Panel {
  constructor({ root, kind, onSelect }) {
    this.root = root; // id of the root branch of the panel's texts
    this.kind = kind;
    const id = freshId("panel");
    this.name = h("h3", { id });
    this.state = h("span", { class: "tv-state" });
    this.strip = new Strip({ label: "", onSelect });
    this.figures = h("dl", { class: "tv-figures" });
    this.element = h("article", { class: `tv-panel tv-${kind}`, "aria-labelledby": id },
      h("header", {}, this.name, this.state), this.strip.element, this.figures);
  }

  show({ branch, steps, name, text, marks }) {
    this.name.replaceChildren(h("bdi", {}, name));
    this.strip.element.setAttribute("aria-label", `${name}, ${steps.length} tokens`);
    const running = branch.finish_reason === null;
    this.state.textContent = running ? "generating …" : ENDS[branch.finish_reason] ?? branch.finish_reason;
    this.element.setAttribute("aria-busy", String(running));
    this.element.classList.toggle("tv-running", running);
    this.strip.show(steps, { text, marks });
    this.element.classList.toggle("tv-empty", !steps.length && !text);
    this.figures.replaceChildren(...figuresOf(branch, steps).flatMap(([term, value, about]) => [
      h("div", { title: about }, h("dt", {}, term), h("dd", {}, value))]));
  }
}

/** The figures of a text: name, value and explanation. */
export function figuresOf(branch, steps) {
  const { guidance } = branch;
  const found = [["tokens", branch.parent === null ? String(steps.length) : `${steps.length} (${branch.steps.length} new)`, "of the text shown, the closing token included"]];
  if (Number.isFinite(branch.reward)) found.push(["reward", number(branch.reward), "of the finished text, by the held-out reward"]);
  const score = lastScore(branch, steps);
  if (score !== null) found.push(["score", number(score), "the scorer’s, of the whole text"]);
  const kl = guidance.kl_nats;
  if (Number.isFinite(kl)) found.push(["KL", `${number(kl)} nats`, "log-probability of the text, guided − policy over its whole vocabulary"]);
  if (branch.seconds > 0 && branch.steps.length) found.push(["speed", `${number(branch.steps.length / branch.seconds, 1)} tokens/s`, "measured in this page, while both texts are generated"]);
  if (Number.isFinite(guidance.policy_calls)) found.push(["policy calls", String(guidance.policy_calls), "forward passes of the policy"]);
  if (Number.isFinite(guidance.scorer_calls)) found.push(["scorer calls", String(guidance.scorer_calls), "all candidates of a step are one call"]);
  if (guidance.fallback === true) found.push(["scorer", "failed: some tokens are unguided", "the scorer returned NaN"]);
  return found;
}

function lastScore(branch, steps) {
  if (Number.isFinite(branch.guidance.score)) return branch.guidance.score;
  const known = branch.prefix_scores?.at(-1);
  if (Number.isFinite(known)) return known;
  const last = steps.at(-1);
  const at = last ? chosenIndex(last) : -1;
  return last?.scores && at >= 0 ? last.scores[at] : null;
}
