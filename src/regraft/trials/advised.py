"""The options that `advise` gives for the training photos of a run."""

from regraft.advice.advise_model import advise
from regraft.data.photos import Photos
from regraft.trials.bench import Bench
from regraft.trials.ways import Options, stage_config


def advised_stages(bench: Bench, few: Photos, epochs: int, seed: int) -> tuple[tuple[Options, ...], float]:
    """Return the options that the advice for some photos gives, and the seconds that it took.

    Batch norms stay frozen, as in all ways that train more than a head. Where nothing can be determined, as with one
    photo of a class, the head alone is trained.
    """
    config = stage_config(bench.config, {"epochs": epochs}, seed)
    model = bench.network(config).model
    advice = advise(model, (few, bench.validation), config=config, trust_code=bench.trust_code, progress=False)
    norms = {"freeze": bench.layers.norms} if advice.options and bench.layers.norms else {}
    return ({**advice.options, **norms, "epochs": epochs},), advice.seconds
