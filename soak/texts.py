"""Sentences that are alike enough for a tiny model to learn from, and different enough to tell apart."""


def chapters(count: int) -> list[str]:
    """Write twelve documents of two lines about each of `count` chapters."""
    return [
        f"Chapter {number}. The {noun} of the {place} was {adjective}, and {number} people saw it.\nThen it went away."
        for number in range(1, count + 1)
        for noun in ("wife", "dog", "clock")
        for place in ("mill", "harbour")
        for adjective in ("old", "green")
    ]
