// The displayable pieces of a token: text, marked white space, bytes that are not text, control characters.
// A token may end inside a character, so the reader keeps the character's bytes until it is complete.

const SPACES = { " ": ["·", "space"], "\n": ["↵", "new line"], "\t": ["⇥", "tab"], "\r": ["␍", "carriage return"],
  "\u00a0": ["⍽", "no-break space"] };
// Invisible characters: C0 and C1 controls, directional marks and overrides, zero-width space and no-break space.
const HIDDEN = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]/;

/** @typedef {{kind: "text"|"space"|"hidden"|"bytes"|"special", text: string, mark?: string, name?: string}} Piece */

/** Pieces of a string of complete characters. @returns {Piece[]} */
export function pieces(text) {
  const found = [];
  for (const character of text) {
    if (SPACES[character]) {
      const [mark, name] = SPACES[character];
      found.push({ kind: "space", text: character, mark, name });
    } else if (HIDDEN.test(character)) {
      const mark = `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
      found.push({ kind: "hidden", text: character, mark, name: mark });
    } else if (found.length && found[found.length - 1].kind === "text") {
      found[found.length - 1].text += character;
    } else {
      found.push({ kind: "text", text: character });
    }
  }
  return found;
}

function bytesPiece(bytes) {
  const mark = bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
  return { kind: "bytes", text: "\ufffd", mark, name: `bytes ${mark}` };
}

function lengthOf(lead) {
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead <= 0xdf) return 2;
  if (lead >= 0xe0 && lead <= 0xef) return 3;
  return lead >= 0xf0 && lead <= 0xf4 ? 4 : 0;
}

function decodeCharacter(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes));
  } catch {
    return null;
  }
}

/** Reads tokens in order; `pending` holds the bytes of an incomplete character. */
export class TokenReader {
  constructor(pending = []) {
    this.pending = [...pending];
  }

  /** Pieces of the next token, from its bytes, or from its text if the bytes are unknown or empty. @returns {Piece[]} */
  read(bytes, text) {
    if (!bytes || !bytes.length) {
      this.pending = [];
      return bytes || !text ? [{ kind: "special", text: "", mark: text || "∅", name: text || "no text" }] : pieces(text);
    }
    const found = [];
    let whole = "";
    const close = () => { found.push(...pieces(whole)); whole = ""; };
    let fresh = 0; // number of pending bytes that belong to this token
    for (const byte of bytes) {
      const continues = (byte & 0xc0) === 0x80;
      if (this.pending.length && !continues) fresh = this.#giveUp(found, close, fresh);
      this.pending.push(byte);
      fresh += 1;
      const needed = lengthOf(this.pending[0]);
      if (needed === 0) fresh = this.#giveUp(found, close, fresh);
      else if (this.pending.length === needed) {
        const character = decodeCharacter(this.pending);
        if (character === null) fresh = this.#giveUp(found, close, fresh);
        else { whole += character; this.pending = []; fresh = 0; }
      }
    }
    close();
    if (fresh) found.push(bytesPiece(this.pending.slice(-fresh)));
    return found;
  }

  #giveUp(found, close, fresh) {
    close();
    if (fresh) found.push(bytesPiece(this.pending.slice(-fresh))); // bytes of earlier tokens are already shown
    this.pending = [];
    return 0;
  }
}

/** A token in words, for labels, titles and the tree of forks. */
export function spoken(found) {
  const words = found.map((piece) => (piece.kind === "text" ? piece.text : piece.kind === "space" && piece.text === " "
    ? " " : ` [${piece.name}] `)).join("");
  return `“${words}”`;
}

/** Bytes and text of a candidate, by its index. */
export function candidateText(step, index) {
  return [step.candidate_bytes ? step.candidate_bytes[index] : null, step.candidate_texts ? step.candidate_texts[index] : ""];
}

/** A number as text. */
export function number(value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  const text = size >= 1e5 ? size.toExponential(1) : size.toFixed(digits);
  return value < 0 && Number(text) !== 0 ? `−${text}` : text;
}

export function signed(value, digits = 2) {
  const text = number(value, digits);
  return value > 0 && Number.isFinite(value) && Number(text) !== 0 ? `+${text}` : text;
}

export function percent(probability) {
  if (probability > 0 && probability < 0.0005) return "<0.1 %";
  if (probability < 1 && probability > 0.9995) return ">99.9 %";
  return `${(100 * probability).toFixed(1)} %`;
}
