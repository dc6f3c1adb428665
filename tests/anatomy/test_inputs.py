"""What a model is fed: several inputs, keywords, nested ones, and guesses."""

from typing import Any

import pytest
import torch
from torch import nn

from anatomy.networks import SharesLayers, TwoInputs
from regraft import freeze, summary, unfreeze
from regraft.anatomy.inputs import guess_input_size
from regraft.errors import InputError

A, B = torch.zeros(2, 4), torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("arguments", "joined"),
    [
        ({"inputs": (A, B)}, (2, 3)),
        ({"inputs": {"b": B, "a": A}}, (2, 3)),
        ({"inputs": (A, B, "both")}, (2, 6)),
        ({"inputs": {"a": A, "b": B, "how": "both"}}, (2, 6)),
        ({"input_size": ((2, 4), (2, 5))}, (2, 3)),
        ({"input_size": [[2, 4], [2, 5]]}, (2, 3)),
    ],
)
def test_summary_takes_several_inputs_in_every_form(arguments: dict[str, Any], joined: tuple[int, ...]) -> None:
    found = summary(TwoInputs(), **arguments)
    assert found.layers[0].output_shapes == (joined, (2, 3))
    assert found.layers[0].output_shape == joined
    assert set(found.input_shapes) == {(2, 4), (2, 5)}
    assert "2×4" in str(found)
    assert "2×5" in str(found)


def test_summary_does_not_read_the_values_of_inputs() -> None:
    with torch.device("meta"):
        on_meta = torch.empty(2, 4), torch.empty(2, 5)
    assert summary(TwoInputs(), inputs=on_meta).to_dict() == summary(TwoInputs(), inputs=(A, B)).to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": [A, B]}, "inputs is a list, expected a tensor, a tuple"),
        ({"inputs": A, "input_size": (2, 4)}, "both input_size and inputs were given"),
        ({"input_size": (2, "4")}, r"input_size\[1\] is '4', expected a whole number"),
        ({"input_size": (2, -4)}, "is no shape"),
        ({"inputs": (A,)}, "Pass the inputs that its forward takes"),
        ({"inputs": (B, A)}, r"layer 'left' \(Linear\) was given \(2, 5\)"),
    ],
)
def test_summary_refuses_wrong_inputs(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        summary(TwoInputs(), **arguments)


def test_freeze_in_execution_order_takes_inputs() -> None:
    model = TwoInputs()
    freeze(model, until="left", inputs=(A, B))
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True]
    freeze(model)
    unfreeze(model, since="right", inputs={"a": A, "b": B})
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, False, True, True]


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Embedding(9, 4), (1, 16)),
        (nn.LSTM(6, 4), (1, 16, 6)),
        (nn.Conv1d(2, 4, 3), (1, 2, 224)),
        (nn.Conv3d(1, 4, 3), (1, 1, 16, 224, 224)),
        (nn.Conv2d(4, 4, 3), (1, 4, 224, 224)),
        (nn.Linear(7, 2), (1, 7)),
    ],
)
def test_guess_input_size_finds_an_input_that_the_first_layer_takes(layer: nn.Module, size: tuple[int, ...]) -> None:
    assert guess_input_size(layer) == size
    assert summary(layer).problem is None


def test_summary_shows_a_layer_under_two_names_once_and_counts_it_once() -> None:
    model = SharesLayers()
    found = {layer.path: layer for layer in summary(model).layers}
    assert list(found) == ["", "block", "block.0", "block.1", "again", "head"]
    assert (found["block"].calls, found["block.0"].calls, found["head"].calls) == (3, 3, 1)
    assert found["block.0"].multiply_adds == 3 * 16
    assert found["again"].shared_with == "block"
    assert (found["again"].calls, found["again"].multiply_adds, found["again"].parameters) == (0, None, 20)
    assert found[""].parameters == sum(parameter.numel() for parameter in model.parameters()) == 30
    line = next(line for line in str(summary(model)).splitlines() if "again" in line)
    assert line.split("again")[1].strip() == "(shared with block)"


HUGGING_FACE = {
    "vit": ((1, 2), ((1, 3, 32, 32),)),
    "bert": ((3, 2), ((3, 5),)),
    "gpt2": ((3, 5, 60000), ((3, 5),)),
    "whisper-encoder": ((1, 20, 16), ((1, 8, 40),)),
}


def hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if name == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(**small, image_size=32, patch_size=8))
    if name == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**small, vocab_size=99))
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60000, n_positions=32)
        )
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=60000, num_mel_bins=8, max_source_positions=20,
    )  # fmt: skip
    return transformers.WhisperModel(config).encoder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_summary_knows_what_hugging_face_models_take(name: str) -> None:
    model = hugging_face(name).eval()
    found = summary(model)
    shape, fed = HUGGING_FACE[name]
    assert (found.problem, found.note, found.layers[0].output_shape, found.input_shapes) == (None, None, shape, fed)
    assert found.layers[0].parameters == sum(parameter.numel() for parameter in model.parameters())
    seen: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda _, __, out, path=path: (
                (seen.setdefault(path, tuple(out.shape)) if isinstance(out, torch.Tensor) else None) and None
            )
        )
    with torch.no_grad():  # the oracle: hooks on a real forward of the same size
        is_words = len(fed[0]) == 2
        name_of_input = getattr(model, "main_input_name", "input_ids")
        model(**{name_of_input: torch.zeros(fed[0], dtype=torch.int64) if is_words else torch.randn(fed[0])})
    ours = {layer.path: layer.output_shape for layer in found.layers}
    assert len(seen) > 10
    assert {path: ours[path] for path in seen} == seen


def test_summary_passes_over_dummy_inputs_that_raise() -> None:
    class Odd(nn.Linear):
        config, main_input_name = object(), "input_ids"

        @property
        def dummy_inputs(self) -> dict[str, torch.Tensor]:
            raise RuntimeError("no dummies here")

    assert summary(Odd(4, 2)).layers[0].output_shape == (1, 2)
