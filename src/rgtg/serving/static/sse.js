// Parser of server-sent events; chunks of the stream may end anywhere.

/** Calls `onData` with the data of every complete event in the text that is pushed. */
export class EventParser {
  constructor(onData) {
    this.onData = onData;
    this.rest = "";
    this.data = [];
  }

  push(text) {
    // A carriage return at the end may be the first half of \r\n, so it waits for the next chunk.
    const held = this.rest + text;
    const cut = held.endsWith("\r") ? held.length - 1 : held.length;
    const lines = held.slice(0, cut).split(/\r\n|\n|\r/);
    this.rest = lines.pop() + held.slice(cut);
    for (const line of lines) this.#line(line);
  }

  #line(line) {
    if (line === "") {
      if (this.data.length) this.onData(this.data.join("\n"));
      this.data = [];
    } else if (line.startsWith("data:")) {
      this.data.push(line.slice(line[5] === " " ? 6 : 5));
    } // comments (pings), event names and ids are ignored
  }
}
