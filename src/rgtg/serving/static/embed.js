// Traces embedded in a page: an exported file, or a report. A trace inside <details> is drawn when it is opened.
import { h } from "./dom.js";
import { parseDocument, TraceError } from "./trace.js";
import { number } from "./text.js";
import { Viewer } from "./viewer.js";

/** Prompt, models and settings of a trace, for an exported page. */
function provenance({ prompt, messages, policy, request, created }) {
  const guidance = request?.guidance ?? {};
  const betas = Object.entries(guidance.scorers ?? {}).map(([name, beta]) => (typeof beta === "number" ? `${name} × ${number(beta)}` : String(beta)));
  const asked = messages ? messages.map(({ role, content }) => `${role}: ${content}`).join("\n") : prompt;
  const settings = ["seed", "max_tokens", "temperature", "top_p"].filter((name) => Number.isFinite(request?.[name])).map((name) => `${name} ${request[name]}`);
  const known = [["prompt", asked], ["policy", policy], ["method", guidance.method], ["scorers × β", betas.join(", ")],
    ["candidates", guidance.top_k ?? null], ["sampling", settings.join(", ")], ["written", created?.replace(/^(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*$/, "$1 $2 UTC")]];
  return h("dl", { class: "tv-made" }, ...known.filter(([, value]) => value !== null && value !== undefined && value !== "").flatMap(([name, value]) => [
    h("dt", {}, name), h("dd", {}, String(value))]));
}

function showTrace(data) {
  const place = h("div", { class: "tv-embedded" });
  data.before(place);
  try {
    const trace = parseDocument(data.textContent);
    if (document.body.classList.contains("tv-page")) place.append(provenance(trace));
    new Viewer(place).open(trace);
  } catch (error) {
    if (!(error instanceof TraceError)) throw error;
    place.replaceChildren(h("p", { role: "alert" }, `The trace in this page cannot be shown. ${error.message}`));
  }
}

/** Draw every trace of the page. */
export function showEmbedded() {
  for (const data of document.querySelectorAll('script[type="application/json"].rgtg-trace')) {
    const folded = data.closest("details");
    if (folded && !folded.open) folded.addEventListener("toggle", () => showTrace(data), { once: true });
    else showTrace(data);
  }
}
