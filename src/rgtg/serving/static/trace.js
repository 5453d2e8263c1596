// Documents: a prompt and its texts with a trace of every step. Documents from files are checked field by field.

export const FORMAT = "rgtg-trace";
export const VERSION = 1;
const MOST = { branches: 1000, steps: 100000, candidates: 5000000, bytes: 256 * 2 ** 20 };

/** An invalid file or answer; the message says where, and what was expected. */
export class TraceError extends Error {}

function refuse(where, expected) {
  throw new TraceError(`${where}: expected ${expected}`);
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function text(value, where, none = false) {
  if (none && (value === null || value === undefined)) return null;
  return typeof value === "string" ? value : refuse(where, "a text");
}

function whole(value, where, none = false) {
  if (none && (value === null || value === undefined)) return null;
  return Number.isSafeInteger(value) && value >= 0 ? value : refuse(where, "a whole number, 0 or more");
}

/** JSON has no infinity: an excluded candidate has the text "-Infinity". */
function logProb(value, where) {
  if (value === "-Infinity" || value === -Infinity) return -Infinity;
  return Number.isFinite(value) ? value : refuse(where, 'a number or "-Infinity"');
}

function finite(value, where, none = false) {
  if (none && (value === null || value === undefined)) return null;
  return Number.isFinite(value) ? value : refuse(where, "a number");
}

function list(value, where, each, length = null, none = false) {
  if (none && (value === null || value === undefined)) return null;
  if (!Array.isArray(value)) refuse(where, "a list");
  if (length !== null && value.length !== length) refuse(where, `a list of ${length}, one for each candidate`);
  return value.map((one, i) => each(one, `${where}[${i}]`));
}

/** One step of a trace, with the known fields only. @returns {import("./guidance.js").Step} */
export function readStep(raw, where = "step") {
  if (!isObject(raw)) refuse(where, "an object");
  const ids = list(raw.candidate_ids, `${where}.candidate_ids`, whole);
  const of = (name, each, none = false) => list(raw[name], `${where}.${name}`, each, ids.length, none);
  const byte = (value, at) => (Number.isInteger(value) && value >= 0 && value < 256 ? value : refuse(at, "a byte"));
  const token = whole(raw.token_id, `${where}.token_id`);
  if (!ids.includes(token)) refuse(`${where}.token_id`, "one of candidate_ids");
  return {
    token_id: token,
    candidate_ids: ids,
    policy_log_probs: of("policy_log_probs", logProb),
    scores: of("scores", finite, true),
    scores_of_each: list(raw.scores_of_each, `${where}.scores_of_each`, (one, at) => list(one, at, finite, ids.length), null, true),
    guided_log_probs: of("guided_log_probs", logProb),
    candidate_texts: of("candidate_texts", text, true),
    candidate_bytes: of("candidate_bytes", (one, at) => list(one, at, byte), true),
  };
}

/** The fields of an object that are numbers, texts, booleans or lists of them, and the object "scorers". */
function facts(raw, where) {
  if (raw === null || raw === undefined) return {};
  if (!isObject(raw)) refuse(where, "an object");
  const plain = (value) => value === null || ["number", "string", "boolean"].includes(typeof value);
  const kept = Object.entries(raw).filter(([, value]) => plain(value) || (Array.isArray(value) && value.every(plain)));
  const found = new Map(kept);
  if (isObject(raw.scorers)) found.set("scorers", facts(raw.scorers, `${where}.scorers`));
  return Object.fromEntries(found); // defines own properties, so a name such as __proto__ is safe
}

function readRule(raw, where) {
  if (!isObject(raw)) refuse(where, "an object");
  const scorers = list(raw.scorers, `${where}.scorers`, text);
  const betas = list(raw.betas, `${where}.betas`, finite);
  if (betas.length !== scorers.length) refuse(`${where}.betas`, "one number for each scorer");
  const temperature = finite(raw.temperature, `${where}.temperature`);
  if (temperature < 0) refuse(`${where}.temperature`, "0 or more");
  return { scorers, betas, temperature, greedy: raw.greedy === true, clip: raw.clip === true };
}

function readBranch(raw, where, before) {
  if (!isObject(raw)) refuse(where, "an object");
  const branch = {
    id: whole(raw.id, `${where}.id`),
    parent: whole(raw.parent, `${where}.parent`, true),
    at: whole(raw.at ?? 0, `${where}.at`),
    token_id: whole(raw.token_id, `${where}.token_id`, true),
    label: text(raw.label, `${where}.label`),
    side: ["unguided", "guided"].includes(raw.side) ? raw.side : refuse(`${where}.side`, '"unguided" or "guided"'),
    rule: readRule(raw.rule, `${where}.rule`),
    steps: list(raw.steps, `${where}.steps`, readStep),
    text: text(raw.text ?? "", `${where}.text`),
    finish_reason: text(raw.finish_reason, `${where}.finish_reason`, true),
    guidance: facts(raw.guidance, `${where}.guidance`),
    seconds: finite(raw.seconds, `${where}.seconds`, true),
    reward: finite(raw.reward, `${where}.reward`, true),
    prefix_scores: list(raw.prefix_scores, `${where}.prefix_scores`, (one, at) => finite(one, at, true), null, true),
  };
  if (before.has(branch.id)) refuse(`${where}.id`, "a number that no earlier text has");
  if (branch.parent === null) return branch;
  const parent = before.get(branch.parent) ?? refuse(`${where}.parent`, "the id of an earlier text");
  const step = path({ branches: [...before.values()] }, parent.id)[branch.at] ?? refuse(`${where}.at`, "a token of its parent");
  if (!step.candidate_ids.includes(branch.token_id)) refuse(`${where}.token_id`, "a candidate of the step it leaves");
  return branch;
}

/** Check parsed JSON and return the document. @throws {TraceError} */
export function readDocument(raw) {
  if (!isObject(raw) || raw.format !== FORMAT) throw new TraceError(`this is no saved trace (its "format" is not "${FORMAT}")`);
  if (raw.version !== VERSION) throw new TraceError(`this trace is of version ${JSON.stringify(raw.version)}; this page reads version ${VERSION}`);
  if (!Array.isArray(raw.branches) || !raw.branches.length) refuse("branches", "a list of at least one text");
  if (raw.branches.length > MOST.branches) throw new TraceError(`more than ${MOST.branches} texts in one file`);
  requireSize(raw.branches);
  const known = new Map();
  raw.branches.forEach((one, i) => {
    const branch = readBranch(one, `branches[${i}]`, known);
    known.set(branch.id, branch);
  });
  const message = (one, at) => (isObject(one) ? { role: text(one.role, `${at}.role`), content: text(one.content, `${at}.content`) } : refuse(at, "an object"));
  return {
    format: FORMAT,
    version: VERSION,
    created: text(raw.created, "created", true),
    policy: text(raw.policy, "policy", true),
    prompt: text(raw.prompt, "prompt", true),
    messages: list(raw.messages, "messages", message, null, true),
    prompt_token_ids: list(raw.prompt_token_ids, "prompt_token_ids", whole, null, true),
    request: readRequest(raw.request),
    branches: [...known.values()],
  };
}

/** The settings that a fork sends again: plain values only; the server validates them. */
function readRequest(raw) {
  if (raw === null || raw === undefined) return null;
  return { ...facts(raw, "request"), guidance: facts(raw.guidance, "request.guidance") };
}

function requireSize(branches) {
  let steps = 0;
  let candidates = 0;
  for (const branch of branches) {
    for (const step of Array.isArray(branch?.steps) ? branch.steps : []) {
      steps += 1;
      candidates += Array.isArray(step?.candidate_ids) ? step.candidate_ids.length : 0;
    }
  }
  if (steps > MOST.steps || candidates > MOST.candidates) throw new TraceError(`too large: ${steps} steps with ${candidates} candidates`);
}

/** Parse and check a file's text. @throws {TraceError} */
export function parseDocument(json) {
  if (json.length > MOST.bytes) throw new TraceError("too large: a trace of more than 256 MiB");
  let raw;
  try {
    raw = JSON.parse(json);
  } catch {
    throw new TraceError("this file is not JSON");
  }
  return readDocument(raw);
}

export function writeDocument(document) {
  const plain = (_, value) => (value === -Infinity ? "-Infinity" : value);
  return JSON.stringify(document, plain);
}

export function branchOf(document, id) {
  return document.branches.find((branch) => branch.id === id) ?? null;
}

/** The branch and its ancestors, the root first. */
export function ancestry(document, id) {
  const found = [];
  for (let branch = branchOf(document, id); branch; branch = branchOf(document, branch.parent)) found.unshift(branch);
  return found;
}

const leaving = new WeakMap(); // branch → its first step, cached so that it is always the same object

function leavingStep(branch, step) {
  if (!leaving.has(branch)) leaving.set(branch, { ...step, token_id: branch.token_id });
  return leaving.get(branch);
}

/** All steps of a branch's text: the ancestors' steps before the fork, the step of the fork, and its own steps. */
export function path(document, id) {
  return ancestry(document, id).reduce((steps, branch) => (branch.parent === null ? branch.steps
    : [...steps.slice(0, branch.at), leavingStep(branch, steps[branch.at]), ...branch.steps]), []);
}

/** Scores requested afterwards, one per token of a branch's text; null if unknown. */
export function knownScores(document, id) {
  return ancestry(document, id).reduce((scores, branch) => {
    const own = branch.prefix_scores ?? [];
    return branch.parent === null ? own : [...scores.slice(0, branch.at), null, ...own];
  }, []);
}

/** Token ids of a branch's text before token `at`. */
export function idsBefore(document, id, at) {
  return path(document, id).slice(0, at).map((step) => step.token_id);
}

/** JSON escaped for a script element. */
export function jsonForHtml(json) {
  return json.replace(/[<>&\u2028\u2029]/g, (found) => `\\u${found.charCodeAt(0).toString(16).padStart(4, "0")}`);
}
