// The server as this page knows it: whether it is ready, its prologue, and answers as they come.

const PATIENCE_MS = 1000;

export class ServerError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds, or null: then trying again is of no use
  }
}

// {status, progress}; progress goes from 0 to 1.
export async function readiness() {
  const answer = await fetch("/health/ready");
  return answer.json();
}

// Calls tell(readiness) until the model is ready or has failed.
export async function untilReady(tell) {
  for (;;) {
    let state = { status: "unreachable", progress: 0 };
    try {
      state = await readiness();
    } catch {
      // not listening, or restarting
    }
    tell(state);
    if (state.status !== "loading" && state.status !== "unreachable") return state;
    await pause(state.status === "loading" ? 150 : PATIENCE_MS);
  }
}

// {persona, prologue, model}; waits while the server opens its ready answers.
export async function prologue() {
  for (;;) {
    const answer = await fetch("/prologue");
    if (answer.ok) return answer.json();
    const fault = await refused(answer);
    if (fault.retryAfter === null) throw fault;
    await pause(150);
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
    if (chunk.error) throw new ServerError(500, chunk.error.message, null);
    const choice = chunk.choices[0];
    if (choice?.delta.content) heard.text(choice.delta.content);
    finish = choice?.finish_reason ?? finish;
    if (chunk.usage) heard.figures(chunk, finish);
  }
  throw new ServerError(0, "the connection was cut before the answer ended", null);
}

async function admitted(body, heard, signal) {
  for (;;) {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
      signal,
    });
    if (response.ok) return response;
    const fault = await refused(response);
    if (fault.retryAfter === null) throw fault;
    heard.waiting(fault.message, fault.retryAfter);
    await pause(1000 * fault.retryAfter, signal);
  }
}

async function refused(response) {
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // a proxy's page, not the server's error
  }
  const after = response.headers.get("Retry-After");
  return new ServerError(response.status, message, after === null ? null : Math.max(0.2, Number(after) || 1));
}

function origin(headers) {
  return {
    source: headers.get("X-Emerald-Source"),
    entry: headers.get("X-Emerald-Entry"),
    tier: headers.get("X-Emerald-Tier"),
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
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice("data: ".length);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
