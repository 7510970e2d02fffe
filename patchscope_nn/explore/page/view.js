/* The view: what the page shows, as plain data and as the fragment of a link. It does not contain the token. */

export const DEFAULT_MOST = 20;

/** Parse the fragment of a link; missing and invalid fields take the defaults. */
export function parse(fragment, defaults) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  const json = (name, fallback) => {
    try {
      return JSON.parse(fields.get(name)) ?? fallback;
    } catch {
      return fallback;
    }
  };
  const text = (name, fallback) => fields.get(name) ?? fallback;
  const natural = (value, fallback) => (Number.isInteger(value) && value >= 0 ? value : fallback);
  const target = (value) => ({
    prompt: String(value?.prompt ?? defaults.describe),
    position: String(value?.position ?? -1),
    layer: String(value?.layer ?? "same"),
  });
  const place = (value) => ({ position: natural(value?.position, 0), layer: natural(value?.layer, 0) });
  const at = json("at", null);
  const pins = json("pins", []);
  return {
    prompt: text("prompt", defaults.prompt),
    source: text("source", defaults.source),
    target: text("target", defaults.target),
    lens: text("lens", "token-identity"),
    own: target(json("own", { prompt: defaults.identity })),
    shade: ["entropy", "surprisal"].includes(fields.get("shade")) ? fields.get("shade") : "probability",
    from: natural(Number(fields.get("from") ?? 0), 0),
    at: at && place(at),
    into: target(json("into", null)),
    most: Math.min(200, Math.max(1, natural(Number(fields.get("most") ?? DEFAULT_MOST), DEFAULT_MOST))),
    pins: (Array.isArray(pins) ? pins : []).slice(0, 2).map((pin) => ({ ...place(pin), into: target(pin?.into), most: natural(pin?.most, DEFAULT_MOST) || DEFAULT_MOST })),
  };
}

/** Write a view as a fragment; single quotes are escaped, so that it can be quoted in a shell. */
export function format(view, defaults) {
  const fields = new URLSearchParams({ prompt: view.prompt, source: view.source, target: view.target });
  if (view.lens !== "token-identity") fields.set("lens", view.lens);
  if (view.lens === "own") fields.set("own", JSON.stringify(view.own));
  if (view.shade !== "probability") fields.set("shade", view.shade);
  if (view.from) fields.set("from", view.from);
  const differs = (into) => into.prompt !== defaults.describe || into.position !== "-1" || into.layer !== "same";
  if (view.at) fields.set("at", JSON.stringify(view.at));
  if (differs(view.into)) fields.set("into", JSON.stringify(view.into));
  if (view.most !== DEFAULT_MOST) fields.set("most", view.most);
  if (view.pins.length) {
    fields.set("pins", JSON.stringify(view.pins.map(({ position, layer, into, most }) => ({ position, layer, ...(differs(into) && { into }), ...(most !== DEFAULT_MOST && { most }) }))));
  }
  return fields.toString().replaceAll("'", "%27");
}

const models = (view) => ({ prompt: view.prompt, source_model: view.source, target_model: view.target });

/** The body of a request for a grid. */
export function gridRequest(view, positions) {
  return { ...models(view), lens: view.lens, ...(view.lens === "own" && { target: view.own }), positions };
}

/** The body of a request for one cell. */
export function cellRequest(view, { position, layer }, into, most) {
  return { ...models(view), position, layer, target: into, max_new_tokens: most };
}
