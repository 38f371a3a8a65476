"""Tables: one that lines up in a terminal, and the same for a notebook."""

from collections.abc import Sequence
from html import escape
from typing import ClassVar

Rows = Sequence[Sequence[str]]  # the head first


class Table:
    """A result that prints as aligned columns in a terminal and renders as a table in a notebook.

    Example:
        >>> class Losses(Table):
        ...     verdict = "fc hurts."
        ...
        ...     def table(self):
        ...         return [("layer", "loss"), ("fc", "1.25")]
        >>> Losses()
        layer  loss
        fc     1.25
        fc hurts.
    """

    __slots__ = ()
    LEFT: ClassVar[int] = 1  # so many columns are text, the others numbers
    TOTAL: ClassVar[bool] = False  # the last row sums up

    def table(self) -> Rows:
        """The cells, the head first."""
        raise NotImplementedError

    @property
    def verdict(self) -> str:
        """What follows from it, if anything."""
        return ""

    def __repr__(self) -> str:
        rows = self.table()
        columns = []
        for i, column in enumerate(zip(*rows, strict=True)):
            side = "<" if i < self.LEFT else ">"
            columns.append([f"{cell:{side}{max(map(len, column))}}" for cell in column])
        lines = ["  ".join(row) for row in zip(*columns, strict=True)]
        if self.TOTAL:
            rule = "-" * len(lines[0])
            lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        return "\n".join([*lines, *filter(None, [self.verdict])])

    def _repr_html_(self) -> str:
        head, *body = self.table()
        tags = ["th", *("td" for _ in body)]
        if self.TOTAL:
            tags[-1] = "th"
        lines = "".join(self._line(tag, row) for tag, row in zip(tags, [head, *body], strict=True))
        return f"<table>{lines}</table>" + (f"<p>{escape(self.verdict)}</p>" if self.verdict else "")

    def _line(self, tag: str, row: Sequence[str]) -> str:
        sides = ["left" if i < self.LEFT else "right" for i in range(len(row))]
        cells = (f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for side, cell in zip(sides, row, strict=True))
        return f"<tr>{''.join(cells)}</tr>"
