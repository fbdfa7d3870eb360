// The page: wires the stories, the prologue, the chat and the server together.
import { Chat, described } from "/web/chat.js";
import { asMarkdown, Conversations } from "/web/conversations.js";
import { Prologue } from "/web/prologue.js";
import { prologue, untilReady } from "/web/server.js";
import { Sound } from "/web/sound.js";

const part = (id) => document.getElementById(id);
const say = (text) => {
  part("status").textContent = text;
};

const stories = new Conversations();
const sound = new Sound();
let story = null;
let road = null;

const chat = new Chat(part("turns"), part("scroll"), {
  keep,
  say,
  spoken: (text) => {
    part("spoken").textContent = text;
  },
  busy: (whether) => {
    part("stop").hidden = !whether;
    part("send").disabled = whether;
  },
});

const opening = new Prologue(part("prologue"), {
  changed: (choices) => {
    story.choices = choices;
    keep(story);
  },
  entered: () => enter(),
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
  if (!story.entered && road) opening.show(road, story.choices);
  list();
}

function enter() {
  if (story.entered) return;
  story.entered = true;
  opening.hide();
  chat.draw();
  keep(story);
  part("message").focus();
}

function list() {
  const items = stories.all().map((one) => {
    const item = document.createElement("li");
    const choose = button(one.title, () => {
      open(one.id === story.id ? story : one);
      closeShelf();
    });
    const remove = button("×", () => {
      if (!confirm(`Delete “${one.title}”?`)) return;
      stories.remove(one.id);
      if (one.id === story.id) open(stories.all()[0] ?? stories.begin());
      else list();
    });
    remove.ariaLabel = `Delete ${one.title}`;
    remove.className = "plain";
    if (one.id === story.id) item.ariaCurrent = "true";
    item.append(choose, remove);
    return item;
  });
  part("stories").replaceChildren(...items);
}

function button(textContent, onclick) {
  return Object.assign(document.createElement("button"), { type: "button", textContent, onclick });
}

function closeShelf() {
  part("shelf").classList.remove("open");
  part("shelf-toggle").ariaExpanded = "false";
}

function send() {
  const text = part("message").value.trim();
  if (!text || part("send").disabled) return;
  part("message").value = "";
  enter();
  chat.send(text);
}

part("ask").onsubmit = (event) => {
  event.preventDefault();
  send();
};
part("message").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
};
part("stop").onclick = () => chat.stop();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") chat.stop();
});
part("new-story").onclick = () => {
  open(stories.begin());
  closeShelf();
};
part("shelf-toggle").onclick = () => {
  const opened = part("shelf").classList.toggle("open");
  part("shelf-toggle").ariaExpanded = String(opened);
};
part("export").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([asMarkdown(story, described)], { type: "text/markdown" }));
  link.download = `emerald-${story.id}.md`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
part("sound").onclick = () => {
  sound.toggle();
  part("sound").ariaPressed = String(sound.on);
};
part("theme").onclick = () => {
  const shown = document.documentElement.dataset.theme;
  const dark = shown ? shown === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  setTheme(dark ? "light" : "dark"); // of theme.js
  try {
    localStorage.setItem(THEME, dark ? "light" : "dark");
  } catch {
    say("This browser does not keep the choice.");
  }
};
addEventListener("storage", list); // another page of ours kept or deleted a story
addEventListener("pagehide", () => story.turns.at(-1)?.growing && keep(story));

async function load() {
  part("loading").hidden = false;
  const state = await untilReady(({ status, progress }) => {
    part("progress").value = progress;
    part("loading-text").textContent =
      status === "unreachable" ? "The server cannot be reached" : `The storyteller is waking: ${Math.round(100 * progress)} %`;
  });
  if (state.status === "ready") {
    part("loading").hidden = true;
    if (!part("prologue").hidden) say("The storyteller is awake. Walk on, or enter the city when you like.");
  } else part("loading-text").textContent = state.status;
}

async function begin() {
  open(stories.all()[0] ?? stories.begin());
  load();
  try {
    const told = await prologue();
    road = told.prologue;
    chat.greeting = told.persona.greeting;
    part("model").textContent = told.model;
    document.title = told.persona.name;
    document.querySelector("h1").textContent = told.persona.name;
    if (story.entered) chat.draw();
    else if (!part("turns").children.length) opening.show(road, story.choices);
  } catch (fault) {
    say(fault.message);
  }
}

begin();
