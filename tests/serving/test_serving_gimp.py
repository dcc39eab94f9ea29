"""The plug-in for GIMP: its HTTP part against a server that listens, and all of it where GIMP 3 is installed."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from types import ModuleType

import pytest
import uvicorn
from PIL import Image

import t2i_cli
from t2i.serving import api
from t2i.serving.guard import Guard

PLUG_IN = Path(t2i_cli.__file__).parent / "gimp" / "t2i-draw"


@pytest.fixture(scope="module")
def plug_in() -> ModuleType:
    spec = importlib.util.spec_from_file_location("client", PLUG_IN / "client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def listen(make_service):
    """(service, address) of a server with a token."""
    servers = []

    def listen(token: str | None = None):
        service = make_service()
        server = uvicorn.Server(uvicorn.Config(Guard(api.build(service), token, 2**20), log_level="error"))
        taken = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        servers.append((server, thread, taken))
        return service, f"http://127.0.0.1:{taken.getsockname()[1]}"

    yield listen
    for server, thread, taken in servers:
        server.should_exit = True
        thread.join()
        taken.close()


def png(colour: int | tuple[int, int, int], size=(8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB" if isinstance(colour, tuple) else "L", size, colour).save(file, format="PNG")
    return file.getvalue()


def test_a_layer_and_a_selection_become_a_picture(plug_in, listen):
    service, address = listen(token="secret")
    told = []
    client = plug_in.Client(address + "/", "secret")
    wanted = {"prompt": "red", "negative_prompt": "", "seed": 3, "strength": 0.5, "width": 8, "height": 8}
    (drawn,) = client.draw(wanted, png((0, 255, 0)), png(255), told.append)
    picture = Image.open(io.BytesIO(drawn))
    recipe = json.loads(picture.text["t2i"])
    assert (picture.size, picture.getpixel((4, 4))) == ((8, 8), (255, 0, 0))
    assert Image.open(service.input_picture(recipe["image"])).getpixel((0, 0)) == (0, 255, 0)
    assert Image.open(service.input_picture(recipe["mask"])).getpixel((0, 0)) == 255
    assert all(0 <= share <= 1 for share in told)


def test_what_the_server_refuses_is_its_sentence(plug_in, listen):
    _, address = listen(token="secret")
    with pytest.raises(plug_in.Refused, match="The token is missing or wrong"):
        plug_in.Client(address).model()
    client = plug_in.Client(address, "secret")
    for wanted, sentence in [
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": "red", "height": 6}, "multiples of 4"),
    ]:
        with pytest.raises(plug_in.Refused, match=sentence):
            client.draw(wanted)
    with pytest.raises(plug_in.Refused, match="image is not a picture"):
        client.draw({"prompt": "red"}, b"no picture")


def test_whoever_gives_up_stops_the_drawing(plug_in, listen):
    service, address = listen()
    service.generator.gate.clear()

    def give_up(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plug_in.Client(address).draw({"prompt": "red"}, progress=give_up)
    (job,) = service.queue.known.values()
    assert job.stop.is_set()


def test_a_server_that_is_not_there_is_one_sentence(plug_in):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for each in (address, "no address", "http://a b"):
        with pytest.raises(plug_in.Refused, match=f"{each} cannot be reached"):
            plug_in.Client(each).model()


@pytest.mark.parametrize(
    ("size_px", "canvas", "size"),
    [
        (512, (1000, 1000), (512, 512)),
        (512, (1920, 1080), (896, 512)),
        (512, (100, 3000), (512, 1024)),
        (32, (640, 480), (32, 32)),
        (32, (64, 20), (96, 32)),
    ],
)
def test_a_canvas_is_drawn_at_whole_units(plug_in, size_px, canvas, size):
    model = {"size_px": size_px, "limits": {"max_side_px": 1024}}
    assert plug_in.size_for(model, *canvas) == size


# Run by GIMP's own Python: a green layer that is not shown, whose right half is selected.
IN_GIMP = """
import gi, json, os
gi.require_version("Gimp", "3.0")
from gi.repository import Gegl, Gimp

def draw(image, layer, **wanted):
    procedure = Gimp.get_pdb().lookup_procedure("t2i-draw")
    config = procedure.create_config()
    config.set_core_object_array("drawables", [layer])
    for key, value in {"run-mode": Gimp.RunMode.NONINTERACTIVE, "image": image, **wanted}.items():
        config.set_property(key, value)
    status = procedure.run(config).index(0).value_nick
    return status, Gimp.get_pdb().get_last_error()

image = Gimp.Image.new(32, 16, Gimp.ImageBaseType.RGB)
layer = Gimp.Layer.new(image, "below", 32, 16, Gimp.ImageType.RGBA_IMAGE, 20, Gimp.LayerMode.NORMAL)
image.insert_layer(layer, None, 0)
Gimp.context_set_foreground(Gegl.Color.new("lime"))
layer.fill(Gimp.FillType.FOREGROUND)
layer.set_visible(False)
image.select_rectangle(Gimp.ChannelOps.REPLACE, 16, 0, 16, 16)
address = os.environ["ADDRESS"]
told = {
    "drawn": draw(image, layer, address=address, token="secret", prompt="red", start=True, strength=1.0),
    "refused": draw(image, layer, address=address, token="", prompt="red", start=True),
}
top = image.get_layers()[0]
told["layers"] = [each.get_name() for each in image.get_layers()]
told["size"] = [top.get_width(), top.get_height()]
told["colour"] = list(top.get_pixel(4, 4).get_rgba())[:3]
with open(os.environ["TOLD"], "w") as file:
    json.dump(told, file)
"""


@pytest.mark.skipif(shutil.which("gimp-console-3.0") is None, reason="GIMP 3 is not installed")
def test_gimp_itself_draws_what_is_selected(listen, tmp_path):
    service, address = listen(token="secret")
    shutil.copytree(PLUG_IN, tmp_path / "gimp" / "plug-ins" / PLUG_IN.name)
    told = tmp_path / "told.json"
    given = {"HOME": tmp_path, "GIMP3_DIRECTORY": tmp_path / "gimp", "ADDRESS": address, "TOLD": told}
    command = [
        "gimp-console-3.0",
        "-n",
        "-i",
        "--quit",
        "--batch-interpreter",
        "python-fu-eval",
        "-b",
        IN_GIMP,
    ]
    subprocess.run(command, env=os.environ | {key: str(value) for key, value in given.items()}, timeout=300)
    answer = json.loads(told.read_text())
    assert answer["drawn"][0] == "success", answer
    assert (answer["layers"], answer["size"], answer["colour"]) == (["red", "below"], [32, 16], [1, 0, 0])
    status, sentence = answer["refused"]
    assert (status, "The token is missing or wrong" in sentence) == ("execution-error", True)
    (picture,) = (tmp_path / "pictures").glob("*.png")
    recipe = json.loads(Image.open(picture).text["t2i"])
    start, mask = (Image.open(service.input_picture(recipe[name])) for name in ("image", "mask"))
    assert [start.convert("RGB").getpixel((x, 2)) for x in (1, start.width - 2)] == [(0, 255, 0)] * 2
    assert [mask.convert("L").getpixel((x, 2)) for x in (1, mask.width - 2)] == [0, 255]


def test_the_plug_in_is_as_gimp_wants_it():
    """Its folder has its name and it may be run."""
    path = PLUG_IN / f"{PLUG_IN.name}.py"
    assert path.stat().st_mode & 0o111
    assert "client" in {
        node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
    }
