"""Tables: one that lines up in a terminal, and the same for a notebook."""

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]  # the head first; the first column is text, the others numbers


def text(rows: Rows) -> str:
    """Aligned columns.

    Example:
        >>> print(text([("layer", "loss"), ("fc", "1.25")]))
        layer  loss
        fc     1.25
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    )


def html(rows: Rows) -> str:
    """An HTML table.

    Example:
        >>> html([("layer",), ("fc",)])
        '<table><tr><th>layer</th></tr><tr><td>fc</td></tr></table>'
    """
    head, *body = rows
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><tr>{cells}</tr>{lines}</table>"
