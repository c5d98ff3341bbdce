"""Checks a sentence against what its prompt demands, and says what is missing."""

from __future__ import annotations


def verify(problem, completion):
    """1 for one sentence of at most 12 words that has both words and no comma."""
    text = completion.strip()
    missing = [word for word in problem.data["words"] if word not in text.lower()]
    if missing:
        return 0.0, f"The word {' and the word '.join(missing)} is missing."
    if text.count(".") != 1 or not text.endswith("."):
        return 0.0, "This is not one sentence that ends with a full stop."
    if len(text.split()) > 12:
        return 0.0, f"It has {len(text.split())} words; at most 12 are allowed."
    if "," in text:
        return 0.0, "There is a comma in it."
    return 1.0
