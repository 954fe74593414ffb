"""Small texts whose words tell their label."""

GOOD, BAD = ("good", "great", "fine", "lovely"), ("bad", "awful", "poor", "dull")
WORDS = (*GOOD, *BAD, "a", "film", "plot", "cast", "with", "very", "the", "and", "was", "is")


def sentences(rows: int):
    """(text, label) with words that tell the label, all texts distinct."""
    fillers = [f"{a} {b} {c}" for a in WORDS[8:] for b in WORDS[8:] for c in WORDS[8:]]
    for k in range(rows):
        words, label = (GOOD, "pos") if k % 2 else (BAD, "neg")
        yield f"{fillers[k]} {words[k % 4]} {words[(k + 1) % 4]}", label
