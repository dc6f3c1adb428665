"""`advise`: which layers to freeze, and which of several networks to take, from one pass over the photos."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from torch import nn

from regraft.advice.budget import parse_budget
from regraft.advice.one_model import Question
from regraft.advice.ranking import rank
from regraft.advice.result import Advice, Ranking
from regraft.anatomy.modes import preserved_randomness
from regraft.arguments import check_arguments, check_path, check_weights
from regraft.console import progress_of
from regraft.errors import ConfigError
from regraft.progress import Progress
from regraft.torch_internals import defer_compiler
from regraft.training.config import TrainConfig
from regraft.training.train_data import list_if_known
from regraft.wording import option

DECIDED = ("freeze", "freeze_until", "unfreeze_all", "unfreeze")  # options that the advice gives


@overload
def advise(model: nn.Module | str, data: Any, **options: Any) -> Advice: ...
@overload
def advise(model: Sequence[nn.Module | str], data: Any, **options: Any) -> Ranking: ...
def advise(
    model: nn.Module | str | Sequence[nn.Module | str],
    data: Any,
    *,
    config: TrainConfig | None = None,
    budget: str | float | None = None,
    layers: Sequence[str] | None = None,
    trust_code: bool = False,
    progress: Progress | bool = True,
    **options: Any,
) -> Advice | Ranking:
    """Say from which layer on to train `model` on `data`, after one pass over the training photos.

    The pass gives the activations after each of the compared blocks, pooled to a vector a photo. A linear probe on each
    is cross-validated on the training photos; the validation photos are not looked at. One step of the whole network on
    a few photos gives the gradients and the seconds. What a training with the advised options would compute once is
    written into the cache, so that `fit(model, data, **advice.options)` decodes and computes nothing again. A network
    that is passed stays as it is.

    Args:
        model: A name, a checkpoint or a module, see `fit`; or several, which are ranked by the probes of their heads on
            the same photos and folds.
        data: A folder, shards or a table, datasets of Hugging Face, or a pair of decoded `Photos`; see `fit`.
        config: Options of the training that will follow, as one value.
        budget: Time that the advice may take with the training after it, as in `"10m"`, `"90s"`, `"2h"`, or in
            seconds; None: no limit.
        layers: Paths of layers: only after these may the frozen part end. None: up to five, evenly spaced over the
            blocks.
        trust_code: Whether custom code for a class may be imported.
        progress: See `fit`.
        **options: Fields of `TrainConfig`, which take precedence over `config`.

    Returns:
        The advice for one network, or the ranking of several.

    Raises:
        InputError: An argument or the data is invalid. Nothing was changed.
    """
    model = str(model) if isinstance(model, Path) else model
    check_arguments(advise, locals())
    listener, limit_s = progress_of(progress), parse_budget(budget)
    config = (config or TrainConfig()).updated(**options)
    if decided := next((name for name in DECIDED if getattr(config, name) != getattr(TrainConfig(), name)), None):
        raise ConfigError(f"{option(decided)} is what the advice gives. Leave it out.")
    if isinstance(data, (str, Path)):
        check_path(advise, "data", data)
        config = config.updated(data=str(data))
    models = [model] if isinstance(model, (str, nn.Module)) else list(model)
    if not models:
        raise ConfigError("model is an empty list. Name at least one network.")
    for number, entry in enumerate(models):
        if isinstance(entry, nn.Module):
            check_weights(advise, "model" if len(models) == 1 else f"model[{number}]", entry)
    with defer_compiler(), preserved_randomness(config.seed):
        with listener.status("looking for photos"):
            listing = list_if_known(data, config)
        share_s = limit_s / len(models) if limit_s is not None else None
        asked = [
            Question(entry, data, listing, config, share_s, layers, trust_code, listener).answer() for entry in models
        ]
    return asked[0] if isinstance(model, (str, nn.Module)) else rank(asked)
