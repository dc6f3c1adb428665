"""Join several backbones side by side, or put several heads on one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from regraft.anatomy.inputs import Inputs
from regraft.anatomy.modes import in_mode, unmoved_on_failure
from regraft.arguments import check_arguments
from regraft.card import attach
from regraft.errors import EditError
from regraft.surgery.checks import attach_joined, require_editable
from regraft.surgery.fitting import classifier, fitted, output_shape
from regraft.surgery.layer_text.build import construct
from regraft.zoo import preprocessing_of

Head = nn.Module | int


class Grafted(nn.Module):
    """Backbones on one input, whose features are concatenated, with one or several heads."""

    def __init__(self, parts: Mapping[str, nn.Module], heads: nn.Module | Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))
        self.has_names = isinstance(heads, Mapping)
        self.heads = nn.ModuleDict(dict(heads)) if isinstance(heads, Mapping) else heads

    def forward(self, x: torch.Tensor) -> Any:
        """Return the scores (N, K), or a dict of them where the heads have names."""
        features = torch.cat([as_vectors(part(x)) for part in self.parts.values()], 1)  # (N, D1 + D2 + …)
        if isinstance(self.heads, nn.ModuleDict):
            return {name: head(features) for name, head in self.heads.items()}
        return self.heads(features)


@unmoved_on_failure()
def graft(
    parts: nn.Module | Mapping[str, nn.Module], heads: Head | Mapping[str, Head], *, inputs: Inputs | None = None
) -> nn.Module:
    """Return a network of one or several backbones with one or several heads; it shares their weights.

    The output of each backbone becomes a vector (maps and tokens are averaged); the heads take these concatenated.

    Args:
        parts: A backbone, or several by name. Cut their classifiers off first, as with `truncate(model, drop=1)`.
        heads: A head, or several by name (the network then gives a dict); each a module, or a number of classes.
        inputs: What the backbones take; guessed where not given, see `summary`.

    Raises:
        EditError: A backbone gives no single tensor, a head does not fit, or backbones are on different devices.
            Nothing was changed.

    >>> a, b = nn.Linear(4, 3), nn.Linear(4, 5)
    >>> both = graft({"a": a, "b": b}, {"colour": 2, "kind": 7})
    >>> {name: tuple(scores.shape) for name, scores in both(torch.zeros(1, 4)).items()}
    {'colour': (1, 2), 'kind': (1, 7)}
    """
    check_arguments(graft, locals())
    named = dict(parts) if isinstance(parts, Mapping) else {"backbone": parts}
    if not named or (isinstance(heads, Mapping) and not heads):
        raise EditError("a graft needs at least one backbone and one head. Nothing was changed.")
    for part in named.values():
        require_editable(part)
    devices = {str(parameter.device) for part in named.values() for parameter in part.parameters()}
    if len(devices) > 1:
        raise EditError(f"the backbones are on {', '.join(sorted(devices))}. Move them to one device first.")
    first = next(iter(named.values()))
    width = sum(_vector_width(output_shape(part, inputs)) for part in named.values())
    modules = _head_modules(heads, width, first)
    for name, head in modules.items():
        _require_fit(head, name, width)
    grafted = Grafted(named, modules if isinstance(heads, Mapping) else modules[""])
    arguments = {"parts": list(named), "heads": modules, "has_names": grafted.has_names}
    attach_joined(grafted, "graft", tuple(named.values()), arguments)
    return in_mode(attach(grafted, preprocessing=preprocessing_of(first)), first.training)


def rebuild_grafted(parts: tuple[nn.Module, ...], arguments: dict[str, Any], *, trust_code: bool) -> nn.Module:
    """Build a graft again from its parts and its recipe."""
    texts = arguments["heads"]
    heads: Any = {name: construct(text, trust_code=trust_code) for name, text in texts.items()}
    named = dict(zip(arguments["parts"], parts, strict=True))
    return Grafted(named, heads if arguments["has_names"] else heads[""])


def as_vectors(x: torch.Tensor) -> torch.Tensor:
    """Return one vector (N, D) for each image: maps (N, C, H, W) and tokens (N, T, D) are averaged.

    >>> as_vectors(torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 3])
    """
    if x.ndim == 4:
        return x.mean((2, 3))
    return x.mean(1) if x.ndim == 3 else x.flatten(1)


def _vector_width(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        raise EditError(f"a backbone gives {shape}, expected one vector for each input, (N, D). Nothing was changed.")
    return as_vectors(torch.empty(shape, device="meta")).shape[1]


def _head_modules(heads: Head | Mapping[str, Head], width: int, model: nn.Module) -> dict[str, nn.Module]:
    """Return the heads as modules by name, under the empty name where there is one without; numbers become layers."""
    named = heads if isinstance(heads, Mapping) else {"": heads}
    modules = {}
    for name, head in named.items():
        layer = classifier((1, width), head) if isinstance(head, int) and not isinstance(head, bool) else head
        (modules[name],) = fitted(model, [layer])
    return modules


def _require_fit(head: nn.Module, name: str, width: int) -> None:
    taken = getattr(head, "in_features", width)
    if taken not in (0, width):  # 0: a lazy layer
        place = f" '{name}'" if name else ""
        raise EditError(
            f"the head{place} ({type(head).__name__}) takes {taken} features, the backbones give {width} together. "
            "Give its number of classes, or a layer of that width. Nothing was changed."
        )
