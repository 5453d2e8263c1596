// Colour scales of the tokens: the quantity, its range, and the position of a value in it.
import { change, chosenIndex, entropy } from "./guidance.js";

export const MODES = {
  change: { label: "Change", unit: "nats", diverging: true, low: "less likely than without the scorer", high: "more likely",
    about: "log-probability of the token, guided − policy, over the same candidates" },
  score: { label: "Score", unit: "", diverging: false, low: "lower score", high: "higher score",
    about: "score of the text up to and including the token" },
  entropy: { label: "Entropy", unit: "nats", diverging: false, low: "certain", high: "uncertain",
    about: "of the distribution the token was drawn from" },
};

/** The score of the text up to and including the token; `known` holds scores requested afterwards. */
export function scoreAt(step, index, known = null) {
  const at = chosenIndex(step);
  if (step.scores && at >= 0) return step.scores[at];
  return known && Number.isFinite(known[index]) ? known[index] : null;
}

export function valueOf(mode, step, index, known = null) {
  if (mode === "change") return change(step);
  if (mode === "score") return scoreAt(step, index, known);
  return entropy(step.guided_log_probs);
}

/** Range of the colour scale over all texts shown. A diverging scale is symmetric about 0, and one token in twenty may
 *  lie beyond it (`open`), so that one outlier does not make all other colours pale. */
export function range(mode, values) {
  const known = values.filter((value) => value !== null && Number.isFinite(value));
  const { diverging } = MODES[mode];
  if (diverging) {
    const sizes = known.map(Math.abs).sort((a, b) => a - b);
    const most = Math.max(0.5, sizes[Math.ceil(sizes.length * 0.95) - 1] ?? 0);
    return { low: -most, high: most, open: sizes.at(-1) > most };
  }
  if (!known.length) return { low: 0, high: 1 };
  const low = mode === "entropy" ? 0 : known.reduce((a, b) => Math.min(a, b));
  const high = known.reduce((a, b) => Math.max(a, b));
  return { low, high: high > low ? high : low + 1 };
}

/** Position of a value: −1 to 1 on a diverging scale, else 0 to 1; null: no colour. */
export function place(mode, value, { low, high }) {
  if (value === null || !Number.isFinite(value)) return null;
  const at = MODES[mode].diverging ? value / high : (value - low) / (high - low);
  return Math.min(Math.max(at, MODES[mode].diverging ? -1 : 0), 1);
}

/** About `count` round numbers in a range, for an axis. */
export function ticks(low, high, count = 4) {
  const raw = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * unit).find((size) => size >= raw * 0.8);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
  return found;
}
