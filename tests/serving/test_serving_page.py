"""The page of `t2i serve` in a real browser: type, press, see, stop, search, draw again."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageChops

BROWSERS = [
    path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))
]
pytestmark = pytest.mark.skipif(not BROWSERS, reason="a page for tests needs Chromium, not found here")
PATIENCE_S = 60
GREEN = (30, 160, 60)


@dataclass
class Served:
    """address: of the page; pictures: the folder; elsewhere: what the browser asked of other machines"""

    page: object
    address: str
    pictures: Path
    elsewhere: list[str]

    def files(self) -> list[Path]:
        return sorted(self.pictures.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def run(train, compose_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    few = ["trainer.num_images=8", "trainer.batch_size=8", "trainer.accelerator=cpu", f"runs_dir={folder}"]
    return train(compose_run("experiment=pixel_diffusion/tiny_cosine_learned", *few)).folder


@pytest.fixture(scope="module")
def served(run, tmp_path_factory) -> Iterator[Served]:
    from playwright.sync_api import sync_playwright

    folder = tmp_path_factory.mktemp("served")
    command = ["serve", "--checkpoint", str(run), "--port", "0", "--out", "pictures", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "t2i_cli.main", *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        said, address = "", None
        while address is None:
            line = process.stdout.readline()
            said += line
            assert line, said
            address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSERS[0], args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1300, "height": 1000})
            page.set_default_timeout(PATIENCE_S * 1000)
            elsewhere: list[str] = []
            page.on("request", lambda asked: elsewhere.append(asked.url) if is_elsewhere(asked.url) else None)
            page.goto(address[0])
            yield Served(page, address[0], folder / "pictures", elsewhere)
            browser.close()
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) in (0, 130), process.stdout.read()


def is_elsewhere(address: str) -> bool:
    return not address.startswith(("http://127.0.0.1:", "data:", "blob:"))


def draw(served: Served, prompt: str, steps: int, count: int = 1) -> None:
    page = served.page
    page.get_by_role("tab", name="Draw").click()
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#option_steps input").fill(str(steps))
    page.locator("#count input[type=number]").fill(str(count))
    page.locator("#draw").click()


def test_pictures_appear_as_they_are_drawn_and_draw_again_by_their_recipe(served, tmp_path):
    page = served.page
    draw(served, "a red circle", steps=3, count=2)
    page.get_by_text("Done: 2 of 2 pictures.").wait_for()
    shown = page.locator("#pictures button img")
    assert shown.count() == 2
    assert shown.first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 32
    draw(served, "a blue square", steps=3)
    page.get_by_text("Done: 1 of 1 picture.").wait_for()
    first, second, _ = served.files()

    page.get_by_role("tab", name="Gallery").click()
    page.locator("#words textarea, #words input").fill("circle")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#gallery button img')?.src.includes('a-red-circle_1')")
    page.locator("#gallery button img").nth(1).click()  # the older of the two
    page.locator("#recipe").get_by_text("a red circle").wait_for()
    page.locator("#again").click()
    page.get_by_role("tab", name="Draw").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'a red circle'")
    before = first.rename(tmp_path / first.name)  # what is there is not drawn again
    page.locator("#draw").click()
    until(first.is_file)
    assert same(first, before)
    assert not same(first, second)


def test_the_stop_button_stops(served):
    draw(served, "a green star", steps=1000)
    served.page.get_by_text(re.compile(r"step \d+ of 1000")).wait_for()
    assert served.page.locator("#draw").is_disabled()  # a press would draw nothing
    served.page.locator("#stop").click()
    served.page.get_by_text("Stopped: 0 of 1 picture.").wait_for()
    until(served.page.locator("#draw").is_enabled)
    assert not list(served.pictures.glob("a-green-star*"))


def test_what_is_painted_over_is_drawn_anew(served, tmp_path):
    page = served.page
    start_from(served, tmp_path / "green.png", size=256)
    x, y = middle(page)
    page.mouse.move(x - 4, y)
    page.mouse.down()
    page.mouse.move(x + 4, y, steps=4)
    page.mouse.up()
    page.mouse.move(0, 0)
    until(lambda: seen(page) == (255, 255, 255))
    draw(served, "a pink star", steps=3)
    page.get_by_text("Done: 1 of 1 picture.").wait_for()
    until(lambda: list(served.pictures.glob("a-pink-star*")))
    drawn = Image.open(next(served.pictures.glob("a-pink-star*")))
    assert drawn.getpixel((0, 0)) == GREEN
    assert drawn.getpixel((16, 16)) != GREEN


def test_what_is_added_is_drawn_and_the_picture_kept(served, tmp_path):
    page = served.page
    start_from(served, tmp_path / "green.png", size=32)
    page.locator("#extend_left input").fill("32")
    draw(served, "a pink heart", steps=3)
    page.get_by_text("Done: 1 of 1 picture.").wait_for()
    drawn = Image.open(next(served.pictures.glob("a-pink-heart*")))
    assert drawn.size == (64, 32)
    assert drawn.crop((32, 0, 64, 32)).getcolors() == [(32 * 32, GREEN)]
    assert drawn.crop((0, 0, 32, 32)).getcolors() != [(32 * 32, GREEN)]


def test_what_is_not_allowed_is_said_on_the_page(served):
    draw(served, "a green star", steps=0)
    served.page.get_by_text("sampling.steps is 0; allowed: 1 or more.").wait_for()


def test_the_page_gives_out_no_other_file(served):
    secret = served.pictures / "secret.txt"
    secret.write_text("secret")
    for path in (secret, served.pictures / "manifest.jsonl"):
        answer = served.page.request.get(f"{served.address}gradio_api/file={path}")
        assert answer.status in (403, 404)
        assert answer.text() != path.read_text()


def test_a_gallery_of_many_pictures_shows_more_when_asked(served):
    draw(served, "a red circle", steps=3)  # it may be there already
    served.page.get_by_text("Done: 1 of 1 picture.").wait_for()
    for i in range(70):
        shutil.copy(served.files()[-1], served.pictures / f"copy_{i}.png")
    shown = served.page.locator("#gallery button img")
    served.page.get_by_role("tab", name="Gallery").click()
    served.page.locator("#words textarea, #words input").fill("")
    served.page.keyboard.press("Enter")
    until(lambda: shown.count() == 60)
    served.page.locator("#more").click()
    until(lambda: shown.count() == len(served.files()))


def test_the_page_asks_no_other_machine(served):
    assert served.elsewhere == []


def start_from(served: Served, path: Path, size: int) -> None:
    """A green square of so many pixels on the canvas of a fresh page."""
    Image.new("RGB", (size, size), GREEN).save(path)
    page = served.page
    page.goto(served.address)
    page.get_by_role("button", name="All options of this model").click()  # what is empty there stays so
    page.get_by_role("button", name="Start from a picture").click()
    page.locator("#image canvas").first.wait_for()

    def uploaded() -> bool:
        """An editor that is not ready yet takes no file."""
        page.locator("#image input[type=file]").first.set_input_files(path)
        page.wait_for_timeout(2000)
        return seen(page) == GREEN

    until(uploaded)


def middle(page) -> tuple[float, float]:
    canvas = page.locator("#image canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def seen(page) -> tuple[int, ...]:
    """The colour in the middle of the canvas."""
    x, y = middle(page)
    shot = page.screenshot(clip={"x": x, "y": y, "width": 1, "height": 1})
    return Image.open(io.BytesIO(shot)).convert("RGB").getpixel((0, 0))


def same(one: Path, other: Path) -> bool:
    return ImageChops.difference(Image.open(one), Image.open(other)).getbbox() is None


def until(holds) -> None:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < PATIENCE_S
        time.sleep(0.05)
