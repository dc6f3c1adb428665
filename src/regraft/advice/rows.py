"""One row for each depth, from what was measured."""

from collections.abc import Sequence

from regraft.advice.activations import PIXELS
from regraft.advice.depths import BlockBoundary
from regraft.advice.gradients import StepMeasurement, relative_gradient_norm
from regraft.advice.probes import Probe
from regraft.advice.result import EVERYTHING, HEAD_ONLY, DepthAdvice
from regraft.anatomy.model_facts import ModelFacts
from regraft.errors import ModelError

FLOAT_BYTES = 4
COPIES = 3  # of each trained weight beside itself: its gradient, and two moments of AdamW


def describe_depths(
    facts: ModelFacts,
    boundaries: Sequence[BlockBoundary],
    probes: dict[str, Probe],
    logmes: dict[str, float],
    step: StepMeasurement | None,
    photos: int,
    batch_size: int,
) -> tuple[DepthAdvice, ...]:
    """Return the depths from everything to the head alone.

    Args:
        facts: The network.
        boundaries: The boundaries, from the input to the head.
        probes: A probe by the path of its layer; under `pixels` that of the photos themselves.
        logmes: LogME by the same names.
        step: The measured step.
        photos: Number of training photos.
        batch_size: Photos in a step of the training.
    """
    parameters = dict(facts.model.named_parameters())
    whole = frozenset(name for name, _ in facts.model.named_parameters(remove_duplicate=False))
    trained = [whole, *(boundary.trained for boundary in boundaries)]
    rows = []
    for number, names in enumerate(trained):
        boundary = boundaries[number - 1] if number else None
        layer = boundary.layer if boundary else None
        after = trained[number + 1] if number + 1 < len(trained) else frozenset()
        measured = probes.get(layer or PIXELS)
        seconds = None if step is None else step.whole_s if layer is None else step.seconds.get(layer)
        size = sum(parameters[name].numel() for name in names if name in parameters)
        is_last = number == len(trained) - 1 and boundary is not None
        rows.append(
            DepthAdvice(
                name=EVERYTHING if layer is None else HEAD_ONLY if is_last else f"after {layer}",
                layer=layer,
                score=measured.score if measured else None,
                error=measured.error if measured else None,
                logme=logmes.get(layer or PIXELS),
                relative_gradient=(
                    relative_gradient_norm(step.gradients, facts.model, sorted(names - after)) if step else None
                ),
                trainable=size,
                epoch_s=seconds * photos if seconds is not None else None,
                memory_bytes=_memory(facts, layer, size, batch_size),
                checkpoint_bytes=_changed_bytes(facts, names),
            )
        )
    return tuple(rows)


def _memory(facts: ModelFacts, layer: str | None, trainable: int, batch_size: int) -> int | None:
    """Estimate the bytes of a step: all weights, copies of the trained ones, activations after the frozen part."""
    try:
        trace = facts.trace
    except ModelError:
        return None
    rows = next((call.input_shapes[0][0] for call in trace.calls if call.path == "" and call.input_shapes), 1)
    end = max((call.ended for call in trace.calls if call.path == layer), default=0) if layer else 0
    around = {call.path.rpartition(".")[0] for call in trace.calls}
    kept = sum(call.output_bytes for call in trace.calls if call.began >= end and call.path not in around)
    size = sum(parameter.numel() for parameter in facts.model.parameters())
    return (size + COPIES * trainable) * FLOAT_BYTES + kept // rows * batch_size


def _changed_bytes(facts: ModelFacts, names: frozenset[str]) -> int:
    """Return the bytes of the trained tensors, with the buffers of their layers (running statistics)."""
    owners = {name.rpartition(".")[0] for name in names}
    tensors = [parameter for name, parameter in facts.model.named_parameters() if name in names]
    tensors += [buffer for name, buffer in facts.model.named_buffers() if name.rpartition(".")[0] in owners]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
