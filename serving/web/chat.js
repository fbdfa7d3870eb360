// One story on the page: its turns, an answer that is growing, and what can be done with each.
import { asMove, choices } from "/web/choices.js";
import { button, element } from "/web/element.js";
import { facts, headline } from "/web/origin.js";
import { rendered } from "/web/render.js";
import { answer } from "/web/server.js";

const NEAR_END_PX = 80;
const MESSAGES_MAX = 999;

export class Chat {
  // hooks: keep(story) saves it, choices(story) are what the server is told of its prologue, say(text) shows a status,
  // spoken(text) tells a screen reader, busy(whether).
  constructor(place, scroll, hooks) {
    this.place = place;
    this.scroll = scroll;
    this.hooks = hooks;
    this.story = null;
    this.persona = { name: "Emerald", greeting: "" };
  }

  show(story) {
    this.stop();
    this.story = story;
    story.turns = story.turns.map((turn) => (turn.growing && !turn.text && turn.before) || turn);
    for (const turn of story.turns) {
      if (turn.growing) Object.assign(turn, { growing: undefined, stopped: true }); // the page was closed meanwhile
    }
    this.draw();
    this.toEnd();
  }

  async send(text) {
    this.story.turns.push({ role: "user", text });
    await this.reply({ useCache: true });
  }

  stop() {
    this.growing?.abort(new DOMException("stopped", "AbortError"));
  }

  // Another answer in place of the last one, which stays if there is none. A ready answer would be the same again, so
  // the model is asked; unless there was a fault, since then the question has not been answered yet.
  async regenerate() {
    const { story } = this;
    const before = story.turns.pop();
    const turn = await this.reply({ useCache: unanswered(before), before: before.text ? before : undefined });
    if (turn.text || !before.text || story.turns.at(-1) !== turn) return;
    story.turns.splice(-1, 1, before);
    this.hooks.keep(story);
    if (this.story === story) this.draw();
    if (turn.fault) this.hooks.say(`No other answer: ${turn.fault}.`);
  }

  // What the visitor said becomes something else, and all that followed is gone.
  async edit(at, text) {
    this.stop();
    this.story.turns.length = at;
    await this.send(text);
  }

  // `before` is kept with the answer until that has a word, so that closing the page loses neither.
  async reply({ useCache, before }) {
    const { story } = this;
    const messages = story.turns.filter((turn) => turn.text).slice(-MESSAGES_MAX);
    const body = {
      messages: messages.map((turn) => ({ role: turn.role, content: turn.text })),
      emerald: { cache: useCache, choices: this.hooks.choices(story) },
    };
    const turn = { role: "assistant", text: "", growing: true, before };
    story.turns.push(turn);
    this.hooks.keep(story);
    this.draw();
    this.toEnd();
    if (document.activeElement === document.body) this.place.lastElementChild.focus(); // what had it is gone
    const growing = new AbortController();
    this.growing = growing;
    this.hooks.busy(true);
    this.hooks.say(`${this.persona.name} is thinking.`);
    await this.hear(body, turn, growing.signal);
    this.hooks.keep(story);
    if (this.growing !== growing) return turn; // another story, or another answer, has begun
    this.growing = null;
    this.hooks.busy(false);
    this.hooks.say(turn.stopped ? "Stopped." : "");
    if (this.story === story) this.finish(turn);
    return turn;
  }

  // Lets the turn grow to its end, whatever that is.
  async hear(body, turn, signal) {
    const heard = {
      waiting: (message, seconds) => this.hooks.say(`${message}; asking again in ${Math.ceil(seconds)} s`),
      origin: (origin) => {
        turn.origin = origin;
        this.hooks.say(`${this.persona.name} is speaking.`);
      },
      text: (piece) => {
        turn.text += piece;
        delete turn.before;
        this.grow(turn);
      },
      figures: ({ usage, timings }, finish) => {
        turn.figures = { usage, timings, finish };
      },
    };
    try {
      await answer(body, heard, signal);
    } catch (fault) {
      if (fault.name === "AbortError") turn.stopped = true;
      else turn.fault = fault.message;
    }
    delete turn.growing;
    delete turn.before;
  }

  draw() {
    const follow = this.nearEnd();
    const { turns, entered } = this.story;
    const greets = entered && this.persona.greeting;
    const items = greets ? [this.item({ role: "assistant", text: this.persona.greeting }, -1)] : [];
    this.place.replaceChildren(...items, ...turns.map((turn, at) => this.item(turn, at)));
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

  // The last turn alone is drawn anew: an earlier one may be in an editor.
  finish(turn) {
    const follow = this.nearEnd();
    const old = this.place.lastElementChild;
    const item = this.item(turn, this.story.turns.length - 1);
    const focused = old.contains(document.activeElement);
    old.replaceWith(item);
    if (focused) item.focus({ preventScroll: true });
    if (follow) this.toEnd();
    this.hooks.spoken(turn.fault ?? item.querySelector(".words").innerText);
  }

  item(turn, at) {
    const visitor = turn.role === "user";
    const words = element("div", { className: "words" });
    if (visitor) words.textContent = turn.text;
    else words.replaceChildren(rendered(turn.text));
    const speaker = element("span", { className: "unseen", textContent: visitor ? "You:" : `${this.persona.name}:` });
    const item = element("li", { className: `turn ${turn.role}`, tabIndex: -1 }, speaker, words);
    if (turn.growing) {
      item.ariaBusy = "true";
      return item;
    }
    if (turn.fault) item.append(element("p", { className: "fault", textContent: faultLine(turn) }));
    else if (turn.stopped && !turn.text) item.append(element("p", { className: "small", textContent: "Stopped." }));
    if (!visitor && at === this.story.turns.length - 1) item.append(...this.offered(turn));
    const foot = element("div", { className: "foot" });
    if (turn.origin) foot.append(provenance(turn));
    if (at >= 0) foot.append(this.tools(turn, at, item, words));
    item.append(foot);
    return item;
  }

  // What the last reply offers, as buttons that say it in the visitor's words.
  offered(turn) {
    const found = turn.fault || turn.stopped || turn.origin?.source !== "model" ? [] : choices(turn.text);
    if (found.length === 0) return [];
    const options = element("div", { className: "options", role: "group", ariaLabel: "What to do next" });
    for (const choice of found) {
      options.append(button(choice[0].toUpperCase() + choice.slice(1), () => this.send(asMove(choice))));
    }
    return [options];
  }

  tools(turn, at, item, words) {
    const tools = element("div", { className: "tools" });
    const add = (label, title, onclick) => tools.append(button(label, onclick, { className: "plain", title }));
    if (turn.text) add("Copy", "Copy this text", () => this.copy(turn.text));
    if (turn.role === "user") add("Edit", "Change this and go on from here", () => this.editor(turn, at, item, words));
    else if (at === this.story.turns.length - 1) {
      if (unanswered(turn)) add("Try again", "Ask again", () => this.regenerate());
      else add("Regenerate", "Have the model answer anew", () => this.regenerate());
    }
    return tools;
  }

  editor(turn, at, item, words) {
    const box = element("textarea", { value: turn.text, rows: 3, ariaLabel: "Change what you said" });
    const send = () => box.value.trim() && this.edit(at, box.value.trim());
    const cancel = () => {
      const restored = this.item(turn, at);
      item.replaceWith(restored);
      restored.querySelector(".tools button:last-child").focus();
    };
    box.onkeydown = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation(); // it would stop a growing answer
        cancel();
      }
      if (entered(event)) {
        event.preventDefault();
        send();
      }
    };
    const options = element("div", { className: "options" });
    options.append(button("Send again", send, { className: "main" }), button("Cancel", cancel));
    words.replaceChildren(box, options);
    item.querySelector(".foot").remove();
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

// Enter sends, with Shift it starts a new line; while a word is composed it ends that word.
export function entered(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

function unanswered({ text, fault }) {
  return Boolean(fault) || !text;
}

function faultLine({ text, fault }) {
  return text ? `The answer breaks off: ${fault}.` : `No answer: ${fault}.`;
}

// Where the answer came from, in a line that opens to every figure.
function provenance(turn) {
  const summary = element("summary", { textContent: headline(turn) });
  const list = element("dl");
  for (const [term, said] of facts(turn)) {
    list.append(element("dt", { textContent: term }), element("dd", { textContent: said }));
  }
  return element("details", { className: `origin ${turn.origin.source}` }, summary, list);
}
