// The page: wires the stories, the prologue, the chat and the server together.
import { Chat, entered } from "/web/chat.js";
import { asMarkdown, Conversations } from "/web/conversations.js";
import { button, element } from "/web/element.js";
import { offered, Prologue } from "/web/prologue.js";
import { prologue, untilReady } from "/web/server.js";
import { Sound } from "/web/sound.js";

const part = (id) => document.getElementById(id);
const say = (text) => {
  part("status").textContent = text;
};
const spoken = (text) => {
  part("spoken").textContent = text;
};

const stories = new Conversations();
const sound = new Sound();
let story = null;
let road = null;
let busy = false;

const chat = new Chat(part("turns"), part("scroll"), {
  keep,
  say,
  spoken,
  choices: ({ choices }) => (road ? offered(road, choices) : choices),
  busy: (whether) => {
    busy = whether;
    part("send").textContent = busy ? "Stop" : "Send";
    part("send").classList.toggle("main", !busy);
  },
});

const opening = new Prologue(part("prologue"), {
  spoken,
  changed: (choices) => {
    story.choices = choices;
    keep(story);
  },
  entered: () => {
    enter();
    part("message").focus();
  },
});

function keep(changed) {
  try {
    stories.keep(changed);
  } catch (fault) {
    say(`This browser keeps no more stories (${fault.message}). Export this one, or delete others.`);
  }
  list();
}

function open(chosen) {
  story = chosen;
  opening.hide();
  chat.show(story);
  if (road) opening.show(road, story.choices, story.entered);
  if (!story.entered) part("scroll").scrollTop = 0;
  say("");
  list();
}

function enter() {
  if (story.entered) return;
  story.entered = true;
  if (road) opening.enter();
  chat.draw();
  keep(story);
}

function list() {
  const items = stories.all().map((one) => {
    const current = one.id === story.id;
    const choose = button(one.title, () => turnTo(current ? story : one));
    const remove = button("×", () => discard(one), { className: "plain", ariaLabel: `Delete ${one.title}` });
    return element("li", { ariaCurrent: current ? "true" : null }, choose, remove);
  });
  const focused = [...part("stories").querySelectorAll("button")].indexOf(document.activeElement);
  part("stories").replaceChildren(...items);
  part("stories").querySelectorAll("button")[focused]?.focus();
}

// From the shelf to a story, with the keyboard's focus.
function turnTo(chosen) {
  if (chosen !== story) open(chosen);
  closeShelf();
  part("scroll").focus();
}

function discard(one) {
  if (!confirm(`Delete “${one.title}”?`)) return;
  stories.remove(one.id);
  if (one.id === story.id) open(stories.all()[0] ?? stories.begin());
  else list();
  part("new-story").focus();
}

function openShelf() {
  part("shelf").classList.add("open");
  part("shelf-toggle").ariaExpanded = "true";
  part("new-story").focus();
}

function closeShelf() {
  if (!part("shelf").classList.contains("open")) return;
  part("shelf").classList.remove("open");
  part("shelf-toggle").ariaExpanded = "false";
  part("shelf-toggle").focus();
}

function send() {
  const text = part("message").value.trim();
  if (!text || busy) return;
  part("message").value = "";
  enter();
  chat.send(text);
}

part("ask").onsubmit = (event) => {
  event.preventDefault();
  if (busy) chat.stop();
  else send();
};
part("message").onkeydown = (event) => {
  if (!entered(event)) return;
  event.preventDefault();
  send();
};
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  chat.stop();
  closeShelf();
});
part("new-story").onclick = () => turnTo(stories.begin());
part("shelf-toggle").onclick = () => (part("shelf").classList.contains("open") ? closeShelf() : openShelf());
document.querySelector("main").addEventListener("pointerdown", closeShelf);
part("export").onclick = () => {
  const href = URL.createObjectURL(new Blob([asMarkdown(story)], { type: "text/markdown" }));
  element("a", { href, download: `emerald-${story.id}.md` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
};
part("sound").onclick = () => {
  sound.toggle();
  part("sound").ariaPressed = String(sound.on);
};
addEventListener("storage", ({ key }) => {
  // another page of ours kept or deleted a story
  const kept = key?.endsWith(story.id) && stories.all().find(({ id }) => id === story.id);
  if (kept && !busy && !part("turns").querySelector("textarea")) open(kept);
  else list();
});
addEventListener("pagehide", () => story.turns.at(-1)?.growing && keep(story)); // as far as it was told

// The bar is the server's own progress; it is not shown at all if the model is ready.
async function load() {
  let waited = false;
  const state = await untilReady(({ status, progress }) => {
    if (status === "ready") return;
    waited = true;
    part("loading").hidden = false;
    part("progress").value = progress;
    part("loading-text").textContent =
      status === "unreachable"
        ? "The server cannot be reached."
        : `The storyteller is waking: ${Math.round(100 * progress)} %. Common questions are answered already.`;
  });
  if (state.status === "ready") {
    part("loading").hidden = true;
    if (waited) say(story.entered ? "The storyteller is awake." : "The storyteller is awake; walk on at your leisure.");
  } else {
    part("progress").hidden = true;
    part("loading").classList.add("fault");
    part("loading-text").textContent = `No stories today: ${state.status}.`;
  }
}

async function begin() {
  open(stories.all()[0] ?? stories.begin());
  load();
  try {
    const told = await prologue();
    road = told.prologue;
    chat.persona = told.persona;
    part("model").textContent = told.model;
    part("badge").textContent = told.badge;
    document.title = told.persona.name;
    document.querySelector("h1").textContent = told.persona.name;
    if (!busy) chat.draw();
    opening.show(road, story.choices, story.entered);
  } catch (fault) {
    say(fault.message);
  }
}

begin();
