"""Remove from names what wrappers added: parts such as `module.` anywhere, and whole prefixes.

No prefix is trusted by its name alone. A rule is kept if more names of the file then exist in the model with equal
shapes. It is certain only if no other rule claims the same tensors.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from regraft.checkpoint.foreign.state_dicts import Tensors
from regraft.checkpoint.matching.load_report import Confidence
from regraft.errors import CheckpointError, ConfigError

WRAPPER_PARTS = (
    "module",
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)  # DataParallel, torch.compile, Lightning's strategies, FSDP
RULES = 8  # rules that are applied one after the other
CANDIDATES = 12  # rules that are compared in each round, those with the most votes
PARTS = 40  # of a name that are considered
HALF = 0.5  # share of the names; a rule that explains fewer is `likely` at most

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Rule:
    """A prefix to strip from names of the file, and a prefix to add.

    Attributes:
        strip: With its dot; empty where nothing is stripped.
        add: With its dot; empty where nothing is added.
    """

    strip: str
    add: str

    def __str__(self) -> str:
        if self.strip and self.add:
            return f"prefix '{self.strip}' replaced by '{self.add}'"
        return f"prefix '{self.strip}' stripped" if self.strip else f"prefix '{self.add}' added"

    def apply(self, name: str) -> str:
        """Return the name after the rule; unchanged where it does not start with `strip`."""
        return self.add + name.removeprefix(self.strip) if name.startswith(self.strip) else name


@dataclass(frozen=True)
class Naming:
    """The names of a file as the model should have them.

    Attributes:
        names: Name in the file → name to look up in the model.
        uncertain: Name in the file → (level, reason), where a rule that is not certain changed it.
        notes: What was stripped or added.
        rivals: Rules that explain the same tensors of the model equally well, if any.
        averages: Prefixes of running averages that were ignored.
    """

    names: dict[str, str]
    uncertain: dict[str, tuple[Confidence, str]]
    notes: tuple[str, ...]
    rivals: tuple[str, ...] = ()
    averages: tuple[str, ...] = ()


def fit_names(file_shapes: Shapes, model_shapes: Shapes) -> Naming:
    """Find the prefixes and parts that wrappers added to the names of a file or of a model.

    Args:
        file_shapes: Shape by name in the file.
        model_shapes: Shape by name in the model.
    """
    plain_names, actual, notes = _without_parts(file_shapes, model_shapes)
    plain_shapes = {plain: model_shapes[name] for plain, name in actual.items()}
    current = dict(plain_names)
    uncertain: dict[str, tuple[Confidence, str]] = {}
    rivals: tuple[str, ...] = ()
    averages: list[str] = []
    changed: set[str] = set()
    # One rule per round, as a file may need several: `encoder.` for one part and `decoder.` for another. Each name is
    # changed once at most, so that no later rule undoes an earlier one.
    for _ in range(RULES):
        loose = {now: file_shapes[name] for name, now in current.items() if name not in changed}
        loose = {now: shape for now, shape in loose.items() if plain_shapes.get(now) != shape}
        taken = {now for name, now in current.items() if plain_shapes.get(now) == file_shapes[name]}
        free = {name: shape for name, shape in plain_shapes.items() if name not in taken}
        chosen = _best_rule(loose, free, len(model_shapes))
        if chosen is None or rivals:  # with rivals the choice is the caller's; more rules would build on it
            break
        rule, claims, new_rivals, new_averages = chosen
        level = _confidence(rule, len(claims), list(loose), len(file_shapes), len(model_shapes), new_rivals)
        notes.append(str(rule))
        averages += new_averages
        rivals = rivals or tuple(new_rivals)
        for name, now in list(current.items()):
            if now in loose and name not in changed and now.startswith(rule.strip):
                current[name] = rule.apply(now)
                changed.add(name)
                if level != "certain":
                    uncertain[name] = level, str(rule) + (f"; as good: {new_rivals[-1]}" if new_rivals else "")
    names = {name: actual.get(now, now) for name, now in current.items()}
    return Naming(names, uncertain, tuple(notes), rivals, tuple(averages))


def without_wrappers(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Strip wrapper parts, and usual prefixes that all names share, without a model to compare with.

    >>> without_wrappers(["module.model.fc.weight", "module.model.fc.bias"])[0]["module.model.fc.bias"]
    'fc.bias'
    """
    current, notes = {name: name for name in names}, []
    for part in WRAPPER_PARTS:
        plain = {name: _without(now, part) for name, now in current.items()}
        # Stripping must keep names distinct, or one tensor would replace another.
        if plain != current and len(set(plain.values())) == len(plain):
            notes.append(_part_note(part, list(current.values()), "stripped"))
            current = plain
    for prefix in ("model.", "backbone.", "encoder.", "net.", "network.", "base_model."):
        if current and all(now.startswith(prefix) for now in current.values()):
            current = {name: now.removeprefix(prefix) for name, now in current.items()}
            notes.append(f"prefix '{prefix}' stripped")
    return current, notes


def strip_wrapper_parts(names: Iterable[str]) -> dict[str, str]:
    """Strip each wrapper part unless two names would become equal."""
    current = {name: name for name in names}
    for part in WRAPPER_PARTS:
        plain = {name: _without(now, part) for name, now in current.items()}
        if len(set(plain.values())) == len(plain):
            current = plain
    return current


def parse_rules(texts: Iterable[str]) -> dict[str, str]:
    r"""Parse renamings, each as `OLD=NEW`.

    Raises:
        ConfigError: One has no OLD, or no `=`.

    >>> parse_rules([r"encoder\.(.*)=backbone.\1"])
    {'encoder\\.(.*)': 'backbone.\\1'}
    """
    rules = {}
    for text in texts:
        pattern, separator, replacement = text.partition("=")
        if not separator or not pattern:
            raise ConfigError(rf"'{text}' is not of the form OLD=NEW, as in 'encoder\.(.*)=backbone.\1'.")
        rules[pattern] = replacement
    return rules


def renamed(tensors: Tensors, rules: Mapping[str, str], path: Path) -> Tensors:
    """Apply regular expressions to names.

    Raises:
        CheckpointError: An expression is invalid, or two names become equal.
    """
    for pattern, replacement in rules.items():
        try:
            names = {name: re.sub(pattern, replacement, name) for name in tensors}
        except (re.error, IndexError) as error:
            raise CheckpointError(
                f"the renaming '{pattern}={replacement}' is no regular expression with its replacement: {error}. "
                r"Expected as in 'encoder\.(.*)=backbone.\1'. Nothing was changed."
            ) from error
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        if twice:
            both = [before for before, after in names.items() if after == twice[0]]
            raise CheckpointError(
                f"the renaming '{pattern}={replacement}' makes '{twice[0]}' of '{both[0]}' and of '{both[1]}' in "
                f"'{path}'. Expected one name for each. Nothing was changed."
            )
        tensors = {names[name]: tensor for name, tensor in tensors.items()}
    return tensors


def _without_parts(file_shapes: Shapes, model_shapes: Shapes) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Strip wrapper parts from the names of both sides, unless two names of one side would become equal.

    Returns:
        Name in the file → plain name; plain name → name in the model; notes.
    """
    file_names, model_names = {name: name for name in file_shapes}, {name: name for name in model_shapes}
    notes: list[str] = []
    for part in WRAPPER_PARTS:
        plain_file = {name: _without(now, part) for name, now in file_names.items()}
        plain_model = {name: _without(now, part) for name, now in model_names.items()}
        in_file, in_model = plain_file != file_names, plain_model != model_names
        is_clear = all(len(set(plain.values())) == len(plain) for plain in (plain_file, plain_model))
        # A layer of the network itself may be called `module`: the part stays where stripping loses equal names.
        if not (in_file or in_model) or not is_clear or _fits(plain_file, plain_model) < _fits(file_names, model_names):
            continue
        if in_file and not in_model:
            notes.append(_part_note(part, list(file_names.values()), "stripped"))
        elif in_model and not in_file:
            notes.append(_part_note(part, list(model_names.values()), "added"))
        file_names, model_names = plain_file, plain_model
    return file_names, {now: name for name, now in model_names.items()}, notes


def _fits(file_names: Mapping[str, str], model_names: Mapping[str, str]) -> int:
    """Count the names that both sides have."""
    return len(set(file_names.values()) & set(model_names.values()))


def _without(name: str, part: str) -> str:
    """Return a name without a part, wherever it occurs; the last part, which names the tensor, stays."""
    pieces = name.split(".")
    return ".".join([piece for piece in pieces[:-1] if piece != part] + pieces[-1:])


def _part_note(part: str, names: list[str], verb: str) -> str:
    holding = [name for name in names if part in name.split(".")[:-1]]
    if all(name.startswith(f"{part}.") for name in holding):
        return f"prefix '{part}.' {verb}"
    return f"'{part}.' {verb} inside of {len(holding)} names"


def _best_rule(loose: Shapes, free: Shapes, total: int) -> tuple[Rule, set[str], list[str], list[str]] | None:
    """Choose the rule that makes the most loose names fit.

    Args:
        loose: Shape by name in the file, of names that do not fit as they are.
        free: Shape by name in the model, of names that nothing fits yet.
        total: Number of tensors of the model.

    Returns:
        The rule, the names of the model that it claims, the rule and its rivals as text (empty without rivals), and
        prefixes of running averages beside it; None where no rule makes any name fit.
    """
    tried: list[tuple[Rule, set[str]]] = []
    for rule in _candidates(loose, free):
        moved = {rule.apply(name): shape for name, shape in loose.items() if name.startswith(rule.strip)}
        claims = {now for now, shape in moved.items() if free.get(now) == shape}
        # A replaced prefix that explains less than half of the model may lead to another part of equal shapes. The
        # structural step weighs such a renaming with more evidence.
        is_renaming = rule.strip and rule.add and len(claims) <= HALF * total
        if claims and not is_renaming:
            tried.append((rule, claims))
    if not tried:
        return None
    most = max(len(claims) for _, claims in tried)
    best = [entry for entry in tried if len(entry[1]) == most]
    raw = [entry for entry in best if not _is_average(entry[0].strip)] or best
    # Among equals the simplest rule: one that only strips or only adds, then the shortest.
    rule, claims = min(raw, key=lambda entry: (bool(entry[0].strip and entry[0].add), len(str(entry[0]))))
    # An average of the weights beside the weights is no rival: it is ignored, and reported.
    averages = [other.strip for other, _ in tried if _is_average(other.strip) and not _is_average(rule.strip)]
    rivals = [
        str(other)
        for other, other_claims in tried
        if other != rule and other.strip not in averages and _competes(rule, claims, other, other_claims)
    ]
    return rule, claims, ([str(rule), *rivals] if rivals else []), averages


def _competes(rule: Rule, claims: set[str], other: Rule, other_claims: set[str]) -> bool:
    """Return whether another rule makes the choice ambiguous.

    It does if it explains at least half of the claimed names with other tensors of the file, or if it moves the same
    tensors of the file to other names.
    """
    if rule.strip == other.strip:
        return rule.add != other.add and len(other_claims) >= HALF * len(claims)
    # Nested prefixes (`a.` and `a.b.`) describe one part of the file, not two alternatives.
    is_nested = rule.strip.startswith(other.strip) or other.strip.startswith(rule.strip)
    return not is_nested and len(other_claims & claims) >= HALF * len(claims)


def _is_average(prefix: str) -> bool:
    """Return whether a prefix is named like a running average of the weights."""
    words = prefix.lower().replace(".", "_").split("_")
    return "ema" in words or "swa" in words


def _candidates(file_shapes: Shapes, model_shapes: Shapes) -> Iterator[Rule]:
    """List rules, those with the most votes first.

    Each name of the file votes for the prefixes in front of the longest ending that it shares with a name of the model
    of equal shape. Votes keep the number of rules small: all pairs of prefixes would be a product of both sides.
    """
    endings: dict[str, list[str]] = {}
    for name in model_shapes:
        for prefix, ending in _splits(name):
            endings.setdefault(ending, []).append(prefix)
    votes: Counter[Rule] = Counter()
    for name, shape in file_shapes.items():
        for strip, ending in _splits(name):
            fitting = [add for add in endings.get(ending, ()) if model_shapes[add + ending] == shape]
            if fitting:
                votes.update(Rule(strip, add) for add in fitting[:RULES])
                break
    # A longer ending can hide a prefix, as `encoder.` in front of `encoder.layer`. So rules that only strip get votes
    # at every split.
    for name in file_shapes:
        for strip, ending in _splits(name):
            if strip and model_shapes.get(ending) == file_shapes[name]:
                votes[Rule(strip, "")] += 1
    yield from (rule for rule, _ in votes.most_common(CANDIDATES) if rule.strip or rule.add)


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Split a name into prefix and ending at each dot, the longest ending first."""
    pieces = name.split(".", PARTS)
    for cut in range(len(pieces)):
        yield "".join(f"{piece}." for piece in pieces[:cut]), ".".join(pieces[cut:])


def _confidence(rule: Rule, claims: int, loose: list[str], total: int, slots: int, rivals: list[str]) -> Confidence:
    """Return the level of a rule.

    Args:
        rule: The rule.
        claims: Number of names of the model that it makes fit.
        loose: Names of the file that do not fit as they are.
        total: Number of tensors in the file.
        slots: Number of tensors of the model.
        rivals: Rules that explain the same.
    """
    if rivals:
        return "ambiguous"
    below = sum(name.startswith(rule.strip) for name in loose)
    # Certain if it makes half of its prefix fit and this is half of the file, or if it fills most of the model. Fewer
    # names can fit by accident.
    explains_file = claims >= HALF * below and below >= HALF * total
    return "certain" if explains_file or claims > HALF * slots else "likely"
