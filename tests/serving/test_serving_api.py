"""The HTTP API, and who may ask it."""

from __future__ import annotations

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from t2i.generation.recipes import RECIPE_KEY
from t2i.serving import api
from t2i.serving.guard import Guard

HERE = "http://127.0.0.1:7860"


@pytest.fixture
def ask(make_service):
    """(service, client) behind a guard."""

    def ask(token: str | None = None, max_bytes: int = 2**20, **limits):
        service = make_service(**limits)
        return service, TestClient(Guard(api.build(service), token, max_bytes), base_url=HERE)

    return ask


def drawn(client: TestClient, **body) -> dict:
    answer = client.post("/api/generate", json={"prompt": "red"} | body)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    began = time.monotonic()
    while job["state"] in ("waiting", "drawing"):
        assert time.monotonic() - began < 30
        job = client.get(f"/api/jobs/{job['id']}").json()
    return job


def test_a_request_becomes_pictures(ask):
    _, client = ask()
    job = drawn(client, num_images=2, seed=4)
    assert (job["state"], job["ahead"], job["error"]) == ("done", 0, None)
    answer = client.get(job["pictures"][0])
    assert answer.headers["content-type"] == "image/png"
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.getpixel((0, 0)) == (255, 0, 0)
    assert json.loads(picture.text[RECIPE_KEY])["seed"] == 4
    assert [each["picture"] for each in client.get("/api/gallery?text=red").json()["pictures"]] == job[
        "pictures"
    ][::-1]


def test_a_picture_to_start_from_is_kept_for_its_recipe(ask):
    service, client = ask()
    file = io.BytesIO()
    Image.new("RGB", (40, 20), (255, 0, 0)).save(file, format="JPEG")
    job = drawn(client, image=base64.b64encode(file.getvalue()).decode(), strength=0.5)
    recipe = json.loads(Image.open(io.BytesIO(client.get(job["pictures"][0]).content)).text[RECIPE_KEY])
    assert recipe["strength"] == 0.5
    assert Image.open(service.input_picture(recipe["image"])).size == (40, 20)
    assert service.input_picture("../../secret.png") is None


def png(size: tuple[int, int], colour: int = 0) -> str:
    file = io.BytesIO()
    Image.new("L", size, colour).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({"extend": {"left": 4, "bottom": 8}}, (12, 16)),
        ({"extend": {"left": 4}, "height": 8, "width": 16}, (16, 8)),
        ({"mask": png((8, 8), 255)}, (8, 8)),
    ],
)
def test_a_picture_is_extended_and_a_part_of_it_drawn_anew(ask, body, size):
    service, client = ask()
    job = drawn(client, image=png((8, 8)), **body)
    picture = Image.open(io.BytesIO(client.get(job["pictures"][0]).content))
    assert picture.size == size
    assert json.loads(picture.text[RECIPE_KEY])["strength"] == 1.0
    (request,) = service.generator.requests
    mask = request.mask
    assert mask.shape == (1, 1, size[1], size[0])
    assert mask.sum() == (
        64 if "mask" in body else size[0] * size[1] - (64 if "height" not in body else 8 * 12)
    )


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"extend": {"up": 8}}, "extend is 'up'; allowed: left, right, top, bottom."),
        ({"extend": {"left": 0}}, "extend.left is 0; allowed: 1 to 1024."),
        (
            {"extend": {"top": 1}},
            "height is 9; allowed: multiples of 4: extend by other pixels, or say height 8 and width 8 of the whole, "
            "to which the picture is cut.",
        ),
        ({"extend": {"top": 1}, "height": 9, "width": 8}, "height is 9; allowed: multiples of 4."),
        ({"extend": {"left": 8}, "height": 8, "width": 8}, "less than the whole, 8 x 8 px"),
        ({"extend": {"left": 1020}}, "height x width is '8 x 1028'; allowed: at most 1024 each."),
        ({"mask": png((4, 8), 255)}, "is '8 x 4 pixels'; allowed: 8 x 8 pixels"),
        ({"mask": png((8, 8))}, "mask is 'white nowhere'; allowed: white (128"),
        ({"extend": {"left": 1}, "image": png((2000, 2000))}, "height x width is '2000 x 2001'"),
        ({"image": png((5000, 5000))}, "image is '5000 x 5000 px'; allowed: at most 16,777,216 pixels."),
        ({"image": "héé"}, "image is not a picture file in base64"),
    ],
)
def test_what_does_not_fit_the_picture_is_one_sentence(ask, body, sentence):
    _, client = ask()
    answer = client.post("/api/generate", json={"prompt": "red", "image": png((8, 8))} | body)
    assert answer.status_code == 422
    assert sentence in answer.json()["error"]


def test_a_model_says_what_it_takes(ask):
    _, client = ask(max_images=3)
    model = client.get("/api/model").json()
    assert model["sampling"] == {"steps": 3, "sampler": "euler", "noise": None}
    assert (model["size_px"], model["limits"]["max_images"]) == (8, 3)


def test_a_job_is_stopped(ask):
    service, client = ask()
    service.generator.gate.clear()
    jobs = [client.post("/api/generate", json={"prompt": "red"}).json()["id"] for _ in range(2)]
    assert client.delete(f"/api/jobs/{jobs[1]}").json()["state"] == "stopped"
    assert client.get("/api/jobs/none").status_code == 404
    assert client.delete("/api/jobs/none").status_code == 404


def test_fifty_at_once_are_answered_or_told_to_wait(ask):
    service, client = ask(max_waiting=20)
    service.generator.gate.clear()
    with ThreadPoolExecutor(50) as threads:
        answers = list(
            threads.map(lambda i: client.post("/api/generate", json={"prompt": f"red {i}"}), range(50))
        )
    taken = [answer.json()["id"] for answer in answers if answer.status_code == 202]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(taken) in (20, 21)  # one may have begun
    assert len(taken) + len(refused) == 50
    assert {answer.headers["retry-after"] for answer in refused} == {"5"}
    service.generator.gate.set()
    for id in taken:
        while (job := client.get(f"/api/jobs/{id}").json())["state"] in ("waiting", "drawing"):
            time.sleep(0.01)
        assert job["state"] == "done"


@pytest.mark.parametrize(
    ("content", "kind", "sentence"),
    [
        (b'{"prompt": "red", "steps": 3}', "application/json", "steps is not a known key"),
        (b'{"prompt": 3}', "application/json", "prompt is 3; allowed: text."),
        (b"{}", "application/json", "prompt is missing"),
        (b'{"prompt": "red", "tile": "z"}', "application/json", "tile is 'z'; allowed: '', x, y, xy."),
        (b'{"prompt": "red", "mask": "x"}', "application/json", "mask is 'given'; allowed: only with image."),
        (b'{"prompt": "red", "image": "x"}', "application/json", "image is not a picture file in base64"),
        (
            b'{"prompt": "red", "extend": {"up": 8}}',
            "application/json",
            "extend is 'given'; allowed: only with image.",
        ),
        (b"[]", "application/json", "The body is 'list'; allowed: a JSON object."),
        (b"{", "application/json", "The body is not JSON"),
        (b"[" * 100_000, "application/json", "The body is not JSON"),
        (b'\xff{"prompt": "red"}', "application/json", "The body is not JSON"),
        (b'{"prompt": "red"}', "text/plain", "Content-Type is 'text/plain'; allowed: application/json."),
        (b'{"prompt": "\\ud800"}', "application/json", "prompt is"),
        (b'{"\\ud800": 1}', "application/json", "\\ud800 is not a known key"),
    ],
)
def test_a_body_that_is_not_allowed_is_one_sentence(ask, content, kind, sentence):
    _, client = ask()
    answer = client.post("/api/generate", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 422
    assert sentence in answer.json()["error"]


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/api/pictures/..%2Fsecret.png", 404),
        ("/api/pictures/secret.png", 422),
        ("/api/gallery?limit=0", 422),
        ("/api/gallery?limit=many", 422),
        ("/api/gallery?like=none.png", 422),
        ("/api/nothing", 404),
        ("/docs", 404),
        ("/openapi.json", 404),
        ("/api/gallery?limit=²", 422),
        (f"/api/gallery?limit={'9' * 5000}", 422),  # more digits than Python reads
    ],
)
def test_an_address_that_is_not_there(ask, address, status):
    _, client = ask()
    answer = client.get(address)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}


@pytest.mark.parametrize(
    ("method", "address", "allowed"),
    [
        ("GET", "/api/generate", "POST"),
        ("OPTIONS", "/api/generate", "POST"),
        ("POST", "/api/model", "GET"),
        ("HEAD", "/api/model", "GET"),
        ("PUT", "/api/jobs/none", "DELETE, GET"),
        ("DELETE", "/api/pictures/none.png", "GET"),
    ],
)
def test_another_method_is_refused_with_those_that_there_are(ask, method, address, allowed):
    _, client = ask()
    answer = client.request(method, address)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    if method != "HEAD":
        assert answer.json() == {"error": f"{method} {address} is not known; allowed: {allowed}."}


def test_a_full_disk_is_one_sentence(ask, monkeypatch):
    service, _ = ask()
    monkeypatch.setattr(
        service, "_kept_input", lambda data: (_ for _ in ()).throw(OSError(28, "No space left", "x"))
    )
    client = TestClient(Guard(api.build(service), None, 2**20), HERE, raise_server_exceptions=False)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    body = {"prompt": "red", "image": base64.b64encode(file.getvalue()).decode()}
    answer = client.post("/api/generate", json=body)
    assert (answer.status_code, answer.json()) == (500, {"error": "x cannot be used: No space left."})


def test_a_long_body_is_refused_whether_or_not_it_says_so(ask):
    _, client = ask(max_bytes=1000)
    long = json.dumps({"prompt": "x" * 2000}).encode()
    assert client.post("/api/generate", content=long).status_code == 413
    in_parts = client.post(
        "/api/generate", content=iter([long[:500], long[500:]]), headers={"Content-Type": "application/json"}
    )
    assert in_parts.status_code == 413


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:7860", "Origin": "http://localhost:7860"}, 200),
        ({"Host": "[::1]:7860"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[evil"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_without_a_token_only_this_machines_own_pages_may_ask(ask, headers, status):
    _, client = ask()
    assert client.get("/api/model", headers=headers).status_code == status


def test_what_has_ended_keeps_no_pictures_in_memory(ask):
    service, client = ask()
    drawn(client, image=png((8, 8)))
    failing = {"prompt": "broken", "image": png((8, 8))}
    assert client.post("/api/generate", json=failing).status_code == 202
    until_ended(service)
    assert [job.asked for job in service.queue.known.values()] == [None, None]


def until_ended(service) -> None:
    began = time.monotonic()
    while not all(job.ended and job.asked is None for job in service.queue.known.values()):
        assert time.monotonic() - began < 30
        time.sleep(0.01)


def test_a_token_is_asked_for(ask):
    _, client = ask(token="tökén")
    assert client.get("/api/model").status_code == 401
    assert client.get("/api/model", headers={"Authorization": "Bearer other"}).status_code == 401
    assert client.get("/api/model?token=other").status_code == 401
    client, token = ask(token="secret")[1], "secret"
    assert (
        client.get("/api/model", headers={"Authorization": f"Bearer {token}", "Host": "a.name"}).status_code
        == 200
    )
    assert client.get("/api/model").status_code == 401
    answer = client.get(f"/api/model?token={token}")
    assert answer.status_code == 200
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert client.get("/api/model").status_code == 200  # by its cookie


def test_a_page_may_load_nothing_from_elsewhere(ask):
    _, client = ask()
    policy = client.get("/api/model").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


def test_what_the_model_cannot_do_with_these_options_is_refused_before_it_waits(ask):
    service, client = ask()
    answer = client.post("/api/generate", json={"prompt": "red", "sampling": {"steps": 501}})
    assert answer.status_code == 422
    assert answer.json()["error"] == "sampling.steps is 501; allowed: at most 500 with this model."
    assert service.generator.drawn == []
