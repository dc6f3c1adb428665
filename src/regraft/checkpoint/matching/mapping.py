"""The load doctor: which tensor of a file belongs to which tensor of a model, and how sure that is.

Names decide first, without what wrappers put on them. What is left is paired by shapes, order and alike names, and that
is never certain but in one case: where one consistent renaming of words explains every pair, numbers, order and shapes
agree, nothing is left over, and the renamed part is most of the network.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from regraft.checkpoint.matching.alignment import COUNTER, ROLES, Unit, align, assign, single_units, units_of, words_of
from regraft.checkpoint.matching.load_report import SURENESS, Match, Sureness
from regraft.checkpoint.matching.naming import Shapes, fit_names
from regraft.errors import CheckpointError

HALF = 0.5  # of the layers: a renaming of fewer may be another part of the network that looks the same
LIKELY = 0.9  # of the layers paired in order, for an order to say something
FAMILY = 2  # numbered layers that make a row
DEPTH = 40  # parts of a name that are looked at
DIGITS = 9  # of a number that counts layers
CELLS = 4_000_000  # pairs of layers that are compared at most: 2,000 with 2,000


@dataclass(frozen=True)
class Proposal:
    """Which tensor of a file belongs to which of a model.

    Attributes:
        matches: At most one for each tensor of the model; shapes may still differ where names agree.
        names: Name in the file → name after what was taken off and put on.
        notes: What was taken off and put on.
        rivals: What explains the same tensors equally well, where a choice is to be made.
        averages: Prefixes of running averages in the file that were left aside.
    """

    matches: tuple[Match, ...]
    names: Mapping[str, str]
    notes: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    averages: tuple[str, ...] = ()


def propose(theirs: Shapes, ours: Shapes, *, is_ordered: bool = True) -> Proposal:
    """Propose which tensor of a file belongs to which tensor of a model.

    Args:
        theirs: Shape by name in the file, in its order.
        ours: Shape by name in the model, in the order of registration.
        is_ordered: Whether the order of the file means something.
    """
    naming = fit_names(theirs, ours)
    found: dict[str, Match] = {}
    for source, name in sorted(naming.names.items(), key=lambda item: item[0] != item[1]):  # equal names first
        if name in ours and name not in found:
            same = "same name" if name == source else "same name without what a wrapper added"
            sure, reason = naming.sure.get(source, ("certain", same))
            found[name] = Match(name, source, sure, reason, theirs[source])
    found = _shifted(found, {naming.names[source]: source for source in theirs}, theirs, ours)
    placed = {match.source for match in found.values()}
    loose = {naming.names[source]: source for source in theirs if source not in placed}
    free = {name: ours[name] for name in ours if name not in found}
    if loose and free:
        left = units_of({name: theirs[source] for name, source in loose.items()})
        right = units_of(free)
        total = max(1, len(units_of(ours)))
        for match in _by_structure(left, right, total, is_ordered=is_ordered):
            source = loose[match.source]
            found[match.name] = replace(match, source=source, shape=theirs[source])
        found |= _counters(found, loose, free, theirs)
    ordered = tuple(found[name] for name in ours if name in found)
    return Proposal(ordered, naming.names, naming.notes, naming.rivals, naming.averages)


def match_shapes(theirs: Shapes, ours: Shapes, *, is_ordered: bool = True) -> Proposal:
    """Pair the tensors of a file and of a model by order and shape alone; names are not looked at.

    The last layer may have another number of classes; the file may have more layers where that leaves no choice.

    Raises:
        CheckpointError: A layer of the model finds no partner, or the order leaves a choice.
    """
    left, right = units_of(theirs), units_of(ours)
    if not any(unit.members.keys() <= set(ROLES) for unit in left):  # names that say nothing: each tensor by itself
        left, right = single_units(theirs), single_units(ours)
    if len(left) * len(right) > CELLS:
        raise CheckpointError(
            f"{len(left):,} layers of the file and {len(right):,} of the model are too many to pair by shape. "
            "Give rename={…} (--rename). Nothing was changed."
        )
    if is_ordered:
        pairs, choices = align(left, right, by_name=False)
    else:
        only = assign(left, right)
        pairs = [(i, j) for i, j, is_only in only if is_only]
        choices = {
            j: tuple(i for i, unit in enumerate(left) if unit.signature == right[j].signature) for _, j, _ in only
        }
        choices = {j: known for j, known in choices.items() if len(known) > 1}
    if choices:
        position = min(choices)
        names = " or ".join(f"'{left[i].path}'" for i in choices[position][:3])
        others = f", as may {len(choices) - 1} more layers" if len(choices) > 1 else ""
        reason = "" if is_ordered else " The file does not keep the order of layers."
        raise CheckpointError(
            f"by order and shape, '{right[position].path}' of the model may be {names} of the file or another"
            f"{others}.{reason} Rename what names can tell, with rename={{…}} (--rename). Nothing was changed."
        )
    paired = {j for _, j in pairs}
    unpaired = [unit.path for j, unit in enumerate(right) if j not in paired]
    if unpaired and unpaired != [right[-1].path]:  # a head for other classes comes last
        raise CheckpointError(
            f"by order and shape, '{unpaired[0]}' of the model finds no layer in the file ({len(unpaired)} of "
            f"{len(right)} layers do not). The file is of another architecture. Nothing was changed."
        )
    found = {
        match.name: replace(match, shape=theirs[match.source])
        for i, j in pairs
        for match in _pair(left[i], right[j], "likely", "order and shape")
    }
    found |= _counters(found, {name: name for name in theirs}, ours, theirs)
    return Proposal(tuple(found[name] for name in ours if name in found), {name: name for name in theirs})


def weakest(matches: Iterable[Match]) -> Sureness:
    """Return the least sure of the levels of some matches.

    >>> weakest([Match("a", "a", "certain", ""), Match("b", "c", "likely", "")])
    'likely'
    """
    return SURENESS[max((SURENESS.index(match.sure) for match in matches), default=0)]


def _by_structure(left: Sequence[Unit], right: Sequence[Unit], total: int, *, is_ordered: bool) -> list[Match]:
    """Pair units by shapes, order and alike names.

    Args:
        left: Units of the file that names did not place, under the names that they would have in the model.
        right: Units of the model that names did not fill.
        total: Number of units of the model.
        is_ordered: Whether the order of the file means something.
    """
    if len(left) * len(right) > CELLS:
        return []
    pairs, choices = align(left, right, by_name=True) if is_ordered else ([], {})
    is_complete = len(pairs) >= LIKELY * max(len(left), len(right))
    if not is_complete:  # the order may have been lost on the way
        by_words = [(i, j) for i, j, _ in assign(left, right)]
        words = _renaming(left, right, by_words, total)
        if len(words) == len(by_words) > 0:
            return [
                match for i, j in by_words for match in _pair(left[i], right[j], "likely", f"{words[j]}; order differs")
            ]
    explained = _renaming(left, right, pairs, total)
    is_small = len(right) < HALF * total
    counts_left, counts_right = (Counter(unit.signature for unit in units) for units in (left, right))
    matches = []
    for i, j in pairs:
        a, b = left[i], right[j]
        others = counts_left[a.signature], counts_right[b.signature]
        if j not in choices and j in explained:
            sure, reason = "certain", f"{explained[j]}, and numbers, order and shapes agree"
        elif is_small:
            sure, reason = "guess", "shape; most names are equal, so this may be another part of the network"
        elif others == (1, 1):
            sure, reason = "likely", "the only ones of these shapes"
        elif is_complete and j not in choices:
            sure, reason = "likely", f"order and shape; {others[0] - 1} more layers of these shapes"
        else:
            sure, reason = "guess", f"shape, one of {max(others)} layers of these shapes"
        matches += _pair(a, b, sure, reason)
    used_left, used_right = {i for i, _ in pairs}, {j for _, j in pairs}
    rest_left = [unit for i, unit in enumerate(left) if i not in used_left]
    rest_right = [unit for j, unit in enumerate(right) if j not in used_right]
    for i, j, is_only in assign(rest_left, rest_right):
        sure: Sureness = "likely" if is_only and not is_small else "guess"
        reason = "the only ones of these shapes that are left" if is_only else "shape and alike names"
        matches += _pair(rest_left[i], rest_right[j], sure, reason)
    return matches


def _pair(theirs: Unit, ours: Unit, sure: Sureness, reason: str) -> list[Match]:
    if theirs.exact != ours.exact and sure == "certain":
        sure = "likely"
    return [Match(ours.members[role], theirs.members[role], sure, reason) for role in ours.members]


def _counters(found: Mapping[str, Match], loose: Mapping[str, str], free: Shapes, theirs: Shapes) -> dict[str, Match]:
    """Let the counters of batches go where the statistics beside them go."""
    made = {}
    for name, match in found.items():
        parent, _, last = name.rpartition(".")
        if last != "running_mean":
            continue
        counter = f"{parent}.{COUNTER}".lstrip(".")
        source = f"{match.source.rpartition('.')[0]}.{COUNTER}".lstrip(".")
        if counter in free and source in loose.values() and counter not in found:
            made[counter] = replace(match, name=counter, source=source, shape=theirs[source])
    return made


def _renaming(
    left: Sequence[Unit], right: Sequence[Unit], pairs: Sequence[tuple[int, int]], total: int
) -> dict[int, str]:
    """Find one renaming of words that explains every pair; return it for each position in `right` that it settles."""
    rest_left = set(range(len(left))) - {i for i, _ in pairs}
    rest_right = set(range(len(right))) - {j for _, j in pairs}
    if not pairs or not (
        rest_left <= {len(left) - 1} and rest_right <= {len(right) - 1}
    ):  # but for a head, which is last
        return {}
    words: dict[str, str] = {}
    for i, j in pairs:
        a, b = words_of(left[i].path), words_of(right[j].path)
        if len(a) != len(b) or [number for _, number in a] != [number for _, number in b]:
            return {}
        for (before, _), (after, _) in zip(a, b, strict=True):
            if words.setdefault(before, after) != after:
                return {}
    changed = {before: after for before, after in words.items() if before != after}
    if len(set(words.values())) != len(words) or not changed:
        return {}
    holders = {word: {j for i, j in pairs if word in dict(words_of(left[i].path))} for word in changed}
    wide = [its for its in holders.values() if len(its) >= HALF * total]
    anchored = set().union(*wide)
    settled = {word for word, its in holders.items() if len(its & anchored) > HALF * len(its)}
    settled -= _exchangeable(changed, left, right, pairs)
    text = ", ".join(f"'{before}' is '{after}'" for before, after in changed.items())
    doubtful = set().union(*(its for word, its in holders.items() if word not in settled))
    return {j: text for _, j in pairs if j not in doubtful} if anchored else {}


def _exchangeable(
    changed: Mapping[str, str], left: Sequence[Unit], right: Sequence[Unit], pairs: Sequence[tuple[int, int]]
) -> set[str]:
    """Return words whose new words could be exchanged, as all shapes would fit as well."""
    signatures = {unit.path: unit.signature for unit in right}
    ours = {left[i].path: right[j].path for i, j in pairs}
    found: set[str] = set()
    for a, b in combinations(changed, 2):
        exchanged = {changed[a]: changed[b], changed[b]: changed[a]}
        moved = {path: _reworded(path, exchanged) for path in ours.values()}
        if all(signatures.get(moved[path]) == signatures[path] for path in moved if moved[path] != path):
            found |= {a, b}
    return found


def _reworded(path: str, words: Mapping[str, str]) -> str:
    return ".".join(words.get(word, word) + number for word, number in words_of(path))


def _shifted(found: dict[str, Match], sources: Mapping[str, str], theirs: Shapes, ours: Shapes) -> dict[str, Match]:
    """Doubt equal names in rows of numbered layers that begin with other numbers, where a shift fits as well."""
    files, models = _families(sources), _families(ours)
    for family in sorted(files.keys() & models.keys()):
        numbers, known = sorted(files[family]), sorted(models[family])
        offset = known[0] - numbers[0]
        is_row = min(len(numbers), len(known)) >= FAMILY and (len(numbers) == len(known) or not family[1])
        if not offset or not is_row:
            continue
        moved = {_renumbered(name, family, offset): name for number in numbers for name in files[family][number]}
        inside = {name: moved[name] for number in known for name in models[family][number] if name in moved}
        fits = all(theirs[sources[before]] == ours[now] for now, before in inside.items())
        if not fits or len(inside) < HALF * sum(len(models[family][number]) for number in known):
            continue
        text = f"numbers begin at {numbers[0]} in the file and at {known[0]} in the model"
        is_whole = len(numbers) == len(known) and len(inside) == len(moved)
        for number in known:
            for name in models[family][number]:
                if is_whole:
                    source = sources[inside[name]] if name in inside else None
                    found.pop(name, None)
                    if source is not None:
                        found[name] = Match(name, source, "likely", f"shifted: {text}", theirs[source])
                elif name in found:
                    found[name] = replace(
                        found[name], sure="guess", reason=f"same name, but {text}, so it may be shifted"
                    )
    return found


def _families(names: Iterable[str]) -> dict[tuple[str, str], dict[int, list[str]]]:
    """Group names by rows of numbered layers: (path before it, its word) → number → names."""
    found: dict[tuple[str, str], dict[int, list[str]]] = {}
    for name in names:
        before = ""
        for word, number in words_of(name)[:DEPTH]:
            if 0 < len(number) <= DIGITS:
                found.setdefault((before, word), {}).setdefault(int(number), []).append(name)
            before += f"{word}{number}."
    return found


def _renumbered(name: str, family: tuple[str, str], offset: int) -> str:
    before, word = family
    part, dot, rest = name[len(before) :].partition(".")
    return f"{before}{word}{int(part.removeprefix(word)) + offset}{dot}{rest}"
