// Server-sent events out of a byte stream, whatever its chunks cut in two.

/** Feed it text; it calls `onData` with the data of every finished event. */
export class EventParser {
  constructor(onData) {
    this.onData = onData;
    this.rest = "";
    this.data = [];
  }

  push(text) {
    // A carriage return at the end may be half of a line end: it waits for what follows.
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
    } // comments (pings), event names and ids are of no use here
  }
}
