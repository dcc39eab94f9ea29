"""Networks that pictures are compared by, against the field's own tools on random weights in the true formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_bit import BitImageProcessor

from t2i.errors import CheckpointError, ConfigError
from t2i.evaluation.features import check_published, clip_scores, load
from t2i.evaluation.resizing import resized
from t2i.nn.inception import Inception

CPU = torch.device("cpu")


def some_pictures(count: int = 3, height: int = 40, width: int = 56) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under which features stay far from zero."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("size", [(40, 56), (400, 320)])
def test_resizing_is_clean_fids_and_tensorflows(size):
    """Smaller and larger pictures, none of them square."""
    pictures = some_pictures(2, *size)
    for how in ("clean", "legacy_pytorch"):
        theirs = build_resizer(how)
        expected = [theirs(picture.permute(1, 2, 0).numpy()) for picture in pictures]
        found = resized(pictures, 299, how)
        np.testing.assert_allclose(
            found.permute(0, 2, 3, 1).numpy(), np.stack(expected), rtol=1e-6, atol=1e-4
        )
    expected = interpolate_bilinear_2d_like_tensorflow1x(
        pictures.float(), size=(299, 299), align_corners=False
    )
    torch.testing.assert_close(resized(pictures, 299, "legacy_tensorflow"), expected, rtol=1e-6, atol=1e-4)


def test_inception_features_are_torch_fidelitys(inception_file):
    theirs = FeatureExtractorInceptionV3(
        "theirs", ["2048"], feature_extractor_weights_path=str(inception_file)
    )
    pictures = some_pictures()
    (expected,) = theirs(pictures)
    extractor = load(f"inception={inception_file}", "legacy_tensorflow", CPU)
    found = extractor(pictures)
    assert found.shape == (3, extractor.width) == (3, 2048)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (load(f"inception={inception_file}", "clean", CPU)(pictures) - expected).abs().max() > 1e-3


def test_a_file_named_by_its_hash_has_to_have_it(tmp_path, inception_file):
    renamed = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    renamed.write_bytes(inception_file.read_bytes())
    with pytest.raises(CheckpointError, match=r"its name says 6726825d: it is not the published file"):
        load(f"inception={renamed}", "clean", CPU)
    digest = check_published(inception_file)
    right = tmp_path / f"inception-{digest[:8]}.pth"
    right.write_bytes(inception_file.read_bytes())
    assert check_published(right) == digest


def test_weights_that_are_not_there_are_one_sentence(tmp_path):
    for spec, said in {
        "inception": "names no weights",
        f"inception={tmp_path}/none.pth": "none.pth does not exist; allowed: inception=FILE, a local copy of pt_incep",
        f"clip={tmp_path}/none": "does not exist; allowed: clip=DIR",
        f"dinov2={tmp_path}/none": "cannot be loaded",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            load(spec, "clean", CPU)
    with pytest.raises(ConfigError, match="--features is 'vgg'"):
        load("vgg", "clean", CPU)


def test_weights_of_another_network_are_one_sentence(tmp_path):
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match=r"Conv2d_1a_3x3\.conv\.weight is missing; Inception needs shape"
    ):
        load(f"inception={tmp_path}/other.pth", "clean", CPU)


def test_dinov2_features_are_those_of_its_class_token(tmp_path, capfd):
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    torch.manual_seed(0)
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    pictures = some_pictures(2, 224, 224)
    processor = BitImageProcessor(
        do_resize=False,
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    with torch.inference_mode():
        states = network(processor(images, return_tensors="pt")["pixel_values"]).last_hidden_state
    capfd.readouterr()
    extractor = load(f"dinov2={tmp_path}", "clean", CPU)
    assert capfd.readouterr().err == ""  # no progress bar of transformers
    assert extractor.width == 24
    torch.testing.assert_close(extractor(pictures), states[:, 0], rtol=1e-4, atol=1e-4)


def test_efficientnets_features_are_what_the_package_gives():
    from t2i.nn.efficientnet import EfficientNetLite0

    pictures = some_pictures(2, 224, 224)
    extractor = load("efficientnet", "clean", CPU)
    expected = EfficientNetLite0().pooled(pictures.float() / 127.5 - 1)
    torch.testing.assert_close(extractor(pictures), expected)
    assert "FID" not in extractor.distance


def test_the_clip_score_is_the_cosine_of_picture_and_caption(tmp_path):
    import json

    import open_clip

    described = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    (tmp_path / "ViT-least.json").write_text(json.dumps(described))
    open_clip.add_model_config(tmp_path / "ViT-least.json")
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-least")
    torch.save(model.state_dict(), tmp_path / "least.pt")
    pictures, captions = some_pictures(3), ["a cat", "two dogs", "nothing"]
    extractor = load(f"clip=ViT-least:{tmp_path}/least.pt", "clean", CPU)
    images = torch.stack([preprocess(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pictures])
    with torch.inference_mode():
        ours = clip_scores(extractor.clip, extractor(pictures), captions, CPU)
        of_images = model.eval().encode_image(images, normalize=True)
        of_texts = model.encode_text(open_clip.get_tokenizer("ViT-least")(captions), normalize=True)
    expected = 100 * (of_images * of_texts).sum(1).clamp_min(0)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
    assert expected.abs().max() > 0.1
