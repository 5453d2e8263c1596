// Unit tests of the page's pure functions: `node --test` in a folder with copies of src/rgtg/serving/static/*.js.
import assert from "node:assert/strict";
import { test } from "node:test";

import { bundle, standalonePage } from "./files.js";
import { agrees, candidateRows, change, chosenIndex, entropy, firstDivergence, guidedLogProbs, logSumExp, ranks, steering } from "./guidance.js";
import { place, range, ticks, valueOf } from "./scale.js";
import { EventParser } from "./sse.js";
import { number, percent, pieces, signed, spoken, TokenReader } from "./text.js";
import { idsBefore, jsonForHtml, knownScores, parseDocument, path, readDocument, readStep, TraceError, writeDocument } from "./trace.js";

const near = (a, b, within = 1e-9) => assert.ok(Math.abs(a - b) <= within, `${a} is not ${b}`);
const rule = (more = {}) => ({ scorers: ["s"], betas: [1], temperature: 1, greedy: false, clip: false, ...more });

function step(more = {}) {
  return { token_id: 7, candidate_ids: [5, 7], policy_log_probs: [Math.log(0.5), Math.log(0.5)], scores: [0, 1], scores_of_each: null,
    guided_log_probs: [Math.log(0.2689414), Math.log(0.7310586)], candidate_texts: ["a", "b"], candidate_bytes: [[97], [98]], ...more };
}

function branch(more = {}) {
  return { id: 0, parent: null, at: 0, token_id: null, label: "Guided", side: "guided", rule: rule(), steps: [step(), step({ token_id: 5 })], text: "ba",
    finish_reason: "length", guidance: { score: 1, scorers: { s: 2 } }, seconds: 1, reward: null, prefix_scores: [0.5, null], ...more };
}

function file(more = {}) {
  return { format: "rgtg-trace", version: 1, created: "now", policy: "tiny", prompt: "p", messages: null, prompt_token_ids: [0, 1],
    request: { seed: 3, max_tokens: 8, stop: ["x"], guidance: { method: "pargs", top_k: null, scorers: { s: 2 } } }, branches: [branch()], ...more };
}

test("guidedLogProbs equals the hand-worked example of rgtg.decoding.sampling: π = ½, ½, scores 0, 1, β = 1", () => {
  const [a, b] = guidedLogProbs(step(), rule()).map(Math.exp);
  near(a, 0.2689414, 1e-6);
  near(b, 0.7310586, 1e-6);
  assert.ok(agrees(step(), rule()));
  assert.ok(!agrees(step(), rule({ betas: [2] })));
  assert.ok(!agrees(step(), rule({ scorers: [], betas: [] })));
});

test("temperature divides the sum; 0 and greedy take the first maximum", () => {
  near(guidedLogProbs(step(), rule({ temperature: 0.5 })).map(Math.exp)[1], 1 / (1 + Math.exp(-2)));
  assert.deepEqual(guidedLogProbs(step(), rule({ temperature: 0 })), [-Infinity, 0]);
  assert.deepEqual(guidedLogProbs(step({ scores: [0, 0] }), rule({ greedy: true })), [0, -Infinity]);
});

test("huge strengths and tiny temperatures give finite numbers, and excluded candidates stay excluded", () => {
  const excluded = step({ policy_log_probs: [0, -Infinity], scores: [0, 1e30] });
  assert.deepEqual(guidedLogProbs(excluded, rule({ betas: [1e300] })), [0, -Infinity]);
  assert.ok(guidedLogProbs(step(), rule({ temperature: 1e-300 })).every((value) => !Number.isNaN(value)));
});

test("RAD clips scores to [0, 1]; several scorers have one beta each; unguided steps add nothing", () => {
  assert.deepEqual(steering(step({ scores: [-3, 4] }), rule({ betas: [2], clip: true })), [0, 2]);
  assert.deepEqual(steering(step({ scores: [3, -1], scores_of_each: [[1, 0], [1, -1]] }), rule({ scorers: ["a", "b"], betas: [2, 1] })), [3, -1]);
  assert.equal(steering(step({ scores: null }), rule()), null);
  near(logSumExp(guidedLogProbs(step({ scores: null }), rule())), 0);
});

test("change is 0 at β = 0, however many candidates there are", () => {
  const cut = step({ policy_log_probs: [Math.log(0.1), Math.log(0.1)], scores: [0, 1], guided_log_probs: [Math.log(0.5), Math.log(0.5)] });
  near(change(cut), 0);
  near(change(step()), Math.log(0.7310586 / 0.5), 1e-6);
  assert.equal(change(step({ token_id: 99 })), null);
  assert.equal(chosenIndex(step()), 1);
  near(entropy([Math.log(0.5), Math.log(0.5), -Infinity]), Math.log(2));
});

test("rows are sorted by guided value and hold each candidate's change of rank", () => {
  const rows = candidateRows(step({ candidate_ids: [5, 7, 9], policy_log_probs: [-0.5, -1, -3], scores: [0, 2, 2.1] }), rule());
  assert.deepEqual(rows.map((row) => [row.id, row.policyRank, row.guidedRank, row.move, row.chosen]), [[7, 2, 1, 1, true], [5, 1, 2, -1, false], [9, 3, 3, 0, false]]);
  assert.deepEqual(ranks([-Infinity, 1, 1, -Infinity]), [3, 1, 2, 4]);
  assert.deepEqual(candidateRows(step(), null).map((row) => row.steering), [null, null]);
});

test("firstDivergence of finished and unfinished texts", () => {
  assert.equal(firstDivergence([1, 2, 3], [1, 2, 4]), 2);
  assert.equal(firstDivergence([1, 2], [1, 2, 3], false), null);
  assert.equal(firstDivergence([1, 2], [1, 2, 3], true), 2);
  assert.equal(firstDivergence([1], [1]), null);
  assert.equal(firstDivergence([], []), null);
});

test("diverging ranges are symmetric and ignore one outlier", () => {
  const values = [...new Array(30).fill(1), 50];
  assert.deepEqual(range("change", values), { low: -1, high: 1, open: true });
  assert.deepEqual(range("change", [0.1, null, NaN]), { low: -0.5, high: 0.5, open: false });
  assert.deepEqual(range("score", [2, 4, null]), { low: 2, high: 4 });
  assert.deepEqual(range("entropy", []), { low: 0, high: 1 });
  assert.equal(place("change", -9, { low: -1, high: 1 }), -1);
  assert.equal(place("score", 3, { low: 2, high: 4 }), 0.5);
  assert.equal(place("score", null, { low: 2, high: 4 }), null);
  assert.equal(valueOf("score", step({ scores: null }), 1, [null, 2.5]), 2.5);
  assert.deepEqual(ticks(0, 10, 4), [0, 2, 4, 6, 8, 10]);
  assert.ok(ticks(3, 3).length >= 1);
});

test("characters split over tokens appear with their last byte; invalid UTF-8 is shown as bytes", () => {
  const reader = new TokenReader();
  assert.deepEqual(reader.read([0xe4, 0xb8]).map((piece) => piece.mark), ["E4 B8"]);
  assert.deepEqual(reader.read([0xad]).map((piece) => [piece.kind, piece.text]), [["text", "中"]]);
  assert.deepEqual(reader.read([0xff, 0x61]).map((piece) => [piece.kind, piece.mark ?? piece.text]), [["bytes", "FF"], ["text", "a"]]);
  assert.deepEqual(new TokenReader().read([0xe4, 0x61]).map((piece) => piece.mark ?? piece.text), ["E4", "a"]);
  assert.deepEqual(new TokenReader().read([0xed, 0xa0, 0x80]).map((piece) => piece.kind), ["bytes"]); // half a surrogate pair
  assert.deepEqual(new TokenReader([0xf0, 0x9f]).read([0x98, 0x80]).map((piece) => piece.text), ["😀"]);
  assert.deepEqual(new TokenReader().read([], "</s>").map((piece) => [piece.kind, piece.mark]), [["special", "</s>"]]);
  assert.deepEqual(new TokenReader().read(null, "ab").map((piece) => piece.text), ["ab"]);
});

test("white space and invisible characters are marked; joiners inside emoji are kept", () => {
  assert.deepEqual(pieces(" a\n\tb").map((piece) => piece.mark ?? piece.text), ["·", "a", "↵", "⇥", "b"]);
  assert.deepEqual(pieces("a\u202eb\u0000").map((piece) => piece.mark ?? piece.text), ["a", "U+202E", "b", "U+0000"]);
  assert.deepEqual(pieces("👩‍👧").map((piece) => piece.kind), ["text"]);
  assert.deepEqual(pieces("שלום").map((piece) => piece.kind), ["text"]);
  assert.equal(spoken(pieces(" a\n")), "“ a [new line] ”");
});

test("numbers are formatted", () => {
  assert.equal(number(-0.004), "0.00");
  assert.equal(number(-1.5), "−1.50");
  assert.equal(number(null), "–");
  assert.equal(number(-Infinity), "−∞");
  assert.equal(signed(0.25), "+0.25");
  assert.equal(signed(0), "0.00");
  assert.equal(percent(0.0001), "<0.1 %");
  assert.equal(percent(0), "0.0 %");
  assert.equal(percent(0.99999), ">99.9 %");
});

test("server-sent events are parsed wherever chunks end", () => {
  const whole = ': ping\r\ndata: {"a":1}\r\n\r\nevent: x\ndata: one\ndata:two\n\ndata: [DONE]\r\n\r\n';
  for (let cut = 0; cut < whole.length; cut += 1) {
    const seen = [];
    const parser = new EventParser((data) => seen.push(data));
    parser.push(whole.slice(0, cut));
    parser.push(whole.slice(cut));
    assert.deepEqual(seen, ['{"a":1}', "one\ntwo", "[DONE]"], `cut at ${cut}`);
  }
});

test("a document is equal after it is written and read", () => {
  const before = readDocument(file({ branches: [branch({ steps: [step({ policy_log_probs: [-1, -Infinity], guided_log_probs: [0, "-Infinity"] })] })] }));
  const after = parseDocument(writeDocument(before));
  assert.deepEqual(after, before);
  assert.equal(after.branches[0].steps[0].policy_log_probs[1], -Infinity);
  assert.deepEqual(after.request, { seed: 3, max_tokens: 8, stop: ["x"], guidance: { method: "pargs", top_k: null, scorers: { s: 2 } } });
});

test("a fork is its parent's text up to the fork, with another token there", () => {
  const fork = branch({ id: 4, parent: 0, at: 1, token_id: 7, steps: [step({ token_id: 5 })], prefix_scores: null });
  const found = readDocument(file({ branches: [branch(), fork] }));
  assert.deepEqual(path(found, 4).map((one) => one.token_id), [7, 7, 5]);
  assert.deepEqual(path(found, 0).map((one) => one.token_id), [7, 5]);
  assert.deepEqual(idsBefore(found, 4, 2), [7, 7]);
  assert.equal(path(found, 4)[1], path(found, 4)[1]);
  assert.deepEqual(knownScores(found, 4), [0.5, null]);
});

test("invalid files are refused, and the message says where", () => {
  const bad = [
    ["{", /not JSON/], ["null", /no saved trace/], ["[]", /no saved trace/], ['{"format":"x"}', /no saved trace/],
    [file({ version: 2 }), /version 2/], [file({ branches: [] }), /branches: expected/], [file({ prompt: 4 }), /prompt: expected a text/],
    [file({ branches: [branch({ steps: [{ ...step(), token_id: 6 }] })] }), /steps\[0\]\.token_id: expected one of candidate_ids/],
    [file({ branches: [branch({ steps: [{ ...step(), scores: [1] }] })] }), /scores: expected a list of 2/],
    [file({ branches: [branch({ steps: [{ ...step(), scores: [1, null] }] })] }), /scores\[1\]: expected a number/],
    [file({ branches: [branch({ steps: [{ ...step(), candidate_bytes: [[1], [256]] }] })] }), /expected a byte/],
    [file({ branches: [branch({ steps: [{ ...step(), candidate_texts: [{}, "b"] }] })] }), /candidate_texts\[0\]: expected a text/],
    [file({ branches: [branch({ label: ["<b>"] })] }), /label: expected a text/], [file({ branches: [branch({ side: "both" })] }), /side/],
    [file({ branches: [branch({ rule: null })] }), /rule: expected an object/], [file({ branches: [branch({ rule: rule({ betas: [] }) })] }), /betas/],
    [file({ branches: [branch(), branch()] }), /branches\[1\]\.id/], [file({ branches: [branch({ parent: 0 })] }), /parent: expected the id of an earlier/],
    [file({ branches: [branch(), branch({ id: 1, parent: 0, at: 9, token_id: 7 })] }), /at: expected a token of its parent/],
    [file({ branches: [branch(), branch({ id: 1, parent: 0, at: 0, token_id: 8 })] }), /token_id: expected a candidate/],
  ];
  for (const [raw, message] of bad) {
    assert.throws(() => parseDocument(typeof raw === "string" ? raw : JSON.stringify(raw)), (error) => error instanceof TraceError && message.test(error.message), `${JSON.stringify(raw).slice(0, 60)} … ${message}`);
  }
  assert.throws(() => readStep(null), TraceError);
});

test("names such as __proto__ are handled like any other", () => {
  const raw = JSON.parse('{"__proto__": {"polluted": 1}, "constructor": 3, "scorers": {"__proto__": 2}}');
  const found = readDocument(file({ branches: [branch({ guidance: raw })] }));
  assert.equal({}.polluted, undefined);
  assert.equal(found.branches[0].guidance.constructor, 3);
  assert.equal(Object.getPrototypeOf(found.branches[0].guidance), Object.prototype);
});

test("no text in an exported file can end its script element", () => {
  const hostile = readDocument(file({ prompt: "</script><script>alert(1)</script><!--\u2028" }));
  const page = standalonePage(hostile, bundle(["const a = 1;\n"]), "");
  assert.equal(page.match(/<\/script>/g).length, 2);
  assert.equal(page.match(/<script/g).length, 2);
  assert.deepEqual(JSON.parse(jsonForHtml(JSON.stringify("<!--</script>&"))), "<!--</script>&");
});

test("bundle removes imports and export keywords", () => {
  const made = bundle(['import { a,\n  b } from "./a.js";\nexport const c = a;\n', "export class D {}\nexport function e() {}\n"]);
  assert.ok(!/^(import|export)\b/m.test(made));
  assert.ok(made.includes("const c = a;") && made.includes("class D {}") && made.includes("function e() {}"));
});
