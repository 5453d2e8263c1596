// The form of settings: filled from /v1/guidance, read into a request, and marked where the server refuses a value.
import { h } from "./dom.js";

const STORE = "rgtg-playground";
// Settings that only some methods have, with the names of /v1/guidance.
const OWN = {
  entropy_gate: { label: "Entropy gate", note: "nats; guide only where the policy’s entropy exceeds this", min: 0 },
  kl_budget: { label: "KL budget", note: "nats per text, in place of β", min: 0 },
  value_threshold: { label: "Score to reach", note: "of every token", required: true },
  abstain_below: { label: "Abstain below", note: "end a text whose score falls below this" },
  n: { label: "Draws", note: "number of candidates to choose from", min: 1, step: 1 },
  proposal: { label: "Particles are drawn", note: "by pargs, or from the policy, which needs fewer scores", choices: { pargs: "by pargs", policy: "from the policy" } },
  resample_finished: { label: "Finished particles", note: "resampled with the unfinished ones, or kept with their weight", choices: { true: "resampled", false: "kept" } },
  segment_length: { label: "Segment length", note: "tokens", min: 1, step: 1 },
  min_segment: { label: "Shortest segment", note: "tokens", min: 1, step: 1 },
  entropy_threshold: { label: "Entropy that ends a segment", note: "nats", min: 0 },
  reward_threshold: { label: "Reward to reach", note: "of the finished text", required: true },
  threshold_start: { label: "First threshold", note: "0 is the prompt’s reward, 1 the one to reach", min: 0, max: 1 },
  retries: { label: "Retries", note: "segments rejected before the best is taken", min: 0, step: 1 },
};
const GREEDY = ["args", "pargs-greedy"];

/** One line that describes a method. */
function methodNote(method) {
  const unit = { token: "guides token by token", segment: "guides segment by segment", completion: "chooses among whole texts" }[method.unit] ?? method.unit;
  const made = method.scorer ? `, for scorers trained by ${method.scorer}` : "";
  return `${unit}${made} (${method.paper})`;
}

export class Form {
  constructor(root) {
    this.root = root;
    this.at = (id) => root.querySelector(`#${CSS.escape(id)}`);
    this.methods = [];
    this.kept = stored();
    this.at("method").addEventListener("change", () => this.#methodChanged(true));
    this.at("new-seed").addEventListener("click", () => { this.at("seed").value = Math.floor(Math.random() * 2 ** 31); this.keep(); });
    this.at("add-message").addEventListener("click", () => this.#addMessage("user", "").querySelector("textarea").focus());
    root.addEventListener("change", (event) => {
      if (event.target.name === "kind") this.kept.kind = event.target.value; // chosen by hand, and kept
      clearMark(event.target);
      this.#showKind();
      this.keep();
    });
    root.addEventListener("input", (event) => { clearMark(event.target); if (event.target.matches("textarea")) this.keep(); });
    this.#restore();
  }

  /** Fill the fields from the answer of /v1/guidance. */
  fill(server) {
    this.server = server;
    this.methods = server.methods.filter((method) => (server.scorers.length ? method.name !== "policy" : !method.scorer));
    const select = this.at("method");
    select.replaceChildren(...this.methods.map((method) => h("option", { value: method.name }, method.name)));
    const wanted = this.kept.method ?? "pargs";
    select.value = this.methods.some((method) => method.name === wanted) ? wanted : this.methods[0]?.name ?? "";
    this.at("scorers").hidden = server.scorers.length === 0;
    this.at("scorer-list").replaceChildren(...server.scorers.map((scorer, i) => this.#scorer(scorer, i)));
    const most = server.limits?.max_tokens ?? server.limits?.max_tokens_limit;
    if (Number.isFinite(most)) this.at("max_tokens").max = most;
    this.root.querySelector('input[value="chat"]').disabled = !server.chat_template;
    // a policy with a chat template answers messages; a bare text it may end at once
    this.#choose(server.chat_template && this.kept.kind !== "text" ? "chat" : "text");
    this.at("chat-note").hidden = server.chat_template === true;
    this.at("chat-note").textContent = "this policy has no chat template";
    this.#showKind();
    this.#methodChanged(false);
  }

  get method() {
    return this.methods.find((method) => method.name === this.at("method").value);
  }

  /** The request; null if a field is invalid (the browser then shows a message at the field). */
  read() {
    this.clearMarks();
    if (!this.at("settings").open && !this.root.checkValidity()) this.at("settings").open = true;
    if (!this.root.reportValidity()) return null;
    const figure = (id) => this.at(id).valueAsNumber;
    const stop = this.at("stop-texts").value.split("\n").filter((line) => line).map((line) => line.replaceAll("\\n", "\n"));
    const request = {
      model: this.server.policy, ...this.#asked(), seed: figure("seed"), max_tokens: figure("max_tokens"),
      ...(this.#greedy() ? {} : { temperature: figure("temperature") }), top_p: figure("top_p"), ...(stop.length ? { stop } : {}),
    };
    const guidance = { method: this.method.name, top_k: Number.isFinite(figure("top_k")) ? figure("top_k") : null, ...this.#scorersRead(), ...this.#ownRead() };
    return { ...request, guidance };
  }

  /** The decoding rule of the guided text under this request, to recompute steps with. */
  rule(request) {
    const given = request.guidance.scorers ?? {};
    const scorers = Array.isArray(given) ? given : Object.keys(given);
    return { scorers, betas: scorers.map((name) => (Array.isArray(given) ? 1 : given[name])), temperature: request.temperature ?? 1,
      greedy: this.#greedy(), clip: this.method.clip ?? this.method.name === "rad" };
  }

  /** Show an error at the field that caused it; false if there is no such field. */
  mark(param, message) {
    const field = this.#fieldOf(param);
    if (!field) return false;
    if (field.closest("details")) field.closest("details").open = true;
    field.setAttribute("aria-invalid", "true");
    const note = h("p", { class: "wrong", id: `${field.id}-wrong` }, message);
    field.setAttribute("aria-describedby", note.id);
    (field.closest(".field") ?? field.parentElement).append(note);
    field.focus();
    return true;
  }

  clearMarks() {
    this.root.querySelectorAll("[aria-invalid]").forEach(clearMark);
  }

  /** Keep prompt and settings in the session storage of this tab. */
  keep() {
    const values = { ...this.kept, messages: this.#messages() };
    for (const field of this.root.querySelectorAll("input[id], select[id], textarea[id]")) {
      values[field.id] = field.type === "checkbox" ? field.checked : field.value;
    }
    this.kept = values;
    try { sessionStorage.setItem(STORE, JSON.stringify(values)); } catch { /* storage is disabled: nothing is kept */ }
  }

  /** Fill the fields from a loaded trace. */
  adopt(trace) {
    const { request } = trace;
    if (trace.prompt !== null) this.at("prompt").value = trace.prompt;
    if (trace.messages) {
      this.at("messages").replaceChildren();
      for (const message of trace.messages) this.#addMessage(message.role, message.content);
    }
    if (trace.prompt !== null || trace.messages) this.#choose(trace.messages ? "chat" : "text");
    for (const name of ["seed", "max_tokens", "temperature", "top_p"]) if (Number.isFinite(request?.[name])) this.at(name).value = request[name];
    this.#showKind();
    this.keep();
  }

  #asked() {
    return this.#kind() === "chat" ? { messages: this.#messages() } : { prompt: this.at("prompt").value };
  }

  #kind() {
    return this.root.querySelector('input[name="kind"]:checked').value;
  }

  #choose(kind) {
    this.root.querySelector(`input[name="kind"][value="${kind}"]`).checked = true;
  }

  #greedy() {
    return this.method?.rule ? this.method.rule === "greedy" : GREEDY.includes(this.method?.name);
  }

  #messages() {
    return [...this.at("messages").children].map((item) => ({ role: item.querySelector("select").value, content: item.querySelector("textarea").value }));
  }

  #showKind() {
    const chat = this.#kind() === "chat";
    this.at("text-part").hidden = chat;
    this.at("chat-part").hidden = !chat;
    this.at("prompt").required = !chat;
    if (chat && !this.at("messages").children.length) this.#addMessage("user", this.at("prompt").value);
    for (const field of this.at("messages").querySelectorAll("textarea")) field.required = chat; // a hidden field is not
  }

  #addMessage(role, content) {
    const item = h("li", {},
      h("select", { "aria-label": "role" }, ...["system", "user", "assistant"].map((one) => h("option", { value: one, selected: one === role }, one))),
      h("textarea", { rows: 2, dir: "auto", "aria-label": "message", placeholder: "Message", required: this.#kind() === "chat", spellcheck: "false" }, content),
      h("button", { type: "button", class: "quiet", "aria-label": "remove this message", on: { click: () => { item.remove(); this.keep(); } } }, "✕"));
    this.at("messages").append(item);
    return item;
  }

  #scorer(scorer, i) {
    const id = `scorer-${scorer.name}`;
    const kept = this.kept[id];
    const about = [scorer.objective, scorer.kind].filter(Boolean).join(", ");
    return h("div", { class: "scorer" },
      h("label", { for: id }, h("input", { type: "checkbox", id, checked: kept ?? i === 0, "data-scorer": scorer.name }), h("bdi", {}, scorer.name), h("span", { class: "soft" }, ` ${about}`)),
      h("input", { type: "number", id: `beta-${scorer.name}`, step: "any", value: this.kept[`beta-${scorer.name}`] ?? 1, "aria-label": `β of ${scorer.name}`, required: true }));
  }

  #scorersRead() {
    const chosen = [...this.at("scorer-list").querySelectorAll("[data-scorer]:checked")].map((box) => box.dataset.scorer);
    if (!this.method.scorer || !chosen.length) return {};
    const budget = this.method.takes.includes("kl_budget") && this.at("kl_budget")?.value && chosen.length === 1;
    if (!this.method.takes.includes("beta") || budget) return { scorers: chosen };
    return { scorers: Object.fromEntries(chosen.map((name) => [name, this.at(`beta-${name}`).valueAsNumber])) };
  }

  #ownRead() {
    const read = (field) => (field.matches("select") ? { true: true, false: false }[field.value] ?? field.value : field.valueAsNumber);
    const filled = [...this.at("own").querySelectorAll("input, select")].filter((field) => field.value !== "" && !Number.isNaN(read(field)));
    return Object.fromEntries(filled.map((field) => [field.name, read(field)]));
  }

  #methodChanged(byHand) {
    const { method } = this;
    if (!method) return;
    this.at("method-note").textContent = methodNote(method);
    if (byHand || this.kept.top_k === undefined) this.at("top_k").value = method.top_k ?? "";
    const beta = method.takes.includes("beta");
    this.root.querySelectorAll('[id^="beta-"][type="number"]').forEach((field) => { field.hidden = !beta; field.disabled = !beta; });
    this.at("beta-note").hidden = !beta;
    this.at("temperature-field").hidden = this.#greedy();
    const own = method.takes.filter((name) => OWN[name]);
    this.at("own").replaceChildren(h("div", { class: "pair" }, ...own.map((name) => this.#ownField(name))));
  }

  #ownField(name) {
    const { label, note, choices, ...limits } = OWN[name];
    const kept = this.kept[name] ?? null;
    const options = Object.entries({ "": "default", ...choices }).map(([value, text]) => h("option", { value, selected: value === kept }, text));
    const field = choices ? h("select", { id: name, name }, ...options)
      : h("input", { id: name, name, type: "number", step: "any", placeholder: limits.required ? null : "default", value: kept, ...limits });
    return h("div", { class: "field" }, h("label", { for: name }, label), field, h("p", { class: "soft" }, note));
  }

  #fieldOf(param) {
    if (!param) return null;
    const name = param.replace(/^(body|guidance)\./, "").split(/[.[]/);
    if (name[0] === "messages") return this.at("messages").querySelector("textarea");
    const known = { beta: "scorer-list", scorers: "scorer-list", stop: "stop-texts", max_new_tokens: "max_tokens", model: "method" }[name[0]] ?? name[0];
    if (known === "scorer-list") return (name[1] && this.at(`beta-${name[1]}`)) || this.at("scorer-list").querySelector("input");
    return this.at(known);
  }

  #restore() {
    for (const [id, value] of Object.entries(this.kept)) {
      const field = this.at(id);
      if (field?.matches("input:not([type=radio]):not([type=checkbox]), textarea")) field.value = value;
    }
    for (const message of Array.isArray(this.kept.messages) ? this.kept.messages : []) this.#addMessage(message.role, message.content);
    if (this.kept.kind === "chat") this.#choose("chat");
    this.#showKind();
  }
}

function clearMark(field) {
  if (!field.hasAttribute?.("aria-invalid")) return;
  field.removeAttribute("aria-invalid");
  field.removeAttribute("aria-describedby");
  document.getElementById(`${field.id}-wrong`)?.remove();
}

function stored() {
  try {
    const found = JSON.parse(sessionStorage.getItem(STORE));
    return typeof found === "object" && found !== null && !Array.isArray(found) ? found : {};
  } catch {
    return {};
  }
}
