"""Map the tensors of a file to the tensors of a model, with a level of confidence for each pair.

Two steps, from strong evidence to weak:

1. Names. Prefixes and parts that wrappers add are removed (see `naming`). Equal names are `certain`.
2. Structure, for what is left. Tensors of one layer form a unit. Units are aligned in order by equal shapes and similar
   names (see `alignment`). Such a pair is `likely` or `ambiguous`, with one exception: it is `certain` where one
   consistent renaming of words explains every pair, numbers, order and shapes agree, nothing but a head is left over,
   and a renamed word occurs in at least half of all layers.

    key in the file                      key in the model
    module.conv1.weight  (8, 3, 3, 3)    stem1.weight  (8, 3, 3, 3)     step 2: 'conv' is 'stem', certain
    module.conv2.weight  (16, 8, 3, 3)   stem2.weight  (16, 8, 3, 3)    step 2: 'conv' is 'stem', certain
    module.fc.weight     (10, 16)        fc.weight     (10, 16)         step 1: without 'module.', certain

Why so: names alone load nothing from a file whose layers were renamed. Shapes alone pair the wrong layers without any
sign of it, because most networks repeat layers of equal shapes. An optimal assignment of all pairs would ignore the
order of layers, take cubic time, and always give an answer, without telling whether another one is as good. The
alignment takes time proportional to the product of both numbers of layers, and shows where the order leaves a choice.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from regraft.checkpoint.matching.alignment import COUNTER, ROLES, Unit, align, assign, single_units, units_of, words_of
from regraft.checkpoint.matching.load_report import CONFIDENCE_LEVELS, Confidence, Match
from regraft.checkpoint.matching.naming import Shapes, fit_names
from regraft.errors import CheckpointError
from regraft.wording import rename_option

HALF = 0.5  # share of the layers; a renaming of fewer may be another part of the network that looks the same
COMPLETE = 0.9  # share of the layers that must be paired in order, for the order to be evidence
MIN_ROW = 2  # numbered layers that make a row
MAX_PARTS = 40  # parts of a name that are searched for numbers
MAX_DIGITS = 9  # of a number that counts layers
MAX_PAIRS = 4_000_000  # pairs of layers that are compared: 2,000 with 2,000


@dataclass(frozen=True)
class Proposal:
    """The pairs of a tensor in a file and a tensor in a model.

    Attributes:
        matches: At most one for each tensor of the model; shapes may still differ where names agree.
        names: Name in the file → name after prefixes were stripped and added.
        notes: Which prefixes were stripped and added.
        rivals: Rules that explain the same tensors equally well, where the caller has to choose.
        averages: Prefixes of running averages in the file that were ignored.
    """

    matches: tuple[Match, ...]
    names: Mapping[str, str]
    notes: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    averages: tuple[str, ...] = ()


def propose(file_shapes: Shapes, model_shapes: Shapes, *, is_ordered: bool = True) -> Proposal:
    """Propose which tensor of a file belongs to which tensor of a model.

    Args:
        file_shapes: Shape by name in the file, in the file's order.
        model_shapes: Shape by name in the model, in the order of registration.
        is_ordered: Whether the file keeps the order of registration.
    """
    naming = fit_names(file_shapes, model_shapes)
    matches: dict[str, Match] = {}
    # Unchanged names go first: where two sources end at one name, the one that had it from the start keeps it.
    for source, name in sorted(naming.names.items(), key=lambda item: item[0] != item[1]):
        if name in model_shapes and name not in matches:
            same = "same name" if name == source else "same name without what a wrapper added"
            confidence, reason = naming.uncertain.get(source, ("certain", same))
            matches[name] = Match(name, source, confidence, reason, file_shapes[source])
    sources = {naming.names[source]: source for source in file_shapes}
    matches = _match_shifted_rows(matches, sources, file_shapes, model_shapes)
    placed = {match.source for match in matches.values()}
    loose = {naming.names[source]: source for source in file_shapes if source not in placed}
    free = {name: model_shapes[name] for name in model_shapes if name not in matches}
    if loose and free:
        # Units of the file get the stripped names, which are closer to the model's. `loose` has the original ones.
        file_units = units_of({name: file_shapes[source] for name, source in loose.items()})
        model_units = units_of(free)
        total = max(1, len(units_of(model_shapes)))  # shares are of the whole model, not of what is free
        for match in _match_structure(file_units, model_units, total, is_ordered=is_ordered):
            source = loose[match.source]
            matches[match.name] = replace(match, source=source, shape=file_shapes[source])
        matches |= _match_counters(matches, loose, free, file_shapes)
    ordered = tuple(matches[name] for name in model_shapes if name in matches)
    return Proposal(ordered, naming.names, naming.notes, naming.rivals, naming.averages)


def match_shapes(file_shapes: Shapes, model_shapes: Shapes, *, is_ordered: bool = True) -> Proposal:
    """Pair the tensors of a file and of a model by order and shape alone; names are ignored.

    The last layer may have another number of classes. The file may have more layers where that leaves no choice.

    Raises:
        CheckpointError: A layer of the model has no partner, or the order leaves a choice.
    """
    file_units, model_units = units_of(file_shapes), units_of(model_shapes)
    # A file with names such as "arr_0" has no weights and biases to group into units: each tensor is a unit.
    if not any(unit.members.keys() <= set(ROLES) for unit in file_units):
        file_units, model_units = single_units(file_shapes), single_units(model_shapes)
    if len(file_units) * len(model_units) > MAX_PAIRS:
        raise CheckpointError(
            f"{len(file_units):,} layers of the file and {len(model_units):,} of the model are too many to pair "
            f"by shape. Give {rename_option()}. Nothing was changed."
        )
    if is_ordered:
        pairs, choices = align(file_units, model_units, by_name=False)
    else:
        # Without an order, a shape identifies a layer only where it occurs once on each side.
        assigned = assign(file_units, model_units)
        pairs = [(i, j) for i, j, is_only in assigned if is_only]
        choices = {
            j: tuple(i for i, unit in enumerate(file_units) if unit.signature == model_units[j].signature)
            for _, j, _ in assigned
        }
        choices = {j: positions for j, positions in choices.items() if len(positions) > 1}
    if choices:
        position = min(choices)
        names = " or ".join(f"'{file_units[i].path}'" for i in choices[position][:3])
        others = f", as may {len(choices) - 1} more layers" if len(choices) > 1 else ""
        reason = "" if is_ordered else " The file does not keep the order of layers."
        raise CheckpointError(
            f"by order and shape, '{model_units[position].path}' of the model may be {names} of the file or another"
            f"{others}.{reason} Rename what names can tell, with {rename_option()}. Nothing was changed."
        )
    paired = {j for _, j in pairs}
    unpaired = [unit.path for j, unit in enumerate(model_units) if j not in paired]
    if unpaired and unpaired != [model_units[-1].path]:  # a head for other classes is the last layer
        raise CheckpointError(
            f"by order and shape, '{unpaired[0]}' of the model finds no layer in the file ({len(unpaired)} of "
            f"{len(model_units)} layers do not). The file is of another architecture. Nothing was changed."
        )
    matches = {
        match.name: replace(match, shape=file_shapes[match.source])
        for i, j in pairs
        for match in _match_units(file_units[i], model_units[j], "likely", "order and shape")
    }
    names = {name: name for name in file_shapes}
    matches |= _match_counters(matches, names, model_shapes, file_shapes)
    return Proposal(tuple(matches[name] for name in model_shapes if name in matches), names)


def weakest(matches: Iterable[Match]) -> Confidence:
    """Return the lowest confidence among some matches.

    >>> weakest([Match("a", "a", "certain", ""), Match("b", "c", "likely", "")])
    'likely'
    """
    return CONFIDENCE_LEVELS[max((CONFIDENCE_LEVELS.index(match.confidence) for match in matches), default=0)]


def _match_structure(
    file_units: Sequence[Unit], model_units: Sequence[Unit], total: int, *, is_ordered: bool
) -> list[Match]:
    """Pair units by shapes, order and similar names.

    Args:
        file_units: Units of the file that names did not place, under their stripped names.
        model_units: Units of the model that names did not fill.
        total: Number of units of the model.
        is_ordered: Whether the file keeps the order of registration.
    """
    if len(file_units) * len(model_units) > MAX_PAIRS:
        return []
    pairs, choices = align(file_units, model_units, by_name=True) if is_ordered else ([], {})
    is_complete = len(pairs) >= COMPLETE * max(len(file_units), len(model_units))
    if not is_complete:
        # The order may have been lost, as in a file sorted by name. One renaming that explains all pairs is evidence
        # enough to load on request, but not by default: hence "likely".
        by_words = [(i, j) for i, j, _ in assign(file_units, model_units)]
        words = _find_renaming(file_units, model_units, by_words, total)
        if len(words) == len(by_words) > 0:
            return [
                match
                for i, j in by_words
                for match in _match_units(file_units[i], model_units[j], "likely", f"{words[j]}; order differs")
            ]
    explained = _find_renaming(file_units, model_units, pairs, total)
    is_small = len(model_units) < HALF * total
    counts_file, counts_model = (Counter(unit.signature for unit in units) for units in (file_units, model_units))
    matches = []
    for i, j in pairs:
        file_unit, model_unit = file_units[i], model_units[j]
        counts = counts_file[file_unit.signature], counts_model[model_unit.signature]
        # From the strongest evidence to the weakest; the first that applies gives the level.
        if j not in choices and j in explained:
            confidence, reason = "certain", f"{explained[j]}, and numbers, order and shapes agree"
        elif is_small:
            confidence, reason = "ambiguous", "shape; most names are equal, so this may be another part of the network"
        elif counts == (1, 1):
            confidence, reason = "likely", "the only ones of these shapes"
        elif is_complete and j not in choices:
            confidence, reason = "likely", f"order and shape; {counts[0] - 1} more layers of these shapes"
        else:
            confidence, reason = "ambiguous", f"shape, one of {max(counts)} layers of these shapes"
        matches += _match_units(file_unit, model_unit, confidence, reason)
    # What the order did not pair is paired by shape and similar names, never as certain.
    used_file, used_model = {i for i, _ in pairs}, {j for _, j in pairs}
    rest_file = [unit for i, unit in enumerate(file_units) if i not in used_file]
    rest_model = [unit for j, unit in enumerate(model_units) if j not in used_model]
    for i, j, is_only in assign(rest_file, rest_model):
        confidence: Confidence = "likely" if is_only and not is_small else "ambiguous"
        reason = "the only ones of these shapes that are left" if is_only else "shape and alike names"
        matches += _match_units(rest_file[i], rest_model[j], confidence, reason)
    return matches


def _match_units(file_unit: Unit, model_unit: Unit, confidence: Confidence, reason: str) -> list[Match]:
    """Return one match for each tensor of two units; a reshape lowers `certain` to `likely`."""
    if file_unit.exact != model_unit.exact and confidence == "certain":
        confidence = "likely"
    return [Match(model_unit.members[role], file_unit.members[role], confidence, reason) for role in model_unit.members]


def _match_counters(
    matches: Mapping[str, Match], loose: Mapping[str, str], free: Shapes, file_shapes: Shapes
) -> dict[str, Match]:
    """Match `num_batches_tracked` of the layers whose running statistics are matched; units do not contain it."""
    counters = {}
    for name, match in matches.items():
        parent, _, last = name.rpartition(".")
        if last != "running_mean":
            continue
        counter = f"{parent}.{COUNTER}".lstrip(".")
        source = f"{match.source.rpartition('.')[0]}.{COUNTER}".lstrip(".")
        if counter in free and source in loose.values() and counter not in matches:
            counters[counter] = replace(match, name=counter, source=source, shape=file_shapes[source])
    return counters


def _find_renaming(
    file_units: Sequence[Unit], model_units: Sequence[Unit], pairs: Sequence[tuple[int, int]], total: int
) -> dict[int, str]:
    """Find one renaming of words that explains every pair.

    Returns:
        The renaming as text, by position in `model_units`, for the pairs that it makes certain; may be empty.

    """
    rest_file = set(range(len(file_units))) - {i for i, _ in pairs}
    rest_model = set(range(len(model_units))) - {j for _, j in pairs}
    # Only a head, which is the last layer, may be left over: other layers without a partner contradict the renaming.
    if not pairs or not (rest_file <= {len(file_units) - 1} and rest_model <= {len(model_units) - 1}):
        return {}
    words: dict[str, str] = {}
    for i, j in pairs:
        file_words, model_words = words_of(file_units[i].path), words_of(model_units[j].path)
        if [number for _, number in file_words] != [number for _, number in model_words]:
            return {}
        for (before, _), (after, _) in zip(file_words, model_words, strict=True):
            if words.setdefault(before, after) != after:
                return {}
    changed = {before: after for before, after in words.items() if before != after}
    # Two words of the file that become one word would merge layers.
    if len(set(words.values())) != len(words) or not changed:
        return {}
    # A word that many layers have anchors the renaming. A rare word is settled where most of its layers also have an
    # anchored word; by itself it proves nothing, as one layer fits any place of its shape.
    holders = {word: {j for i, j in pairs if word in dict(words_of(file_units[i].path))} for word in changed}
    wide = [positions for positions in holders.values() if len(positions) >= HALF * total]
    anchored = set().union(*wide)
    settled = {word for word, positions in holders.items() if len(positions & anchored) > HALF * len(positions)}
    settled -= _exchangeable(changed, file_units, model_units, pairs)
    text = ", ".join(f"'{before}' is '{after}'" for before, after in changed.items())
    doubtful = set().union(*(positions for word, positions in holders.items() if word not in settled))
    return {j: text for _, j in pairs if j not in doubtful} if anchored else {}


def _exchangeable(
    changed: Mapping[str, str],
    file_units: Sequence[Unit],
    model_units: Sequence[Unit],
    pairs: Sequence[tuple[int, int]],
) -> set[str]:
    """Return the words whose replacements could be swapped with each other, because all shapes would still fit."""
    signatures = {unit.path: unit.signature for unit in model_units}
    model_paths = {file_units[i].path: model_units[j].path for i, j in pairs}
    exchangeable: set[str] = set()
    for a, b in combinations(changed, 2):
        exchanged = {changed[a]: changed[b], changed[b]: changed[a]}
        # Swap both words in the model's paths: where every moved path has the shapes of the old one, nothing in the
        # file tells the two renamings apart.
        moved = {path: _reworded(path, exchanged) for path in model_paths.values()}
        if all(signatures.get(moved[path]) == signatures[path] for path in moved if moved[path] != path):
            exchangeable |= {a, b}
    return exchangeable


def _reworded(path: str, words: Mapping[str, str]) -> str:
    """Return a path with some words replaced; numbers stay."""
    return ".".join(words.get(word, word) + number for word, number in words_of(path))


def _match_shifted_rows(
    matches: dict[str, Match], sources: Mapping[str, str], file_shapes: Shapes, model_shapes: Shapes
) -> dict[str, Match]:
    """Lower the level of equal names in rows of numbered layers that begin with different numbers.

    A file with `layer1` to `layer4` and a model with `layer0` to `layer3` share three names that may each mean the
    wrong layer. Where the shifted names have equal shapes and give at least half of the row, they are as good. They
    replace the equal names as `likely` if they map the whole row of the file; otherwise the equal names become
    `ambiguous`.
    """
    file_rows, model_rows = _numbered_rows(sources), _numbered_rows(model_shapes)
    for row in sorted(file_rows.keys() & model_rows.keys()):
        file_numbers, model_numbers = sorted(file_rows[row]), sorted(model_rows[row])
        offset = model_numbers[0] - file_numbers[0]
        # Rows of different lengths are compared only where the part is a bare number, as in an `nn.Sequential`: one
        # more layer in front of the others renumbers them all.
        is_row = min(len(file_numbers), len(model_numbers)) >= MIN_ROW and (
            len(file_numbers) == len(model_numbers) or not row[1]
        )
        if not offset or not is_row:
            continue
        model_names = [name for names in model_rows[row].values() for name in names]
        renumbered = {_renumbered(name, row, offset): name for names in file_rows[row].values() for name in names}
        # Name in the model → name in the file, for the names in the model that the shift gives.
        shifted = {name: renumbered[name] for name in model_names if name in renumbered}
        fits = all(file_shapes[sources[shifted[name]]] == model_shapes[name] for name in shifted)
        if not fits or len(shifted) < HALF * len(model_names):
            continue
        text = f"numbers begin at {file_numbers[0]} in the file and at {model_numbers[0]} in the model"
        is_whole = len(file_numbers) == len(model_numbers) and len(shifted) == len(renumbered)
        for name in model_names:
            if is_whole:
                # Without a shifted source, the equal name is dropped as well: it belongs to a neighboring layer.
                matches.pop(name, None)
                if name in shifted:
                    source = sources[shifted[name]]
                    matches[name] = Match(name, source, "likely", f"shifted: {text}", file_shapes[source])
            elif name in matches:
                reason = f"same name, but {text}, so it may be shifted"
                matches[name] = replace(matches[name], confidence="ambiguous", reason=reason)
    return matches


def _numbered_rows(names: Iterable[str]) -> dict[tuple[str, str], dict[int, list[str]]]:
    """Group names by rows of numbered layers.

    Returns:
        (Path before the number's part, word before the number) → number → names. A name is in one row per number.
    """
    rows: dict[tuple[str, str], dict[int, list[str]]] = {}
    for name in names:
        before = ""
        for word, number in words_of(name)[:MAX_PARTS]:
            if 0 < len(number) <= MAX_DIGITS:
                rows.setdefault((before, word), {}).setdefault(int(number), []).append(name)
            before += f"{word}{number}."
    return rows


def _renumbered(name: str, row: tuple[str, str], offset: int) -> str:
    """Return a name with an offset added to the number that places it in a row."""
    before, word = row
    part, dot, rest = name[len(before) :].partition(".")
    return f"{before}{word}{int(part.removeprefix(word)) + offset}{dot}{rest}"
