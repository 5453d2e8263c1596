// Reads [{step, rule}] and writes the guided log-probabilities that the page computes, and whether they equal the stored ones.
import { readFileSync } from "node:fs";

import { agrees, guidedLogProbs } from "./guidance.js";
import { readStep } from "./trace.js";

const cases = JSON.parse(readFileSync(0, "utf8")).map(({ step, rule }) => ({ step: readStep(step), rule }));
const plain = (value) => (value === -Infinity ? "-Infinity" : value);
process.stdout.write(JSON.stringify(cases.map(({ step, rule }) => ({ guided: guidedLogProbs(step, rule).map(plain), agrees: agrees(step, rule, 1e-5) }))));
