"""How values show themselves in a session: a few lines of text, or a table in a notebook."""

import textwrap
from collections.abc import Iterable, Sequence
from html import escape

WIDTH = 80  # columns of a terminal
MAX_LINES = 12
MAX_ROW_LINES = 2


def block(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return a title with labelled rows below it, in at most 12 lines of 80 columns; rows without a text are left out.

    >>> print(block("Report: good", [("count", "3"), ("names", "")]))
    Report: good
      count  3
    """
    kept = [(label, printable(text)) for label, text in rows if text]
    column = max((len(label) for label, _ in kept), default=0) + 4
    lines = textwrap.wrap(printable(title), WIDTH, subsequent_indent="  ", max_lines=MAX_ROW_LINES, placeholder=" …")
    for label, text in kept:
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=f"  {label}".ljust(column),
            subsequent_indent=" " * column,
            max_lines=MAX_ROW_LINES,
            placeholder=" …",
        )
    return "\n".join(lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "  …"])


def table_html(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """Return a title, a table and lines below it as HTML; every text is escaped."""
    cells = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(cells)}</tbody></table>" if cells else ""
    lines = "<br>".join(escape(note) for note in notes if note)
    return f"<p><b>{escape(title)}</b></p>{table}" + (f"<p>{lines}</p>" if lines else "")


def some(names: Iterable[str], count: int = 3) -> str:
    """List the first few names.

    >>> some(["a", "b", "c"], 2)
    'a, b, …'
    """
    known = list(names)
    return f"{', '.join(known[:count])}{', …' if len(known) > count else ''}"


def shortened(rows: Sequence[Sequence[str]], first: int, last: int) -> list[Sequence[str]]:
    """Return the first and the last rows of a table, and between them one that says how many are missing.

    >>> shortened([["1"], ["2"], ["3"], ["4"]], 1, 1)
    [['1'], ['… 2 more'], ['4']]
    """
    if len(rows) <= first + last + 1:
        return list(rows)
    gap = [f"… {len(rows) - first - last} more", *[""] * (len(rows[0]) - 1)]
    return [*rows[:first], gap, *rows[len(rows) - last :]]


def cut_middle(text: str, limit: int) -> str:
    """Replace the middle of a text that is longer than `limit` characters.

    >>> cut_middle("Staffordshire bullterrier", 12)
    'Staffo…rrier'
    """
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[len(text) - (limit - 1) // 2 :]}"


def printable(text: str) -> str:
    r"""Escape characters that would break a line or a terminal: line breaks, control characters, undecodable bytes.

    >>> printable("caf\u00e9\n\udcff")
    'café\\n\\udcff'
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
