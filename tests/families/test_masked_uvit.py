"""aMUSEd's U-ViT and what is drawn with it against diffusers' model and pipeline."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import AmusedScheduler, UVit2DModel
from diffusers.models import normalization
from diffusers.models.unets import uvit_2d
from diffusers.pipelines.deprecated.amused.pipeline_amused import AmusedPipeline
from diffusers.schedulers import scheduling_amused
from grey_codec import GreyCodec

from t2i.codes.config import CodeSampling
from t2i.codes.masked import gumbel, uniform
from t2i.codes.sampling import drawn
from t2i.config import TextConfig
from t2i.families.masked.config import CodesBuildsOn, Config, SamplingConfig, UVitConfig
from t2i.families.masked.model import MaskedModel
from t2i.families.masked.uvit import UVit
from t2i.interfaces import SampleRequest, TextFeatures
from t2i.nn.embeddings import timestep_embedding

CODES, CONTEXT, POOLED, STEPS = 11, 20, 24, 6
SMALL = UVitConfig(
    name="uvit",
    width=32,
    depth=2,
    heads=4,
    hidden=28,
    channels=16,
    conv_blocks=2,
    conv_heads=2,
    embedding_dim=12,
    vocabulary=17,
)


@pytest.fixture
def in_float64(float64, monkeypatch):
    """Without what diffusers rounds to float32 on the way."""

    def rms_norm(self, x):
        return torch.nn.functional.rms_norm(x, self.dim, self.weight, self.eps)

    monkeypatch.setattr(normalization.RMSNorm, "forward", rms_norm)
    monkeypatch.setattr(
        uvit_2d, "get_timestep_embedding", lambda t, dim, **_: timestep_embedding(t.double(), dim)
    )


def theirs(downsample: bool) -> UVit2DModel:
    torch.manual_seed(0)
    model = UVit2DModel(
        hidden_size=32,
        cond_embed_dim=POOLED,
        encoder_hidden_size=CONTEXT,
        vocab_size=17,
        codebook_size=CODES,
        in_channels=12,
        block_out_channels=16,
        num_res_blocks=2,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=28,
        downsample=downsample,
        upsample=downsample,
        sample_size=4,
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.eval()


def test_it_has_as_many_parameters_as_the_published_one():
    with torch.device("meta"):
        network = UVit(UVitConfig("uvit", vocabulary=8256), 8192, 768, 768, 16)
    assert sum(p.numel() for p in network.parameters()) == 603_537_664


@pytest.mark.parametrize("downsample", [False, True])
def test_logits_are_those_of_diffusers(downsample, in_float64):
    model = theirs(downsample)
    own = UVit(dataclasses.replace(SMALL, downsample=downsample), CODES, CONTEXT, POOLED, 8).eval()
    own.load_state_dict(model.state_dict())  # published names and shapes
    tokens = torch.randint(CODES + 1, (2, 4, 6))
    context, pooled = torch.randn(2, 5, CONTEXT), torch.randn(2, POOLED)
    told = torch.tensor([[48.0, 32.0, 0.0, 0.0, 6.0]]).expand(2, -1)
    wanted = model(tokens, context, pooled, told).permute(0, 2, 3, 1).flatten(1, 2)
    found = own(tokens, context, torch.ones(2, 5, dtype=torch.bool), pooled=pooled)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


class Given:
    """A text encoder that says what it was given."""

    token_dim, pooled_dim, trainable = CONTEXT, POOLED, False

    def __init__(self):
        torch.manual_seed(3)
        self.said = {text: (torch.randn(5, CONTEXT), torch.randn(POOLED)) for text in ("a star", "blurred")}

    def __call__(self, captions):
        tokens, pooled = (torch.stack(each) for each in zip(*(self.said[c] for c in captions), strict=True))
        return TextFeatures(tokens, pooled, torch.ones(len(captions), 5, dtype=torch.bool))


def test_codes_are_those_of_the_pipeline(in_float64, monkeypatch):
    """Given the same random numbers, with its temperature from 2 to 0 put as ours; guidance and a negative prompt."""
    model, text = theirs(False), Given()
    monkeypatch.setattr("t2i.families.low_codes.text_encoder_for_training", lambda _: text)
    sampling = SamplingConfig(
        temperature=1.0,
        top_k=None,
        top_p=1.0,
        guidance_scale=4.0,
        steps=STEPS,
        guidance_schedule="constant",
        choice_temperature=2 * STEPS / (STEPS - 1),
        order="confidence",
    )
    config = Config(CodesBuildsOn("grey"), SMALL, TextConfig("minilm", max_tokens=5), sampling, 0.0)
    own = MaskedModel(config, GreyCodec(CODES), 32).eval()
    own.transformer.load_state_dict(model.state_dict())
    request = SampleRequest(["a star"], [7], 32, 32, negative_prompt="blurred")
    codes, finite = own.drawn_codes(request, sampling, [torch.Generator().manual_seed(7)], None)
    assert finite.all()

    numbers = [torch.Generator().manual_seed(7)]
    plain = CodeSampling(temperature=1.0, top_k=None, top_p=1.0, guidance_scale=1.0)
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda p, *_, **__: drawn(p.double().log(), uniform(numbers, 16)[0], plain)[:, None],
    )
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", lambda *_, **__: gumbel(uniform(numbers, 16)))
    torch.set_default_dtype(torch.float32)  # as its counts are computed
    vqvae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(1, 1, 1, 1)))
    monkeypatch.setattr(AmusedPipeline, "register_modules", lambda self, **parts: vars(self).update(parts))
    monkeypatch.setattr(AmusedPipeline, "_execution_device", torch.device("cpu"))
    monkeypatch.setattr(AmusedPipeline, "maybe_free_model_hooks", lambda self: None)
    scheduler = AmusedScheduler(mask_token_id=16)  # the last row of the vocabulary
    pipeline = AmusedPipeline(vqvae, None, None, model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    wanted, without = text(["a star"]), text(["blurred"])
    (latents,) = pipeline(
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        prompt_embeds=wanted.pooled,
        encoder_hidden_states=wanted.tokens,
        negative_prompt_embeds=without.pooled,
        negative_encoder_hidden_states=without.tokens,
        output_type="latent",
        return_dict=False,
        height=32,
        width=32,
    )
    assert torch.equal(codes, latents)
    assert len(codes.unique()) > 2
