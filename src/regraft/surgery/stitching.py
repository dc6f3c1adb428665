"""Join the front of one network to the back of another."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from regraft.anatomy.inputs import Inputs, Shape, guess_input_size
from regraft.anatomy.modes import evaluation_mode, in_mode, unmoved_on_failure
from regraft.anatomy.paths import layer_at
from regraft.arguments import check_arguments, check_weights
from regraft.card import attach, card_of
from regraft.errors import EditError, ModelError
from regraft.surgery.adapters import ClassToken, adapter_for
from regraft.surgery.checks import attach_joined, prove, require_editable
from regraft.surgery.edits import without_rest
from regraft.surgery.fitting import output_shape, place
from regraft.surgery.layer_text.build import construct
from regraft.surgery.tail import tail
from regraft.zoo import preprocessing_of

Batches = Iterable[torch.Tensor | tuple[Any, ...] | list[Any]]
RIDGE = 1e-6  # relative to the mean of the Gram matrix's diagonal


class Stitched(nn.Module):
    """The front of one network, an adapter, and the back of another."""

    def __init__(self, front: nn.Module, adapter: nn.Module, back: nn.Module) -> None:
        super().__init__()
        self.front, self.adapter, self.back = front, adapter, back

    def forward(self, x: torch.Tensor) -> Any:  # noqa: D102
        return self.back(self.adapter(self.front(x)))


@unmoved_on_failure()
def stitch(
    front: nn.Module,
    back: nn.Module,
    *,
    cut: tuple[str, str],
    adapter: nn.Module | str = "auto",
    batches: Batches | None = None,
    inputs: Inputs | None = None,
) -> nn.Module:
    """Return a network that begins as `front` and ends as `back`, whose weights it shares.

    The adapter between them is chosen by the shapes of `front`'s output and `back`'s input at the cuts (see
    `adapter_for`). With `batches` its weights are fitted in closed form: its outputs are, in the least squares sense,
    the inputs that the back had for the same images.

    Args:
        front: The network to begin with.
        back: The network to end with.
        cut: Path of the last layer that is taken of `front`, and path of the layer of `back` after which it goes on.
        adapter: `"auto"`, `"none"`, or a module of your own.
        batches: Inputs (N, …) of `front`, or pairs that begin with them; resized and normalized anew for `back`.
        inputs: What `front` takes, for the check; guessed where not given, see `summary`.

    Raises:
        SelectionError: A path names no layer.
        EditError: The networks are on different devices or in different dtypes, a skip connection crosses a cut, or the
            shapes do not fit. Nothing was changed.

    >>> a = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> b = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    >>> stitch(a, b, cut=("1", "1"))(torch.zeros(1, 4)).shape
    torch.Size([1, 3])
    """
    check_arguments(stitch, locals())
    for part, path in ((front, cut[0]), (back, cut[1])):
        require_editable(part)
        layer_at(part, path)
    _require_alike(front, back)
    try:
        head, seen = without_rest(front, after=cut[0], inputs=inputs), without_rest(back, after=cut[1])
    except ModelError as error:
        raise EditError(f"cannot stitch at '{cut[0]}' and '{cut[1]}': {error} Nothing was changed.") from error
    rest = tail(back, cut[1])
    given, wanted = output_shape(head, inputs), output_shape(seen)
    is_fitted = batches is not None
    own = adapter if isinstance(adapter, nn.Module) else _chosen(adapter, given, wanted, is_fitted=is_fitted)
    stitched = Stitched(head, in_mode(place(own, front), front.training), rest)
    try:
        prove(stitched, front, f"stitch at '{cut[0]}' and '{cut[1]}'", inputs)
    except EditError as error:
        raise EditError(
            f"cannot stitch at '{cut[0]}' and '{cut[1]}': the front gives {given}, the back expects {wanted}. {error} "
            'Pass adapter="auto".'
        ) from error
    if batches is not None:
        check_weights(stitch, "front", front)
        check_weights(stitch, "back", back)
        fit_adapter(stitched, seen, batches)
    arguments = {"cut": cut, "adapter": adapter, "given": given, "wanted": wanted, "is_fitted": is_fitted}
    attach_joined(stitched, "stitch", (front, back), arguments)
    known = card_of(back)  # whose outputs these are
    return attach(stitched, preprocessing=preprocessing_of(front), classes=known.classes, task=known.task)


@torch.no_grad()
def fit_adapter(stitched: Stitched, target: nn.Module, batches: Batches) -> None:
    """Set the weights of a stitched network's adapter, in place, so that it gives what `target` gives.

    Solved by normal equations in float64 with a ridge of `RIDGE`, summed up batch by batch; a batch norm after the
    solved layer is made to change nothing, and a class token becomes the mean of those that `target` gives.

    Args:
        stitched: The network.
        target: What the back used to see: its network, cut where it goes on.
        batches: Inputs of the front, or pairs that begin with them.

    Raises:
        EditError: The adapter has no layer that can be fitted, or there are no batches.
    """
    layers = list(stitched.adapter) if isinstance(stitched.adapter, nn.Sequential) else []
    position = next((i for i, layer in enumerate(layers) if _is_linear(layer)), None)
    if position is None:
        raise EditError("the adapter has no linear layer or 1×1 convolution that could be fitted. Leave out batches.")
    solved: Any = layers[position]
    gram, product, outputs, tokens = None, None, [], []
    with evaluation_mode(stitched), evaluation_mode(target):
        for batch in batches:
            x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(x, torch.Tensor):
                raise EditError(
                    f"one of the batches is a {type(x).__name__}, expected a tensor, or a pair that begins with one. "
                    "Nothing was changed."
                )
            try:
                rows = stitched.front(x)
                for layer in layers[:position]:
                    rows = layer(rows)
                wanted = target(_seen_by(target, x, stitched))
                if any(isinstance(layer, ClassToken) for layer in layers):
                    tokens.append(wanted[:, :1].mean(0, keepdim=True))
                    wanted = wanted[:, 1:]
                # One row for each position of each image, as the layer sees it.
                rows = _channels_last(rows, solved).flatten(0, -2)
                goal = _channels_last(wanted, solved).reshape(len(rows), -1)
                if goal.shape[1] != len(solved.weight):
                    raise ValueError(
                        f"{len(rows)} places of the front do not meet the shape {tuple(wanted.shape)} of the back"
                    )
            except Exception as error:  # the user's networks on the user's inputs
                reason = str(error).partition("\n")[0]
                raise EditError(
                    f"cannot fit the adapter on a batch of shape {tuple(x.shape)}: {reason}. Give batches that the "
                    "front takes, of the size that both networks are made for. Nothing was changed."
                ) from error
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1).double()
            gram = rows.T @ rows if gram is None else gram + rows.T @ rows
            product = rows.T @ goal.double() if product is None else product + rows.T @ goal.double()
            outputs.append(goal)
    if gram is None or product is None:
        raise EditError("there are no batches to fit the adapter on. Give at least one.")
    if not (gram.isfinite().all() and product.isfinite().all()):
        raise EditError("what the networks give for these batches is not finite. Give other batches. Nothing changed.")
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram + ridge, product).T  # (out, in + 1)
    solved.weight.copy_(solution[:, :-1].reshape(solved.weight.shape))
    solved.bias.copy_(solution[:, -1])
    for layer in layers[position + 1 :]:
        if isinstance(layer, nn.BatchNorm2d):
            _neutralize(layer, torch.cat(outputs))
        if isinstance(layer, ClassToken):
            layer.token.copy_(torch.stack(tokens).mean(0))


def rebuild_stitched(parts: tuple[nn.Module, ...], arguments: dict[str, Any], *, trust_code: bool) -> nn.Module:
    """Build a stitched network again from its parts and its recipe."""
    front, back = parts
    text = arguments["adapter"]
    if text in ("auto", "none"):
        given, wanted = tuple(arguments["given"]), tuple(arguments["wanted"])
        adapter: nn.Module = _chosen(text, given, wanted, is_fitted=arguments["is_fitted"])
    else:
        adapter = construct(text, trust_code=trust_code)
    first, last = arguments["cut"]
    return Stitched(without_rest(front, after=first), adapter, tail(back, last))


def _chosen(name: str, given: Shape, wanted: Shape, *, is_fitted: bool) -> nn.Module:
    if name == "none":
        return nn.Sequential(nn.Identity())
    if name != "auto":
        raise EditError(f"no adapter '{name}'. Expected 'auto', 'none' or a module. Nothing was changed.")
    return adapter_for(given, wanted, is_fitted=is_fitted)


def _require_alike(front: nn.Module, back: nn.Module) -> None:
    for what, of in (("device", lambda p: p.device), ("dtype", lambda p: p.dtype)):
        in_front, in_back = ({of(p) for p in part.parameters() if p.is_floating_point()} for part in (front, back))
        if in_front and in_back and in_front != in_back:
            names = [", ".join(sorted(map(str, values))) for values in (in_front, in_back)]
            raise EditError(
                f"cannot stitch networks of different {what}s: the front has {names[0]}, the back {names[1]}. "
                f"Move one of them first, as in back.to(…). Nothing was changed."
            )


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1})


def _seen_by(target: nn.Module, x: torch.Tensor, stitched: Stitched) -> torch.Tensor:
    """Return the front's inputs in the size and with the normalization that the back's network takes."""
    size = guess_input_size(target)
    if x.ndim != 4 or len(size) != 4:
        return x
    front, back = preprocessing_of(stitched.front), preprocessing_of(target)
    if front.channels == back.channels == x.shape[1]:
        for preprocessing, is_undone in ((front, True), (back, False)):
            mean = torch.tensor(preprocessing.mean, device=x.device).view(-1, 1, 1)
            std = torch.tensor(preprocessing.std, device=x.device).view(-1, 1, 1)
            x = x * std + mean if is_undone else (x - mean) / std
    return F.interpolate(x, size=size[2:], mode="bilinear", align_corners=False, antialias=True)


def _channels_last(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    return x.permute(0, 2, 3, 1) if isinstance(layer, nn.Conv2d) and x.ndim == 4 else x


def _neutralize(norm: nn.BatchNorm2d, outputs: torch.Tensor) -> None:
    """Make a batch norm the identity in evaluation mode, and in training mode for batches like these."""
    mean, variance = outputs.mean(0), outputs.var(0, unbiased=False)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt())
    norm.bias.copy_(mean)
