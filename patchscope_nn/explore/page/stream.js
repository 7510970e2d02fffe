/* Requests to the server. Answers are streams of JSON lines; an abort signal cancels them. */

/** An error that the server reports, with a hint. */
export class ServerError extends Error {
  constructor({ message, hint }) {
    super(message);
    this.hint = hint;
  }
}

const STOPPED = "Check that `patchscope explore` is still running in its terminal.";

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
    throw new ServerError({ message: "The explorer cannot be reached.", hint: STOPPED });
  }
  if (response.ok) return response;
  const text = await response.text();
  let report;
  try {
    report = JSON.parse(text);
  } catch {
    report = { message: text.trim() || `The server answered with status ${response.status}.`, hint: "" };
  }
  throw new ServerError(report);
}

/** Send a request and yield its events as they arrive; an `error` event is thrown. */
export async function* ask(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let ended = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done && ended) return; // the stream is read to its end, so that the connection can be reused
    if (done) throw new ServerError({ message: "The answer is incomplete.", hint: STOPPED });
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === "error") throw new ServerError(event);
      if (event.event === "done") ended = true;
      else yield event;
    }
  }
}

/** Fetch a view as the text of a recipe or of a Python script. */
export async function copyOf(what, form, body) {
  const response = await send(`copy/${what}/${form}`, body);
  return (await response.json()).text;
}
