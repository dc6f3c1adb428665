"""Gradual unfreezing inside the loops of Lightning and Hugging Face: the same `Schedule`, called by their callbacks.

Neither library is needed to import this module.
"""

from typing import Any

from regraft.arguments import check_arguments
from regraft.freezing.schedule import Schedule


def lightning_callback(schedule: Schedule | str, **rates: Any) -> Any:
    """Return a Lightning callback that thaws layers as epochs go by.

    Call `schedule.start(module.model)` before the optimizer is built, which must hold the trainable parameters alone
    (`configure_optimizers` with `build_optimizer`). Lightning's own `BackboneFinetuning` knows one backbone and one
    epoch; this takes any stages.

    Args:
        schedule: Stages, or their text as in `"head:3,layer4:5,all:10"`.
        **rates: `lr` and whatever else `param_groups` takes, for the layers that join.

    Raises:
        ImportError: Lightning is not installed.

    Source: https://lightning.ai/docs/pytorch/stable/extensions/callbacks.html
    """
    check_arguments(lightning_callback, locals())
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]

    stages = Schedule.parse(schedule) if isinstance(schedule, str) else schedule

    class GradualUnfreezing(Callback):
        """Thaws layers at the beginning of an epoch."""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            """Thaw what joins with this epoch."""
            running = [config.scheduler for config in trainer.lr_scheduler_configs]
            model = getattr(pl_module, "model", pl_module)
            for optimizer in trainer.optimizers:
                stages.advance(
                    trainer.current_epoch + 1, model, optimizer, scheduler=running[0] if running else None, **rates
                )

    return GradualUnfreezing()


def trainer_callback(schedule: Schedule | str, **rates: Any) -> Any:
    """Return a callback for Hugging Face's `Trainer` that thaws layers as epochs go by.

    Call `schedule.start(model)` before the `Trainer` is made: its optimizer then holds the trainable parameters alone.

    Args:
        schedule: Stages, or their text as in `"head:3,layer4:5,all:10"`.
        **rates: `lr` and whatever else `param_groups` takes, for the layers that join.

    Raises:
        ImportError: transformers is not installed.

    Source: https://huggingface.co/docs/transformers/main_classes/callback
    """
    check_arguments(trainer_callback, locals())
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]

    stages = Schedule.parse(schedule) if isinstance(schedule, str) else schedule

    class GradualUnfreezing(TrainerCallback):
        """Thaws layers at the beginning of an epoch."""

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Thaw what joins with this epoch."""
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # accelerate wraps it
            scheduler = getattr(kwargs.get("lr_scheduler"), "scheduler", kwargs.get("lr_scheduler"))
            epoch = round(state.epoch or 0) + 1
            stages.advance(epoch, kwargs["model"], optimizer, scheduler=scheduler, **rates)

    return GradualUnfreezing()
