"""The forms in which texts are compared: as guards read them, and as exact matches know them."""

import re
import unicodedata

ALPHANUMERIC = re.compile(r"[^\W_]+")


def lowered(text: str) -> str:
    """The form in which guards read a text."""
    return text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def normalise(text: str) -> str:
    """The form in which two texts are exactly the same question: case, punctuation and spacing do not count."""
    folded = lowered(unicodedata.normalize("NFKC", text)).replace("'", "")
    return " ".join(ALPHANUMERIC.findall(folded))
