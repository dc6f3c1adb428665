"""Format external text (file names, class names) and numbers for a page."""

import unicodedata

from regraft.display import cut_middle

BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they reorder the surrounding text
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"


def visible(text: str) -> str:
    r"""Return `text` with control characters and invalid UTF-8 bytes as escapes.

    HTML is escaped by the templates, not here.

    >>> print(visible("one\ntwo \udcff"))
    one\ntwo \xff
    """
    return text if text.isprintable() else "".join(map(_visible_character, text))


def shorten(text: str, limit: int) -> str:
    """Replace the middle of a text that is longer than `limit` characters.

    >>> shorten("Staffordshire bullterrier", 12)
    'Staffo…rrier'
    """
    return cut_middle(visible(text), limit)


def percent(share: float) -> str:
    """Format a share in percent, with one decimal."""
    return f"{100 * share:.1f}{NO_BREAK_SPACE}%"


def number(value: float) -> str:
    """Format a number with four significant digits."""
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Format a duration in seconds with suitable precision.

    >>> duration(0.0312), duration(75.2), duration(7325)
    ('0.03 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _visible_character(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python represents a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cs") or character in BIDI_CONTROLS:
        return character.encode("unicode_escape").decode("ascii")
    return character
