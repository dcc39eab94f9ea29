"""The page: a prompt in, pictures out as they are drawn; and a gallery of all that was drawn."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from fastapi import FastAPI
from PIL import Image

from t2i.errors import UserError
from t2i.few import plural
from t2i.generation.extension import SIDES, STRENGTH
from t2i.generation.starting import read_mask, size_of
from t2i.interfaces import Tile
from t2i.schema import parse
from t2i.serving.gallery import Kept
from t2i.serving.options import Option, options_of
from t2i.serving.queue import Job
from t2i.serving.service import Service
from t2i.serving.wanted import MAX_SEED, Wanted

LOOK_S = 0.1  # between two looks at how far a job is
SHOWN = 60  # pictures of the gallery at first, and as many more each time
Listed = tuple[
    list[str], list[str], int
]  # files that are shown, names of all that was found, how many are shown
HOW_FAR = Option("strength", "number", None, optional=True)
MAIN = ("steps", "guidance_scale")  # stand beside the prompt where a family has them


def mount(app: FastAPI, service: Service) -> FastAPI:
    """The application with the page at /."""
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        app,
        page(service),
        path="/",
        footer_links=[],
        max_file_size=service.limits.max_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        theme=theme,
    )


def page(service: Service) -> gr.Blocks:
    with gr.Blocks(title="t2i", analytics_enabled=False, delete_cache=(3600, 86_400)) as blocks:
        gr.Markdown(f"# t2i\n{service.recipe['checkpoint']}")
        with gr.Tab("Draw"):
            fields = Fields(service)
        with gr.Tab("Gallery") as tab:
            of_gallery(service, fields, tab)
    blocks.queue(api_open=False, max_size=4 * service.limits.max_waiting)
    return blocks


class Fields:
    """The tab that draws."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.options = options_of(service.usual)
        size_px, limits = service.generator.default_size_px, service.limits
        with gr.Row():
            with gr.Column(scale=2):
                self.prompt = gr.Textbox(label="Prompt (Shift+Enter draws)", lines=2, elem_id="prompt")
                self.negative = gr.Textbox(label="Negative prompt", elem_id="negative")
                with gr.Row():
                    self.seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
                    self.count = gr.Slider(1, limits.max_images, 1, step=1, label="Pictures", elem_id="count")
                with gr.Row():
                    self.height = gr.Number(size_px, label="Height", precision=0, elem_id="height")
                    self.width = gr.Number(size_px, label="Width", precision=0, elem_id="width")
                with gr.Row():
                    made = {each.name: field_of(each) for each in self.options if each.name in MAIN}
                with gr.Accordion("All options of this model", open=False):
                    made |= {each.name: field_of(each) for each in self.options if each.name not in MAIN}
                self.of_options = [made[each.name] for each in self.options]
                with gr.Accordion("Start from a picture", open=False, elem_id="start"):
                    self.image = gr.ImageEditor(
                        label="Picture; what is painted over is drawn anew, the rest is kept",
                        type="pil",
                        sources=["upload", "clipboard"],
                        transforms=[],
                        brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"),
                        layers=gr.LayerOptions(allow_additional_layers=False),
                        elem_id="image",
                    )
                    self.strength = gr.Textbox(
                        "",
                        label=f"How far from it, above 0 to 1; empty: {STRENGTH}, or 1 where a part of it is kept",
                        elem_id="strength",
                    )
                    with gr.Row():
                        self.extend = [
                            gr.Number(0, label=f"Extend {side}", precision=0, elem_id=f"extend_{side}")
                            for side in SIDES
                        ]
                self.tile = gr.Dropdown(
                    [("no", ""), *((each, each) for each in get_args(Tile) if each)],
                    value="",
                    label="Seamless along",
                    elem_id="tile",
                )
            with gr.Column(scale=3):
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Stop", elem_id="stop")
                self.status = gr.Markdown("", elem_id="status")
                self.pictures = gr.Gallery(label="Pictures", columns=4, format="png", elem_id="pictures")
        self.job = gr.State("")
        inputs = [self.prompt, self.negative, self.seed, self.count, self.height, self.width]
        self.inputs = [*inputs, self.image, self.strength, self.tile, *self.extend, *self.of_options]
        outputs = [self.job, self.status, self.pictures, draw]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        together: dict[str, Any] = private | {"concurrency_limit": None}
        drawn = gr.on([draw.click, self.prompt.submit], self.draw, self.inputs, outputs, **together)
        drawn.then(lambda: gr.Button(interactive=True), None, draw, queue=False, **private)
        stop.click(self.stop, self.job, None, queue=False, **private)

    def draw(self, *given: Any) -> Iterator[tuple[str, str, list[str], gr.Button]]:
        """(job, status, pictures, the button that draws), again and again until the job has ended: until then a press
        would draw nothing."""
        try:
            job = self.service.ask(self.wanted(*given))
        except UserError as error:
            yield "", str(error), [], gr.Button(interactive=True)
            return
        try:
            while True:
                ended = job.ended
                pictures = [offered(path) for path in job.pictures]
                yield job.id, spoken(self.service, job), pictures, gr.Button(interactive=ended)
                if ended:
                    return
                time.sleep(LOOK_S)
        finally:  # the page was closed
            self.service.queue.stop(job)

    def stop(self, id: str) -> None:
        if (job := self.service.queue.get(id)) is not None:
            self.service.queue.stop(job)

    def wanted(self, *given: Any) -> Wanted:
        """Raises ConfigError."""
        prompt, negative, seed, count, height, width, painted, strength, tile, *more = given
        sides, options = more[: len(SIDES)], more[len(SIDES) :]
        sampling = {each.name: each.read(value) for each, value in zip(self.options, options, strict=True)}
        image, mask = start_of(painted)
        extend = {side: pixels for side, pixels in zip(SIDES, sides, strict=True) if pixels} if image else {}
        size_px = self.service.generator.default_size_px
        keeps = extend and (height, width) == (size_px, size_px)  # nothing is said of the whole
        values = {
            "prompt": prompt,
            "negative_prompt": negative,
            "seed": seed,
            "num_images": count,
            "height": None if keeps else height,
            "width": None if keeps else width,
            "image": image,
            "mask": mask,
            "strength": HOW_FAR.read(strength) if image else None,
            "extend": extend,
            "tile": tile,
            "sampling": sampling,
        }
        return parse(Wanted, values)

    def filled(self, recipe: dict[str, Any]) -> list[Any]:
        """The values of `inputs` that draw a picture again. Of the recipe, which may come from anybody, what is no such
        value is left out by the fields themselves and by `Wanted`."""
        size_px, own = self.service.generator.default_size_px, recipe.get("sampling")
        own = own if isinstance(own, dict) else {}
        sides = dict(re.findall(r"(\w+)=([0-9]{1,5})(?=,|$)", str(recipe.get("extend", ""))))
        image, mask = (self.service.input_picture(str(recipe.get(key))) for key in ("image", "mask"))
        return [
            str(recipe.get("prompt", "")),
            str(recipe.get("negative_prompt", "")),
            number(recipe, "seed", 0),
            1,
            number(recipe, "height_px", size_px),
            number(recipe, "width_px", size_px),
            None if image is None else painted_over(image, mask),
            number(recipe, "strength", None),
            recipe.get("tile", "") if recipe.get("tile", "") in get_args(Tile) else "",
            *(int(sides.get(side, 0)) for side in SIDES),
            *(own[x.name] if x.name in own and x.takes(own[x.name]) else x.value for x in self.options),
        ]


def number(recipe: dict[str, Any], key: str, usual: float | None) -> float | None:
    """A number of a recipe, which may come from anybody."""
    value = recipe.get(key)
    ok = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_SEED
    return value if ok and value is not None else usual


def field_of(option: Option) -> Any:
    label, id = option.name.replace("_", " "), f"option_{option.name}"
    if option.kind == "choice":
        choices = [
            *([("", None)] if option.optional else []),
            *((str(each), each) for each in option.choices),
        ]
        return gr.Dropdown(choices, value=option.value, label=label, elem_id=id)
    if option.kind == "truth":
        return gr.Checkbox(option.value, label=label, elem_id=id)
    if (
        option.kind in ("whole", "number") and not option.optional
    ):  # an empty one would turn to 0 when it is shown
        return gr.Number(
            option.value, label=label, elem_id=id, precision=0 if option.kind == "whole" else None
        )
    return gr.Textbox(option.value, label=label, elem_id=id)


def spoken(service: Service, job: Job) -> str:
    """How far a job is, for a person."""
    done, count = len(job.pictures), job.count
    said = {
        "waiting": f"Waiting: {service.queue.ahead(job)} before this one.",
        "drawing": f"Drawing: {done} of {plural(count, 'picture')}; step {job.step} of {job.steps}.",
        "done": f"Done: {done} of {plural(count, 'picture')}.",
        "stopped": f"Stopped: {done} of {plural(count, 'picture')}.",
        "failed": f"Failed: {job.error}",
    }
    return f"{said[job.state]} {job.note}".strip()


def of_gallery(service: Service, fields: Fields, tab: gr.Tab) -> None:
    """The tab that shows what was drawn."""
    with gr.Row():
        words = gr.Textbox(label="Search by words", elem_id="words")
        likeness = gr.Image(
            label="Search by likeness", type="pil", sources=["upload", "clipboard"], height=160
        )
    shown = gr.Gallery(
        label="Pictures: the newest, or what is most like, first",
        columns=8,
        format="png",
        elem_id="gallery",
        allow_preview=False,
    )
    more = gr.Button("More pictures", elem_id="more")
    with gr.Row():
        chosen = gr.Image(label="Chosen", interactive=False, type="filepath", elem_id="chosen")
        with gr.Column():
            recipe = gr.Code(label="Recipe", language="json", interactive=False, elem_id="recipe")
            again = gr.Button("Take this recipe to Draw", elem_id="again")
            alike = gr.Button("Pictures like this one", elem_id="alike")
    names, count = gr.State([]), gr.State(SHOWN)  # of all that was found; so many of them are shown
    name = gr.State("")
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": 4}

    def listed(found: list[Kept]) -> Listed:
        return [offered(each.path) for each in found[:SHOWN]], [each.path.name for each in found], SHOWN

    def by_words(text: str) -> Listed:
        return listed(service.gallery.search(text or ""))

    def by_likeness(image: Image.Image | None) -> Listed:
        return by_words("") if image is None else listed(told(lambda: service.alike(image)))

    def by_chosen(of: str) -> Listed:
        return listed(told(lambda: service.gallery.like(service.gallery.get(of))))

    def further(of: list[str], shown: int) -> Listed:
        left = [each for each in of if (service.folder / each).is_file()]
        return [offered(service.folder / each) for each in left[: shown + SHOWN]], left, shown + SHOWN

    def choose(of: list[str], event: gr.SelectData) -> tuple[str, str, str]:
        each = told(lambda: service.gallery.get(of[event.index]))
        return offered(each.path), json.dumps(each.recipe, indent=2), each.path.name

    def take(of: str) -> list[Any]:
        picked = told(lambda: service.gallery.get(of)).recipe
        for sentence in service.drawn_otherwise(picked):
            gr.Warning(sentence)
        return fields.filled(picked)

    found = [shown, names, count]
    tab.select(by_words, words, found, **quiet)
    words.submit(by_words, words, found, **quiet)
    likeness.change(by_likeness, likeness, found, **quiet)
    more.click(further, [names, count], found, **quiet)
    shown.select(choose, names, [chosen, recipe, name], **quiet)
    alike.click(by_chosen, name, found, **quiet)
    again.click(take, name, fields.inputs, **quiet)


def offered(path: Path) -> str:
    """A file as the page may have it: a link in the folder of uploads, the only one that the page's library gives files
    from."""
    changed = str(path.stat().st_mtime_ns)
    link = Path(os.environ["GRADIO_TEMP_DIR"]) / "shown" / changed / path.name
    if not link.is_file():
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, link)
        except OSError:  # another disk
            shutil.copyfile(path, link)
    return str(link)


def told(ask: Any) -> Any:
    """What `ask` returns; its sentence is shown on the page where it refuses."""
    try:
        return ask()
    except UserError as error:
        raise gr.Error(str(error)) from error


def start_of(painted: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """(image, mask) of `Wanted`, of what stands in the editor."""
    if painted is None or painted["background"] is None:
        return None, None
    image = painted["background"].convert("RGBA")
    mask = Image.new("L", image.size)
    for layer in painted["layers"]:
        mask.paste(255, mask=layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha > 0)))
    return encoded(image), None if mask.getbbox() is None else encoded(mask)


def painted_over(image: Path, mask: Path | None) -> dict[str, Any]:
    """What stands in the editor, of the files of a recipe."""
    layers = []
    if mask is not None:
        alpha = Image.fromarray(read_mask(mask, size_of(mask))[0].mul(255).byte().numpy())
        layers = [Image.merge("RGBA", (*[Image.new("L", alpha.size, 255)] * 3, alpha))]
    return {"background": offered(image), "layers": layers, "composite": None}


def encoded(image: Image.Image) -> str:
    """A picture of the page as the API takes it: a PNG file in base64."""
    file = io.BytesIO()
    upright = image.convert("RGBA")
    white = Image.new("RGBA", upright.size, "white")
    Image.alpha_composite(white, upright).convert("RGB").save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
