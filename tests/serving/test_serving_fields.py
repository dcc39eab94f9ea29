"""What the page's fields ask for."""

from __future__ import annotations

import gradio
import pytest
from PIL import Image

from t2i.errors import ConfigError
from t2i.serving.page import Fields


@pytest.mark.parametrize("size", [(8, 8), (12, 16)])
def test_an_extended_picture_keeps_its_size_unless_another_is_said(make_service, size):
    with gradio.Blocks():
        fields = Fields(make_service())
    given = fields.filled({"prompt": "red", "height_px": size[0], "width_px": size[1], "extend": "left=4"})
    given[fields.inputs.index(fields.image)] = {"background": Image.new("RGB", (5, 6)), "layers": []}
    wanted = fields.wanted(*given)
    assert wanted.extend == {"left": 4}
    assert (wanted.height, wanted.width) == ((None, None) if size == (8, 8) else size)
    if size == (8, 8):
        with pytest.raises(
            ConfigError, match=r"height is 6; allowed: multiples of 4: extend by other pixels"
        ):
            fields.service.ask(wanted)
    else:
        assert fields.service.ask(wanted).count == 1
