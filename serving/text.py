"""The forms in which texts are compared: as guards read them, and as exact matches know them."""

import unicodedata


def lowered(text: str) -> str:
    """The form in which guards read a text."""
    return text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def normalise(text: str) -> str:
    """The form in which two texts are exactly the same question: case, punctuation and spacing do not count."""
    folded = lowered(unicodedata.normalize("NFKC", text)).replace("'", "")
    return " ".join("".join(letter if letter.isalnum() else " " for letter in folded).split())
