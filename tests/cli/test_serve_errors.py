"""What `t2i serve` refuses before it loads anything."""

from __future__ import annotations

import socket
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "70000"], "t2i serve: --port is 70000; allowed: 0 to 65535; 0 takes any that is free."),
        (["--max-images", "0"], "t2i serve: --max-images is 0; allowed: 1 to 1,000."),
        (["--token", ""], "t2i serve: --token is ''; allowed: letters and digits of ASCII, and _ . ~ -."),
        (["--token", "a+b"], "t2i serve: --token is 'a+b'; allowed: letters and digits"),
        (["--checkpoint", ""], "t2i serve: --checkpoint is ''; allowed: a run folder or a file of weights."),
        (
            ["--host", "a b"],
            "t2i serve: --host is 'a b'; allowed: an address of this",
        ),
        (
            ["--host", "192.0.2.1"],
            "t2i serve: --port 7860 of 192.0.2.1 cannot be had: Cannot assign requested address",
        ),
        (["--port", "0", "--clip", "none"], "t2i serve: --clip is 'none'; allowed: a folder with a CLIP"),
        (["--port", "0"], "t2i serve: There is no trained run in"),
    ],
)
def test_a_wrong_flag_is_one_sentence(t2i, arguments, sentence):
    assert t2i("serve", *arguments).sentence.startswith(sentence)


def test_a_port_in_use_is_one_sentence(t2i):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = t2i("serve", "--port", str(port)).sentence
    assert sentence == (
        f"t2i serve: --port {port} of 127.0.0.1 cannot be had: Address already in use; --port 0 takes any that is free."
    )


def test_without_its_package_it_says_how_to_get_it(t2i, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("t2i.serving")]:
        monkeypatch.delitem(sys.modules, name)
    assert t2i("serve", "--port", "0").sentence == (
        "t2i serve: The page needs gradio: `pip install 't2i[serve]'` brings it."
    )
