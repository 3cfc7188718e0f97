"""Tables as text, for terminals."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[object]], words: int | None = None) -> list[str]:
    """Return rows as lines in columns.

    Args:
        rows: Cells by row, all rows of one length.
        words: Columns that begin at the left; those after them end at the right. All unless given.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.ljust if words is None or at < words else str.rjust for at in range(len(widths))]
    return [
        "  ".join(
            side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)
        ).rstrip()
        for row in cells
    ]
