"""What is asked for is drawn in order, up to a bound, and can be stopped."""

from __future__ import annotations

import json
import time

import pytest
from PIL import Image

from t2i.errors import ConfigError
from t2i.generation.recipes import RECIPE_KEY
from t2i.serving.queue import Job, QueueFull
from t2i.serving.wanted import Wanted
from t2i.text.tokens import TokenCounter


def until(holds) -> None:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < 30
        time.sleep(0.005)


def ended(job: Job) -> Job:
    until(lambda: job.ended)
    return job


def test_a_job_writes_its_pictures_with_their_recipes(make_service):
    service = make_service()
    job = ended(service.ask(Wanted("red", seed=5, num_images=3, sampling={"steps": 2})))
    assert (job.state, job.step, job.steps, job.error) == ("done", 2, 2, None)
    recipes = [json.loads(Image.open(path).text[RECIPE_KEY]) for path in job.pictures]
    assert [each["seed"] for each in recipes] == [5, 6, 7]
    assert recipes[0] | {"seed": 0} == {
        "checkpoint": "a/run",
        "weights": "0123",
        "precision": "32-true",
        "sampling": {"steps": 2, "sampler": "euler", "noise": None},
        "height_px": 8,
        "width_px": 8,
        "negative_prompt": "",
        "prompt": "red",
        "seed": 0,
    }


def test_what_is_there_already_is_shown_without_being_drawn(make_service):
    service = make_service()
    first, again = (ended(service.ask(Wanted("red", num_images=2))) for _ in range(2))
    assert again.pictures == first.pictures
    assert service.generator.drawn == ["red", "red"]
    more = ended(service.ask(Wanted("red", num_images=3)))
    assert more.pictures[:2] == first.pictures
    assert service.generator.drawn == ["red"] * 3


def test_what_the_text_encoder_does_not_take_is_said(make_service):
    service = make_service()
    service.tokens = TokenCounter(lambda text: len(text.split()), 3)
    assert service.ask(Wanted("red green blue")).note == ""
    note = service.ask(Wanted("red green blue gold", negative_prompt="a b c d")).note
    assert "prompt has 4 tokens, of which 3 are taken: 'gold' is left out." in note
    assert "negative_prompt has 4 tokens" in note


def test_fifty_at_once_are_drawn_in_order_or_told_to_wait(make_service):
    service = make_service(max_waiting=30)
    service.generator.gate.clear()
    first = service.ask(Wanted("first"))
    until(lambda: service.generator.drawn)
    jobs = [service.ask(Wanted(f"number {i}")) for i in range(30)]
    for i in range(30, 50):
        with pytest.raises(QueueFull, match="30 requests wait already: ask again later"):
            service.ask(Wanted(f"number {i}"))
    assert [service.queue.ahead(job) for job in jobs] == list(range(1, 31))
    assert service.queue.ahead(first) == 0
    service.generator.gate.set()
    ended(jobs[-1])
    assert service.generator.drawn == ["first", *(f"number {i}" for i in range(30))]
    assert ended(service.ask(Wanted("later"))).state == "done"


def test_what_waits_is_stopped_without_being_drawn(make_service):
    service = make_service()
    service.generator.gate.clear()
    first, second = service.ask(Wanted("first")), service.ask(Wanted("second"))
    service.queue.stop(second)
    service.generator.gate.set()
    assert (ended(first).state, second.state) == ("done", "stopped")
    assert service.generator.drawn == ["first"]


def test_what_is_drawn_stops_after_its_step_and_keeps_its_pictures(make_service):
    service = make_service()
    service.generator.calls_before_the_gate = 1
    job = service.ask(Wanted("red", num_images=4))  # two batches
    until(lambda: len(service.generator.drawn) == 4)
    service.queue.stop(job)
    service.generator.gate.set()
    assert ended(job).state == "stopped"
    assert len(job.pictures) == 2
    assert len(service.gallery.all()) == 2


@pytest.mark.parametrize(
    ("prompt", "error"),
    [("broken", "2 of 2 pictures came out with numbers"), ("bug", "ZeroDivisionError: a fault")],
)
def test_a_failure_is_said_and_the_next_one_is_drawn(make_service, prompt, error):
    service = make_service()
    job = ended(service.ask(Wanted(prompt, num_images=2)))
    assert job.state == "failed"
    assert error in job.error
    assert ended(service.ask(Wanted("red"))).state == "done"


def test_a_size_that_the_model_refuses_is_refused_at_once(make_service):
    with pytest.raises(ConfigError, match=r"height is 6; allowed: multiples of 4\."):
        make_service().ask(Wanted("red", height=6))


def test_what_a_recipe_says_and_the_server_does_not_draw_is_said(make_service):
    service = make_service()
    drawn = {"prompt": "red", "weights": "0123", "precision": "32-true", "between": None}
    assert service.drawn_otherwise(drawn) == []
    said = service.drawn_otherwise(
        {"weights": "4567", "precision": "16-mixed", "between": {"share": 0.5}, "image": "/etc/passwd"}
    )
    assert said == [
        "It was drawn with weights '4567', and the weights are here '0123': another picture will come of it.",
        "It was drawn with precision '16-mixed', and the precision is here '32-true': another picture will come of it.",
        "It lies between prompts or seeds, which `t2i sample` draws and this page does not.",
        "Its image was not sent to this server: give it again.",
    ]


def test_an_end_stops_all(make_service):
    service = make_service()
    service.generator.gate.clear()
    jobs = [service.ask(Wanted("red")) for _ in range(3)]
    until(lambda: service.generator.drawn)
    service.generator.gate.set()
    service.queue.close()
    assert {job.state for job in jobs[1:]} == {"stopped"}
    assert jobs[0].ended


PICTURE = "iVBORw0KGgo="


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"prompt": "x" * 10_001}, "prompt is '10,001 characters'; allowed: at most 10,000."),
        ({"num_images": 17}, "num_images is 17; allowed: 1 to 16."),
        ({"num_images": 0}, "num_images is 0; allowed: 1 to 16."),
        ({"seed": -1}, "seed is -1; allowed: 0 to"),
        ({"height": 2048}, "height is 2048; allowed: 1 to 1024."),
        ({"width": 0}, "width is 0; allowed: 1 to 1024."),
        ({"strength": 0.0}, "strength is 0.0; allowed: above 0, at most 1."),
        ({"strength": 0.5}, "strength is 'given'; allowed: only with image."),
        ({"sampling": {"steps": 1001}}, "sampling.steps is 1001; allowed: at most 1000."),
        ({"sampling": {"steps": "many"}}, "sampling.steps is 'many'; allowed: a whole number."),
        ({"sampling": {"stepz": 3}}, "sampling.stepz is not a known key; did you mean sampling.steps?"),
        ({"image": "%"}, "image is not a picture file in base64"),
        ({"image": PICTURE}, "image is not a picture file in base64"),
    ],
)
def test_what_is_not_allowed_is_one_sentence(make_service, values, sentence):
    with pytest.raises(ConfigError) as refused:
        make_service().ask(Wanted(**{"prompt": "red"} | values))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
