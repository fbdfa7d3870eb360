// The server as this page knows it: whether it is ready, its prologue, and answers as they come.

const POLL_MS = 200;
const PATIENCE_MS = 1000;
const CUT = "the connection was cut";

export class ServerError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status; // 0 if there was none
    this.retryAfter = retryAfter; // seconds, or null: then trying again by itself is of no use
  }
}

// Calls tell({status, progress}) until the model is ready or has failed, and returns the last; progress goes from 0 to 1.
export async function untilReady(tell) {
  for (;;) {
    let state = { status: "unreachable", progress: 0 };
    try {
      const said = await (await fetch("/health/ready")).json();
      if (typeof said?.status === "string") state = said; // else it is a proxy's
    } catch {
      // not listening, or restarting
    }
    tell(state);
    if (state.status !== "loading" && state.status !== "unreachable") return state;
    await pause(state.status === "loading" ? POLL_MS : PATIENCE_MS);
  }
}

// {persona, prologue, model, badge}; waits while the server cannot be reached or opens its ready answers.
export async function prologue() {
  for (;;) {
    try {
      return await (await accepted("/prologue")).json();
    } catch (fault) {
      if (fault.status && fault.retryAfter === null) throw fault;
      await pause(fault.status ? POLL_MS : PATIENCE_MS);
    }
  }
}

// Streams an answer. Calls heard.origin(origin), heard.text(piece), heard.figures({usage, timings}, finishReason), and
// heard.waiting(message, seconds) before it tries again. Ends with the answer; throws ServerError or AbortError.
export async function answer(body, heard, signal) {
  const response = await admitted(body, heard, signal);
  heard.origin(origin(response.headers));
  let finish = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(500, chunk.error.message);
    const choice = chunk.choices[0];
    if (choice?.delta.content) heard.text(choice.delta.content);
    finish = choice?.finish_reason ?? finish;
    if (chunk.usage) heard.figures(chunk, finish);
  }
  throw new ServerError(0, CUT);
}

async function admitted(body, heard, signal) {
  for (;;) {
    try {
      return await accepted("/v1/chat/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
        signal,
      });
    } catch (fault) {
      if (fault.name === "AbortError" || fault.retryAfter === null) throw fault;
      heard.waiting(fault.message, fault.retryAfter);
      await pause(1000 * fault.retryAfter, signal);
    }
  }
}

// A response that is no error; throws ServerError or AbortError.
async function accepted(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (fault) {
    if (fault.name === "AbortError") throw fault;
    throw new ServerError(0, "the server cannot be reached");
  }
  if (response.ok) return response;
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // a proxy's page, not the server's error
  }
  const after = response.headers.get("Retry-After");
  throw new ServerError(response.status, message, after === null ? null : Math.max(0.2, Number(after) || 1));
}

function origin(headers) {
  return {
    source: headers.get("X-Emerald-Source"),
    entry: headers.get("X-Emerald-Entry"),
    certificate: headers.get("X-Emerald-Certificate"),
    bound: headers.get("X-Emerald-False-Hit-Bound"),
    miss: headers.get("X-Emerald-Miss"),
    dropped: Number(headers.get("X-Emerald-Dropped-Turns") ?? 0),
  };
}

// The data of server-sent events, wherever the network cut them.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await next(reader);
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice("data: ".length);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function next(reader) {
  try {
    return await reader.read();
  } catch (fault) {
    if (fault.name === "AbortError") throw fault;
    throw new ServerError(0, CUT);
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
