"""The schedule inside other libraries' loops thaws the same layers at the same epochs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tiny
from regraft import Schedule, audit, build_optimizer
from regraft.freezing.callbacks import lightning_callback, trainer_callback

RATES = {"lr": 0.1, "backbone_lr": 0.01}
STAGES = "head:1,bn1:1,all:1"
EXPECTED = [{"fc.weight", "fc.bias"}, {"fc.weight", "fc.bias", "bn1.weight", "bn1.bias"}]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def batches() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, *tiny.batch("plain").shape[1:]), torch.arange(8) % 5


@pytest.mark.filterwarnings("ignore")
def test_lightning_callback_thaws_stage_by_stage(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    seen: list[set[str]] = []

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny.build("plain")

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            seen.append(trainable(self.model))
            assert audit(self.model, self.trainer.optimizers[0]) == []
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return build_optimizer("sgd", self.model, momentum=0.9, **RATES)

    task = Task()
    Schedule.parse(STAGES).start(task.model)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[lightning_callback(STAGES, **RATES)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, DataLoader(TensorDataset(*batches()), batch_size=8))
    assert seen == [*EXPECTED, {name for name, _ in task.model.named_parameters()}]


@pytest.mark.filterwarnings("ignore")
def test_trainer_callback_thaws_stage_by_stage(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    seen: list[set[str]] = []

    class Items(Dataset[dict[str, torch.Tensor]]):
        def __init__(self) -> None:
            self.inputs, self.targets = batches()

        def __len__(self) -> int:
            return len(self.inputs)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"inputs": self.inputs[index], "labels": self.targets[index]}

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny.build("plain")

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.append(trainable(self.net))
            logits = self.net(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    model = Wrapped()
    stages = "net.fc:1,net.bn1:1,all:1"
    rates = {"lr": 0.1}
    Schedule.parse(stages).start(model)
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Items(), callbacks=[trainer_callback(stages, **rates)]
    )
    trainer.train()
    assert seen == [*EXPECTED, {name for name, _ in model.net.named_parameters()}]
