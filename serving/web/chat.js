// One story on the page: its turns, an answer that is growing, and what can be done with each.
import { rendered } from "/web/render.js";
import { answer } from "/web/server.js";

const NEAR_END_PX = 80;
const MESSAGES_MAX = 999;

export class Chat {
  // hooks: keep(story) saves it, say(text) shows a status, spoken(text) tells a screen reader, busy(whether).
  constructor(place, scroll, hooks) {
    this.place = place;
    this.scroll = scroll;
    this.hooks = hooks;
    this.story = null;
    this.greeting = "";
  }

  show(story) {
    this.stop();
    this.story = story;
    for (const turn of story.turns) {
      if (turn.growing) Object.assign(turn, { growing: undefined, stopped: true }); // the page was closed meanwhile
    }
    this.draw();
    this.toEnd();
  }

  // Asks the model, or has the cache answer; useCache false asks the model in any case.
  async send(text) {
    this.story.turns.push({ role: "user", text });
    await this.reply(true);
  }

  stop() {
    this.growing?.abort(new DOMException("stopped", "AbortError"));
  }

  // Another answer in place of the last one. A ready answer would be the same again, so the model is asked.
  async regenerate() {
    const last = this.story.turns.pop();
    await this.reply(Boolean(last.fault) && !last.text);
  }

  // What the visitor said becomes something else, and all that followed is gone.
  async edit(at, text) {
    this.stop();
    this.story.turns.length = at;
    await this.send(text);
  }

  async reply(useCache) {
    const { story } = this;
    const body = {
      messages: story.turns.filter((turn) => turn.text).slice(-MESSAGES_MAX)
        .map((turn) => ({ role: turn.role, content: turn.text })),
      emerald: { cache: useCache, choices: story.choices },
    };
    const turn = { role: "assistant", text: "", growing: true };
    story.turns.push(turn);
    this.draw();
    this.toEnd();
    const growing = new AbortController();
    this.growing = growing;
    this.hooks.busy(true);
    this.hooks.say("The storyteller is thinking.");
    const heard = {
      waiting: (message, seconds) => this.hooks.say(`${message}; asking again in ${seconds} s`),
      origin: (origin) => {
        turn.origin = origin;
        this.hooks.say("The storyteller is speaking.");
      },
      text: (piece) => {
        turn.text += piece;
        this.grow(turn);
      },
      figures: ({ usage, timings }, finish) => {
        turn.figures = { usage, timings, finish };
      },
    };
    try {
      await answer(body, heard, growing.signal);
      this.hooks.say("");
    } catch (fault) {
      if (fault.name === "AbortError") turn.stopped = true;
      else turn.fault = fault.status === undefined ? "the server cannot be reached" : fault.message;
      this.hooks.say(turn.stopped ? "Stopped." : "");
    }
    delete turn.growing;
    if (turn.stopped && !turn.text) turn.fault = "stopped before the first word";
    this.hooks.keep(story);
    if (this.growing !== growing) return; // another story, or another answer, has begun
    this.growing = null;
    this.hooks.busy(false);
    this.hooks.spoken(turn.fault ?? turn.text);
    if (this.story === story) this.draw();
  }

  draw() {
    const follow = this.nearEnd();
    const items = this.story.entered && this.greeting ? [this.item({ role: "assistant", text: this.greeting }, -1)] : [];
    this.place.replaceChildren(...items, ...this.story.turns.map((turn, at) => this.item(turn, at)));
    if (follow) this.toEnd();
  }

  // At most once a frame, however fast the words come.
  grow(turn) {
    if (this.waitingFrame) return;
    this.waitingFrame = requestAnimationFrame(() => {
      this.waitingFrame = null;
      const words = this.place.lastElementChild?.querySelector(".words");
      if (!turn.growing || this.story.turns.at(-1) !== turn || !words) return;
      const follow = this.nearEnd();
      words.replaceChildren(rendered(turn.text));
      if (follow) this.toEnd();
    });
  }

  item(turn, at) {
    const item = element("li", { className: `turn ${turn.role}` });
    const words = element("div", { className: "words" });
    if (turn.role === "user") words.textContent = turn.text;
    else words.replaceChildren(rendered(turn.text));
    item.append(element("span", { className: "unseen", textContent: turn.role === "user" ? "You:" : "Emerald:" }), words);
    if (turn.growing) item.ariaBusy = "true";
    if (turn.fault) item.append(element("p", { className: "fault", textContent: `No answer: ${turn.fault}.` }));
    if (turn.origin) item.append(element("p", { className: "origin", textContent: described(turn) }));
    if (at >= 0 && !turn.growing) item.append(this.tools(turn, at, words));
    return item;
  }

  tools(turn, at, words) {
    const tools = element("div", { className: "tools" });
    const add = (textContent, title, onclick) =>
      tools.append(element("button", { type: "button", className: "plain", textContent, title, onclick }));
    if (turn.text) add("Copy", "Copy this text", () => this.copy(turn.text));
    if (turn.role === "user") add("Edit", "Change this and go on from here", () => this.editor(words, tools, turn, at));
    else if (at === this.story.turns.length - 1) {
      if (turn.fault && !turn.text) add("Try again", "Ask again", () => this.regenerate());
      else add("Regenerate", "Have the model answer anew", () => this.regenerate());
    }
    return tools;
  }

  editor(words, tools, turn, at) {
    const box = element("textarea", { value: turn.text, rows: 3, ariaLabel: "Change what you said" });
    const again = element("button", { type: "button", className: "main", textContent: "Send again" });
    const cancel = element("button", { type: "button", textContent: "Cancel" });
    const row = element("div", { className: "options" });
    again.onclick = () => box.value.trim() && this.edit(at, box.value.trim());
    cancel.onclick = () => this.draw();
    box.onkeydown = (event) => {
      if (event.key === "Escape") this.draw();
    };
    row.append(again, cancel);
    words.replaceChildren(box, row);
    tools.remove();
    box.focus();
  }

  async copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      this.hooks.say("Copied.");
    } catch {
      this.hooks.say("This browser lets no page copy here: select the text and copy it by hand.");
    }
  }

  nearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroll;
    return scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
  }

  toEnd() {
    this.scroll.scrollTop = this.scroll.scrollHeight;
  }
}

// Where an answer came from and what it cost, in one line.
export function described({ origin, figures, stopped }) {
  const parts = [];
  if (origin.source === "cache") {
    parts.push(`Ready answer “${origin.entry}”`);
    if (origin.bound) parts.push(`certified: at most ${percent(origin.bound)} of such answers are wrong`);
    else parts.push("word for word a known question");
  } else {
    parts.push("Written by the model");
    if (origin.dropped) parts.push(`without the first ${origin.dropped} turns, which its memory has no room for`);
  }
  if (stopped) parts.push("stopped");
  if (figures) {
    const { usage, timings, finish } = figures;
    if (usage.completion_tokens) parts.push(`${usage.completion_tokens} tokens`);
    if (timings.tokens_per_second) parts.push(`${Math.round(timings.tokens_per_second)} tokens/s`);
    parts.push(`first word after ${short(timings.ttft_ms)} ms`);
    const { joules, joules_low, joules_high, grams_co2e, source } = usage.energy;
    const range = source === "modelled" ? ` (${short(joules_low)} to ${short(joules_high)}, modelled)` : " (metered)";
    parts.push(`${short(joules)} J${range}`, `${short(1000 * grams_co2e)} mg CO₂e`);
    if (finish === "length") parts.push("cut at the longest reply");
  }
  return parts.join(" · ");
}

function percent(share) {
  return `${(100 * Number(share)).toFixed(1)} %`;
}

function short(number) {
  return String(Number(number.toPrecision(2)));
}

function element(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}
