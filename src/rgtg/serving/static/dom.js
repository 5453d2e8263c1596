// Builds elements from plain values. Text becomes text nodes and attributes only, never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "vars") for (const [key, one] of Object.entries(value)) element.style.setProperty(`--${key}`, String(one));
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An HTML element: `on` holds listeners, `vars` custom properties; children are elements or texts. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element, built in the same way. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Text for screen readers only. */
export function unseen(...children) {
  return h("span", { class: "tv-unseen" }, ...children);
}

/** The nodes for the pieces of a token (see text.js); with `marks`, plain spaces are marked too. */
export function tokenNodes(pieces, marks) {
  return pieces.map((piece) => {
    if (piece.kind === "text") return piece.text;
    if (piece.kind === "space" && piece.text === " ") {
      return marks ? h("span", { class: "tv-space" }, piece.mark, unseen(" ")) : " ";
    }
    if (piece.kind === "space") {
      const mark = h("span", { class: "tv-space", title: piece.name }, piece.mark);
      return marks === "only" ? mark : [mark, piece.text];
    }
    return h("span", { class: `tv-chip tv-${piece.kind}`, title: piece.name }, piece.mark);
  });
}

let made = 0;

/** An id that is unique in the page. */
export function freshId(stem) {
  made += 1;
  return `tv-${stem}-${made}`;
}

/** A keydown handler; `moves` maps keys to functions that move focus and selection. */
export function onKeys(moves) {
  return (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || !moves[event.key]) return;
    if (moves[event.key](event) !== false) event.preventDefault();
  };
}
