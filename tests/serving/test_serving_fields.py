"""What the page's fields ask for."""

from __future__ import annotations

import gradio
import pytest
from PIL import Image

from t2i.errors import ConfigError
from t2i.serving.options import Option
from t2i.serving.page import Fields, field_of


@pytest.mark.parametrize("size", [(8, 8), (12, 16)])
def test_an_extended_picture_keeps_its_size_unless_another_is_said(make_service, size):
    with gradio.Blocks():
        fields = Fields(make_service())
    given = fields.filled({"prompt": "red", "height_px": size[0], "width_px": size[1], "extend": "left=4"})
    given[fields.inputs.index(fields.image)] = {"background": Image.new("RGB", (5, 6)), "layers": []}
    wanted = fields.wanted(*given)
    assert (wanted.extend, wanted.strength) == ({"left": 4}, None)  # as where the API is told nothing
    assert (wanted.height, wanted.width) == ((None, None) if size == (8, 8) else size)
    if size == (8, 8):
        with pytest.raises(
            ConfigError, match=r"height is 6; allowed: multiples of 4: extend by other pixels"
        ):
            fields.service.ask(wanted)
    else:
        assert fields.service.ask(wanted).count == 1
    given[fields.inputs.index(fields.strength)] = "0.5"
    assert fields.wanted(*given).strength == 0.5
    given[fields.inputs.index(fields.strength)] = "far"
    with pytest.raises(ConfigError, match=r"strength is 'far'; allowed: a number"):
        fields.wanted(*given)


@pytest.mark.parametrize(
    ("kind", "given", "read"), [("whole", "20", 20), ("number", "0.5", 0.5), ("number", "", None)]
)
def test_a_number_that_may_be_left_out_is_text(kind, given, read):
    """An empty field of numbers would turn to 0 when it is shown."""
    option = Option("top_k", kind, None, optional=True)
    assert isinstance(field_of(option), gradio.Textbox)
    assert option.read(given) == read
    assert isinstance(field_of(Option("steps", kind, 3)), gradio.Number)
