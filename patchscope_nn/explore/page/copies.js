/* Copies of what the page shows: as text, recipe, Python script or command. */
import { byId } from "./text.js";
import { showError } from "./cards.js";
import { copyOf } from "./stream.js";
import { format } from "./view.js";

let fading = 0;
function toast(text) {
  byId("toast").textContent = text;
  clearTimeout(fading);
  fading = setTimeout(() => (byId("toast").textContent = ""), 2500);
}

/** Copy a text, or show it for copying by hand if the browser refuses. */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    toast(`${what} copied`);
  } catch {
    const dialog = byId("by-hand");
    dialog.querySelector("textarea").value = text;
    dialog.showModal();
    dialog.querySelector("textarea").select();
  }
}

/** Copy a view as a recipe or as Python. */
export async function copyView(what, form, body) {
  try {
    await copy(await copyOf(what, form, body), form === "recipe" ? "Recipe" : "Python");
  } catch (error) {
    showError(byId("error"), error);
  }
}

/** Quote an argument for the shell, if necessary. */
const quotedWord = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

/** The command that starts another explorer with this view. */
export function command(view, defaults, about) {
  const models = view.source === view.target ? ["--model", view.source] : ["--source-model", view.source, "--target-model", view.target];
  return ["patchscope", "explore", ...models, ...about.options, "--view", format(view, defaults)].map(quotedWord).join(" ");
}
