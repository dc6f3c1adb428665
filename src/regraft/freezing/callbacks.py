"""Callbacks for Lightning and the `Trainer` of Hugging Face that unfreeze layers by a `Schedule`.

This module imports neither library.
"""

from typing import Any

from regraft.arguments import check_arguments
from regraft.freezing.schedule import Schedule


def lightning_callback(schedule: Schedule | str, **rates: Any) -> Any:
    """Return a Lightning callback that unfreezes layers by epoch.

    Call `schedule.start(module.model)` before the optimizer is built, which must contain only the trainable parameters
    (`configure_optimizers` with `build_optimizer`). Lightning's own `BackboneFinetuning` supports one backbone and one
    epoch; this callback supports any stages.

    Args:
        schedule: Stages, or their text as in `"head:3,layer4:5,all:10"`.
        **rates: `lr` and other arguments of `param_groups`, for the newly trainable layers.

    Raises:
        ImportError: Lightning is not installed.

    Source: https://lightning.ai/docs/pytorch/stable/extensions/callbacks.html
    """
    check_arguments(lightning_callback, locals())
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]

    stages = Schedule.parse(schedule) if isinstance(schedule, str) else schedule

    class GradualUnfreezing(Callback):
        """Unfreezes layers at the beginning of an epoch."""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            """Unfreeze the layers of the stage that begins with this epoch."""
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            model = getattr(pl_module, "model", pl_module)
            for optimizer in trainer.optimizers:
                scheduler = schedulers[0] if schedulers else None
                stages.advance(trainer.current_epoch + 1, model, optimizer, scheduler=scheduler, **rates)

    return GradualUnfreezing()


def trainer_callback(schedule: Schedule | str, **rates: Any) -> Any:
    """Return a callback for Hugging Face's `Trainer` that unfreezes layers by epoch.

    Call `schedule.start(model)` before the `Trainer` is created, so that its optimizer contains only trainable
    parameters.

    Args:
        schedule: Stages, or their text as in `"head:3,layer4:5,all:10"`.
        **rates: `lr` and other arguments of `param_groups`, for the newly trainable layers.

    Raises:
        ImportError: transformers is not installed.

    Source: https://huggingface.co/docs/transformers/main_classes/callback
    """
    check_arguments(trainer_callback, locals())
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]

    stages = Schedule.parse(schedule) if isinstance(schedule, str) else schedule

    class GradualUnfreezing(TrainerCallback):
        """Unfreezes layers at the beginning of an epoch."""

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Unfreeze the layers of the stage that begins with this epoch."""
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # accelerate wraps it
            scheduler = getattr(kwargs.get("lr_scheduler"), "scheduler", kwargs.get("lr_scheduler"))
            epoch = round(state.epoch or 0) + 1
            stages.advance(epoch, kwargs["model"], optimizer, scheduler=scheduler, **rates)

    return GradualUnfreezing()
