/* Cards: each shows one state, with the model's description of it and those of its controls. */
import { isolated, make, percent, quoted, visible } from "./text.js";
import { ask } from "./stream.js";
import { cellRequest } from "./view.js";

const KINDS = [[null, "patched"], ["unpatched", "unpatched"], ["random", "random"]];
const ABOUT = {
  patched: "the state, written into the target prompt",
  unpatched: "the target prompt with nothing written: an answer that is also here does not come from the state",
  random: "a random state of the same norm",
};
/** Answers by request, so that a state that is selected again is not computed again. */
const answers = new Map();
const KEPT = 300;
/** Requests that are running, each with a promise that resolves at its end. */
const running = new Map();

export class Card {
  /**
   * @param view a function that returns the current view
   * @param place the state's position and layer
   * @param into the target prompt, position and layer
   * @param most the number of tokens to decode at most
   * @param head the node above the texts
   * @param foot the nodes below them
   */
  constructor({ view, place, into, most, head, foot = [] }) {
    Object.assign(this, { view, place, into, most });
    this.texts = new Map();
    const rows = KINDS.flatMap(([control, name]) => {
      const text = make("dd", { name: `answer ${name}`, dir: "auto" });
      this.texts.set(control, text);
      // Screen readers wait while a live region is busy, and then read the complete text.
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
      head, this.where,
      make("dl", { name: "texts" }, ...rows),
      make("div", { name: "bar" }, this.status, this.progress, this.cancelButton),
      this.error, ...foot,
    );
    this.busy(false);
  }

  get request() {
    return cellRequest(this.view(), this.place, this.into, this.most);
  }

  busy(isBusy) {
    this.progress.hidden = this.cancelButton.hidden = !isBusy;
    this.node.ariaBusy = String(isBusy);
  }

  setText(control, text, growing) {
    const node = this.texts.get(control);
    node.textContent = visible(text) || (growing ? "" : "(nothing)");
    node.classList.toggle("growing", growing);
    node.ariaBusy = String(growing);
    node.classList.toggle("nothing", !text && !growing);
  }

  /** Stop the request; the text so far stays. */
  cancel(status = "cancelled") {
    if (!this.abort) return;
    this.abort.abort();
    this.abort = null;
    this.status.textContent = status;
    this.busy(false);
    for (const node of this.texts.values()) node.classList.remove("growing");
  }

  /** Show the model's description, from an earlier answer if there is one. */
  async describe() {
    this.cancel();
    this.error.hidden = true;
    const body = this.request;
    const key = JSON.stringify(body);
    if (answers.has(key)) {
      this.finish(answers.get(key));
      return;
    }
    const abort = (this.abort = new AbortController());
    for (const [control] of KINDS) this.setText(control, "", true);
    this.where.textContent = "";
    this.progress.value = 0;
    this.status.textContent = "asking…";
    this.busy(true);
    while (running.has(key)) {
      await running.get(key); // another card has sent the same request
      if (this.abort !== abort) return;
    }
    if (answers.has(key)) {
      this.abort = null;
      this.finish(answers.get(key));
      return;
    }
    let ended;
    running.set(key, new Promise((resolve) => (ended = resolve)));
    try {
      await this.run(body, key, abort);
    } finally {
      running.delete(key);
      ended();
    }
  }

  async run(body, key, abort) {
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
          this.setText(event.control, event.text, true);
          this.progress.value = Math.max(this.progress.value, event.n_tokens);
          this.status.textContent = "decoding…";
        }
        if (event.event === "answer") rows.push(event);
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
    const note = first ? `first token after ${(first / 1000).toFixed(1)} s, all after ${took.toFixed(1)} s` : `after ${took.toFixed(1)} s`;
    if (answers.size >= KEPT) answers.delete(answers.keys().next().value);
    answers.set(key, { rows, note });
    this.finish({ rows, note });
  }

  finish({ rows, note }) {
    for (const row of rows) this.setText(row.control, row.text, false);
    const patched = rows.find((row) => row.control === null);
    const into = patched.target_layer === -1 ? "the embedding" : `layer ${patched.target_layer}`;
    const tokens = patched.target_token.map((text, i) => `${quoted(text)} (position ${patched.target_position[i]})`);
    this.where.replaceChildren(`Written into ${into} of the target prompt, over `, isolated(tokens.join(", ")), ".");
    this.status.textContent = note;
    this.busy(false);
  }

  fail(error) {
    for (const [control] of KINDS) this.setText(control, "", true);
    for (const node of this.texts.values()) node.classList.remove("growing");
    showError(this.error, error);
  }
}

/** Show an error's message and hint. */
export function showError(box, error) {
  box.replaceChildren(
    make("p", { text: visible(error.message ?? String(error)) }),
    ...(error.hint ? [make("p", { text: visible(error.hint), name: "hint" })] : []),
  );
  box.hidden = false;
}

/** A table of a cell's most likely next tokens, with bars. */
export function topTokens(cell) {
  const rows = cell.top_tokens.map((text, i) => {
    const bar = make("span", { name: "amount" });
    bar.style.inlineSize = `${100 * cell.top_probs[i]}%`;
    return make("tr", {}, make("td", { name: "which" }, isolated(quoted(text))), make("td", { name: "much", text: percent(cell.top_probs[i]) }), make("td", { name: "bars" }, bar));
  });
  return make("table", { name: "top", "aria-label": "Most likely next tokens, by the lens" }, make("tbody", {}, ...rows));
}
