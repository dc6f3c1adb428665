"""The advice for one network: build it, pass the photos, probe, measure a step, decide, and keep what was computed."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regraft.advice.activations import Activations, OutOfBudgetError, PooledExtractor, pooled_activations
from regraft.advice.decision import Decision, decide
from regraft.advice.depths import BlockBoundary, list_boundaries
from regraft.advice.gradients import StepMeasurement, measure_step
from regraft.advice.prepared import prepare_training
from regraft.advice.probes import Probe, count_folds, logme, probe
from regraft.advice.result import Advice
from regraft.advice.rows import describe_depths
from regraft.anatomy.model_facts import ModelFacts
from regraft.checkpoint.create import is_checkpoint
from regraft.data.photos import Photos
from regraft.data.samples import Listing
from regraft.data.transforms import augmentation, normalize
from regraft.errors import DataError, EditError, ModelError
from regraft.freezing.flags import freeze, unfreeze
from regraft.frontier.cache.store import Store
from regraft.progress import Progress
from regraft.training.checks.weight_types import compute_for
from regraft.training.config import TrainConfig
from regraft.training.heads.solved_head import is_solvable, solve_head
from regraft.training.losses import build_loss
from regraft.training.setup import check_options, prepare_model
from regraft.training.steps.compute import ComputeContext, channels_last

STEP_PHOTOS, STEP_BATCHES = 12, 2  # of the gradients and of the seconds of an epoch


@dataclass
class Question:
    """What is asked about one network.

    Attributes:
        model: A name, a checkpoint or a module.
        data: As in `advise`.
        listing: The data, where it was listed.
        config: Options of the training.
        limit_s: Seconds for advice and training; None: no limit.
        layers: Where the frozen part may end; None: evenly spaced.
        trust_code: Whether custom code may be imported.
        progress: Reports progress.
    """

    model: nn.Module | str | Path
    data: Any
    listing: Listing | None
    config: TrainConfig
    limit_s: float | None
    layers: Sequence[str] | None
    trust_code: bool
    progress: Progress

    def answer(self) -> Advice:
        """Return the advice.

        Raises:
            InputError: The network or the data is invalid.
        """
        began = time.perf_counter()
        facts, compute, is_partly_frozen = self._build()
        train, validation = self._photos(facts)
        outputs = len(train.classes) if train.classes is not None else 1
        undetermined: list[str] = []
        boundaries = list_boundaries(facts, self.layers)
        targets = torch.tensor([sample.target for sample in train.samples])
        activations = self._pass(facts, boundaries, train, compute, undetermined)
        probes: dict[str, Probe] = {}
        logmes: dict[str, float] = {}
        step = None
        if activations is not None:
            targets = torch.tensor([sample.target for sample in activations.photos.samples])
            probes, logmes = self._probe(activations, targets, outputs, undetermined)
            step = self._measure(facts, boundaries, activations, targets, outputs, compute, undetermined)
        depths = describe_depths(facts, boundaries, probes, logmes, step, len(train), self.config.batch_size)
        spent_s = time.perf_counter() - began
        decision = (
            decide(
                depths,
                probes,
                logmes,
                photos=len(targets),
                epochs=self.config.epochs,
                limit_s=max(0.0, self.limit_s - spent_s) if self.limit_s is not None else None,
            )
            if boundaries
            else Decision(None, "open", "its blocks could not be told apart")
        )
        options = self._options(boundaries, decision, is_partly_frozen)
        if activations is not None and decision.index is not None:
            self._keep(facts, boundaries, decision, train, validation, activations, compute, undetermined)
        return Advice(
            model=str(self.model) if not isinstance(self.model, nn.Module) else type(self.model).__name__,
            data=str(self.data) if isinstance(self.data, (str, Path)) else "",
            task="regression" if train.classes is None else "classification",
            photos=len(targets),
            classes=outputs,
            chance=next((known.chance for known in probes.values()), None),
            depths=depths,
            recommended=depths[decision.index] if decision.index is not None else None,
            certainty=decision.certainty,
            reason=decision.reason,
            would_change=decision.would_change,
            undetermined=tuple(undetermined),
            options=options,
            flags=as_flags(options),
            seconds=time.perf_counter() - began,
            pass_s=activations.seconds if activations is not None else 0.0,
        )

    def _build(self) -> tuple[ModelFacts, ComputeContext, bool]:
        """Build the network, or copy the caller's, and say whether layers of it are frozen as it comes."""
        config, listing = self.config, self.listing
        check_options(config, listing.task if listing is not None else None, trust_code=self.trust_code)
        if isinstance(self.model, nn.Module):
            source: nn.Module | str = copy.deepcopy(self.model)
        else:
            source = str(self.model)
            config = config.updated(model=source)
        is_new = isinstance(source, str) and not is_checkpoint(source)
        with self.progress.status(f"preparing {source if isinstance(source, str) else 'the network'}"):
            # A pretrained network by name would be frozen here, which is no wish of the caller's.
            prepared = config.updated(unfreeze_all=True) if is_new else config
            facts = prepare_model(source, listing, prepared, self.progress, trust_code=self.trust_code)
        is_partly_frozen = not all(parameter.requires_grad for parameter in facts.model.parameters())
        compute = compute_for(facts.model, config.device, config.precision)
        compute = replace(compute, has_channels_last=config.fast)
        facts.model.to(compute.device)
        return facts, compute, is_partly_frozen

    def _photos(self, facts: ModelFacts) -> tuple[Photos, Photos]:
        """Return training and validation photos in their plain view."""
        plain = augmentation("none", facts.preprocessing)
        if self.listing is not None:
            listing = self.listing
            train, validation = (
                Photos(samples, facts.preprocessing, plain, listing.classes)
                for samples in (listing.train, listing.validation)
            )
            return train, validation
        pair = self.data if isinstance(self.data, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(part, Photos) for part in pair):
            raise DataError(
                "advise needs photos: a folder, shards, a .csv table, datasets of Hugging Face, or a pair (train, "
                f"validation) of Photos; data is a {type(self.data).__name__}. Pass one of these."
            )
        return pair[0].augmented(augmentation("none", pair[0].preprocessing)), pair[1]

    def _pass(
        self,
        facts: ModelFacts,
        boundaries: Sequence[BlockBoundary],
        train: Photos,
        compute: ComputeContext,
        undetermined: list[str],
    ) -> Activations | None:
        outputs = len(train.classes) if train.classes is not None else 0
        if not boundaries:
            undetermined.append(
                "The blocks of the network could not be told apart, as its forward cannot be followed or has no layer "
                "before its head: no depth between the head and everything was looked at, and nothing was probed."
            )
            return None
        if outputs == 1:
            undetermined.append("There is one class, so there is nothing to tell apart: nothing was probed.")
            return None
        set_flags(facts.model, boundaries[-1].layer)
        config = self.config
        try:
            extractor = PooledExtractor(
                facts,
                boundaries,
                len(train),
                self.limit_s,
                compute=compute,
                fast=config.fast,
                precision=config.cache_precision,
                keep_pixels=True,
                store=Store() if config.cache else None,
                progress=self.progress,
            )
            return pooled_activations(extractor, train, boundaries, "looking at each photo once")
        except OutOfBudgetError as error:
            undetermined.append(
                f"One pass over the {len(train)} photos would take about {error.seconds:.0f} s, more than the budget: "
                "nothing was probed. Parameters, memory and files do not depend on it."
            )
        except (ModelError, EditError) as error:
            undetermined.append(f"Nothing could be probed: {error}")
        return None

    def _probe(
        self, activations: Activations, targets: torch.Tensor, outputs: int, undetermined: list[str]
    ) -> tuple[dict[str, Probe], dict[str, float]]:
        known = {layer: rows for layer, rows in activations.by_layer.items() if bool(rows.isfinite().all())}
        if lost := [layer for layer in activations.by_layer if layer not in known]:
            undetermined.append(f"What {', '.join(map(repr, lost))} gives is not finite for some photo: not probed.")
        kinds = 2 if targets.is_floating_point() else len(targets.unique())
        if kinds < 2:
            undetermined.append("The photos that can be read are of one class, so nothing was probed.")
            return {}, {}
        values = {layer: logme(rows.double().numpy(), targets.numpy(), outputs) for layer, rows in known.items()}
        logmes = {layer: value for layer, value in values.items() if value is not None}
        if count_folds(targets) < 2:
            what = "one photo of a class" if not targets.is_floating_point() else f"{len(targets)} photos"
            undetermined.append(
                f"With {what} none can be left out, so the accuracy of no depth could be cross-validated."
            )
            return {}, logmes
        probes = {layer: probe(rows, targets, outputs, seed=self.config.seed) for layer, rows in known.items()}
        return {layer: measured for layer, measured in probes.items() if measured is not None}, logmes

    def _measure(
        self,
        facts: ModelFacts,
        boundaries: Sequence[BlockBoundary],
        activations: Activations,
        targets: torch.Tensor,
        outputs: int,
        compute: ComputeContext,
        undetermined: list[str],
    ) -> StepMeasurement | None:
        """Run a step with a head that is solved on the features: that of a new one is chance."""
        photos = activations.photos
        features = activations.by_layer.get(boundaries[-1].layer)
        if features is not None and not targets.is_floating_point():
            solve_into(facts.model, features, targets, outputs)
        count = min(STEP_PHOTOS * STEP_BATCHES, len(photos))
        chosen = torch.randperm(len(photos), generator=torch.Generator().manual_seed(self.config.seed))[:count]
        pixels = torch.stack([photos.views.of(index, photos.decoded(index), 0) for index in chosen.tolist()])
        inputs = normalize(pixels.to(compute.device), photos.preprocessing)
        if compute.input_dtype is not None:
            inputs = inputs.to(compute.input_dtype)
        labels = targets[chosen].to(compute.device)
        size = max(1, count // STEP_BATCHES)
        batches = list(zip(inputs.split(size)[:STEP_BATCHES], labels.split(size)[:STEP_BATCHES], strict=True))
        loss = build_loss(
            self.config.loss,
            "regression" if targets.is_floating_point() else "classification",
            trust_code=self.trust_code,
        )
        try:
            with channels_last(facts.model):
                return measure_step(facts.model, batches, loss, [boundary.layer for boundary in boundaries], compute)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            undetermined.append(f"Gradients and seconds could not be measured, as a step fails: {reason}")
            return None

    def _options(
        self, boundaries: Sequence[BlockBoundary], decision: Decision, is_partly_frozen: bool
    ) -> dict[str, Any]:
        if decision.index is None:
            return {}
        if decision.index == 0:
            return {"unfreeze_all": True}
        thaw = {"unfreeze_all": True} if is_partly_frozen else {}
        return {**thaw, "freeze_until": boundaries[decision.index - 1].layer}

    def _keep(
        self,
        facts: ModelFacts,
        boundaries: Sequence[BlockBoundary],
        decision: Decision,
        train: Photos,
        validation: Photos,
        activations: Activations,
        compute: ComputeContext,
        undetermined: list[str],
    ) -> None:
        assert decision.index is not None
        set_flags(facts.model, boundaries[decision.index - 1].layer if decision.index else None)
        try:
            prepare_training(facts, train, validation, activations, self.config, compute, self.progress)
        except ModelError as error:
            undetermined.append(f"What is frozen could not be computed once for the training: {error}")


def set_flags(model: nn.Module, layer: str | None) -> None:
    """Freeze a network until a layer, or nothing of it, as `fit` does with the options of the advice."""
    unfreeze(model)
    if layer is not None:
        freeze(model, until=layer)


def solve_into(model: nn.Module, features: torch.Tensor, targets: torch.Tensor, outputs: int) -> None:
    """Give a network whose head is one linear layer the head that is solved on features (N, D)."""
    heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.weight.requires_grad]
    if len(heads) != 1 or heads[0].in_features != features.shape[1] or heads[0].out_features != outputs:
        return
    if not is_solvable(len(features), features.shape[1], outputs):
        return
    solved = solve_head(features, targets, outputs)
    if solved is not None:
        with torch.no_grad():
            heads[0].weight.copy_(solved.weight)
            if heads[0].bias is not None:
                heads[0].bias.copy_(solved.bias)


def as_flags(options: dict[str, Any]) -> str:
    """Return options of `fit` as flags of `regraft train`."""
    texts = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        texts.append(flag if value is True else f"{flag} {value}")
    return " ".join(texts)
