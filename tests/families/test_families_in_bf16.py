"""What stays in single precision within autocast to bfloat16, which has 8 binary digits. It is the CPU's autocast here;
what only CUDA's changes is seen by dtypes alone."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from grey_codec import GreyCodec
from pixel_models import CLASSIFIER, SAMPLING, build, request
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from t2i.codes.config import CodeSampling
from t2i.config import TextConfig
from t2i.families.autoencoder.discriminator import PatchDiscriminator
from t2i.families.autoencoder.dvae import ToLogits
from t2i.families.autoencoder.losses import adaptive_weight
from t2i.families.autoregressive import drawing
from t2i.families.autoregressive.palette import PaletteCodec
from t2i.families.gan_int_cls.config import DiscriminatorConfig
from t2i.families.gan_int_cls.networks import Discriminator
from t2i.families.generator import ModelGenerator
from t2i.families.masked.config import CodesBuildsOn, Config, MuseConfig
from t2i.families.masked.config import SamplingConfig as MaskedSampling
from t2i.families.masked.model import MaskedModel
from t2i.families.pixel_diffusion.model import PixelDiffusion
from t2i.interfaces import TextFeatures
from t2i.nn.residual import Doubled
from t2i.training.checkpoint import LoadedCheckpoint

TEXT = TextConfig("learned", max_tokens=8, width=16, depth=1, heads=2)


@pytest.fixture
def bf16() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        yield


def close(actual: Tensor, expected: Tensor) -> None:
    """To single precision, whatever the order of sums: half of bfloat16's last digit is 2^-9."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_the_nearest_colour_of_a_pixel_is_that_of_single_precision(bf16):
    codec = PaletteCodec(512)
    codec.colours = torch.rand(512, 3) * 2 - 1
    # Each pixel is far nearer to its colour than to any other, but for less than bfloat16 tells apart.
    own = torch.randint(512, (2, 16, 16))
    assert torch.equal(codec.tokens(codec.decode_tokens(own)), own)


def test_logits_of_dall_es_codes(bf16):
    layer, x = ToLogits(32, 512, 1), torch.randn(2, 32, 4, 4).bfloat16()
    assert layer.bias is not None
    close(layer(x), F.conv2d(x.double(), layer.weight.double(), layer.bias.double()))
    assert layer.bfloat16()(x).dtype == torch.float32  # as of a codec that works in bfloat16


def test_how_well_captions_fit_pictures(bf16):
    model = build(classifier=CLASSIFIER)
    assert model.classifier is not None
    with torch.no_grad():
        model.classifier.log_scale.fill_(5.0)
        given = (
            torch.randn(2, 3, 16, 16),
            torch.full((2,), 100.0),
            torch.randn(2, 8, 16),
            torch.ones(2, 8) > 0,
        )
        pictures, captions = model.classifier.embed(*given)
        close(model.classifier(*given), pictures.double() @ captions.double().T)


def test_logits_of_discriminators(bf16):
    image, pooled = torch.randn(2, 3, 32, 32), torch.randn(2, 16)
    judged = Discriminator(DiscriminatorConfig(8, 4, "none", "projection"), 16, 32)
    assert PatchDiscriminator(8, 2)(image).dtype == torch.float32
    assert judged(image, pooled).dtype == torch.float32


def test_the_last_layers_of_adms_unet(bf16):
    """Norm and convolution, as in the published code; a learned variance is the exponential of what they put out."""
    model = build(variance="learned")
    last: list[Tensor] = []
    model.denoiser.unet.out.register_forward_hook(lambda _, given, out: last.extend((given[0], out)))
    x, text = torch.randn(2, 3, 16, 16), model.text(["a", "b"])
    with torch.no_grad():
        model.denoise(x, torch.tensor([3.0, 900.0]), text)
    given, out = last
    norm, _, conv = model.denoiser.unet.out
    expected = F.silu(F.group_norm(given.double(), norm.num_groups, norm.weight.double(), norm.bias.double()))
    close(out, F.conv2d(expected, conv.weight.double(), conv.bias.double(), padding=1))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "pndm", "euler", "heun", "dpmpp_2m_sde", "unipc"])
def test_guidance_and_samplers(sampler, bf16, monkeypatch):
    """Also with the quantiles of dynamic thresholding, which torch has in no half precision."""
    denoise = PixelDiffusion.denoise
    seen: list[tuple[Tensor, Tensor]] = []

    def spied(model: PixelDiffusion, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        seen.append((x, denoise(model, x, t, text)))
        return seen[-1][1]

    monkeypatch.setattr(PixelDiffusion, "denoise", spied)
    model = build(objective=dataclasses.replace(build().config.objective, prediction="x0"))
    options = {"clip_x0": False, "threshold_percentile": 0.9, "guidance_scale": 3.0, "guidance_rescale": 0.5}
    sampling = dataclasses.replace(SAMPLING, sampler=sampler, **options)
    assert model.generate(request(), sampling).dtype == torch.float32
    assert {each.dtype for pair in seen for each in pair} == {torch.float32}


def test_latents_of_a_codec_with_a_codebook(bf16, compose_run):
    """A walk from a picture starts from them, and keeps their dtype."""
    from t2i.families.autoencoder.codec import build_codec

    config = compose_run("experiment=autoencoder/tiny_vq")
    codec, image = build_codec(config.model), torch.randn(1, 3, 32, 32)
    codec.latent_scale.fill_(0.7)
    close(codec.encode(image), codec.moments(image).double() * codec.latent_scale.double())


def test_guidance_on_logits_of_codes_one_by_one(monkeypatch):
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 64).bfloat16()
    seen: list[Tensor] = []

    class Known(nn.Module):
        grid, slots_before, blocks = (1, 1), 1, ()

        def forward(self, *_: object) -> Tensor:
            return logits

    def drawn(given: Tensor, *_: object) -> Tensor:
        seen.append(given)
        return given.argmax(-1)

    monkeypatch.setattr(drawing, "drawn", drawn)
    text = TextFeatures(torch.zeros(1, 8, 16), torch.zeros(1, 16), torch.ones(1, 8) > 0)
    sampling = CodeSampling(temperature=1.0, top_k=None, top_p=1.0, guidance_scale=3.0)
    drawing.draw_codes(Known(), text, text, (1, 1), [torch.Generator()], sampling)  # type: ignore[arg-type]
    without, with_prompt = logits[:, 0].double().chunk(2)
    close(seen[0], without + 3.0 * (with_prompt - without))


def test_guidance_on_logits_of_hidden_codes(bf16):
    muse = MuseConfig(32, 1, 2, "rotary", "rms", bias=False, qk_norm=True, dropout=0.0)
    sampling = MaskedSampling(1.0, None, 1.0, 3.0, 4, "constant", 1.0, "confidence")
    model = MaskedModel(Config(CodesBuildsOn("grey"), muse, TEXT, sampling, 0.0), GreyCodec(), 32).eval()
    finite, shape = torch.ones(2, dtype=torch.bool), model.shape
    asked = dataclasses.replace(request(), height_px=32, width_px=32)
    with torch.no_grad():
        codes = torch.zeros(2, shape[0] * shape[1], dtype=torch.int64)
        predict = model.predictor(asked, sampling, shape, None, finite)
        guided = predict(codes, torch.ones_like(codes, dtype=torch.bool), 0.0)
    assert guided.dtype == torch.float32


def test_gradients_that_the_adaptive_weight_compares_do_not_vanish_in_float16():
    """A mean over as many values as large pictures have is here a factor."""
    torch.manual_seed(0)
    x, last = torch.randn(8, 16, 4, 4), nn.Conv2d(16, 3, 1).weight

    def weight(dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=dtype != torch.float64):
            out = F.conv2d(x.to(dtype), last.to(dtype))
            return adaptive_weight(1e-4 * out.abs().mean(), 1e-2 * out.square().mean(), last)

    torch.testing.assert_close(
        weight(torch.float32).double(), weight(torch.float64).double(), rtol=0.02, atol=0
    )


def test_a_gpu_doubles_maps_in_their_own_dtype():
    """No GPU is needed to see what autocast would do."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is none
        x = torch.empty(2, 8, 4, 4, dtype=torch.bfloat16, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            torch.set_autocast_enabled("cuda", True)
            plain, kept = F.interpolate(x, scale_factor=2.0), Doubled()(x)
    assert plain.dtype == torch.float32
    assert kept.dtype == torch.bfloat16
    here = torch.randn(2, 8, 4, 4)
    assert torch.equal(Doubled()(here), here.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [("cuda", "bf16-mixed", torch.bfloat16), ("cuda", "32-true", None), ("cpu", "bf16-mixed", None)],
)
def test_a_frozen_encoder_draws_in_the_precision_that_it_was_trained_beside(device, precision, dtype):
    moved = []
    model = nn.Module()  # without weights, so that no GPU is needed
    model.text = SimpleNamespace(to=lambda *given: moved.append(given))
    checkpoint = LoadedCheckpoint(Path("run"), {}, {"trainer": {"precision": precision}}, {})
    ModelGenerator(model, 32, None, checkpoint, device)
    assert moved == [(torch.device(device), dtype)]
