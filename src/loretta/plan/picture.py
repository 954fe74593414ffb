"""A tensor train as a picture: one box per core with its mode, the ranks on the lines between, the cut dashed."""

from xml.sax.saxutils import quoteattr

from loretta.tt import TTShape

_BOX, _GAP, _HEIGHT = 46, 34, 74


def train_svg(shape: TTShape, caption: str) -> str:
    """Inline SVG of one train, as wide as it has cores; ``caption`` (any text) becomes its accessible name.

    Boxes left of the dashed line spell the input, those right of it the output; where the boundary cuts a mode the
    line runs through its box and the two parts stand in it.
    """
    width = len(shape.modes) * (_BOX + _GAP) + _GAP
    parts = [
        f'<svg class="train" viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}" role="img" '
        f"aria-label={quoteattr(f'{caption}: {shape}')}>",
    ]
    for k, mode in enumerate(shape.modes):
        left = _GAP + k * (_BOX + _GAP)
        is_cut = not shape.aligned and k == shape.n_in
        side = "input" if k < shape.n_in else "cut" if is_cut else "output"
        label = f"{shape.split}·{mode // shape.split}" if is_cut else str(mode)
        parts.append(f'<rect class="{side}" x="{left}" y="22" width="{_BOX}" height="34" rx="5"/>')
        parts.append(f'<text x="{left + _BOX / 2:g}" y="44" text-anchor="middle">{label}</text>')
        if k:
            parts.append(f'<line class="rank" x1="{left - _GAP}" y1="39" x2="{left}" y2="39"/>')
            parts.append(
                f'<text class="rank" x="{left - _GAP / 2:g}" y="34" text-anchor="middle">{shape.ranks[k]}</text>'
            )
    cut = _GAP + shape.n_in * (_BOX + _GAP) + (_BOX / 2 if not shape.aligned else -_GAP / 2)
    # in two pieces, so that the rank or the two parts of a mode stay readable between them
    for top, bottom in ((4, 20), (58, 72)):
        parts.append(f'<line class="boundary" x1="{cut:g}" y1="{top}" x2="{cut:g}" y2="{bottom}"/>')
    parts.append("</svg>")
    return "".join(parts)
