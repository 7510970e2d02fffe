/* What the page shows, as plain data, and as the part of a link behind its #. The token is no part of it. */

export const DEFAULT_MOST = 20;

/** The view that a link's fragment holds; what it leaves out is the page's default. */
export function parse(fragment, defaults) {
  const given = new URLSearchParams(fragment.replace(/^#/, ""));
  const json = (name, fallback) => {
    try {
      return JSON.parse(given.get(name)) ?? fallback;
    } catch {
      return fallback;
    }
  };
  const text = (name, fallback) => given.get(name) ?? fallback;
  const whole = (value, fallback) => (Number.isInteger(value) && value >= 0 ? value : fallback);
  const target = (found) => ({
    prompt: String(found?.prompt ?? defaults.describe),
    position: String(found?.position ?? -1),
    layer: String(found?.layer ?? "same"),
  });
  const place = (found) => ({ position: whole(found?.position, 0), layer: whole(found?.layer, 0) });
  const at = json("at", null);
  const pins = json("pins", []);
  return {
    prompt: text("prompt", defaults.prompt),
    source: text("source", defaults.source),
    target: text("target", defaults.target),
    lens: text("lens", "token-identity"),
    own: target(json("own", { prompt: defaults.identity })),
    shade: ["entropy", "surprisal"].includes(given.get("shade")) ? given.get("shade") : "probability",
    from: whole(Number(given.get("from") ?? 0), 0),
    at: at && place(at),
    into: target(json("into", null)),
    most: Math.min(200, Math.max(1, whole(Number(given.get("most") ?? DEFAULT_MOST), DEFAULT_MOST))),
    pins: (Array.isArray(pins) ? pins : []).slice(0, 2).map((pin) => ({ ...place(pin), into: target(pin?.into), most: whole(pin?.most, DEFAULT_MOST) || DEFAULT_MOST })),
  };
}

/** The fragment that holds a view: readable, with a quote written so that a shell leaves it alone. */
export function format(view, defaults) {
  const said = new URLSearchParams({ prompt: view.prompt, source: view.source, target: view.target });
  if (view.lens !== "token-identity") said.set("lens", view.lens);
  if (view.lens === "own") said.set("own", JSON.stringify(view.own));
  if (view.shade !== "probability") said.set("shade", view.shade);
  if (view.from) said.set("from", view.from);
  const differs = (into) => into.prompt !== defaults.describe || into.position !== "-1" || into.layer !== "same";
  if (view.at) said.set("at", JSON.stringify(view.at));
  if (differs(view.into)) said.set("into", JSON.stringify(view.into));
  if (view.most !== DEFAULT_MOST) said.set("most", view.most);
  if (view.pins.length) {
    said.set("pins", JSON.stringify(view.pins.map(({ position, layer, into, most }) => ({ position, layer, ...(differs(into) && { into }), ...(most !== DEFAULT_MOST && { most }) }))));
  }
  return said.toString().replaceAll("'", "%27");
}

const models = (view) => ({ prompt: view.prompt, source_model: view.source, target_model: view.target });

/** What the server is asked for the grid. */
export function gridOf(view, positions) {
  return { ...models(view), lens: view.lens, ...(view.lens === "own" && { target: view.own }), positions };
}

/** What the server is asked about one cell. */
export function cellOf(view, { position, layer }, into, most) {
  return { ...models(view), position, layer, target: into, max_new_tokens: most };
}
