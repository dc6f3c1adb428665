"""Take off names what wrappers put on them: parts such as `module.` anywhere, and whole prefixes.

Nothing is decided by a name alone: a rule is kept where more names of the file then are names of the model, with equal
shapes, and is called certain only where no other rule claims the same tensors.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from regraft.checkpoint.matching.load_report import Sureness

WRAPPER_PARTS = (
    "module",
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)  # DataParallel, torch.compile, Lightning's strategies, FSDP
RULES = 8  # prefixes that are tried in a row
CANDIDATES = 12  # prefixes that are tried at a time
PARTS = 40  # of a name that are looked at
HALF = 0.5  # of the names: a prefix that explains fewer is a likely one at most

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Rule:
    """A prefix that is taken off names of the file, and one that is put on.

    Attributes:
        strip: With its dot; empty where nothing is taken off.
        add: With its dot; empty where nothing is put on.
    """

    strip: str
    add: str

    def __str__(self) -> str:
        if self.strip and self.add:
            return f"prefix '{self.strip}' replaced by '{self.add}'"
        return f"prefix '{self.strip}' stripped" if self.strip else f"prefix '{self.add}' added"

    def apply(self, name: str) -> str:
        """Return the name as the model would have it."""
        return self.add + name.removeprefix(self.strip) if name.startswith(self.strip) else name


@dataclass(frozen=True)
class Naming:
    """What the names of a file are in the model.

    Attributes:
        names: Name in the file → name to look for in the model.
        sure: Name in the file → how sure that is, where a rule that is not certain changed it.
        notes: What was taken off or put on.
        rivals: Prefixes that explain the same tensors of the model equally well, where there are such.
        averages: Prefixes of running averages that were left aside.
    """

    names: dict[str, str]
    sure: dict[str, tuple[Sureness, str]]
    notes: tuple[str, ...]
    rivals: tuple[str, ...] = ()
    averages: tuple[str, ...] = ()


def fit_names(theirs: Shapes, ours: Shapes) -> Naming:
    """Find what wrappers have put on the names of a file or of a model.

    Args:
        theirs: Shape by name in the file.
        ours: Shape by name in the model.
    """
    parts, actual, notes = _without_parts(theirs, ours)
    canonical_ours = {plain: ours[name] for plain, name in actual.items()}
    current = dict(parts)
    sure: dict[str, tuple[Sureness, str]] = {}
    rivals: tuple[str, ...] = ()
    averages: list[str] = []
    changed: set[str] = set()
    for _ in range(RULES):
        loose = {now: theirs[name] for name, now in current.items() if name not in changed}
        loose = {now: shape for now, shape in loose.items() if canonical_ours.get(now) != shape}
        taken = {now for name, now in current.items() if canonical_ours.get(now) == theirs[name]}
        free = {name: shape for name, shape in canonical_ours.items() if name not in taken}
        chosen = _best_rule(loose, free, len(ours))
        if chosen is None or rivals:
            break
        rule, claims, found_rivals, found_averages = chosen
        level = _sureness(rule, len(claims), list(loose), len(theirs), len(ours), found_rivals)
        notes.append(str(rule))
        averages += found_averages
        rivals = rivals or tuple(found_rivals)
        for name, now in list(current.items()):
            if now in loose and name not in changed and now.startswith(rule.strip):
                current[name] = rule.apply(now)
                changed.add(name)
                if level != "certain":
                    sure[name] = level, str(rule) + (f"; as good: {found_rivals[-1]}" if found_rivals else "")
    names = {name: actual.get(now, now) for name, now in current.items()}
    return Naming(names, sure, tuple(notes), rivals, tuple(averages))


def without_wrappers(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Take wrapper parts off, and prefixes that all names have, where no model says what the names should be.

    >>> without_wrappers(["module.model.fc.weight", "module.model.fc.bias"])[0]["module.model.fc.bias"]
    'fc.bias'
    """
    known = list(names)
    current, notes = {name: name for name in known}, []
    for part in WRAPPER_PARTS:
        plain = {name: _without(now, part) for name, now in current.items()}
        if plain != current and len(set(plain.values())) == len(plain):
            notes.append(_part_note(part, list(current.values()), "stripped"))
            current = plain
    for prefix in ("model.", "backbone.", "encoder.", "net.", "network.", "base_model."):
        if current and all(now.startswith(prefix) for now in current.values()):
            current = {name: now.removeprefix(prefix) for name, now in current.items()}
            notes.append(f"prefix '{prefix}' stripped")
    return current, notes


def strip_wrapper_parts(names: Iterable[str]) -> dict[str, str]:
    """Take wrapper parts off, where that makes no two names one."""
    current = {name: name for name in names}
    for part in WRAPPER_PARTS:
        plain = {name: _without(now, part) for name, now in current.items()}
        if len(set(plain.values())) == len(plain):
            current = plain
    return current


def _without_parts(theirs: Shapes, ours: Shapes) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Take the parts of wrappers off the names on both sides, where that makes no two names one.

    Returns:
        Name in the file → plain name; plain name → name in the model; notes.
    """
    files, models = {name: name for name in theirs}, {name: name for name in ours}
    notes: list[str] = []
    for part in WRAPPER_PARTS:
        plain_files = {name: _without(now, part) for name, now in files.items()}
        plain_models = {name: _without(now, part) for name, now in models.items()}
        in_file, in_model = plain_files != files, plain_models != models
        is_clear = all(len(set(plain.values())) == len(plain) for plain in (plain_files, plain_models))
        if not (in_file or in_model) or not is_clear or _fits(plain_files, plain_models) < _fits(files, models):
            continue
        if in_file and not in_model:
            notes.append(_part_note(part, list(files.values()), "stripped"))
        elif in_model and not in_file:
            notes.append(_part_note(part, list(models.values()), "added"))
        files, models = plain_files, plain_models
    return files, {now: name for name, now in models.items()}, notes


def _fits(files: Mapping[str, str], models: Mapping[str, str]) -> int:
    return len(set(files.values()) & set(models.values()))


def _without(name: str, part: str) -> str:
    pieces = name.split(".")
    return ".".join([piece for piece in pieces[:-1] if piece != part] + pieces[-1:])


def _part_note(part: str, names: list[str], verb: str) -> str:
    holding = [name for name in names if part in name.split(".")[:-1]]
    if all(name.startswith(f"{part}.") for name in holding):
        return f"prefix '{part}.' {verb}"
    return f"'{part}.' {verb} inside of {len(holding)} names"


def _best_rule(loose: Shapes, ours: Shapes, total: int) -> tuple[Rule, set[str], list[str], list[str]] | None:
    """Return the rule that makes the most loose names fit, what it claims, its rivals, and averages beside it.

    Args:
        loose: The names of the file that do not fit as they are.
        ours: The names of the model that nothing fits yet.
        total: Number of tensors of the model.
    """
    tried: list[tuple[Rule, set[str]]] = []
    for rule in _candidates(loose, ours):
        moved = {rule.apply(name): shape for name, shape in loose.items() if name.startswith(rule.strip)}
        claims = {now for now, shape in moved.items() if ours.get(now) == shape}
        is_renaming = rule.strip and rule.add and len(claims) <= HALF * total  # of a part: for the doctor to weigh
        if claims and not is_renaming:
            tried.append((rule, claims))
    if not tried:
        return None
    most = max(len(claims) for _, claims in tried)
    best = [entry for entry in tried if len(entry[1]) == most]
    raw = [entry for entry in best if not _is_average(entry[0].strip)] or best
    rule, claims = min(raw, key=lambda entry: (bool(entry[0].strip and entry[0].add), len(str(entry[0]))))
    averages = [other.strip for other, _ in tried if _is_average(other.strip) and not _is_average(rule.strip)]
    rivals = [
        str(other)
        for other, its in tried
        if other != rule and other.strip not in averages and _competes(rule, claims, other, its)
    ]
    return rule, claims, ([str(rule), *rivals] if rivals else []), averages


def _competes(rule: Rule, claims: set[str], other: Rule, its: set[str]) -> bool:
    """Return whether another rule explains at least half of the same with other tensors, or puts them elsewhere."""
    if rule.strip == other.strip:
        return rule.add != other.add and len(its) >= HALF * len(claims)
    is_nested = rule.strip.startswith(other.strip) or other.strip.startswith(rule.strip)
    return not is_nested and len(its & claims) >= HALF * len(claims)


def _is_average(prefix: str) -> bool:
    words = prefix.lower().replace(".", "_").split("_")
    return "ema" in words or "swa" in words


def _candidates(shapes: Shapes, ours: Shapes) -> Iterator[Rule]:
    """Vote for pairs of prefixes by the longest endings that names of both sides share, with equal shapes."""
    endings: dict[str, list[str]] = {}
    for name in ours:
        for prefix, ending in _splits(name):
            endings.setdefault(ending, []).append(prefix)
    votes: Counter[Rule] = Counter()
    for name, shape in shapes.items():
        for strip, ending in _splits(name):  # the longest ending first
            fitting = [add for add in endings.get(ending, ()) if ours[add + ending] == shape]
            if fitting:
                votes.update(Rule(strip, add) for add in fitting[:RULES])
                break
    for name in shapes:  # a prefix that hides below a longer ending, as `encoder.` in front of `encoder.layer`
        for strip, ending in _splits(name):
            if strip and ours.get(ending) == shapes[name]:
                votes[Rule(strip, "")] += 1
    yield from (rule for rule, _ in votes.most_common(CANDIDATES) if rule.strip or rule.add)


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """List prefix and ending of a name at each dot, the longest ending first."""
    pieces = name.split(".", PARTS)
    for cut in range(len(pieces)):
        yield "".join(f"{piece}." for piece in pieces[:cut]), ".".join(pieces[cut:])


def _sureness(rule: Rule, claims: int, loose: list[str], total: int, slots: int, rivals: list[str]) -> Sureness:
    if rivals:
        return "guess"
    below = sum(name.startswith(rule.strip) for name in loose)
    explains_file = claims >= HALF * below and below >= HALF * total
    return "certain" if explains_file or claims > HALF * slots else "likely"
