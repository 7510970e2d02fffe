/* Requests to the server: streams of JSON lines, which a signal cancels. */

/** An error as the server tells it. */
export class Told extends Error {
  constructor({ message, hint }) {
    super(message);
    this.hint = hint;
  }
}

async function send(path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Told({ message: "The explorer cannot be reached.", hint: "Is `patchscope explore` still running in its terminal?" });
  }
  if (response.ok) return response;
  const text = await response.text();
  let said;
  try {
    said = JSON.parse(text);
  } catch {
    said = { message: text.trim() || `The server said ${response.status}.`, hint: "" };
  }
  throw new Told(said);
}

/** Ask, and give each event as it comes; an `error` event is thrown. */
export async function* ask(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let ended = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done && ended) return; // read to its end, so that the connection can be used again
    if (done) throw new Told({ message: "The answer ended too early.", hint: "Is `patchscope explore` still running in its terminal?" });
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === "error") throw new Told(event);
      if (event.event === "done") ended = true;
      else yield event;
    }
  }
}

/** Ask for a copy of a view: its text. */
export async function copyOf(what, form, body) {
  const response = await send(`copy/${what}/${form}`, body);
  return (await response.json()).text;
}
