"""The four losses: their values, their targets, what is computed for them, and several draws."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from madformer.config import DiffusionConfig, LossConfig
from madformer.diffusion.losses import compute_losses, next_token_loss, wanted_outputs
from madformer.diffusion.noise_schedule import NoiseSchedule
from madformer.errors import ConfigError
from madformer.model.embedding import drop_text, null_text
from madformer.training.module import unused_parameters
from tests.conftest import TEXT, build, latents, prompts, timesteps, tiny

SCHEDULE = NoiseSchedule(DiffusionConfig())
ALL = LossConfig(lambda_text=0.7, lambda_image=3.0, lambda_hidden=0.2, lambda_clean_tower=0.3)


def losses(model, weights=ALL, draws=1, **given):
    config = model.config
    inputs = {
        "clean_BLCYX": latents(config),
        "noise_BLCYX": latents(config, 2 * draws, seed=9),
        "t_BL": timesteps(config, 2 * draws),
    }
    return compute_losses(model, SCHEDULE, weights, **{**inputs, "text": prompts(config), **given})


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_each_term_is_the_mean_squared_error_against_its_target(prediction_type):
    config = tiny(text=TEXT, prediction_type=prediction_type)
    model, clean, noise, t = build(config), latents(config), latents(config, seed=9), timesteps(config)
    result = losses(model)
    a = SCHEDULE.alphas_cumprod[t].double()[..., None, None, None]
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
    targets = {"sample": clean, "epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean}
    out = model(clean, noisy, t, text=prompts(config))
    image = ((out.denoised_BLCYX - targets[prediction_type]) ** 2).mean((2, 3, 4))
    expected = {
        "image": image.mean(),
        # The auxiliary terms stay in sample space whatever the prediction type.
        "hidden": ((out.condition_BLCYX - clean) ** 2).mean(),
        "clean_tower": ((out.clean_tower_BLCYX[:, :-1] - clean[:, 1:]) ** 2).mean(),
        "text": torch.nn.functional.cross_entropy(out.text_logits[:, :-1].flatten(0, 1), prompts(config)[:, 1:].flatten()),
    }
    torch.testing.assert_close(result.terms, expected, check_dtype=False, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.image_BL, image, rtol=1e-5, atol=1e-5)
    total = 0.7 * expected["text"] + 3 * expected["image"] + 0.2 * expected["hidden"] + 0.3 * expected["clean_tower"]
    torch.testing.assert_close(result.total, total, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_a_loss_of_weight_zero_is_neither_there_nor_paid_for():
    config = tiny(text=TEXT)
    none = LossConfig(lambda_text=0, lambda_hidden=0, lambda_clean_tower=0)
    assert wanted_outputs(none) == frozenset()
    assert set(losses(build(config), none).terms) == {"image"}

    def flops(**weights):
        with FlopCounterMode(display=False) as counter:
            losses(build(config), dataclasses.replace(none, **weights))
        return counter.get_total_flops()

    least = flops()
    assert all(flops(**{name: 1.0}) > least for name in ("lambda_text", "lambda_hidden", "lambda_clean_tower"))


def test_a_loss_on_what_the_model_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="needs the condition: set"):
        losses(build(tiny(use_condition=False)))
    with pytest.raises(ConfigError, match="a single block has no next one: set"):
        losses(build(tiny(ar_length=1)))


def test_noise_of_another_shape_is_refused():
    model = build(tiny())
    with pytest.raises(
        ValueError, match=r"noise_BLCYX has shape \(2, 4, 1, 4, 4\): must be a multiple of 2 images of \(4, 2, 4, 4\)"
    ):
        losses(model, noise_BLCYX=latents(model.config)[:, :, :1])
    with pytest.raises(ValueError, match=r"noise_BLCYX has shape \(3, 4, 2, 4, 4\)"):
        losses(model, noise_BLCYX=latents(model.config, 3))


def test_without_prompts_every_used_parameter_still_has_a_gradient():
    model = build(tiny(text=TEXT))
    result = losses(model, text=None)
    assert result.terms["text"] == 0
    result.total.backward()
    unused = {id(parameter) for parameter in unused_parameters(model, wanted_outputs(ALL))}
    assert all((parameter.grad is None) == (id(parameter) in unused) for parameter in model.parameters())


def test_several_draws_are_the_mean_of_single_draws():
    config, draws = tiny(text=TEXT), 3
    model, noise, t = build(config), latents(config, 6, seed=9), timesteps(config, 6)
    together = losses(model, draws=draws, noise_BLCYX=noise, t_BL=t)
    alone = [losses(model, noise_BLCYX=noise[draw::draws], t_BL=t[draw::draws]) for draw in range(draws)]
    torch.testing.assert_close(together.total, torch.stack([one.total for one in alone]).mean())
    gradients = torch.autograd.grad(together.total, list(model.parameters()))
    mean = torch.autograd.grad(sum(one.total for one in alone) / draws, list(model.parameters()))
    for gradient, reference in zip(gradients, mean, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-8)


def test_next_token_loss_leaves_padding_out():
    logits = torch.randn(2, 3, 5)
    text = torch.tensor([[0, 3, 4], [0, 0, 2]])
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 3] + log_p[0, 1, 4] + log_p[1, 1, 2]) / 3
    torch.testing.assert_close(next_token_loss(logits, text, pad_token_id=0), expected)
    assert next_token_loss(logits, torch.zeros(2, 3, dtype=torch.long), pad_token_id=0) == 0


def test_dropped_prompts_are_null_texts_at_the_configured_rate():
    config = dataclasses.replace(TEXT, dropout=0.25)
    text = torch.arange(1, 4).expand(4000, 3)
    dropped = drop_text(text, config, torch.Generator().manual_seed(0))
    is_null = (dropped == null_text(config, 4000)).all(1)
    assert is_null.float().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dropped[~is_null], text[~is_null])
    assert torch.equal(dropped, drop_text(text, config, torch.Generator().manual_seed(0)))
    assert torch.equal(drop_text(text, dataclasses.replace(TEXT, dropout=0.0)), text)


def test_training_brings_the_loss_down():
    torch.manual_seed(0)
    config = tiny(text=TEXT)
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = losses(model).total.item()
    for _ in range(30):
        optimizer.zero_grad()
        losses(model).total.backward()
        optimizer.step()
    assert losses(model).total.item() < 0.5 * before
