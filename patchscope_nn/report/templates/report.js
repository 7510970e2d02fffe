"use strict";
const byId = (id) => document.getElementById(id);
const make = (tag, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};

/* The cells, as columns of values, or of indices into a pool of texts. */
const { columns, limit } = JSON.parse(byId("cells").textContent);
const PAGE = 25;
const count = columns.length ? columns[0].values.length : 0;
const state = { order: [...Array(count).keys()], page: 0, column: -1, down: false };
const value = (column, i) => (column.pool ? column.pool[column.values[i]] : column.values[i]);
const label = (column, i) => {
  const raw = value(column, i);
  if (raw === null) return "–";
  return column.kind === "layer" && raw === -1 ? "embed" : String(raw);
};
let texts = null;
const textOf = (i) => {
  texts ??= new Array(count);
  return (texts[i] ??= columns.map((column) => label(column, i)).join("\n").toLowerCase());
};

function arrange() {
  const wanted = byId("search").value.trim().toLowerCase();
  state.order = [...Array(count).keys()].filter((i) => !wanted || textOf(i).includes(wanted));
  const column = columns[state.column];
  if (column) {
    const sign = state.down ? -1 : 1;
    const compare = new Intl.Collator(undefined, { numeric: true }).compare;
    state.order.sort((a, b) => {
      const [x, y] = [value(column, a), value(column, b)];
      const [noX, noY] = [x === null || x === "", y === null || y === ""];
      if (noX || noY) return noX - noY || a - b; /* empty values come last in both directions */
      return sign * (column.kind === "text" ? compare(x, y) : x - y) || a - b;
    });
  }
  state.page = 0;
  draw();
}

function details(i, width) {
  const line = make("tr", undefined, "detail");
  const list = make("dl");
  for (const column of columns) {
    if (label(column, i) === "") continue;
    list.append(make("dt", column.label));
    const text = make("dd", label(column, i));
    text.dir = "auto";
    list.append(text);
  }
  const cell = make("td");
  cell.colSpan = width;
  cell.append(list);
  line.append(cell);
  return line;
}

function row(i, visible) {
  const line = make("tr", undefined, visible.some((c) => c.label === "control" && value(c, i)) ? "control" : "");
  const opener = make("button", "▸", "open");
  opener.type = "button";
  opener.setAttribute("aria-expanded", "false");
  opener.setAttribute("aria-label", "Show all columns of this cell");
  opener.addEventListener("click", () => {
    const open = opener.getAttribute("aria-expanded") === "true";
    if (open) line.nextSibling.remove();
    else line.after(details(i, visible.length + 1));
    opener.setAttribute("aria-expanded", String(!open));
    opener.textContent = open ? "▸" : "▾";
  });
  const first = make("td");
  first.append(opener);
  line.append(first);
  for (const column of visible) {
    const text = label(column, i);
    const kind = column.label === "note" ? "note" : column.kind === "text" ? "text" : "number";
    const cell = make("td", text.slice(0, 200).replaceAll("\n", "⏎"), kind);
    if (kind === "text") [cell.dir, cell.title] = ["auto", text.slice(0, 600)];
    line.append(cell);
  }
  return line;
}

function draw() {
  const visible = columns.filter((column) => !column.detail);
  const start = state.page * PAGE;
  const part = state.order.slice(start, start + PAGE);
  byId("body").replaceChildren(...part.map((i) => row(i, visible)));
  const of = state.order.length.toLocaleString("en");
  byId("found").textContent = part.length ? `${start + 1}–${start + part.length} of ${of}` : "No cell matches";
  byId("previous").disabled = start === 0;
  byId("next").disabled = start + PAGE >= state.order.length;
  for (const head of byId("head").querySelectorAll("th[data-column]")) {
    const sorted = Number(head.dataset.column) === state.column;
    head.setAttribute("aria-sort", sorted ? (state.down ? "descending" : "ascending") : "none");
    head.firstChild.textContent = head.dataset.label + (sorted ? (state.down ? " ↓" : " ↑") : "");
  }
}

byId("head").append(make("th"));
columns.forEach((column, index) => {
  if (column.detail) return;
  const head = make("th");
  const button = make("button", column.label);
  button.type = "button";
  button.addEventListener("click", () => {
    state.down = state.column === index && !state.down;
    state.column = index;
    arrange();
  });
  head.scope = "col";
  head.className = column.kind === "text" ? "" : "number";
  Object.assign(head.dataset, { column: index, label: column.label });
  head.append(button);
  byId("head").append(head);
});
let timer = 0;
byId("search").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(arrange, 120);
});
byId("previous").addEventListener("click", () => { state.page -= 1; draw(); });
byId("next").addEventListener("click", () => { state.page += 1; draw(); });
byId("limits").textContent = `Texts longer than ${limit.toLocaleString("en")} characters are cut here; the run folder has them in full.`;
draw();

/* The figures: at least as wide as the page, in the colours of the page. */
const figures = JSON.parse(byId("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
function keepNames(node) {
  const shift = node.parentElement.scrollLeft;
  for (const axis of node.querySelectorAll(".yaxislayer-above")) {
    axis.querySelector(".names-back")?.remove();
    axis.style.transform = shift ? `translateX(${shift}px)` : "";
    if (!shift) continue;
    const box = axis.getBBox();
    const back = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const sizes = { x: 0, y: box.y - 6, width: box.x + box.width + 4, height: box.height + 12 };
    for (const [name, size] of Object.entries(sizes)) back.setAttribute(name, size);
    back.setAttribute("class", "names-back");
    axis.prepend(back);
  }
}
/* Plotly keeps a hover label inside its figure, but only part of a wide figure may be in view. */
function keepHover(node) {
  const layer = node.querySelector(".hoverlayer");
  layer.style.transform = "";
  const [view, hover] = [node.parentElement, layer].map((part) => part.getBoundingClientRect());
  const shift = Math.max(view.left - hover.left, Math.min(0, view.right - 4 - hover.right));
  if (shift && hover.width) layer.style.transform = `translateX(${shift}px)`;
}
/* These tools replace plotly's default tool bar, which has a button that uploads the figure. */
const tools = [["zoom2d", "pan2d", "resetScale2d"]];
/* A saved figure is for print: dark on white, with its title, in light and dark mode alike. */
const saved = figures.map((figure) => structuredClone(figure));
async function save(button) {
  const { figure, format } = button.dataset;
  const { data, layout } = structuredClone(saved[figure]);
  const { width, height } = byId(`figure-${figure}`).getBoundingClientRect();
  Object.assign(layout, { paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff", width, height: height + 40 });
  layout.font.color = "#1c2129";
  layout.margin.t = (layout.margin.t ?? 64) + 20;
  const title = layout.title.text.replace(/<[^>]*>|&[a-z]+;/g, " ").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 80);
  const filename = title.replace(/^-|-$/g, "") || "figure";
  await Plotly.downloadImage({ data, layout }, { format, filename, width, height: height + 40, scale: format === "png" ? 2 : 1 });
}
for (const button of document.querySelectorAll(".save button")) button.addEventListener("click", () => save(button));
const config = { displaylogo: false, showSendToCloud: false, plotlyServerURL: "", modeBarButtons: tools };
function drawFigure(figure, index) {
  const node = byId(`figure-${index}`);
  const natural = figure.layout.width ?? 0;
  const wide = () => Math.max(natural, node.parentElement.clientWidth);
  delete figure.layout.title; /* the page shows it as a heading, which wraps */
  Object.assign(figure.layout, { width: wide() });
  figure.layout.margin.t = 24;
  figure.layout.font.color = ink();
  Plotly.newPlot(node, figure.data, figure.layout, config).then(() => {
    /* Observe only now: a scroll bar that appears earlier would resize a figure that is not drawn yet. */
    let last = figure.layout.width;
    const refit = () => wide() !== last && Plotly.relayout(node, { width: (last = wide()) });
    new ResizeObserver(() => requestAnimationFrame(refit)).observe(node.parentElement);
    dark.addEventListener("change", () => Plotly.relayout(node, { "font.color": ink() }));
    /* Keep the names of the lines in view while a wide figure is scrolled. */
    node.parentElement.addEventListener("scroll", () => keepNames(node));
    node.on("plotly_afterplot", () => keepNames(node));
    node.on("plotly_hover", () => keepHover(node));
  });
}
/* Draw the figures one at a time, so that the page stays usable meanwhile. */
const drawFrom = (index) => index < figures.length && setTimeout(() => {
  drawFigure(figures[index], index);
  drawFrom(index + 1);
});
drawFrom(0);
