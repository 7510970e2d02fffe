/* The grid: tokens from left to right, layers from the bottom up. One cell at a time is in the tab order. */
import { byId, isolated, make, percent, quoted, token } from "./text.js";
import { gradient, paint } from "./scale.js";

const SHADES = {
  probability: { title: "Probability of the top token", of: (cell) => cell.top_probs[0], high: 1 },
  entropy: { title: "Entropy in nats", of: (cell) => cell.entropy_nats },
  surprisal: { title: "Surprisal in nats: −log p of the top token, in the model’s own prediction", of: (cell) => cell.surprisal_nats },
};

const key = (position, layer) => `${position}.${layer}`;

export class Grid {
  /** @param select called with a cell's place, and whether it was reached by an arrow key */
  constructor({ select }) {
    this.table = byId("grid");
    this.select = select;
    this.nodes = new Map();
    this.cells = new Map();
    byId("scale").style.background = gradient();
    this.table.addEventListener("click", (event) => {
      const node = event.target.closest("td");
      if (node) this.choose(this.placeOf(node), { byKey: false });
    });
    this.table.addEventListener("keydown", (event) => this.move(event));
    this.box = byId("scroll");
    new ResizeObserver(() => this.align()).observe(this.box);
  }

  placeOf = (node) => ({ position: Number(node.dataset.position), layer: Number(node.dataset.layer) });

  /** Dim the grid and make it unresponsive while the next one is computed. */
  hold() {
    this.table.classList.add("held");
    this.table.ariaBusy = "true";
  }

  clear() {
    this.grid = null;
    this.nodes.clear();
    this.table.replaceChildren();
    byId("legend").hidden = true;
    this.free();
  }

  free() {
    this.table.classList.remove("held");
    this.table.ariaBusy = "false";
  }

  /** Show a grid. */
  show(grid, shade) {
    this.free();
    this.grid = grid;
    this.cells = new Map(grid.cells.map((cell) => [key(cell.position, cell.layer), cell]));
    this.nodes.clear();
    this.table.style.setProperty("--columns", grid.positions.length);
    const tokenHead = (position) => make(
      "th",
      { scope: "col", title: `position ${position}: ${quoted(grid.tokens[position])}`, name: position ? "" : "sink" },
      make("span", { name: "number", text: position }), isolated(token(grid.tokens[position])),
    );
    const heads = () => make("tr", {}, make("th", { scope: "col", name: "corner", text: "layer" }), ...grid.positions.map(tokenHead));
    const rows = [];
    for (let layer = grid.n_layers - 1; layer >= 0; layer--) {
      const cells = grid.positions.map((position) => this.node(position, layer));
      rows.push(make("tr", {}, make("th", { scope: "row", text: layer }), ...cells));
    }
    this.table.replaceChildren(make("thead", {}, heads()), make("tbody", {}, ...rows));
    this.align();
    this.shade(shade);
    byId("legend").hidden = false;
    byId("legend-hit").hidden = !grid.cells.some((cell) => cell.hit !== null);
    byId("legend-sink").hidden = !grid.positions.includes(0);
    this.first = this.nodes.get(key(grid.positions.at(-1), grid.n_layers - 1));
    this.first.tabIndex = 0;
  }

  node(position, layer) {
    const cell = this.cells.get(key(position, layer));
    const top = cell.top_tokens[0];
    const node = make("td", { role: "gridcell", tabindex: "-1", name: cell.hit ? "hit" : "", "data-position": position, "data-layer": layer }, isolated(token(top)));
    node.ariaLabel = `layer ${layer}, position ${position} ${quoted(this.grid.tokens[position])}: ${quoted(top)} ${percent(cell.top_probs[0])}`;
    node.title = `${quoted(top)} ${percent(cell.top_probs[0])}`;
    node.ariaSelected = "false";
    this.nodes.set(key(position, layer), node);
    return node;
  }

  /** Colour the cells by a number, if this grid has it. */
  shade(name) {
    const { title, of, high: fixed } = SHADES[name];
    const values = this.grid.cells.map(of);
    const known = values.every((value) => value !== null);
    const high = fixed ?? Math.max(...values, 1e-9);
    this.grid.cells.forEach((cell, i) => paint(this.nodes.get(key(cell.position, cell.layer)), known ? values[i] / high : 0));
    byId("legend-name").textContent = known ? title : "Surprisal needs one model for source and target";
    byId("legend-low").textContent = known ? "0" : "";
    byId("legend-high").textContent = known ? (fixed ? percent(fixed) : high.toFixed(2)) : "";
  }

  cell({ position, layer }) {
    return this.cells.get(key(position, layer));
  }

  /** Mark the selected cell and the pinned ones. */
  mark(at, pins) {
    for (const node of this.table.querySelectorAll("[aria-selected=true], .pinned")) {
      node.ariaSelected = "false";
      node.classList.remove("pinned");
    }
    for (const pin of pins) this.nodes.get(key(pin.position, pin.layer))?.classList.add("pinned");
    const node = at && this.nodes.get(key(at.position, at.layer));
    if (!node) return;
    node.ariaSelected = "true";
    for (const other of this.table.querySelectorAll("td[tabindex='0']")) other.tabIndex = -1;
    node.tabIndex = 0;
  }

  /** Add space after the last column, so that at the end of scrolling a column starts right beside the layers. */
  align() {
    this.table.style.borderInlineEndWidth = "0";
    const lefts = [...this.table.querySelectorAll("tbody tr:first-child td")].map((node) => this.sides(node).left);
    if (!lefts.length) return;
    this.box.style.scrollPaddingInlineStart = `${lefts[0]}px`;
    this.starts = lefts.map((left) => left - lefts[0]);
    const beyond = this.table.offsetWidth - this.box.clientWidth;
    if (beyond > 0) this.table.style.borderInlineEndWidth = `${this.startFrom(beyond) - beyond}px`;
  }

  /** The left and right edges of a cell within the table, independent of scrolling. */
  sides(node) {
    const [cell, table] = [node, this.table].map((part) => part.getBoundingClientRect());
    return { left: cell.left - table.left, right: cell.right - table.left };
  }

  /** The first scroll position, at or after one, at which no column is partly hidden by the layers. */
  startFrom = (left) => this.starts.find((start) => start >= left) ?? this.starts.at(-1);

  /** Scroll the grid, but not the page, to show a cell. */
  reveal({ position, layer }) {
    const node = this.nodes.get(key(position, layer));
    this.box.scrollLeft = this.startFrom(this.sides(node).left - this.box.clientWidth / 2);
    this.box.scrollTop = node.offsetTop - this.box.clientHeight / 2;
  }

  /** Scroll as little as necessary to show a cell. */
  follow(node) {
    const { left, right } = this.sides(node);
    const end = right - this.box.clientWidth;
    const start = left - parseFloat(this.box.style.scrollPaddingInlineStart);
    if (this.box.scrollLeft > start) this.box.scrollLeft = start;
    else if (this.box.scrollLeft < end) this.box.scrollLeft = this.startFrom(end);
    node.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  choose(place, { byKey }) {
    const node = this.nodes.get(key(place.position, place.layer));
    if (!node || this.table.classList.contains("held")) return;
    this.select(place, { byKey });
    node.focus({ preventScroll: true });
    this.follow(node);
  }

  move(event) {
    const node = event.target.closest("td");
    if (!node || event.ctrlKey || event.metaKey || event.altKey) return;
    const { position, layer } = this.placeOf(node);
    const { positions, n_layers: count } = this.grid;
    const column = positions.indexOf(position);
    const to = (x, y) => ({ position: positions[Math.min(positions.length - 1, Math.max(0, x))], layer: Math.min(count - 1, Math.max(0, y)) });
    const places = {
      ArrowLeft: () => to(column - 1, layer),
      ArrowRight: () => to(column + 1, layer),
      ArrowUp: () => to(column, layer + 1),
      ArrowDown: () => to(column, layer - 1),
      Home: () => to(0, layer),
      End: () => to(Infinity, layer),
      PageUp: () => to(column, Infinity),
      PageDown: () => to(column, 0),
      Enter: () => ({ position, layer }),
      " ": () => ({ position, layer }),
    };
    const place = places[event.key]?.();
    if (!place) return;
    event.preventDefault();
    this.choose(place, { byKey: event.key.length > 1 && event.key !== "Enter" });
  }
}
