"""How the full-size experiments learn, against the papers and the published configuration files.

Numbers of pictures are steps times the batch. Architectures and sizes: test_published_sizes.py and tests/families.
"""

from __future__ import annotations

from typing import Any

import pytest

from t2i.config import EMAConfig, OptimizerConfig, RunConfig

# Adam (0.5, 0.9); its rate is base_learning_rate for each picture of all GPUs.
COMPVIS = {
    "betas": (0.5, 0.9),
    "weight_decay": 0.0,
    "warmup_images": 0,
    "schedule": "constant",
    "gradient_clip": 0.0,
}


def assert_optimizer(optimizer: OptimizerConfig, expected: dict[str, Any]) -> None:
    assert {name: getattr(optimizer, name) for name in expected} == expected


def assert_all_is_drawn_from(config: RunConfig) -> None:
    """Codes are drawn as the network says, none left out: 2102.12092, section 2.6, "without temperature reduction";
    openai/image-gpt, src/run.py: "p = softmax(...) # logits to probas"."""
    sampling = config.model.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, None, 1.0)


def batch_of(config: RunConfig) -> int:
    return config.trainer.global_batch_size or config.trainer.batch_size * config.trainer.processes


def decay_a_step(ema: EMAConfig | None, batch: int) -> float:
    """That the average keeps of itself."""
    assert ema is not None
    assert ema.rampup_ratio is None
    return 0.5 ** (batch / ema.half_life_images)


@pytest.mark.parametrize(
    ("name", "per_gpu", "start_steps", "weight", "layers"),
    [
        ("kl_f4", 12, 50_000, 0.5, 3),
        ("kl_f8", 12, 50_000, 0.5, 3),
        ("kl_f16", 12, 50_000, 0.5, 3),
        ("kl_f32", 12, 50_000, 0.5, 3),
        ("vq_f4", 8, 0, 0.75, 3),
        ("vq_f8", 10, 0, 0.6, 2),
        ("vq_f16", 14, 250_000, 0.75, 2),
        ("vqgan_f16_1024", 12, 250_000, 0.8, 3),
        ("vqgan_f16_16384", 12, 250_000, 0.8, 3),
    ],
)
def test_codecs_of_compvis(name, per_gpu, start_steps, weight, layers, compose_run):
    """CompVis/latent-diffusion: configs/autoencoder/autoencoder_kl_*.yaml and
    models/first_stage_models/vq-f*/config.yaml; CompVis/taming-transformers: configs/imagenet_vqgan.yaml.
    batch_size, disc_start, disc_weight and disc_num_layers.

    taming/modules/vqvae/quantize.py: "due to a bug the beta term was applied to the wrong term": with its default,
    legacy=True, (sg[z_q] - z)^2 has 1 and (z_q - sg[z])^2, which codes kept as averages have not, beta = 0.25.
    """
    config = compose_run(f"experiment=autoencoder/{name}")
    model, batch = config.model, batch_of(config)
    assert config.trainer.batch_size == per_gpu
    assert_optimizer(config.optimizer, COMPVIS)
    assert config.optimizer.learning_rate == pytest.approx(4.5e-6 * batch)
    adversarial = model.adversarial
    assert (adversarial.start_images, adversarial.weight) == (start_steps * batch, weight)
    assert (adversarial.num_layers, adversarial.base_channels) == (layers, 64)
    assert (adversarial.loss, adversarial.adaptive, adversarial.r1_weight) == ("hinge", True, 0.0)
    assert (model.perceptual.name, model.perceptual.weight, model.distance.name) == ("lpips_vgg", 1.0, "l1")
    if name.startswith("kl"):
        assert model.codec.kl_weight == 1e-6
    else:
        assert model.codec.commitment_weight == 1.0


@pytest.mark.parametrize("name", ["vqgan_f16_8192", "vq_f8_8192"])
def test_codecs_of_muse(name, compose_run):
    """2301.00704, appendix A.2: 8,192 codes, "we remove the non-local block", and table 5."""
    config = compose_run(f"experiment=autoencoder/{name}")
    backbone = config.model.backbone
    assert config.model.codec.num_codes == 8_192
    assert (backbone.mid_attention, tuple(backbone.attention_resolutions)) == (False, ())
    assert (backbone.base_channels, backbone.num_res_blocks) == (128, 2)
    assert batch_of(config) == 256
    assert config.trainer.num_images == 1_000_000 * 256
    expected = {"learning_rate": 1e-4, "betas": (0.9, 0.99), "weight_decay": 1e-4, "schedule": "cosine"}
    assert_optimizer(config.optimizer, expected | {"warmup_images": 10_000 * 256})


def test_the_decoder_of_muse(compose_run):
    """2301.00704, appendix A.2: "4 residual blocks in each resolution", "the base channel dimension to be 256"."""
    backbone = compose_run("experiment=muse/decoder").model.backbone
    assert (backbone.decoder_res_blocks, backbone.decoder_base_channels) == (4, 256)


def test_dvae(compose_run):
    """2102.12092, appendix A.2: AdamW of 1e-4, (0.9, 0.999), decay 1e-4, and averages of 0.999 a step."""
    config = compose_run("experiment=autoencoder/dvae")
    expected = {"learning_rate": 1e-4, "betas": (0.9, 0.999), "weight_decay": 1e-4, "gradient_clip": 0.0}
    assert_optimizer(config.optimizer, expected)
    assert decay_a_step(config.ema, 512) == pytest.approx(0.999, rel=1e-6)
    assert (config.data.crop, config.data.horizontal_flip) == ("random", True)


def test_vit_vqgan(compose_run):
    """2110.04627, section 4.1: 500,000 steps of 256, Adam (0.9, 0.99), decay 1e-4, warm-up of 50,000 steps to 1e-4,
    and enhancing-transformers' weights, squared error 1, perceptual 0.1, beta 0.25, of pixels in [0, 1]: with those
    in [-1, 1] the squared error is 4 times as large, so the others are."""
    config = compose_run("experiment=autoencoder/vit_vqgan")
    model = config.model
    assert batch_of(config) == 256
    assert config.trainer.num_images == 500_000 * 256
    expected = {
        "learning_rate": 1e-4,
        "betas": (0.9, 0.99),
        "weight_decay": 1e-4,
        "warmup_images": 50_000 * 256,
    }
    assert_optimizer(config.optimizer, expected | {"gradient_clip": 0.0})
    assert (model.distance.name, model.distance.edge_weight) == ("l2", 0.0)
    assert (model.perceptual.weight, model.codec.commitment_weight) == (4 * 0.1, 4 * 0.25)
    assert model.adversarial.start_images == 0


@pytest.mark.parametrize(("name", "rate"), [("small", 3e-3), ("medium", 3e-3), ("large", 1e-3)])
def test_imagegpt(name, rate, compose_run):
    """Chen et al. 2020, section 3.3: "a batch size of 128 and train for 1M iterations [...] Adam with 0.9 and 0.95
    [...] warmed up for one epoch, and then decays to 0 following a cosine schedule. No dropout is used. We did not
    use weight decay"; openai/image-gpt: "random cropped images are required to faithfully replicate training"."""
    config = compose_run(f"experiment=imagegpt/{name}")
    assert config.trainer.global_batch_size == 128
    assert config.trainer.num_images == 1_000_000 * 128
    expected = {"learning_rate": rate, "betas": (0.9, 0.95), "weight_decay": 0.0, "schedule": "cosine"}
    assert_optimizer(
        config.optimizer, expected | {"warmup_images": 1_281_167}
    )  # ImageNet's training pictures
    assert config.model.transformer.dropout == 0.0
    assert_all_is_drawn_from(config)
    assert config.data.crop == "random"


def test_the_transformer_of_vqgan(compose_run):
    """CompVis/taming-transformers: cond_transformer.py has AdamW (0.9, 0.95), decay 0.01, and no schedule; its
    configurations 4.5e-6 for each picture of the batch; its README draws with k = 600, p = 0.92 and t = 1.0."""
    config = compose_run("experiment=vqgan/imagenet")
    assert_optimizer(config.optimizer, COMPVIS | {"betas": (0.9, 0.95), "weight_decay": 0.01})
    assert config.optimizer.learning_rate == pytest.approx(4.5e-6 * batch_of(config))
    assert config.trainer.num_images == 1_000_000 * batch_of(config)
    sampling = config.model.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 600, 0.92)


def test_dall_e(compose_run):
    """2102.12092, appendix B.2: 430,000 updates of 1,024, AdamW (0.9, 0.96), decay 4.5e-2, "a linear schedule to
    ramp up the step size to 4.5e-4 over 5000 updates", clipping 4, averages "once every 25 updates, using a decay
    coefficient of 0.99"; "we don't use hflip aug since the image may contain text"."""
    config = compose_run("experiment=dalle/12b")
    assert config.trainer.global_batch_size == 1_024
    assert config.trainer.num_images == 430_000 * 1_024
    expected = {"learning_rate": 4.5e-4, "betas": (0.9, 0.96), "weight_decay": 4.5e-2, "gradient_clip": 4.0}
    assert_optimizer(config.optimizer, expected | {"warmup_images": 5_000 * 1_024})
    assert decay_a_step(config.ema, 25 * 1_024) == pytest.approx(0.99, rel=1e-5)
    assert not config.data.horizontal_flip
    assert_all_is_drawn_from(config)


@pytest.mark.parametrize("name", ["350m", "750m", "3b", "20b"])
def test_parti(name, compose_run):
    """2206.10789, section 3: 450,000 steps of 8,192, "beta1 = 0.9, beta2 = 0.96 and decoupled weight decay value of
    4.5e-2 [...] default dropout ratio 0.1 [...] default learning rate of 4.5e-5 [...] with 5,000 warm-up steps
    [...] We do not use exponential moving average [...] clip gradient norm to a value of 4.0"; section 2.2: 128
    tokens of text."""
    config = compose_run(f"experiment=parti/{name}")
    assert config.trainer.global_batch_size == 8_192
    assert config.trainer.num_images == 450_000 * 8_192
    expected = {"learning_rate": 4.5e-5, "betas": (0.9, 0.96), "weight_decay": 4.5e-2, "gradient_clip": 4.0}
    assert_optimizer(config.optimizer, expected | {"warmup_images": 5_000 * 8_192})
    assert config.ema is None
    assert (config.model.transformer.dropout, config.model.text.max_tokens) == (0.1, 128)
    assert_all_is_drawn_from(config)


def test_maskgit(compose_run):
    """google-research/maskgit, maskgit/configs/maskgit_class_cond_config.py."""
    config = compose_run("experiment=maskgit/256")
    assert config.trainer.global_batch_size == 256
    assert config.trainer.num_images == 2_000_000 * 256
    expected = {"learning_rate": 1e-4, "betas": (0.9, 0.96), "weight_decay": 4.5e-2, "schedule": "constant"}
    assert_optimizer(config.optimizer, expected | {"warmup_images": 5_000 * 256})
    model = config.model
    assert (model.label_smoothing, model.sampling.choice_temperature, model.transformer.dropout) == (
        0.1,
        4.5,
        0.1,
    )


@pytest.mark.parametrize("name", ["256", "512"])
def test_muse(name, compose_run):
    """2301.00704, tables 4 and 6; section 3: "checkpoint every 5000 steps, then perform EMA [...] with a decay
    factor of 0.7"; section 2.7: text removed from 10%; section 2.8: 24 and 8 steps."""
    config = compose_run(f"experiment=muse/{name}")
    assert config.trainer.global_batch_size == 512
    assert config.trainer.num_images == 1_000_000 * 512
    expected = {"learning_rate": 1e-4, "betas": (0.9, 0.96), "weight_decay": 4.5e-2, "schedule": "cosine"}
    assert_optimizer(config.optimizer, expected | {"warmup_images": 5_000 * 512})
    assert decay_a_step(config.ema, 5_000 * 512) == pytest.approx(0.7, rel=1e-4)
    assert config.resolution.text_dropout == 0.1
    assert config.model.sampling.steps == {"256": 24, "512": 8}[name]


def test_pixart(compose_run):
    """PixArt-alpha/PixArt-alpha, configs/pixart_config/PixArt_xl2_img256_internal.py: AdamW of 2e-5 and decay 3e-2,
    1,000 steps of warm-up, gradient_clip 0.01; PixArt_xl2_internal.py: auto_lr by the root of the batch over 256,
    120 tokens."""
    config = compose_run("experiment=pixart-xl/256")
    batch = batch_of(config)
    assert config.optimizer.learning_rate == pytest.approx(2e-5 * (batch / 256) ** 0.5, rel=1e-3)
    expected = {
        "weight_decay": 3e-2,
        "warmup_images": 1_000 * batch,
        "gradient_clip": 0.01,
        "schedule": "constant",
    }
    assert_optimizer(config.optimizer, expected)
    assert decay_a_step(config.ema, batch) == pytest.approx(0.9999, rel=1e-8)
    assert config.model.text.max_tokens == 120


@pytest.mark.parametrize(
    ("name", "rate", "batch", "steps", "schedule", "dropout"),
    [
        ("64", 3e-4, 2_048, 540_000, "cosine", 0.1),
        ("128", 1e-4, 256, 4_360_000, "linear", 0.0),
        ("256", 1e-4, 256, 1_980_000, "linear", 0.0),
        ("512", 1e-4, 256, 1_940_000, "linear", 0.0),
    ],
)
def test_adm(name, rate, batch, steps, schedule, dropout, compose_run):
    """2105.05233, table 11, and openai/guided-diffusion: AdamW without decay, clipping or warm-up, averages of
    0.9999."""
    config = compose_run(f"experiment=adm/{name}")
    assert config.trainer.global_batch_size == batch
    assert config.trainer.num_images == steps * batch
    expected = {"learning_rate": rate, "betas": (0.9, 0.999), "schedule": "constant"}
    zeros = dict.fromkeys(("weight_decay", "warmup_images", "gradient_clip"), 0)
    assert_optimizer(config.optimizer, expected | zeros)
    assert decay_a_step(config.ema, batch) == pytest.approx(0.9999, rel=1e-7)
    model = config.model
    assert (model.schedule.name, model.denoiser.dropout, model.variance) == (schedule, dropout, "learned")
    assert model.sampling.steps == 250
