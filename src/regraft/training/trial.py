"""Try network and loss on one batch before anything is trained or written."""

import torch
from torch import nn

from regraft.anatomy.modes import evaluation_mode
from regraft.errors import ConfigError, LossError, ModelError
from regraft.training.config import TrainConfig
from regraft.training.loop import Engine, Inputs, main_output, run
from regraft.training.losses import Loss, check_loss
from regraft.training.material import Material, first_batch
from regraft.training.weight_types import type_names


def try_one_batch(
    model: nn.Module, live: nn.Module, material: Material, criterion: Loss, engine: Engine, config: TrainConfig
) -> None:
    """Run the live part and the loss on one batch, so that what does not fit is said before the first epoch.

    Raises:
        ModelError: The network fails on it, or gives another number of scores than there are classes.
        ConfigError: The inputs cannot be mixed, and that was asked for.
        LossError: The loss fails, or is not one number.
    """
    inputs, targets = first_batch(material.train)
    targets = targets.to(engine.device)
    if config.mixup and not all(one.is_floating_point() for one in _several(inputs)):
        raise ConfigError(
            f"--mixup {config.mixup:g} mixes images or features of floating numbers, and the inputs are "
            f"{type_names(_several(inputs))}. Leave the option out, or give inputs that are scaled."
        )
    with evaluation_mode(live), torch.no_grad(), engine.autocast():
        try:
            output = main_output(run(live, inputs, engine))
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(
                f"{type(model).__name__} fails on a batch of shape {_shapes(inputs)} ({type_names(_several(inputs))}; "
                f"weights in {type_names(model.parameters())}): {reason}. Give inputs of the shape and type that it "
                "was made for."
            ) from error
        if material.task == "classification" and output.ndim == 2:
            known = material.classes is not None
            wanted = len(material.classes) if material.classes is not None else int(targets.max()) + 1
            if output.shape[1] < wanted or (known and output.shape[1] != wanted):
                raise ModelError(
                    f"{type(model).__name__} gives {output.shape[1]} scores, the data has {wanted} classes. "
                    f"Use model = regraft.replace_head(model, {wanted})."
                )
        try:
            loss = criterion(output, targets)
        except Exception as error:  # of anybody's code
            reason = str(error).partition("\n")[0]
            advice = "Use model = regraft.replace_head(model, 1)." if material.task == "regression" else "Pass another."
            raise LossError(
                f"the loss fails on scores of shape {tuple(output.shape)} ({type_names([output])}) and targets of "
                f"shape {tuple(targets.shape)} ({type_names([targets])}): {reason}. {advice}"
            ) from error
        check_loss(loss)


def _several(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (inputs,) if isinstance(inputs, torch.Tensor) else inputs


def _shapes(inputs: Inputs) -> str:
    return ", ".join(str(tuple(one.shape)) for one in _several(inputs))
