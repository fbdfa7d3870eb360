// Stories in this browser: each under a key of its own, so that two open pages do not overwrite each other's.
//
// A story is {id, title, created, choices, entered, turns}. A turn is {role, text} and, for an answer, {origin, figures,
// stopped, fault}, or {growing} while it is under way; choices are the prologue's, by scene; entered says that the
// prologue is behind the visitor.
import { headline } from "/web/origin.js";

const PREFIX = "emerald.story.";
const TITLE_LENGTH = 48;

export class FullError extends Error {}

export class Conversations {
  constructor() {
    this.unkept = new Map(); // what the browser would not store
    this.removed = new Set(); // an answer that ends after its story was deleted must not bring it back
  }

  begin() {
    const now = Date.now();
    const id = `${now.toString(36)}-${Math.floor(Math.random() * 1e9).toString(36)}`;
    return { id, title: "New story", created: now, choices: {}, entered: false, turns: [] };
  }

  // Newest first; what cannot be read is left alone and left out.
  all() {
    const stories = new Map(this.unkept);
    for (const key of keys()) {
      const story = parsed(localStorage.getItem(key));
      if (story) stories.set(story.id, story);
    }
    return [...stories.values()].sort((one, other) => other.created - one.created);
  }

  // Throws FullError if the browser refuses; the story then stays with this page until it is closed.
  keep(story) {
    if (this.removed.has(story.id)) return;
    const asked = story.turns.find((turn) => turn.role === "user");
    if (asked) story.title = asked.text.replace(/\s+/g, " ").slice(0, TITLE_LENGTH);
    try {
      localStorage.setItem(PREFIX + story.id, JSON.stringify(story));
      this.unkept.delete(story.id);
    } catch (fault) {
      this.unkept.set(story.id, story);
      throw new FullError(fault.message);
    }
  }

  remove(id) {
    this.removed.add(id);
    this.unkept.delete(id);
    try {
      localStorage.removeItem(PREFIX + id);
    } catch {
      // storage is blocked: there was nothing to remove
    }
  }
}

// A story as Markdown, with the origin of every answer.
export function asMarkdown(story) {
  const parts = [`# ${story.title}`];
  for (const turn of story.turns) {
    if (turn.text) parts.push(turn.role === "user" ? `**You:** ${turn.text}` : turn.text);
    if (turn.fault) parts.push(`*No answer: ${turn.fault}*`);
    if (turn.origin) parts.push(`*${headline(turn)}*`);
  }
  return parts.join("\n\n") + "\n";
}

function keys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    return [];
  }
}

function parsed(text) {
  try {
    const story = JSON.parse(text);
    return typeof story.id === "string" && Array.isArray(story.turns) ? story : null;
  } catch {
    return null;
  }
}
