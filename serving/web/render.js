// Markdown that a model wrote, as a document fragment in which nothing runs, loads or submits.
import { element } from "/web/element.js";
import DOMPurify from "/web/vendor/purify.es.mjs";
import { marked } from "/web/vendor/marked.esm.js";

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["start"], // a number, to which that expression would be applied too
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

marked.use({
  breaks: true,
  renderer: {
    // A tag that a model writes is text to be read, not a part of this page.
    html: ({ text }) => escaped(text),
    image: ({ text, href }) => escaped(`[image: ${text || href}]`),
    // The page's own headings are h1 and h2.
    heading({ tokens, depth }) {
      const level = Math.min(depth + 2, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

export function rendered(markdown) {
  try {
    return DOMPurify.sanitize(marked.parse(markdown), ALLOWED);
  } catch (fault) {
    // Thousands of nested quotes exhaust the parser's stack: such a text is shown as it came.
    console.warn("shown as plain text:", fault.message);
    return element("p", { className: "plain-text", textContent: markdown });
  }
}

function escaped(text) {
  const signs = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
  return text.replace(/[&<>"]/g, (sign) => signs[sign]);
}
