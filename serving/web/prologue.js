// The road to the story: written scenes that a visitor walks while the model loads, and whose choices shape the story.
//
// Once the story has begun the road folds up above it; whoever opens it again may read it, change a choice or walk on.
import { button, element } from "/web/element.js";

const LETTERS_PER_SECOND = 55;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

// The choices that this prologue still offers: a kept story may be older than the author's last change.
export function offered({ scenes }, choices) {
  const known = ({ id, choices: options = [] }) => options.some((option) => option.id === choices[id]);
  return Object.fromEntries(scenes.filter(known).map(({ id }) => [id, choices[id]]));
}

export class Prologue {
  // hooks: changed(choices) hears of every choice, entered() of the end, spoken(text) tells a screen reader.
  constructor(place, hooks) {
    this.place = place;
    this.hooks = hooks;
  }

  show({ title, scenes }, choices, entered) {
    this.writing?.stop();
    this.scenes = scenes;
    this.choices = offered({ scenes }, choices);
    this.reached = 0;
    this.taken = element("span", { className: "taken" });
    this.road = element("div", { className: "road" });
    this.all = button("Show all", () => this.showAll());
    this.leave = button("Skip the prologue", () => this.hooks.entered());
    this.tools = element("div", { className: "options" }, this.all, this.leave);
    this.fold = element(
      "details", { open: true },
      element("summary", {}, element("h2", { textContent: title }), this.taken),
      this.road, this.tools,
    );
    this.place.replaceChildren(this.fold);
    this.place.hidden = false;
    this.next();
    while (this.reached < scenes.length && scenes[this.reached - 1].id in this.choices) this.next();
    this.tell();
    if (entered) this.enter();
  }

  // The story begins: the road folds up.
  enter() {
    this.writing?.finish();
    this.tools.remove();
    this.fold.open = false;
    this.place.classList.add("behind");
  }

  hide() {
    this.writing?.stop();
    this.place.classList.remove("behind");
    this.place.hidden = true;
    this.place.replaceChildren();
  }

  showAll() {
    while (this.reached < this.scenes.length) this.next({ atOnce: true });
    this.writing.finish();
    this.all.hidden = true;
    this.leave.focus({ preventScroll: true });
  }

  next({ atOnce = calm.matches } = {}) {
    this.writing?.finish();
    const scene = this.scenes[this.reached++];
    const box = element("div", { className: "scene" });
    this.road.append(box);
    const last = this.reached === this.scenes.length;
    this.writing = new Writing(box, scene.text.trim().split(/\n\s*\n/), atOnce, () => {
      if (scene.choices) box.append(this.question(scene));
      if (last) this.atTheEnd();
    });
    return box;
  }

  atTheEnd() {
    this.all.hidden = true;
    this.leave.textContent = "Begin the story";
    this.leave.className = "main";
  }

  // The visitor chose, and the road goes on; a screen reader hears the next scene whole.
  walkOn() {
    const box = this.next();
    const { text, question } = this.scenes[this.reached - 1];
    this.hooks.spoken(question ? `${text} ${question}` : text);
    box.scrollIntoView({ block: "start", behavior: calm.matches ? "auto" : "smooth" });
  }

  question(scene) {
    const options = element("div", { className: "options" });
    for (const choice of scene.choices) {
      const option = button(choice.label, () => {
        for (const other of options.children) other.ariaPressed = String(other === option);
        this.choices[scene.id] = choice.id;
        this.tell();
        this.hooks.changed({ ...this.choices });
        if (this.scenes[this.reached - 1] === scene && this.reached < this.scenes.length) this.walkOn();
      });
      option.ariaPressed = String(this.choices[scene.id] === choice.id);
      options.append(option);
    }
    return element("fieldset", {}, element("legend", { textContent: scene.question }), options);
  }

  tell() {
    const chosen = (scene) => scene.choices?.find((choice) => choice.id === this.choices[scene.id]);
    this.taken.textContent = this.scenes.map(chosen).filter(Boolean).map((choice) => choice.label).join(" · ");
  }
}

// Text that appears letter by letter; all of it is there from the first moment for screen readers and for the layout.
class Writing {
  constructor(box, paragraphs, atOnce, done) {
    this.done = done;
    this.parts = paragraphs.map((text) => {
      const written = document.createTextNode("");
      const unwritten = element("span", { className: "unwritten", textContent: text });
      box.append(element("p", {}, written, unwritten));
      return { text, written, unwritten };
    });
    box.addEventListener("click", () => this.finish());
    if (atOnce) this.finish();
    else this.frame = requestAnimationFrame((start) => this.write(start, start));
  }

  write(start, now) {
    let letters = Math.floor(((now - start) / 1000) * LETTERS_PER_SECOND);
    let whole = true;
    for (const part of this.parts) {
      const shown = Math.max(0, Math.min(part.text.length, letters));
      part.written.data = part.text.slice(0, shown);
      part.unwritten.textContent = part.text.slice(shown);
      letters -= part.text.length;
      whole &&= shown === part.text.length;
    }
    if (whole) this.finish();
    else this.frame = requestAnimationFrame((later) => this.write(start, later));
  }

  finish() {
    if (this.finished) return;
    this.stop();
    for (const part of this.parts) {
      part.written.data = part.text;
      part.unwritten.remove();
    }
    this.done();
  }

  stop() {
    this.finished = true;
    cancelAnimationFrame(this.frame);
  }
}
