/* Texts from models and users, with invisible characters shown. They enter the page only as text, never as markup. */
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060\u2066-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

const code = (mark) => `\\u${mark.charCodeAt(0).toString(16).padStart(4, "0")}`;

/** A text with invisible characters and direction marks written as codes; line breaks are kept. */
export const visible = (text) => text.replace(HIDDEN, code);

const oneLine = (text) => visible(text).replaceAll("\n", "⏎").replaceAll("\t", "⇥");

/** A token without spaces around it; a token of spaces only becomes visible signs. */
export function token(text) {
  const line = oneLine(text);
  return line.trim() || line.replaceAll(" ", "␣") || "∅";
}

/** A token in quotes, with its spaces. */
export const quoted = (text) => `‘${oneLine(text)}’`;

/** Create an element. */
export function make(tag, { text, name, ...attributes } = {}, ...children) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/** A text whose writing direction does not affect the text around it. */
export const isolated = (text, name) => make("bdi", { text, name });

export const byId = (id) => document.getElementById(id);

/** A percentage short enough for a cell. */
export const percent = (value) => (value > 0 && value < 0.001 ? "<0.1 %" : `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`);
