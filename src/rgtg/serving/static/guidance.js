// The guided distribution of one step, computed from its trace: π(v)·exp(β·r)/Z over the step's candidates.
// The same formulas as in rgtg/decoding/sampling.py.

/** A decoding step: all arrays have one entry per candidate; log-probabilities in nats.
 *  @typedef {{token_id: number, candidate_ids: number[], policy_log_probs: number[], scores: number[]|null,
 *    scores_of_each: number[][]|null, guided_log_probs: number[], candidate_texts: string[]|null,
 *    candidate_bytes: number[][]|null}} Step */

/** How a step was sampled: one beta per scorer; `greedy` takes the maximum; `clip` clips scores to [0, 1].
 *  @typedef {{scorers: string[], betas: number[], temperature: number, greedy: boolean, clip: boolean}} Rule */

export function logSumExp(values) {
  const top = values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (top === -Infinity) return -Infinity;
  return top + Math.log(values.reduce((sum, value) => sum + Math.exp(value - top), 0));
}

/** The term added to each candidate's log π: β·r, or Σ β_j·r_j; null for an unguided step. */
export function steering(step, rule) {
  if (!step.scores) return null;
  const clip = (value) => (rule.clip ? Math.min(Math.max(value, 0), 1) : value);
  const each = step.scores_of_each;
  if (each) return step.scores.map((_, i) => clip(each.reduce((sum, scores, j) => sum + rule.betas[j] * scores[i], 0)));
  return step.scores.map((score) => rule.betas[0] * clip(score));
}

/** log π + β·r of each candidate; −∞ where the policy excludes it. */
export function sums(step, rule) {
  const added = steering(step, rule);
  return step.policy_log_probs.map((p, i) => (p === -Infinity || !added ? p : p + added[i]));
}

/** Guided log-probabilities of the step's candidates under a rule, in nats; their probabilities sum to 1. */
export function guidedLogProbs(step, rule) {
  const combined = sums(step, rule);
  const best = combined.reduce((at, value, i) => (value > combined[at] ? i : at), 0);
  if (rule.greedy || rule.temperature === 0) return combined.map((_, i) => (i === best ? 0 : -Infinity));
  const scaled = combined.map((value) => (value - combined[best]) / rule.temperature);
  const total = logSumExp(scaled);
  return scaled.map((value) => value - total);
}

/** Whether the rule gives the probabilities that the server stored, to within `tolerance`. */
export function agrees(step, rule, tolerance = 1e-3) {
  if (step.scores_of_each && step.scores_of_each.length !== rule.betas.length) return false;
  if (step.scores && !step.scores_of_each && rule.betas.length !== 1) return false;
  const again = guidedLogProbs(step, rule);
  return again.every((value, i) => Math.abs(Math.exp(value) - Math.exp(step.guided_log_probs[i])) <= tolerance);
}

/** Entropy −Σ p·log p in nats. */
export function entropy(logProbs) {
  return logProbs.reduce((sum, value) => (value === -Infinity ? sum : sum - Math.exp(value) * value), 0);
}

export function chosenIndex(step) {
  return step.candidate_ids.indexOf(step.token_id);
}

/** The effect of guidance on the chosen token: log π̃ − log π, with π renormalised over the same candidates. */
export function change(step) {
  const at = chosenIndex(step);
  if (at < 0) return null;
  return step.guided_log_probs[at] - (step.policy_log_probs[at] - logSumExp(step.policy_log_probs));
}

/** Ranks of values, 1 for the largest; ties are ranked in order. */
export function ranks(values) {
  const order = values.map((_, i) => i).sort((a, b) => values[b] - values[a] || a - b || 0);
  const found = new Array(values.length);
  order.forEach((i, place) => { found[i] = place + 1; });
  return found;
}

/** The rows of a step's table, highest guided value first; without a rule, with the server's values. */
export function candidateRows(step, rule) {
  const added = rule && steering(step, rule);
  const guided = rule ? guidedLogProbs(step, rule) : step.guided_log_probs;
  const before = ranks(step.policy_log_probs);
  const after = ranks(rule ? sums(step, rule) : guided);
  return step.candidate_ids
    .map((id, i) => ({
      index: i,
      id,
      policy: Math.exp(step.policy_log_probs[i]),
      score: step.scores ? step.scores[i] : null,
      each: step.scores_of_each ? step.scores_of_each.map((scores) => scores[i]) : null,
      steering: added ? added[i] : null,
      guided: Math.exp(guided[i]),
      policyRank: before[i],
      guidedRank: after[i],
      move: before[i] - after[i],
      chosen: id === step.token_id,
    }))
    .sort((a, b) => a.guidedRank - b.guidedRank);
}

/** Index of the first token that differs; null if there is none, or if unfinished texts agree so far. */
export function firstDivergence(one, other, finished = true) {
  const shared = Math.min(one.length, other.length);
  for (let i = 0; i < shared; i += 1) if (one[i] !== other[i]) return i;
  return finished && one.length !== other.length ? shared : null;
}
