// The playground: sends requests, collects the streamed texts in a document, and shows it.
import { ApiError, apiKey, ask, explain, stream } from "./api.js";
import { h } from "./dom.js";
import { exportPage, loadTrace, saveTrace } from "./files.js";
import { Form } from "./form.js";
import { branchOf, FORMAT, idsBefore, path, readStep, TraceError, VERSION } from "./trace.js";
import { Viewer } from "./viewer.js";

const at = (id) => document.getElementById(id);
const form = new Form(at("form"));
const viewer = new Viewer(at("viewer"), { onFork: fork, forkable });
let server = null; // the answer of /v1/guidance
let running = null; // the AbortController of the running request
let trace = null; // the document that is shown

// ---- the server

async function loadServer() {
  try {
    server = await ask("v1/guidance");
    form.fill(server);
    const scorers = server.scorers.map((scorer) => scorer.name).join(", ");
    at("about").textContent = `${server.policy}${scorers ? `, guided by ${scorers}` : " without scorers: start the server with --scorer NAME=DIR"}`;
    at("run").textContent = server.scorers.length ? "Generate both texts" : "Generate";
    clearBanner();
  } catch (error) {
    if (error.status === 401) at("key-box").open = true;
    at("about").textContent = error.status === 401 ? "waiting for the API key" : "no models loaded";
    if (error.status !== 503 || at("banner").hidden) showError(error, loadServer); // while the models load, the message is shown only once
    if (error.status === 503) setTimeout(loadServer, 2000);
  }
  setBusy(running !== null);
}

// ---- messages

function clearBanner() {
  at("banner").hidden = true;
}

function banner(heading, ...rest) {
  at("banner").replaceChildren(...h("div", {}, h("strong", {}, heading), ...rest).childNodes);
  at("banner").hidden = false;
}

/** Show an error above the texts, and at its field if the server names one. */
function showError(error, again = null) {
  if (error.name === "AbortError") return;
  const ours = error instanceof ApiError || error instanceof TraceError;
  if (!ours) console.error(error);
  const [heading, advice] = error instanceof ApiError ? explain(error) : [ours ? "This trace cannot be shown" : "Something failed in this page", ""];
  if (error.param) form.mark(error.param, error.message);
  banner(heading, h("p", {}, [error.message, advice].filter(Boolean).join(" ")),
    error.requestId && h("p", { class: "soft" }, `request ${error.requestId}`),
    again && (error.status === 0 || error.status === 429 || error.status >= 500) && h("button", { type: "button", on: { click: () => { clearBanner(); again(); } } }, "Try again"));
}

function setBusy(busy) {
  at("run").disabled = busy || !server;
  at("run").classList.toggle("waiting", busy);
  at("stop").hidden = !busy;
  at("load").disabled = busy;
  for (const id of ["save", "export"]) at(id).disabled = busy || !trace;
  document.body.classList.toggle("busy", busy);
}

function say(text) {
  at("progress").textContent = text;
}

// ---- generation

/** Run one request that the stop button can abort; the text so far is kept if it ends early. */
async function generate(branches, again, work) {
  running = new AbortController();
  clearBanner();
  setBusy(true);
  say("Generating …");
  const started = performance.now();
  const close = (reason) => {
    for (const branch of branches) {
      branch.finish_reason ??= reason;
      branch.seconds ??= (performance.now() - started) / 1000;
    }
  };
  try {
    await work(running.signal, started);
    close("ended");
    say(branches.map((branch) => `${branch.label}: ${branch.steps.length} tokens.`).join(" "));
  } catch (error) {
    close(error.name === "AbortError" ? "stopped" : "error");
    say(error.name === "AbortError" ? "Stopped." : "");
    showError(error, again);
  } finally {
    running = null;
    setBusy(false);
    viewer.refresh();
  }
}

function newBranch(id, values) {
  return { id, parent: null, at: 0, token_id: null, steps: [], text: "", finish_reason: null, guidance: {}, seconds: null, reward: null, prefix_scores: null, ...values };
}

function append(branch, event, started) {
  const { trace: steps, ...summary } = event.guidance ?? {};
  for (const step of steps ?? []) branch.steps.push(readStep(step));
  branch.text += event.text ?? "";
  if (Object.keys(summary).length) branch.guidance = summary;
  if (event.finish_reason) {
    branch.finish_reason = event.finish_reason;
    branch.seconds = (performance.now() - started) / 1000;
  }
  viewer.refresh();
}

/** Show a document. A new one is opened at its first token, so that a refused request leaves the old texts on the page. */
function open(document) {
  if (trace === document) return;
  trace = document;
  at("empty").hidden = true;
  viewer.open(trace);
}

async function run() {
  const request = form.read();
  if (!request || running) return;
  form.keep();
  const guided = form.rule(request);
  const unguided = { scorers: [], betas: [], temperature: request.temperature ?? 1, greedy: false, clip: false };
  const { prompt = null, messages = null, model, ...settings } = request;
  const sides = [newBranch(0, { side: "unguided", label: "Unguided", rule: unguided })];
  if (server.scorers.length) sides.push(newBranch(1, { side: "guided", label: "Guided", rule: guided }));
  const made = { format: FORMAT, version: VERSION, created: new Date().toISOString(), policy: model, prompt, messages, prompt_token_ids: null, request: settings, branches: sides };
  const begun = () => {
    if (trace !== made && matchMedia("(max-width: 60rem)").matches) at("results").scrollIntoView();
    open(made);
  };
  await generate(sides, run, async (signal, started) => {
    if (server.scorers.length) await compare(request, sides, signal, started, begun);
    else await complete(request, sides[0], signal, started, begun);
    made.prompt_token_ids = sides.map((side) => side.guidance.prompt_token_ids).find(Array.isArray) ?? null;
    for (const side of sides) delete side.guidance.prompt_token_ids;
    if (server.scorers.length) await scoreUnguided(request, sides, signal);
  });
}

async function compare(request, [unguided, guided], signal, started, begun) {
  await stream("v1/compare", request, signal, (event) => {
    begun();
    if (event.side) append(event.side === "guided" ? guided : unguided, event, started);
  });
}

/** Stream one completion or chat completion into a branch. */
async function complete(request, branch, signal, started, begun = () => {}) {
  const kind = request.messages ? "v1/chat/completions" : "v1/completions";
  await stream(kind, { ...request, guidance: { ...request.guidance, trace: true } }, signal, (event) => {
    const choice = event.choices?.[0];
    begun();
    if (choice) append(branch, { ...choice, text: choice.text ?? choice.delta?.content ?? "" }, started);
  });
}

/** Request the scores of the unguided text and of its prefixes, for the curve. The text is shown without them if this fails. */
async function scoreUnguided(request, [unguided, guided], signal) {
  const { scorers, betas } = guided.rule;
  if (!scorers.length || !unguided.text) return;
  const { prompt, messages } = request;
  const prefixes = guided.steps.some((step) => step.scores);
  const body = (model) => ({ model, ...(messages ? { messages } : { prompt }), completion: unguided.text, finished: unguided.finish_reason === "stop", prefixes });
  const joined = (scores) => (scores.length > 1 ? scores.reduce((sum, score, j) => sum + betas[j] * score, 0) : scores[0]);
  try {
    const answers = (await Promise.all(scorers.map((name) => ask("v1/score", body(name), signal)))).map((answer) => answer.data[0]);
    unguided.guidance.score = joined(answers.map((one) => one.score));
    const each = answers.map((one) => one.prefixes ?? []);
    const same = each.every((scores) => unguided.steps.every((step, i) => i >= scores.length || scores[i].token_id === step.token_id));
    if (!prefixes || !same) return; // the text encodes to other tokens than those drawn, so the scores do not belong to the tokens shown
    unguided.prefix_scores = unguided.steps.map((_, i) => (each.every((scores) => i < scores.length) ? joined(each.map((scores) => scores[i].score)) : null));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
  }
}

// ---- forks

/** Why a candidate cannot be continued; null if it can. */
function forkable(branchId, index, candidate) {
  if (running) return "wait until the texts are finished, or stop them";
  if (!server) return "there is no connection to the server";
  if (trace.policy !== server.policy) return `this trace was made with another policy, ${trace.policy}`;
  if (!trace.prompt_token_ids || !trace.request) return "this trace has no prompt tokens or no request, so it cannot be continued";
  const step = path(trace, branchId)[index];
  if ((server.end_token_ids ?? []).includes(step.candidate_ids[candidate])) return "this token ends the text";
  if (index + 1 >= trace.request.max_tokens) return "the text has the maximum length of the settings";
  return null;
}

async function fork(parentId, index, candidate) {
  const parent = branchOf(trace, parentId);
  const token = path(trace, parentId)[index].candidate_ids[candidate];
  // A fork at a token that the parent shares with its own parent belongs to that one, so the tree shows where texts diverge.
  let origin = parent;
  while (origin.parent !== null && index <= origin.at) origin = branchOf(trace, origin.parent);
  const id = Math.max(...trace.branches.map((branch) => branch.id)) + 1;
  const branch = newBranch(id, { parent: origin.id, at: index, token_id: token, side: parent.side, label: parent.label, rule: parent.rule });
  const kept = [...idsBefore(trace, parentId, index), token];
  trace.branches.push(branch);
  viewer.showBranch(id);
  const { max_tokens: limit, guidance, ...settings } = trace.request;
  const alone = { method: "policy", top_k: guidance.top_k ?? null };
  const request = { ...settings, model: trace.policy, prompt: [...trace.prompt_token_ids, ...kept], max_tokens: limit - kept.length, guidance: parent.side === "unguided" ? alone : guidance };
  await generate([branch], () => fork(parentId, index, candidate), (signal, started) => complete(request, branch, signal, started));
  if (branch.finish_reason === "error" && !branch.steps.length && !branch.text) { // the request was refused, so there is no fork
    trace.branches.splice(trace.branches.indexOf(branch), 1);
    viewer.showBranch(parentId);
  }
}

// ---- files and start

async function chooseFile(file) {
  try {
    const loaded = await loadTrace(file);
    clearBanner();
    form.adopt(loaded);
    open(loaded);
    setBusy(false);
    say("Trace loaded.");
  } catch (error) {
    showError(error);
  }
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
at("form").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); run(); } });
at("stop").addEventListener("click", () => running?.abort());
addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
at("save").addEventListener("click", () => saveTrace(trace));
at("export").addEventListener("click", () => exportPage(trace).catch(showError));
at("load").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => { const [file] = at("file").files; if (file) chooseFile(file); at("file").value = ""; });
at("key").value = apiKey.get();
at("key").addEventListener("change", () => { apiKey.set(at("key").value.trim()); loadServer(); });
if (matchMedia("(max-width: 60rem)").matches) at("settings").open = false;
setBusy(true);
at("stop").hidden = true;
loadServer();
