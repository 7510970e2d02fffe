/* The page: the form, the grid, the selected state and the pinned ones, and copies of all of it. */
import { byId, isolated, make, percent, quoted } from "./text.js";
import { Card, showError, topTokens } from "./cards.js";
import { command, copy, copyView } from "./copies.js";
import { Grid } from "./grid.js";
import { ask } from "./stream.js";
import { format, gridRequest, parse } from "./view.js";

const about = await (await fetch("about")).json();
const defaults = {
  prompt: about.examples.entities[0],
  source: about.source_model,
  target: about.target_model,
  describe: about.describe,
  identity: about.identity,
};
const PAUSE_MS = 250; // while an arrow key is held down, cells on the way are not requested
let view = parse(location.hash || about.view, defaults);
let selected = null;
let pinned = [];
let running = null;
let pause = 0;

const grid = new Grid({ select });
const placeholder = [...byId("selected").childNodes];

/* ---- the form ---- */

function fillForm() {
  byId("prompt").value = view.prompt;
  byId("source-model").value = view.source;
  byId("target-model").value = view.target;
  byId("lens").value = view.lens;
  byId("shade").value = view.shade;
  byId("own-prompt").value = view.own.prompt;
  byId("own-position").value = view.own.position;
  fillLayers(byId("own-layer"), view.own.layer);
  byId("own").hidden = view.lens !== "own";
  byId("models").textContent = view.source === view.target ? view.source : `${view.source} → ${view.target}`;
}

function readForm() {
  const next = {
    prompt: byId("prompt").value.toWellFormed(),
    source: byId("source-model").value.trim() || defaults.source,
    target: byId("target-model").value.trim() || defaults.target,
    lens: byId("lens").value,
    own: { prompt: byId("own-prompt").value.toWellFormed(), position: byId("own-position").value.trim(), layer: byId("own-layer").value },
  };
  if (next.prompt !== view.prompt) Object.assign(view, { from: 0, at: null, pins: [] });
  Object.assign(view, next);
}

function fillLayers(select, chosen) {
  const count = grid.grid?.target_layers ?? 0;
  const names = ["same", "embed", ...Array(count).keys()].map(String);
  if (!names.includes(chosen)) names.push(chosen);
  select.replaceChildren(...names.map((name) => make("option", { value: name, text: name === "same" ? "same layer" : name })));
  select.value = chosen;
}

function remember() {
  history.replaceState(null, "", `#${format(view, defaults)}`);
}

/* ---- the grid ---- */

async function showGrid() {
  remember();
  fillForm();
  byId("error").hidden = true;
  running?.abort();
  grid.hold();
  const abort = (running = new AbortController());
  const [status, progress, cancel] = ["grid-status", "grid-progress", "grid-cancel"].map(byId);
  const ended = () => {
    progress.hidden = cancel.hidden = true;
    running = null;
  };
  const started = performance.now();
  cancel.onclick = () => {
    abort.abort();
    ended();
    clear();
    status.textContent = "cancelled";
  };
  status.textContent = "asking…";
  progress.value = 0;
  progress.hidden = cancel.hidden = false;
  try {
    for await (const event of ask("grid", gridRequest(view, windowOf()), abort.signal)) {
      if (running !== abort) return;
      if (event.event === "waiting") status.textContent = `waiting for ${event.ahead} other request${event.ahead > 1 ? "s" : ""}`;
      if (event.event === "loading") status.textContent = `loading ${event.models.join(" and ")}…`;
      if (event.event === "started") status.textContent = "reading…";
      if (event.event === "notice") status.textContent = event.line;
      if (event.event === "progress") {
        Object.assign(progress, { max: event.total, value: event.done });
        status.textContent = `${event.done} of ${event.total} cells`;
      }
      if (event.event === "grid") showCells(event, started);
    }
    ended();
  } catch (error) {
    if (running !== abort) return;
    ended();
    clear();
    status.textContent = "";
    if (error.name !== "AbortError") showError(byId("error"), error);
  }
}

/** Remove everything that belongs to another prompt or other models. */
function clear() {
  grid.clear();
  clearSelected();
  for (const card of pinned) card.cancel();
  byId("pins").hidden = true;
}

function clearSelected() {
  clearTimeout(pause);
  selected?.cancel();
  selected = null;
  byId("selected").replaceChildren(...placeholder);
}

let lengths = { prompt: null, count: 0 };
/** The positions to show, or null for the server's default: all, or the first ones of a long prompt. */
function windowOf() {
  if (!view.from) return null;
  const end = lengths.prompt === view.prompt ? Math.min(lengths.count, view.from + about.window) : view.from + about.window;
  return Array.from({ length: end - view.from }, (_, i) => view.from + i);
}

function showCells(event, started) {
  lengths = { prompt: view.prompt, count: event.n_tokens };
  grid.show(event, view.shade);
  fillLayers(byId("own-layer"), view.own.layer);
  const took = ((performance.now() - started) / 1000).toFixed(1);
  const [first, last] = [event.positions[0], event.positions.at(-1)];
  const range = event.whole ? `${event.n_tokens}` : `${first}–${last} of ${event.n_tokens}`;
  byId("grid-status").textContent = `${range} tokens × ${event.n_layers} layers, ${took} s`;
  byId("earlier").hidden = byId("later").hidden = event.whole;
  byId("earlier").disabled = first === 0;
  byId("later").disabled = last === event.n_tokens - 1;
  const at = view.at ?? { position: last, layer: Math.floor(0.4 * event.n_layers) };
  // The cell of a link may be outside this model or these positions.
  if (grid.cell(at)) {
    select(at, { byKey: false });
    grid.reveal(at);
  } else {
    grid.mark(null, view.pins);
    clearSelected();
  }
  showPins();
}

function page(step) {
  const last = Math.floor((lengths.count - 1) / about.window) * about.window;
  view.from = Math.min(last, Math.max(0, view.from + step * about.window));
  view.at = null;
  showGrid();
}

/* ---- the selected state ---- */

function select(place, { byKey }) {
  view.at = place;
  remember();
  grid.mark(place, view.pins);
  selected?.cancel();
  showSelected(place);
  clearTimeout(pause);
  if (byKey) pause = setTimeout(() => selected.describe(), PAUSE_MS);
  else selected.describe();
}

function heading({ position, layer }, level, id) {
  return make(
    level, { id },
    isolated(quoted(grid.grid.tokens[position])), make("span", { name: "soft", text: ` layer ${layer}, position ${position}` }),
  );
}

function showSelected(place) {
  const cell = grid.cell(place);
  const layer = make("select", { id: "into-layer" });
  fillLayers(layer, view.into.layer);
  const prompt = make("textarea", { id: "into-prompt", rows: 3, spellcheck: "false", dir: "auto" });
  prompt.value = view.into.prompt;
  const position = make("input", { id: "into-position", size: 6, spellcheck: "false" });
  position.value = view.into.position;
  const most = make("input", { id: "into-most", type: "number", min: 1, max: 200 });
  most.value = view.most;
  const again = make("button", { type: "submit", text: "Ask again" });
  const form = make(
    "form", { name: "into", "aria-label": "Where the state is written" },
    make("div", { name: "row" },
      make("div", { name: "field" }, make("label", { for: "into-layer", text: "Target layer" }), layer),
      make("div", { name: "field" }, make("label", { for: "into-position", text: "Token written" }), position),
      make("div", { name: "field" }, make("label", { for: "into-most", text: "Max tokens" }), most),
      again,
    ),
    make("div", { name: "field" }, make("label", { for: "into-prompt", text: "Target prompt" }), prompt),
  );
  const change = () => {
    view.into = { prompt: prompt.value.toWellFormed(), position: position.value.trim() || "-1", layer: layer.value };
    view.most = Math.min(200, Math.max(1, Number(most.value) || 1));
    selected.into = view.into;
    selected.most = selected.progress.max = view.most;
    remember();
    selected.describe();
  };
  layer.addEventListener("change", change);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    change();
  });
  const pin = make("button", { type: "button", text: "Pin", title: "Keep this state below, to compare it with another" });
  pin.disabled = view.pins.length >= 2;
  pin.addEventListener("click", () => pinSelected());
  const facts = [`entropy ${cell.entropy_nats.toFixed(2)} nats`];
  if (cell.surprisal_nats !== null) facts.push(`surprisal ${cell.surprisal_nats.toFixed(2)} nats`);
  selected = new Card({
    view: () => view, place, into: view.into, most: view.most,
    head: make("div", { name: "bar" }, heading(place, "h2", "panel-head"), make("span", { name: "push" }), pin, ...copyButtons(() => selected)),
    foot: [form, make("h3", { text: "Next tokens, by the lens" }), topTokens(cell), make("p", { name: "hint", text: facts.join(", ") })],
  });
  selected.pin = pin;
  byId("selected").replaceChildren(selected.node);
}

function copyButtons(card) {
  return ["recipe", "python"].map((form) => {
    const button = make("button", { type: "button", text: form === "recipe" ? "Copy as recipe" : "Copy as Python" });
    button.addEventListener("click", () => copyView("cell", form, card().request));
    return button;
  });
}

/* ---- pinned states ---- */

function pinSelected() {
  if (view.pins.length >= 2) return;
  view.pins = [...view.pins, { ...view.at, into: view.into, most: view.most }];
  changedPins();
  pinned.at(-1).node.querySelector("button")?.focus();
}

function changedPins() {
  remember();
  grid.mark(view.at, view.pins);
  if (selected) selected.pin.disabled = view.pins.length >= 2;
  showPins();
}

function showPins() {
  for (const card of pinned) card.cancel();
  const inside = view.pins.filter((pin) => pin.position < grid.grid.tokens.length && pin.layer < grid.grid.n_layers);
  pinned = inside.map((pin) => {
    const remove = make("button", { type: "button", text: "Unpin" });
    remove.addEventListener("click", () => {
      view.pins = view.pins.filter((other) => other !== pin);
      changedPins();
    });
    const cell = grid.cell(pin);
    const lens = cell ? [make("p", { name: "hint" }, "By the lens: ", isolated(quoted(cell.top_tokens[0])), ` ${percent(cell.top_probs[0])}`)] : [];
    const card = new Card({
      view: () => view, place: pin, into: pin.into, most: pin.most,
      head: make("div", { name: "bar" }, heading(pin, "h3"), make("span", { name: "push" }), remove, ...copyButtons(() => card)),
      foot: lens,
    });
    card.describe();
    return card;
  });
  byId("pins").replaceChildren(...pinned.map((card) => card.node));
  byId("pins").hidden = !pinned.length;
}

/* ---- start ---- */

function start() {
  for (const [name, rows] of Object.entries(about.examples)) {
    byId("examples").append(make("optgroup", { label: name }, ...rows.map((text) => make("option", { value: text, text }))));
  }
  const lenses = [...about.lenses, { name: "own", title: "Own target…" }];
  byId("lens").append(...lenses.map(({ name, title }) => make("option", { value: name, text: title })));
  const models = new Set([about.source_model, about.target_model, view.source, view.target, "builtin:smollm2-135m-instruct"]);
  byId("known-models").append(...[...models].map((value) => make("option", { value })));
  const submit = () => {
    readForm();
    if (view.prompt) showGrid();
    else showError(byId("error"), { message: "The prompt is empty.", hint: "Type some text, or choose an example." });
  };
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  for (const id of ["prompt", "own-prompt"]) {
    byId(id).addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      submit();
    });
  }
  for (const id of ["lens", "own-layer", "source-model", "target-model"]) byId(id).addEventListener("change", submit);
  byId("examples").addEventListener("change", (event) => {
    if (!event.target.value) return;
    byId("prompt").value = event.target.value;
    event.target.value = "";
    submit();
  });
  byId("shade").addEventListener("change", (event) => {
    view.shade = event.target.value;
    remember();
    if (grid.grid) grid.shade(view.shade);
  });
  byId("earlier").addEventListener("click", () => page(-1));
  byId("later").addEventListener("click", () => page(1));
  for (const button of document.querySelectorAll("[data-copy]")) {
    const request = () => gridRequest(view, grid.grid && !grid.grid.whole ? grid.grid.positions : null);
    button.addEventListener("click", () => copyView("grid", button.dataset.copy, request()));
  }
  byId("copy-link").addEventListener("click", () => copy(location.href, "Link with its token"));
  byId("copy-command").addEventListener("click", () => copy(command(view, defaults, about), "Command"));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || byId("by-hand").open) return;
    selected?.cancel();
    for (const card of pinned) card.cancel();
    if (running) byId("grid-cancel").click();
  });
  addEventListener("hashchange", () => {
    view = parse(location.hash, defaults);
    showGrid();
  });
  showGrid();
}

start();
