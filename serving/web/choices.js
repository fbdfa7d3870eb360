// The choices that a reply ends in, read from its last sentence; serving/choices.py reads them the same way.
const MOST = 4;
const LONGEST = 120; // characters of a choice; what is longer is a sentence that happens to hold an "or"
const ASKED = /^(?:or )?(?:do|will|shall|would|could|might|can|should) you (?:(?:rather|prefer to|like to|first|now) )*/i;
const AGAIN = /^(?:(?:do|will|shall|would) you )?(?:(?:rather|like to|to) )?/i;
const OTHERS = /^(?:do|does|did|is|are|was|will|would|shall|should|has|have|what|who|where|why|how)\b/i;
const MINE = [
  [/\byourself\b/g, "myself"],
  [/\byours\b/g, "mine"],
  [/\byour\b/g, "my"],
  [/\byou are\b/g, "I am"],
  [/\byou (?=will|would|can|could|have|had|know|saw|heard|found)/g, "I "],
  [/\byou\b/g, "me"],
];

// What the visitor may do, as the reply words it; none unless its last sentence asks for two things or more.
export function choices(reply) {
  const last = reply.trim().split(/(?<=[.!?])["”']?\s+/).at(-1);
  const asked = ASKED.exec(last);
  if (!asked || !last.endsWith("?") || !last.includes(" or ")) return [];
  const said = last.slice(asked[0].length, -1);
  const cut = /,? or (?!.* or )/.exec(said);
  if (!cut) return [];
  const head = said.slice(0, cut.index);
  const parts = [...(cut[0].startsWith(",") ? head.split(", ") : [head]), said.slice(cut.index + cut[0].length)];
  const offered = parts.map((part) => part.trim().replace(AGAIN, ""));
  const fits = (part) => part.length > 0 && part.length <= LONGEST && !OTHERS.test(part);
  return offered.length >= 2 && offered.length <= MOST && offered.every(fits) ? offered : [];
}

// A choice in the visitor's own words: "put it in your bag" is "I put it in my bag".
export function asMove(choice) {
  return MINE.reduce((move, [yours, mine]) => move.replace(yours, mine), `I ${choice}`);
}
