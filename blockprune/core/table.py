"""Results that print as an aligned table in a terminal and render as an HTML table in a notebook."""

from collections.abc import Sequence
from html import escape
from typing import ClassVar

Rows = Sequence[Sequence[str]]  # rows of cells; the first row is the header


class Table:
    """A result that prints as aligned columns in a terminal and renders as a table in a notebook.

    Example:
        >>> class Losses(Table):
        ...     verdict = "Pruning fc raises the loss most."
        ...
        ...     def table(self):
        ...         return [("layer", "loss"), ("fc", "1.25")]
        >>> Losses()
        layer  loss
        fc     1.25
        Pruning fc raises the loss most.
    """

    __slots__ = ()
    TEXT_COLUMNS: ClassVar[int] = 1  # the first columns are text and align left; the others are numbers and align right
    HAS_TOTAL: ClassVar[bool] = False  # whether the last row holds totals

    def table(self) -> Rows:
        """Rows of cells; the first row is the header."""
        raise NotImplementedError

    @property
    def verdict(self) -> str:
        """A sentence that is shown below the table, or an empty string."""
        return ""

    def __repr__(self) -> str:
        columns = []
        for i, column in enumerate(zip(*self.table(), strict=True)):
            alignment, width = "<" if i < self.TEXT_COLUMNS else ">", max(map(len, column))
            columns.append([f"{cell:{alignment}{width}}" for cell in column])
        lines = ["  ".join(row) for row in zip(*columns, strict=True)]
        if self.HAS_TOTAL:
            rule = "-" * len(lines[0])
            lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        return "\n".join([*lines, *filter(None, [self.verdict])])

    def _repr_html_(self) -> str:
        header, *body = self.table()
        tags = ["th", *("td" for _ in body)]
        if self.HAS_TOTAL:
            tags[-1] = "th"
        rows = "".join(self._html_row(tag, row) for tag, row in zip(tags, [header, *body], strict=True))
        return f"<table>{rows}</table>" + (f"<p>{escape(self.verdict)}</p>" if self.verdict else "")

    def _html_row(self, tag: str, row: Sequence[str]) -> str:
        alignments = ["left" if i < self.TEXT_COLUMNS else "right" for i in range(len(row))]
        cells = (f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for side, cell in zip(alignments, row, strict=True))
        return f"<tr>{''.join(cells)}</tr>"
