// The road to the city: written scenes that a visitor walks while the model loads, and whose choices shape the story.

const LETTERS_PER_SECOND = 55;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class Prologue {
  // place is the section to write into; changed(choices) hears of every choice, entered() of the end.
  constructor(place, { changed, entered }) {
    this.place = place;
    this.changed = changed;
    this.entered = entered;
  }

  show({ title, scenes }, choices) {
    this.scenes = scenes;
    this.choices = { ...choices };
    this.atOnce = calm.matches;
    this.reached = 0;
    const heading = element("h2", { textContent: title });
    this.road = element("div", { ariaLive: "polite" });
    this.all = element("button", { type: "button", textContent: "Show all", onclick: () => this.showAll() });
    this.enter = element("button", { type: "button", textContent: "Skip the road", onclick: () => this.leave() });
    const tools = element("div", { className: "options" });
    tools.append(this.all, this.enter);
    this.place.replaceChildren(heading, this.road, tools);
    this.place.hidden = false;
    this.next();
    while (this.reached < scenes.length && scenes[this.reached - 1].id in this.choices) this.next();
  }

  showAll() {
    this.atOnce = true;
    this.writing?.finish();
    while (this.reached < this.scenes.length) this.next();
    this.all.hidden = true;
  }

  next() {
    this.writing?.finish();
    const scene = this.scenes[this.reached++];
    const box = element("div", { className: "scene" });
    this.road.append(box);
    const last = this.reached === this.scenes.length;
    this.writing = new Writing(box, scene.text.trim().split(/\n\s*\n/), this.atOnce, () => {
      box.append(this.question(scene));
      if (last) {
        this.all.hidden = true;
        this.enter.textContent = "Enter the city";
        this.enter.className = "main";
      }
    });
    if (this.reached > 1) box.scrollIntoView({ block: "start", behavior: calm.matches ? "auto" : "smooth" });
  }

  question(scene) {
    if (!scene.choices) return "";
    const group = element("fieldset");
    const options = element("div", { className: "options" });
    group.append(element("legend", { textContent: scene.question }), options);
    for (const choice of scene.choices) {
      const button = element("button", { type: "button", textContent: choice.label });
      button.ariaPressed = String(this.choices[scene.id] === choice.id);
      button.onclick = () => {
        for (const other of options.children) other.ariaPressed = String(other === button);
        this.choices[scene.id] = choice.id;
        this.changed({ ...this.choices });
        if (this.scenes[this.reached - 1] === scene && this.reached < this.scenes.length) this.next();
      };
      options.append(button);
    }
    return group;
  }

  leave() {
    this.hide();
    this.entered();
  }

  hide() {
    this.writing?.stop();
    this.place.hidden = true;
    this.place.replaceChildren();
  }
}

// Text that appears letter by letter; all of it is there from the first moment for screen readers and for the layout.
class Writing {
  constructor(box, paragraphs, atOnce, done) {
    this.done = done;
    this.parts = paragraphs.map((text) => {
      const written = document.createTextNode("");
      const unwritten = element("span", { className: "unwritten", textContent: text });
      const paragraph = element("p");
      paragraph.append(written, unwritten);
      box.append(paragraph);
      return { text, written, unwritten };
    });
    box.onclick = () => this.finish();
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

function element(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}
