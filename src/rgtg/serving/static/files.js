// Saves, loads and exports traces.
import { jsonForHtml, parseDocument, TraceError, writeDocument } from "./trace.js";

function download(name, type, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function stamp() {
  return new Date().toISOString().slice(0, 19).replace(/[:T]/g, "-");
}

export function saveTrace(trace) {
  download(`rgtg-trace-${stamp()}.json`, "application/json", writeDocument(trace));
}

/** Read the document in a file. @throws {TraceError} */
export async function loadTrace(file) {
  if (file.size > 256 * 2 ** 20) throw new TraceError("too large: a trace of more than 256 MiB");
  return parseDocument(await file.text());
}

/** Join modules, in order, to one classic script without imports and exports. */
export function bundle(sources) {
  const plain = sources.map((source) => source.replace(/^import\s[^;]*;\n/gm, "").replace(/^export /gm, ""));
  return `(() => {\n"use strict";\n${plain.join("\n")}\nshowEmbedded();\n})();\n`;
}

/** One HTML file that shows the trace without a server. */
export function standalonePage(trace, script, style) {
  const title = "A guided text, token by token";
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>${title}</title><style>
${style}</style></head>
<body class="tv-page"><main><h1>${title}</h1><noscript>This page draws its trace with JavaScript, which is off.</noscript>
<script type="application/json" class="rgtg-trace">${jsonForHtml(writeDocument(trace))}</script></main>
<script>
${script}</script></body></html>
`;
}

export async function exportPage(trace) {
  const text = async (name) => {
    const response = await fetch(`static/${name}`);
    if (!response.ok) throw new TraceError(`the page's own file ${name} could not be read (${response.status})`);
    return response.text();
  };
  const parts = JSON.parse(await text("viewer.json"));
  const [scripts, styles] = await Promise.all([parts.scripts, parts.styles].map((names) => Promise.all(names.map(text))));
  download(`rgtg-trace-${stamp()}.html`, "text/html", standalonePage(trace, bundle(scripts), styles.join("\n")));
}
