#!/usr/bin/env python3
"""A plug-in for GIMP 3: Filters > Draw with t2i. What is selected is drawn anew, or else the whole layer is started
from; what is drawn becomes a layer of its own. See docs/serving.md."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import gi

gi.require_version("Gimp", "3.0")
gi.require_version("GimpUi", "3.0")
from client import Client, Refused, size_for  # noqa: E402  (the file beside this one)
from gi.repository import Gimp, GimpUi, Gio, GLib, GObject  # noqa: E402

NAME = "t2i-draw"
QUIETLY = Gimp.RunMode.NONINTERACTIVE
TEXTS = ("prompt", "negative-prompt", "address", "token")


class Draw(Gimp.PlugIn):
    def do_set_i18n(self, name):
        return False

    def do_query_procedures(self):
        return [NAME]

    def do_create_procedure(self, name):
        made = Gimp.ImageProcedure.new(self, name, Gimp.PDBProcType.PLUGIN, self.run, None)
        made.set_image_types("RGB*, GRAY*")
        made.set_sensitivity_mask(Gimp.ProcedureSensitivityMask.DRAWABLE)
        made.set_menu_label("Draw with t2i...")
        made.add_menu_path("<Image>/Filters/")
        made.set_documentation("Draws for a prompt with a model that `t2i serve` holds", None, name)
        both = GObject.ParamFlags.READWRITE
        made.add_string_argument("prompt", "_Prompt", "What to draw", "", both)
        made.add_string_argument("negative-prompt", "_Negative prompt", "What to move away from", "", both)
        made.add_int_argument("seed", "See_d", "Of the noise", 0, 2**31 - 1, 0, both)
        made.add_boolean_argument("start", "Start _from this layer", "Or else from noise", True, both)
        made.add_double_argument("strength", "_How far from it", "Above 0, at most 1", 0.05, 1.0, 0.8, both)
        made.add_string_argument("address", "_Address", "Of t2i serve", "http://127.0.0.1:7860", both)
        made.add_string_argument("token", "_Token", "Where the server asks for one", "", both)
        return made

    def run(self, procedure, run_mode, image, drawables, config, data):
        if run_mode == Gimp.RunMode.INTERACTIVE:
            GimpUi.init(NAME)
            dialog = GimpUi.ProcedureDialog.new(procedure, config, "Draw with t2i")
            dialog.fill(None)
            wanted = dialog.run()
            dialog.destroy()
            if not wanted:
                return procedure.new_return_values(Gimp.PDBStatusType.CANCEL, GLib.Error())
        # GIMP keeps an empty text of the last call as None.
        prompt, negative, address, token = (config.get_property(key) or "" for key in TEXTS)
        body = {"prompt": prompt, "negative_prompt": negative, "seed": config.get_property("seed")}
        client = Client(address, token)
        Gimp.progress_init("Drawing with t2i")
        try:
            with tempfile.TemporaryDirectory() as folder:
                size = size_for(client.model(), image.get_width(), image.get_height())
                body["width"], body["height"] = size
                start = mask = None
                if config.get_property("start"):
                    body["strength"] = config.get_property("strength")
                    start = exported(image, drawables[0], size, Path(folder) / "start.png")
                    if not Gimp.Selection.is_empty(image):
                        mask = exported(image, image.get_selection(), size, Path(folder) / "mask.png")
                (drawn,) = client.draw(body, start, mask, Gimp.progress_update)
                path = Path(folder) / "drawn.png"
                path.write_bytes(drawn)
                layer = Gimp.file_load_layer(QUIETLY, image, Gio.File.new_for_path(str(path)))
        except Refused as refused:
            return procedure.new_return_values(Gimp.PDBStatusType.EXECUTION_ERROR, GLib.Error(str(refused)))
        layer.set_name(prompt or "t2i")
        image.undo_group_start()
        image.insert_layer(layer, None, 0)
        layer.scale(image.get_width(), image.get_height(), False)
        image.undo_group_end()
        Gimp.displays_flush()
        return procedure.new_return_values(Gimp.PDBStatusType.SUCCESS, GLib.Error())


def exported(image, drawable, size, path):
    """A drawable on the whole canvas, scaled to size (width, height), as the bytes of a PNG file."""
    alone = Gimp.Image.new(image.get_width(), image.get_height(), image.get_base_type())
    layer = Gimp.Layer.new_from_drawable(drawable, alone)
    alone.insert_layer(layer, None, 0)
    _, left, top = drawable.get_offsets()
    layer.set_offsets(left, top)
    # Its pixels count, however it is shown.
    layer.set_visible(True)
    layer.set_opacity(100)
    layer.set_mode(Gimp.LayerMode.NORMAL)
    alone.flatten()
    alone.scale(*size)
    Gimp.file_save(QUIETLY, alone, Gio.File.new_for_path(str(path)), None)
    alone.delete()
    return path.read_bytes()


Gimp.main(Draw.__gtype__, sys.argv)
