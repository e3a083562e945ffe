"""Drift on plain text: against the plain forward pass, for slices and for tuned embeddings."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from circuitune import methods
from circuitune.components import Head
from circuitune.deltas import Delta, load_delta, save_delta, save_tensors
from circuitune.errors import UserError
from circuitune.models import Model, wrap
from circuitune.prefix import training_text
from circuitune.retention import base_text, drift, drift_now, retention_text
from circuitune.slices import attached, head_slices
from tests.conftest import byte_tokenizer, tiny_hf


def make_delta(model: Model, folder: Path, size: float) -> Delta:
    """A constant delta on two heads, saved and read back."""
    with attached(model, head_slices(model, [Head(2, 0), Head(3, 1)])) as views:
        deltas = {part: torch.full_like(view, size) for part, view in views.items()}
    save_delta(folder, model, deltas, {})
    return load_delta(folder)


def test_drift_is_zero_for_a_zero_delta_and_right_for_another(
    tiny: Callable[..., Model], tmp_path: Path
) -> None:
    model = tiny()
    (tmp_path / "zero").mkdir()
    (tmp_path / "some").mkdir()
    deltas = {
        "zero": make_delta(model, tmp_path / "zero", 0.0),
        "some": make_delta(model, tmp_path / "some", 0.05),
    }
    text = retention_text(None)[:3]
    measured = drift(model, deltas, text)
    np.testing.assert_allclose(measured["zero"][:, 1], measured["base"][:, 1], atol=1e-9)
    np.testing.assert_allclose(measured["zero"][:, 2], 0.0, atol=1e-9)
    assert (measured["some"][:, 2] > 1e-6).all()
    tokens = torch.tensor([model.tokenizer(text[0]).input_ids[:64]])
    plain = model.hf(tokens).logits[0, :-1].log_softmax(dim=-1)
    loss = -plain.gather(-1, tokens[0, 1:, None]).sum()
    assert measured["base"][0, 0] == tokens.shape[1] - 1
    assert measured["base"][0, 1] == pytest.approx(float(loss), abs=1e-9)


def test_drift_of_tuned_embeddings_is_that_of_the_plain_forward_pass(
    tiny: Callable[..., Model], tmp_path: Path
) -> None:
    """Everything moves, the unembedding that the base is read with included."""
    model = tiny()
    with methods.attached(model, methods.full(model)) as live:
        for number, parameter in enumerate(live.parameters):
            noise = torch.Generator().manual_seed(number)
            step = 0.02 * torch.randn(parameter.shape, generator=noise, dtype=parameter.dtype)
            parameter.data += step
        tensors = live.tensors()
        text = retention_text(None)[:2]
        tokens = torch.tensor([model.tokenizer(text[0]).input_ids[:64]])
        with torch.no_grad():
            tuned = model.hf(tokens).logits[0, :-1].log_softmax(dim=-1)
    save_tensors(tmp_path, model, tensors, {})
    with torch.no_grad():
        plain = model.hf(tokens).logits[0, :-1].log_softmax(dim=-1)
    measured = drift(model, {"full": load_delta(tmp_path)}, text)["full"][0]
    loss = -tuned.gather(-1, tokens[0, 1:, None]).sum()
    # The delta is stored in float32, the model computes in float64.
    assert measured[1] == pytest.approx(float(loss), rel=1e-5)
    assert measured[2] == pytest.approx(float((plain.exp() * (plain - tuned)).sum()), rel=1e-4)


def test_drift_while_slices_are_attached(tiny: Callable[..., Model]) -> None:
    model = tiny()
    text = base_text(model, retention_text(None)[:2], layer=2)
    with attached(model, head_slices(model, [Head(2, 0)])) as views:
        assert drift_now(model, text)[:, 2] == pytest.approx([0, 0], abs=1e-9)
        for view in views.values():
            view.data += 0.05
        assert (drift_now(model, text)[:, 2] > 1e-6).all()
        same = drift_now(model, base_text(model, retention_text(None)[:2], layer=2))
    assert same[:, 2] == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("copied", [False, True])
def test_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16(
    copied: bool,
) -> None:
    model = wrap(tiny_hf("llama").bfloat16(), byte_tokenizer(), source="tiny llama")
    paragraphs = retention_text(None)[:2]
    text = base_text(model, paragraphs, copy_head=copied)
    head = model.hf.get_output_embeddings().weight
    before = [batch.final.float() for batch in text.batches]
    for layer in range(model.layers):
        model.part(layer, model.family.out).weight.data *= 1.1
    measured = drift_now(model, text, anew=True)
    assert head.dtype == model.hf.get_output_embeddings().weight.dtype == torch.bfloat16
    for batch, base in zip(text.batches, before, strict=True):
        with torch.no_grad():
            states = model.trunk(input_ids=batch.tokens).last_hidden_state[:, :-1].float()
        own, then = ((h @ head.float().T).log_softmax(dim=-1) for h in (states, base))
        kl = ((then.exp() * (then - own)).sum(dim=-1) * batch.predicts).sum(dim=1)
        np.testing.assert_allclose(measured[batch.places, 2], kl.detach().numpy(), rtol=1e-4)


def test_retention_text_is_not_training_text(tmp_path: Path) -> None:
    assert not set(retention_text(None)) & set(training_text())
    assert len(retention_text(None)) == 100
    with pytest.raises(UserError, match="--retention must be a readable"):
        retention_text(str(tmp_path / "absent.txt"))
    (tmp_path / "short.txt").write_text("too short\n")
    with pytest.raises(UserError, match="at least ten lines"):
        retention_text(str(tmp_path / "short.txt"))
