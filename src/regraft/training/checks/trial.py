"""Try network and loss on one batch, before anything is trained or written."""

import torch
from torch import nn

from regraft.anatomy.modes import evaluation_mode
from regraft.errors import ConfigError, LossError, ModelError, RegraftError
from regraft.training.checks.targets import batch_loss, ignored_label
from regraft.training.checks.weight_types import type_names
from regraft.training.config import TrainConfig
from regraft.training.loop import main_output, run
from regraft.training.losses import Loss
from regraft.training.steps.compute import ComputeContext
from regraft.training.steps.micro_batch import as_tuple, require_learnable
from regraft.training.train_data import TrainData, first_batch, require_scores
from regraft.wording import for_caller, option


def try_one_batch(
    model: nn.Module,
    live: nn.Module,
    train_data: TrainData,
    criterion: Loss,
    compute: ComputeContext,
    config: TrainConfig,
) -> None:
    """Run the live part and the loss on one batch, to report errors before the first epoch.

    Raises:
        ModelError: The network fails on it, or its number of scores differs from that of classes.
        ConfigError: Mixup is set, and the inputs are not floating-point.
        LossError: The loss fails, or is not one number.
    """
    inputs, targets = first_batch(train_data.train)
    tensors, targets = as_tuple(inputs), targets.to(compute.device)
    if config.mixup and not all(tensor.is_floating_point() for tensor in tensors):
        raise ConfigError(
            f"{option('mixup', config.mixup)} mixes images or features of floating numbers, and the inputs are "
            f"{type_names(tensors)}. Leave the option out, or give inputs that are scaled."
        )
    require_learnable(live, lambda: run(live, inputs, compute), len(targets))
    with evaluation_mode(live), torch.no_grad(), compute.autocast():
        try:
            output = main_output(run(live, inputs, compute))
        except (RegraftError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # arbitrary user code: the network
            reason = str(error).partition("\n")[0] or type(error).__name__
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise ModelError(
                f"{type(model).__name__} fails on a batch of shape {shapes} ({type_names(tensors)}; "
                f"weights in {type_names(model.parameters())}): {reason}. Give inputs of the shape and type that it "
                "was made for."
            ) from error
        if train_data.task == "classification":
            require_scores(model, output, targets, train_data, ignored_label(criterion))
        try:
            batch_loss(criterion, output, targets)
        except RegraftError:
            raise
        except Exception as error:  # arbitrary user code: the loss
            reason = str(error).partition("\n")[0]
            one_output = for_caller(
                python="Use model = regraft.replace_head(model, 1).", command="Let the network end with one output."
            )
            advice = one_output if train_data.task == "regression" else "Pass another."
            raise LossError(
                f"the loss fails on scores of shape {tuple(output.shape)} ({type_names([output])}) and targets of "
                f"shape {tuple(targets.shape)} ({type_names([targets])}): {reason}. {advice}"
            ) from error
