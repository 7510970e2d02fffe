/* Cards: one state each, with what the model says it is, beside its controls. */
import { isolated, make, percent, quoted, visible } from "./text.js";
import { ask } from "./stream.js";
import { cellOf } from "./view.js";

const KINDS = [[null, "patched"], ["unpatched", "unpatched"], ["random", "random"]];
const ABOUT = {
  patched: "the state, written into the target prompt",
  unpatched: "the target prompt as it is: what is said here too was not read from the state",
  random: "a random state of the same norm",
};
/** What has been said, by what was asked: a state that is selected again need not be asked again. */
const memory = new Map();
const KEPT = 300;
/** What is being asked, each with a promise of its end, good or bad. */
const flights = new Map();

export class Card {
  /**
   * @param place position and layer
   * @param controls buttons and fields of the card's own, as nodes
   */
  constructor({ view, place, into, most, head, controls = [], foot = [] }) {
    Object.assign(this, { view, place, into, most });
    this.texts = new Map();
    const rows = KINDS.flatMap(([control, name]) => {
      const text = make("dd", { name: `said ${name}`, dir: "auto" });
      this.texts.set(control, text);
      // Read out once it is whole: a busy region waits.
      if (control === null) text.ariaLive = "polite";
      return [make("dt", { text: name, title: ABOUT[name] }), text];
    });
    this.where = make("p", { name: "hint where" });
    this.status = make("span", { role: "status" });
    this.progress = make("progress", { "aria-label": "Tokens decoded", max: most, value: 0 });
    this.cancelButton = make("button", { type: "button", text: "Cancel", name: "cancel" });
    this.cancelButton.addEventListener("click", () => this.cancel());
    this.error = make("div", { name: "error", role: "alert" });
    this.error.hidden = true;
    this.node = make(
      "article", { name: "card" },
      head, ...controls, this.where,
      make("dl", { name: "texts" }, ...rows),
      make("div", { name: "bar" }, this.status, this.progress, this.cancelButton),
      this.error, ...foot,
    );
    this.busy(false);
  }

  get asked() {
    return cellOf(this.view(), this.place, this.into, this.most);
  }

  busy(is) {
    this.progress.hidden = this.cancelButton.hidden = !is;
    this.node.ariaBusy = String(is);
  }

  say(control, text, growing) {
    const node = this.texts.get(control);
    node.textContent = visible(text) || (growing ? "" : "(nothing)");
    node.classList.toggle("growing", growing);
    node.ariaBusy = String(growing);
    node.classList.toggle("nothing", !text && !growing);
  }

  /** Stop asking; what has been said so far stays. */
  cancel(said = "cancelled") {
    if (!this.abort) return;
    this.abort.abort();
    this.abort = null;
    this.status.textContent = said;
    this.busy(false);
    for (const node of this.texts.values()) node.classList.remove("growing");
  }

  /** Ask the model, or show what it said before. */
  async describe() {
    this.cancel();
    this.error.hidden = true;
    const body = this.asked;
    const key = JSON.stringify(body);
    if (memory.has(key)) {
      this.finish(memory.get(key));
      return;
    }
    const abort = (this.abort = new AbortController());
    for (const [control] of KINDS) this.say(control, "", true);
    this.where.textContent = "";
    this.progress.value = 0;
    this.status.textContent = "asking…";
    this.busy(true);
    while (flights.has(key)) {
      await flights.get(key); // another card asks the same
      if (this.abort !== abort) return;
    }
    if (memory.has(key)) {
      this.abort = null;
      this.finish(memory.get(key));
      return;
    }
    let land;
    flights.set(key, new Promise((resolve) => (land = resolve)));
    try {
      await this.fly(body, key, abort);
    } finally {
      flights.delete(key);
      land();
    }
  }

  async fly(body, key, abort) {
    const started = performance.now();
    const rows = [];
    let first = 0;
    try {
      for await (const event of ask("cell", body, abort.signal)) {
        if (this.abort !== abort) return;
        if (event.event === "waiting") this.status.textContent = `waiting for ${event.ahead} other request${event.ahead > 1 ? "s" : ""}`;
        if (event.event === "loading") this.status.textContent = `loading ${visible(event.models.join(" and "))}…`;
        if (event.event === "started") this.status.textContent = "reading…";
        if (event.event === "notice") this.status.textContent = visible(event.line);
        if (event.event === "text") {
          first ||= performance.now() - started;
          this.say(event.control, event.text, true);
          this.progress.value = Math.max(this.progress.value, event.n_tokens);
          this.status.textContent = "decoding…";
        }
        if (event.event === "said") rows.push(event);
      }
    } catch (error) {
      if (this.abort !== abort) return;
      this.cancel("");
      this.fail(error);
      return;
    }
    if (this.abort !== abort) return;
    this.abort = null;
    const took = (performance.now() - started) / 1000;
    const said = { rows, note: first ? `first token after ${(first / 1000).toFixed(1)} s, all after ${took.toFixed(1)} s` : `after ${took.toFixed(1)} s` };
    if (memory.size >= KEPT) memory.delete(memory.keys().next().value);
    memory.set(key, said);
    this.finish(said);
  }

  finish({ rows, note }) {
    for (const row of rows) this.say(row.control, row.text, false);
    const patched = rows.find((row) => row.control === null);
    const into = patched.target_layer === -1 ? "the embedding" : `layer ${patched.target_layer}`;
    const tokens = patched.target_token.map((text, i) => `${quoted(text)} (position ${patched.target_position[i]})`);
    this.where.replaceChildren(`Written into ${into} of the target prompt, over `, isolated(tokens.join(", ")), ".");
    this.status.textContent = note;
    this.busy(false);
  }

  fail(error) {
    for (const [control] of KINDS) this.say(control, "", true);
    for (const node of this.texts.values()) node.classList.remove("growing");
    showError(this.error, error);
  }
}

/** An error as a message and what to do about it. */
export function showError(box, error) {
  box.replaceChildren(
    make("p", { text: visible(error.message ?? String(error)) }),
    ...(error.hint ? [make("p", { text: visible(error.hint), name: "hint" })] : []),
  );
  box.hidden = false;
}

/** The most likely next tokens of a cell of the grid, with bars. */
export function topTokens(cell) {
  const rows = cell.top_tokens.map((text, i) => {
    const bar = make("span", { name: "amount" });
    bar.style.inlineSize = `${100 * cell.top_probs[i]}%`;
    return make("tr", {}, make("td", { name: "which" }, isolated(quoted(text))), make("td", { name: "much", text: percent(cell.top_probs[i]) }), make("td", { name: "bars" }, bar));
  });
  return make("table", { name: "top", "aria-label": "Most likely next tokens, by the lens" }, make("tbody", {}, ...rows));
}
