"""`t2i sample` that starts from a picture, keeps a part of it, or goes from one to another."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from weight_files import write

from t2i.config import parse_run
from t2i.families.masked.config import Config as MaskedConfig
from t2i.families.masked.model import model_of as masked_model
from t2i.families.pixel_diffusion.config import Config
from t2i.families.pixel_diffusion.model import PixelDiffusion
from t2i.generation.recipes import RECIPE_KEY
from t2i.generation.text_to_image import read_image
from t2i.generation.video import Film, flicker, write_film
from t2i.training.pictures import save_png, to_pil
from t2i_cli.composition import composed_run

FLAGS = ("sample", "--device", "cpu", "--sampler", "ddim", "--steps", "3", "--guidance-scale", "1")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a small UNet of pixels that knows no place, 32 px."""
    changes = ("denoiser.position_embedding=false", "schedule=scaled_linear")
    config = composed_run(["experiment=pixel_diffusion/tiny_cosine_learned", *changes])
    torch.manual_seed(0)
    model = PixelDiffusion(parse_run(config, Config).model, 32)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    state = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(state, path, metadata={"t2i": json.dumps({"config": config, "extra": {}})})
    return str(path)


def picture(path: str, height: int = 32, width: int = 32) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def mask(path: str, height: int = 32, width: int = 32) -> None:
    marked = np.zeros((height, width), dtype=np.uint8)
    marked[8:24, 8:24] = 255
    Image.fromarray(marked).save(path)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def pngs(folder: str = "samples") -> list[Path]:
    return sorted(path for path in Path(folder).glob("*.png") if path.stem not in ("grid", "strip"))


def again(t2i, path: Path, out: str) -> np.ndarray:
    """The picture that its recipe makes."""
    done = t2i("sample", "--recipe", str(path), "--out", out, "--device", "cpu")
    assert done.code == 0, done
    (made,) = pngs(out)
    return pixels(made)


def test_inpaints_and_the_recipe_does_it_again(t2i, weights: str) -> None:
    before = picture("a.png")
    mask("m.png")
    edit = ("--image", "a.png", "--mask", "m.png", "--checkpoint", weights, "--num-images", "1")
    assert t2i(*FLAGS, "--prompt", "a star", *edit).code == 0
    (made,) = pngs()
    after = pixels(made)
    inside = np.zeros((32, 32), dtype=bool)
    inside[8:24, 8:24] = True
    assert (after[~inside] == before[~inside]).all()
    assert (after[inside] != before[inside]).mean() > 0.9
    recipe = json.loads(Image.open(made).info[RECIPE_KEY])
    assert {key: recipe[key] for key in ("image", "mask", "strength")} == {
        "image": "a.png",
        "mask": "m.png",
        "strength": 1.0,
    }
    assert (again(t2i, made, "again") == after).all()


def test_extends_by_whole_sides(t2i, weights: str) -> None:
    before = picture("a.png", 32, 40)
    edit = ("--image", "a.png", "--extend", "left=8,top=16", "--checkpoint", weights, "--num-images", "1")
    assert t2i(*FLAGS, "--prompt", "a star", *edit).code == 0
    (made,) = pngs()
    after = pixels(made)
    assert after.shape == (48, 48, 3)
    assert (after[16:, 8:] == before).all()
    assert (again(t2i, made, "again") == after).all()


def test_what_the_extended_size_cannot_be_is_one_sentence(t2i, weights: str) -> None:
    picture("a.png")
    done = t2i(*FLAGS, "--prompt", "x", "--image", "a.png", "--extend", "left=3", "--checkpoint", weights)
    assert "width is 35; allowed: multiples of" in done.sentence
    assert done.sentence.endswith(
        ": extend by other pixels, or say --height 32 --width 32 of the whole, to which the picture is cut."
    )
    whole = ("--height", "32", "--width", "32", "--num-images", "1", "--checkpoint", weights)
    assert t2i(*FLAGS, "--prompt", "x", "--image", "a.png", "--extend", "left=3", *whole).code == 0
    assert pixels(pngs()[0]).shape == (32, 32, 3)
    far = ("--extend", "left=16384", "--checkpoint", weights)
    done = t2i(*FLAGS, "--prompt", "x", "--image", "a.png", *far)
    assert "a.png, extended, is '32 x 16416 px'; allowed: up to 16,384 each" in done.sentence
    whole = ("--width", "32", "--checkpoint", weights)
    done = t2i(*FLAGS, "--prompt", "x", "--image", "a.png", "--extend", "left=32", *whole)
    assert "--extend is 'left=32'; allowed: less than the whole, 32 x 32 px" in done.sentence


def test_starts_from_the_noise_of_a_picture(t2i, weights: str) -> None:
    before = picture("a.png")
    edit = ("--image", "a.png", "--invert", "a star", "--checkpoint", weights, "--num-images", "2")
    steps = ("--steps", "30", "--prompt", "a star")
    assert t2i(*FLAGS, *steps, *edit).code == 0
    first, second = map(pixels, pngs())
    assert (first == second).all()  # no seed has a say
    assert t2i(*FLAGS, *steps, "--checkpoint", weights, "--num-images", "1", "--out", "plain").code == 0
    (plain,) = map(pixels, pngs("plain"))
    to_start, to_plain = (np.abs(each.astype(int) - before).mean() for each in (first, plain))
    assert to_start < to_plain / 2
    other = t2i("sample", "--prompt", "a star", "--sampler", "euler", "--device", "cpu", *edit)
    assert "--invert with sampling.sampler is 'euler'; allowed: ddim" in other.sentence


def test_tiles(t2i, weights: str) -> None:
    for tile in ((), ("--tile", "xy")):
        done = t2i(*FLAGS, "--prompt", "a star", *tile, "--checkpoint", weights, "--num-images", "1")
        assert done.code == 0
    first, second = map(pixels, pngs())
    assert (first != second).any()


def test_variations_are_near_and_made_again_by_their_recipes(t2i, weights: str) -> None:
    base = ("--prompt", "a star", "--checkpoint", weights, "--seed", "5")
    assert t2i(*FLAGS, *base, "--num-images", "1", "--out", "own").code == 0
    assert t2i(*FLAGS, *base, "--variations", "2", "--variation-strength", "0.1", "--out", "near").code == 0
    assert t2i(*FLAGS, *base, "--variations", "2", "--variation-strength", "0.9", "--out", "far").code == 0
    (own,) = pngs("own")

    def distance(folder: str) -> list[float]:
        found = [np.abs(pixels(each).astype(int) - pixels(own)).mean() for each in pngs(folder)]
        assert len(found) == 2
        return found

    assert 0 < max(distance("near")) < min(distance("far"))
    made = pngs("near")[1]
    assert (again(t2i, made, "again") == pixels(made)).all()


def test_interpolates_as_strip_and_film(t2i, weights: str) -> None:
    prompts = ("--prompt", "a star", "--prompt", "a blue circle")
    steps = ("--interpolate", "3", "--checkpoint", weights)
    assert t2i(*FLAGS, *prompts, *steps).code == 0
    assert len(pngs()) == 4
    strip, film = Image.open("samples/strip.png"), Image.open("samples/strip.webp")
    assert strip.size == (4 * 32, 32)
    assert film.n_frames == 4
    whole = np.asarray(strip)
    assert t2i(*FLAGS, *prompts, "--num-images", "1", "--checkpoint", weights, "--out", "ends").code == 0
    # The second prompt is drawn with the same seed, so the ends are what is drawn without --interpolate.
    by_prompt = {path.stem: pixels(path) for path in pngs("ends")}
    assert (whole[:, :32] == by_prompt["a-star_0"]).all()
    assert (whole[:, -32:] == by_prompt["a-blue-circle_0"]).all()
    assert (whole[:, 32:64] != whole[:, :32]).any()


def test_prompts_are_gone_between_without_noise_to_go_between(t2i, tmp_path: Path) -> None:
    """One seed for all, with a model of codes, which starts from none."""
    codec = composed_run(["experiment=autoencoder/tiny_fsq"])
    config = composed_run(["experiment=masked/tiny_masked", "text.width=8", "transformer.width=8"])
    torch.manual_seed(0)
    model = masked_model(parse_run(config, MaskedConfig), {"codec": codec})
    state = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    weights = write(tmp_path / "masked", state, config, {"codec": codec})
    steps = ("--interpolate", "3", "--checkpoint", weights, "--batch-size", "1")
    assert t2i("sample", "--prompt", "a star", "--prompt", "a circle", *steps).code == 0
    assert len(pngs()) == 4
    made = Path("samples/a-star_0.png")
    assert (again(t2i, made, "again") == pixels(made)).all()
    two_seeds = t2i("sample", "--prompt", "a star", "--num-images", "2", *steps).sentence
    assert (
        two_seeds == "t2i sample: between is 'two seeds'; allowed: two prompts with one seed with this model."
    )


def film(path: str, speed: int = 1) -> torch.Tensor:
    """Eight frames of a square that moves over a smooth ground."""
    ground = torch.linspace(-0.5, 0.5, 32)
    frames = (ground[:, None] + ground[None, :]).expand(8, 3, 32, 32).clone()
    for i in range(8):
        frames[i, 0, 8:16, 4 + speed * i : 12 + speed * i] = 1
    write_film([to_pil(frame) for frame in frames], Path(path), 40)
    return frames


def test_the_same_noise_for_each_frame_flickers_less_than_noise_of_its_own(
    t2i, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = film("in.webp")
    base = (*FLAGS, "--prompt", "a star", "--strength", "0.7", "--checkpoint", weights)
    said = {}
    for out, flags in {"all": (), "keys": ("--key-every", "4")}.items():
        done = t2i(*base, "--video", "in.webp", "--out", out, *flags)
        assert done.code == 0, done
        said[out] = done.out
    assert "8 frames, 3 of them drawn" in said["keys"]
    for i in range(8):  # what one would get without thought: a picture of each frame with a seed of its own
        one = ("--image", f"all_{i}.png", "--num-images", "1", "--seed", str(i), "--out", "apart")
        save_png(source[i], Path(f"all_{i}.png"))
        assert t2i(*base, *one).code == 0
    apart = sorted(pngs("apart"), key=lambda path: int(path.stem.partition("_")[2].partition("-")[0]))
    films = {
        "apart": torch.stack([read_image(path, (32, 32)) for path in apart]),
        **{out: torch.stack(list(Film(Path(out) / "video.webp", (32, 32)))) for out in ("all", "keys")},
    }
    shown = {name: flicker(frames, source) for name, frames in films.items()}
    assert max(shown["keys"], shown["all"]) < shown["apart"] / 10, shown
    more = "more" if shown["all"] > 0 else "less"
    assert f"differ by {abs(shown['all']):.2f} of 255 {more} than those" in " ".join(said["all"].split())
    frame = read_image(Path("all/frame_00002.png"), (32, 32))
    assert torch.equal(frame, films["all"][2])
    assert t2i(*base, "--video", "in.webp", "--out", "keys", "--key-every", "4").code == 0  # all is there
    before = Path("all/video.webp").read_bytes()
    own = t2i(*base, "--video", "all/video.webp", "--out", "all", "--key-every", "7", "--num-images", "1")
    assert "frame_00000.png is there and is not" in own.sentence
    for frame in Path("all").glob("frame_*.png"):
        frame.rename(Path(frame.name))
    again = t2i(*base, "--video", "all/video.webp", "--out", "all", "--key-every", "7")
    assert again.code == 0
    assert "all/video-" in again.out
    assert Path("all/video.webp").read_bytes() == before
    for frame in Path().glob("frame_*.png"):
        frame.replace(Path("all") / frame.name)
    monkeypatch.setattr("t2i_cli.sample.load", None)  # refused before that
    # Neither a drawn frame nor one between is written over.
    done = t2i(*base, "--video", "in.webp", "--out", "all", "--key-every", "4")
    assert "frame_00001.png is there and is not the picture" in done.sentence
    film("other.webp", speed=2)
    for other in (("--video", "other.webp"), ("--video", "in.webp", "--seed", "1")):
        done = t2i(*base, *other, "--out", "all")
        assert "frame_00000.png is there and is not the picture" in done.sentence
    sentence = t2i("sample", "--recipe", "all/frame_00002.png", "--out", "again").sentence
    assert "is a frame of a film, which --video 'in.webp' makes again" in sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--mask", "m.png"), "--mask is 'm.png'; allowed: only with --image"),
        (("--extend", "left=8"), "--extend is 'left=8'; allowed: only with --image"),
        (("--image", "a.png", "--mask", "absent.png"), "--mask is 'absent.png'; allowed: a picture file"),
        (("--image", "a.png", "--extend", "middle=8"), "--extend is 'middle=8'; allowed: sides among left"),
        (("--image", "a.png", "--extend", "left=8,left=9"), "each once"),
        (("--image", "a.png", "--extend", "left=0"), "1 to 16,384 pixels"),
        (("--image", "a.png", "--extend", "left=1e3"), "--extend is 'left=1e3'"),
        (
            ("--image", "a.png", "--invert", "x", "--strength", "0.5"),
            "--strength is 0.5; allowed: without --inv",
        ),
        (("--video", "absent"), "--video is 'absent'; allowed: a film or a folder of frames that exists"),
        (("--key-every", "2"), "--key-every is 2; allowed: only with --video"),
        (("--video", "a.png", "--image", "a.png"), "--image is 'a.png'; allowed: without --video"),
        (("--video", "a.png", "--num-images", "2"), "--num-images is 2; allowed: 1 with --video"),
        (("--video", ".", "--out", "."), "--out is '.'; allowed: another folder than --video"),
        (
            ("--variations", "2", "--num-images", "1", "--seed", str(2**64 - 1)),
            "--seed is 18446744073709551615; allowed: 0 to 18446744073709551613 with --variations 2",
        ),
        (("--variations", "0"), "--variations is 0; allowed: 1 or more"),
        (("--variation-strength", "0.5"), "--variation-strength is 0.5; allowed: only with --variations"),
        (("--variations", "2", "--interpolate", "2"), "--variations is 2; allowed: without --interpolate"),
        (
            ("--interpolate", "2", "--num-images", "1"),
            "--interpolate is 'of one picture'; allowed: two pictures",
        ),
    ],
)
def test_one_sentence(t2i, arguments: tuple[str, ...], sentence: str) -> None:
    picture("a.png")
    mask("m.png")
    assert sentence in t2i("sample", "--prompt", "x", *arguments).sentence


@pytest.mark.parametrize("flag", ["--video", "--image"])
@pytest.mark.parametrize("place", ["pipe", "", "none"])
def test_what_is_neither_file_nor_folder_is_not_waited_for(t2i, flag: str, place: str) -> None:
    os.mkfifo("pipe")
    assert f"{flag} is {place!r}; allowed: a " in t2i("sample", "--prompt", "x", flag, place).sentence


def test_an_out_without_a_name_is_not_this_folder(t2i) -> None:
    """As a shell makes of "$OUT" where there is no OUT."""
    assert t2i("sample", "--prompt", "x", "--out", "").sentence.endswith("--out is ''; allowed: a folder.")


@pytest.mark.parametrize(
    ("size", "value", "sentence"),
    [
        ((32, 40), 255, "--mask m.png is '32 x 40 pixels'; allowed: 32 x 32 pixels, as a.png has"),
        ((32, 32), 0, "--mask m.png is 'white nowhere'; allowed: white (128"),
        ((32, 32), 127, "--mask m.png is 'white nowhere'; allowed: white (128"),
    ],
)
def test_a_mask_that_does_not_do_is_one_sentence(t2i, weights, size, value, sentence) -> None:
    picture("a.png")
    Image.fromarray(np.full(size, value, dtype=np.uint8)).save("m.png")
    edit = ("--image", "a.png", "--mask", "m.png", "--checkpoint", weights)
    assert sentence in t2i(*FLAGS, "--prompt", "x", *edit).sentence


def test_a_picture_counts_by_what_is_in_its_file(t2i, weights: str) -> None:
    picture("room.png")
    mask("mask.png")
    files = ("--image", "room.png", "--mask", "mask.png")
    flags = (*FLAGS, "--checkpoint", weights, "--prompt", "a star", "--num-images", "1")
    assert t2i(*flags, *files).code == 0
    (first,) = pngs()
    Path("elsewhere").mkdir()
    Path("room.png").rename("elsewhere/r.png")
    moved = t2i(*flags, "--image", "elsewhere/r.png", "--mask", "mask.png")
    assert "0 pictures are drawn in samples; 1 was there already." in moved.out
    Image.fromarray(255 - pixels(Path("mask.png"))).save("mask.png")
    assert t2i(*flags, "--image", "elsewhere/r.png", "--mask", "mask.png").code == 0
    assert len(pngs()) == 2
    Path("elsewhere/r.png").rename("room.png")
    sentence = t2i("sample", "--recipe", str(first), "--out", "again").sentence
    assert (
        sentence
        == "t2i sample: mask.png is no longer what the recipe was drawn from: name another by --mask."
    )
