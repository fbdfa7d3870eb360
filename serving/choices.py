"""The choices that a reply ends in, read from its last sentence; `web/choices.js` reads them the same way."""

import re

MOST = 4
LONGEST = 120
"""Characters of a choice; what is longer is a sentence that happens to hold an "or"."""
ASKED = re.compile(
    r"^(?:or )?(?:do|will|shall|would|could|might|can|should) you (?:(?:rather|prefer to|like to|first|now) )*",
    re.IGNORECASE,
)
"""How the question begins."""
AGAIN = re.compile(r"^(?:(?:do|will|shall|would) you )?(?:(?:rather|like to|to) )?", re.IGNORECASE)
"""How a choice of it may."""
OTHERS = re.compile(
    r"^(?:do|does|did|is|are|was|will|would|shall|should|has|have|what|who|where|why|how)\b", re.IGNORECASE
)
"""What begins no choice, but another question."""
MINE = (
    (r"\byourself\b", "myself"),
    (r"\byours\b", "mine"),
    (r"\byour\b", "my"),
    (r"\byou are\b", "I am"),
    (r"\byou (?=will|would|can|could|have|had|know|saw|heard|found)", "I "),
    (r"\byou\b", "me"),
)


def choices(reply: str) -> list[str]:
    """What the visitor may do, as the reply words it: "take the lamp"; none unless its last sentence asks for two."""
    last = re.split(r"(?<=[.!?])[\"”']?\s+", reply.strip())[-1]
    asked = ASKED.match(last)
    if asked is None or not last.endswith("?") or " or " not in last:
        return []
    said = last[asked.end() : -1]
    cut = re.search(r",? or (?!.* or )", said)
    if cut is None:
        return []
    head, tail = said[: cut.start()], said[cut.end() :]
    parts = [AGAIN.sub("", part.strip()) for part in [*(head.split(", ") if cut[0][0] == "," else [head]), tail]]
    fits = 2 <= len(parts) <= MOST and all(0 < len(part) <= LONGEST and not OTHERS.match(part) for part in parts)
    return parts if fits else []


def as_move(choice: str) -> str:
    """A choice in the visitor's own words: "put it in your bag" is "I put it in my bag"."""
    move = f"I {choice}"
    for yours, mine in MINE:
        move = re.sub(yours, mine, move)
    return move
