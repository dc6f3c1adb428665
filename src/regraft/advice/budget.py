"""A time budget, as a person writes it."""

import math
import re

from regraft.errors import ConfigError
from regraft.wording import option

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_budget(budget: str | float | None) -> float | None:
    """Return the seconds of a budget; None for no limit.

    Raises:
        ConfigError: It is not a positive time.

    >>> parse_budget("10m"), parse_budget("1.5h"), parse_budget(30), parse_budget(None)
    (600.0, 5400.0, 30.0, None)
    """
    if budget is None:
        return None
    if isinstance(budget, str):
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(s|m|min|h|)", budget.strip())
        seconds = float(match[1]) * UNITS[match[2]] if match else 0.0
    else:
        seconds = float(budget)
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{option('budget')} is '{budget}', expected a time as in 90s, 10m or 2h.")
    return seconds
