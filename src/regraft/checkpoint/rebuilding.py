"""Build the architecture that a recipe describes."""

import contextlib
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from regraft.anatomy.modes import preserved_randomness
from regraft.card import Recipe, Source, attach
from regraft.checkpoint.recipes.library_source import build_source
from regraft.checkpoint.recipes.transformers_config import PREFIX
from regraft.errors import EditError, ModelError, RegraftError
from regraft.surgery.grafting import rebuild_grafted
from regraft.surgery.layer_text.build import construct
from regraft.surgery.layer_text.parse import shortened
from regraft.surgery.recipe import apply_step
from regraft.surgery.stitching import rebuild_stitched
from regraft.zoo import PYTHON, build

MAX_STEPS = 64  # in a recipe; each costs a shape-only run
MAX_PARTS = 32
# The functions with which constructors initialize parameters: methods of tensors, and torch.nn.init. All of them return
# the tensor that they fill, which is what lets `_SkipInitialization` answer in their place.
# fmt: off
FILLS = frozenset((
    "normal_", "uniform_", "fill_", "zero_", "copy_", "erfinv_", "mul_", "div_", "add_", "sub_", "clamp_", "constant_",
    "ones_", "zeros_", "eye_", "dirac_", "trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_",
    "kaiming_normal_", "orthogonal_", "sparse_",
))
# fmt: on


def rebuild(recipe: Recipe, *, trust_code: bool = False, unset: bool = False) -> nn.Module:
    """Build the architecture that a recipe describes, with fresh weights; the random state is preserved.

    Args:
        recipe: A source and edits.
        trust_code: Whether the user's own code may be imported.
        unset: Whether parameters may stay uninitialized, because the caller overwrites all of them or reads none. This
            saves most of the time. Buffers are always initialized, as some of them are in no file.

    Raises:
        ModelError: The source is unknown here.
        TrustError: The source is the user's own code and `trust_code` is false.
        EditError: A step does not fit.
    """
    # With trusted code, the recipe may run anything, so limits on it would have no effect.
    if not trust_code:
        _require_bounded(recipe)
    # Initialization is skipped only if nothing reads the values: layers given as text, stitched parts and a user's own
    # constructors may compute with their weights, and so do edits such as `replace_stem`.
    is_plain = not recipe.source.layers and not recipe.source.parts and not recipe.source.name.startswith(PYTHON)
    is_blind = is_plain and all(step.operation in ("replace", "replace_head") for step in recipe.steps)
    with preserved_randomness():
        # The steps lie outside of the interception: a new head is initialized as always, which costs little.
        with _SkipInitialization() if unset and is_blind else contextlib.nullcontext():
            model = _from_source(recipe.source, trust_code)
        for step in recipe.steps:
            model = apply_step(model, step, trust_code=trust_code)
    return attach(model, recipe=recipe)


def _from_source(source: Source, trust_code: bool) -> nn.Module:
    """Build the network that a recipe starts from.

    Raises:
        ModelError: The source is unknown, or its parts cannot be joined.
    """
    if source.layers:
        return construct(source.layers, trust_code=trust_code)
    if not source.parts and (source.arguments or source.name.startswith(PREFIX)):
        return build_source(source)
    if not source.parts:
        return build(source.name, trust_code=trust_code)
    join = {"stitch": rebuild_stitched, "graft": rebuild_grafted}.get(source.name)
    if join is None:
        raise ModelError(f"a recipe puts networks together by '{source.name}', expected stitch or graft.")
    parts = tuple(rebuild(part, trust_code=trust_code) for part in source.parts)
    try:
        return join(parts, source.arguments, trust_code=trust_code)
    except RegraftError:
        raise
    except Exception as error:  # a recipe comes from a file, so its arguments may be of any type
        raise ModelError(
            f"a recipe cannot put its {len(parts)} networks together by {source.name}: {type(error).__name__}: "
            f"{str(error)[:200]}. Get or make the file again."
        ) from error


def _require_bounded(recipe: Recipe) -> None:
    """Refuse a recipe whose cost has no reasonable limit.

    Raises:
        EditError: It has too many steps or parts, or selects layers by a regular expression, whose time is unbounded.
    """
    # An explicit list instead of recursion: recipes nest as deep as the file says.
    recipes, steps, waiting = 0, 0, [recipe]
    while waiting:
        current = waiting.pop()
        recipes, steps = recipes + 1, steps + len(current.steps)
        waiting += current.source.parts
        slow = next((step for step in current.steps if str(step.arguments.get("path")).startswith("re:")), None)
        if slow is not None:
            raise EditError(
                f"a recipe names layers by a regular expression ('{shortened(str(slow))}'), which it may not. "
                "Name them one by one."
            )
        if recipes > MAX_PARTS or steps > MAX_STEPS:
            raise EditError(
                f"a recipe has more than {MAX_STEPS} steps or {MAX_PARTS} parts, which are not carried out. "
                "Keep the weights alone, and use load_weights with a model of your own."
            )


class _SkipInitialization(TorchFunctionMode):
    """Skips the initialization of parameters while a network of torchvision or timm is built.

    Initialization takes most of the time of building, and the system does not provide memory until it is written to.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch, or return its target unchanged if it would initialize a parameter."""
        kwargs = kwargs or {}
        # Methods have their tensor first; torch.nn.init passes itself on by keyword, with the name "tensor".
        target = args[0] if args else kwargs.get("tensor")
        # Parameters only: buffers and temporary tensors, such as timm's drop-path rates, keep their values.
        if isinstance(target, nn.Parameter) and getattr(func, "__name__", "") in FILLS:
            return target
        return func(*args, **kwargs)
