"""Check a model for silent contradictions between its flags, the modes of its layers and its optimizer."""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from regraft.anatomy.heads import width_of
from regraft.anatomy.inputs import Inputs, arguments_for
from regraft.anatomy.mode_dependence import changes_while_training as changes_while_training
from regraft.anatomy.mode_dependence import is_pinned
from regraft.anatomy.model_facts import ModelFacts
from regraft.anatomy.modes import preserved_randomness
from regraft.arguments import check_arguments
from regraft.card import card_of
from regraft.display import block, some, table_html
from regraft.errors import ModelError
from regraft.freezing.pins import frozen_layers
from regraft.torch_internals import NormBase, tree_leaves

MAX_KINDS = 2  # that a line of a session has in full


@dataclass(frozen=True)
class Finding:
    """One problem; `str()` gives one line.

    Attributes:
        kind: A word to test for, such as `frozen-in-optimizer`.
        path: The parameter or the layer at fault.
        problem: What is wrong.
        fix: What to do, in a line.
    """

    kind: str
    path: str
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem} {self.fix}"


class Findings(list[Finding]):
    """A list of findings; a session shows it by kind, with a count and examples."""

    @property
    def by_kind(self) -> dict[str, list[Finding]]:
        """The findings of each kind that occurs."""
        groups: dict[str, list[Finding]] = {}
        for finding in self:
            groups.setdefault(finding.kind, []).append(finding)
        return groups

    def __repr__(self) -> str:
        rows: list[tuple[str, str]] = []
        kinds = list(self.by_kind.items())
        for kind, findings in kinds[:MAX_KINDS]:
            paths = some(finding.path for finding in findings)
            rows += [(kind, f"{len(findings)}: {paths} {findings[0].problem}"), ("", f"-> {findings[0].fix}")]
        rest = ", ".join(f"{kind} {len(findings)}" for kind, findings in kinds[MAX_KINDS:])
        return block(f"Findings: {len(self) or 'none'}", [*rows, ("and", rest)])

    def _repr_html_(self) -> str:
        rows = [
            (kind, f"{len(findings)}", some(finding.path for finding in findings), findings[0].problem, findings[0].fix)
            for kind, findings in self.by_kind.items()
        ]
        return table_html(
            f"Findings: {len(self) or 'none'}", ("kind", "count", "where", "what", "how to mend it"), rows
        )


def audit(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, inputs: Inputs | None = None
) -> Findings:
    """List what contradicts the freezing of `model`. Nothing is changed. Parameters are compared by identity.

    Reported are: frozen parameters in the optimizer, trainable ones missing from it, parameters in it twice or of
    another model; stale gradients; frozen layers that would still move (running statistics) or be random (dropout, drop
    path) because they are not pinned; layers that are still pinned although their flags were set to trainable by hand;
    running statistics that are not finite; and a head whose width differs from the number of classes.

    Given `inputs`, a copy of the model runs forward and backward on them once, in training mode. Then frozen tensors
    that this changed are reported as well, and trainable parameters without a gradient: layers that are never used, or
    that lie in a `torch.no_grad` block or before a `detach`.

    Args:
        model: Any module.
        optimizer: The optimizer that is to train it; None audits the model alone.
        inputs: A batch: a tensor, a tuple of positional inputs or a dict of keyword inputs. None: no run.

    Returns:
        A list of findings, empty where all is well. A session shows it by kind, with counts and examples.

    Raises:
        ModelError: The training forward, or the backward, fails on `inputs`. Nothing was changed.
    """
    check_arguments(audit, locals())
    return findings_of(ModelFacts(model), optimizer, inputs)


def findings_of(
    facts: ModelFacts, optimizer: torch.optim.Optimizer | None = None, inputs: Inputs | None = None
) -> Findings:
    """List what contradicts the freezing of a network; see `audit`."""
    model = facts.model
    findings = Findings(
        (
            *_stale_gradients(model),
            *_unpinned(model),
            *_still_pinned(model),
            *_broken_statistics(model),
            *_head(facts),
        )
    )
    if inputs is not None:
        findings += _after_a_step(model, inputs)
    if optimizer is not None:
        findings += _optimizer(model, optimizer)
    return findings


def _stale_gradients(model: nn.Module) -> Iterator[Finding]:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.grad is not None:
            yield Finding(
                "stale-gradient",
                name,
                "is frozen but has a gradient, which an optimizer that knows it would still apply.",
                f"Set model.get_parameter({name!r}).grad = None.",
            )


def _unpinned(model: nn.Module) -> Iterator[Finding]:
    frozen = frozen_layers(model)
    with_parameters = [path for path, layer in frozen if next(layer.parameters(), None) is not None]
    for path, layer in frozen:
        if (how := changes_while_training(layer)) is not None:
            frozen_already = path if path in with_parameters else next(iter(with_parameters), path)
            yield Finding(
                "unpinned",
                path,
                f"is frozen by its flags, but {how} in .train().",
                f"Call regraft.freeze(model, {frozen_already!r}), which pins all that is frozen.",
            )


def _still_pinned(model: nn.Module) -> Iterator[Finding]:
    frozen = {id(layer) for _, layer in frozen_layers(model)}
    trainable = next((name for name, parameter in model.named_parameters() if parameter.requires_grad), "*")
    for path, layer in model.named_modules():
        if is_pinned(layer) and id(layer) not in frozen:
            yield Finding(
                "still-pinned",
                path,
                "is trainable by its flags, but stays in evaluation mode.",
                f"Call regraft.unfreeze(model, 'params:{trainable}'), which unpins all that is trainable.",
            )


def _after_a_step(model: nn.Module, inputs: Inputs) -> Iterator[Finding]:
    before = {name: tensor.detach().clone() for name, tensor in _frozen_tensors(model).items()}
    copied = _after_backward(model, inputs)
    for name, tensor in _frozen_tensors(copied).items():
        if name in before and not _identical(before[name], tensor.detach()):
            yield Finding(
                "moved",
                name,
                "is frozen, but a forward in .train() changed it.",
                "Let the forward that writes to it ask whether it is frozen, or thaw the layer.",
            )
    for name, parameter in copied.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            yield Finding(
                "no-gradient",
                name,
                "is trainable, but gets no gradient in a training step: it is unused, or cut off by no_grad or detach.",
                f"Call regraft.freeze(model, 'params:{name}'), or let the outputs depend on it.",
            )


def _after_backward(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a copy of `model` that has run one forward and backward in training mode."""
    arguments = arguments_for(model, None, inputs)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        copied = copy.deepcopy(model).train()
        copied.zero_grad(set_to_none=True)
        with preserved_randomness(0), torch.enable_grad():
            batch = arguments.with_values(device)
            leaves = tree_leaves(copied(*batch.args, **batch.kwargs))
            outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            losses = [leaf.abs().mean() for leaf in outputs if leaf.requires_grad]
            if losses:
                torch.stack([loss.to(losses[0]) for loss in losses]).sum().backward()
    except Exception as error:  # the user's forward may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"{type(model).__name__} cannot be audited by a training step on these inputs: {reason}. Pass a batch that "
            "it can train on, or no inputs. Nothing was changed."
        ) from error
    return copied


def _frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = {path for path, _ in frozen_layers(model)}
    frozen: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    frozen |= {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[0] in layers}
    return {name: tensor for name, tensor in frozen.items() if not is_lazy(tensor)}


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())  # two NaN count as equal


def _broken_statistics(model: nn.Module) -> Iterator[Finding]:
    frozen = {path for path, _ in frozen_layers(model)}
    for name, buffer in model.named_buffers():
        layer = name.rpartition(".")[0]
        if layer not in frozen or not buffer.is_floating_point():
            continue
        is_statistic = isinstance(model.get_submodule(layer), NormBase)  # elsewhere, masks and limits are infinite
        if buffer.isnan().any() or (is_statistic and buffer.isinf().any()):
            yield Finding(
                "broken-statistics",
                name,
                "is frozen and holds NaN or infinity, so everything after it will, too.",
                "Load weights that are sound, or thaw the layer and train it.",
            )


def _head(facts: ModelFacts) -> Iterator[Finding]:
    classes = card_of(facts.model).classes
    if classes is None:
        return
    layers = dict(facts.model.named_modules(remove_duplicate=False))
    widths = {head.path: width_of(layers[head.path]) for head in facts.heads if head.path in layers}
    is_right = any(width is None or width % len(classes) == 0 for width in widths.values())  # several scores a class
    for path, width in widths.items() if not is_right else ():
        if width is not None:
            yield Finding(
                "head-width",
                path,
                f"gives {width} scores, but there are {len(classes)} classes.",
                f"Use model = regraft.replace_head(model, {len(classes)}).",
            )


def _optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Finding]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rebuild = "Build the optimizer again: regraft.build_optimizer(...)."
    counts = Counter(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    for name, parameter in model.named_parameters():
        count = counts[id(parameter)]
        if count > 1:
            yield Finding(
                "listed-twice", name, f"is {count} times in the optimizer, so each step counts double.", rebuild
            )
        if count and not parameter.requires_grad:
            moves = " and momentum or weight decay may still move it" if optimizer.state.get(parameter) else ""
            yield Finding("frozen-in-optimizer", name, f"is frozen, but in the optimizer{moves}.", rebuild)
        if not count and parameter.requires_grad:
            yield Finding("missing-from-optimizer", name, "is trainable, but the optimizer does not know it.", rebuild)
    strangers = sum(identity not in names for identity in counts)
    if strangers:
        yield Finding(
            "not-of-this-model",
            "optimizer",
            f"has {strangers} parameters that are not this model's (of a copy, or from before an edit).",
            rebuild,
        )
