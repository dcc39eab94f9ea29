"""Which judge fits the data, and how its answers are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from data_configs import data_config

from t2i.data.reader import read_all
from t2i.evaluation.prompts import check_scenes, derangements, group_of, judge_for, score, score_groups
from t2i.interfaces import Batch


def batch(image: torch.Tensor, metadata: list[dict[str, Any]]) -> Batch:
    count = len(image)
    zeros = torch.zeros(count, 2, dtype=torch.int64)
    return Batch(
        image, ["?"] * count, [str(i) for i in range(count)], zeros, zeros, metadata, torch.arange(count)
    )


@pytest.fixture(scope="module")
def scenes(shapes_shards) -> Batch:
    """The held-out scenes: eight of one object, four of two."""
    data = data_config("shapes", shards=str(shapes_shards / "train" / "00000.tar"))
    return read_all(data, str(shapes_shards / "heldout" / "00000.tar"), 32)


def test_shares_are_among_the_prompts_that_name_the_attribute():
    answers = [
        {"shape": True, "colour": True, "position": True},
        {"shape": True, "colour": False},
        {"shape": False, "colour": True, "relation": False},
        {"shape": True, "colour": True},
    ]
    result = score(answers)
    assert result.count == 4
    assert result.exact == 2 / 4
    assert result.by_attribute == {"shape": 3 / 4, "colour": 3 / 4, "position": 1.0, "relation": 0.0}
    assert list(result.by_attribute) == ["shape", "colour", "position", "relation"]


def test_exact_is_never_more_than_any_attribute():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.rand(7, 3, generator=generator) < 0.7
        answers = [dict(zip("abc", row.tolist(), strict=True)) for row in rows]
        result = score(answers)
        assert result.exact == pytest.approx(rows.all(1).double().mean().item())
        assert list(result.by_attribute.values()) == pytest.approx(rows.double().mean(0).tolist())


@pytest.mark.parametrize(
    ("objects", "group"), [(1, "unseen"), (2, "unseen_two_objects"), (3, "unseen_three_objects")]
)
def test_scenes_are_counted_by_their_objects(objects, group):
    assert group_of({"scene": {"objects": [{}] * objects}}) == group


def test_other_samples_are_one_group():
    assert group_of({"attributes": {"tone": "dark"}}) == group_of({}) == "unseen"


def never() -> Batch:
    raise AssertionError("the training pictures are not needed")


def test_scenes_have_their_exact_checker(scenes):
    assert judge_for(never, scenes) is check_scenes


def test_other_data_has_no_judge():
    assert judge_for(never, batch(torch.zeros(2, 3, 4, 4), [{"caption": "x"}] * 2)) is None


def test_attributes_are_judged_by_the_nearest_picture_of_either_part():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1
    said = [{"attributes": {"tone": tone, "job": job}} for tone in "xy" for job in "ab"]
    train, heldout = batch(images[:3], said[:3]), batch(images[3:], said[3:])
    judge = judge_for(lambda: train, heldout)
    assert judge is not None
    right, wrong = {"tone": True, "job": True}, {"tone": False, "job": False}
    assert judge(images, said) == [right] * 4
    assert judge(images.flip(0), said) == [wrong] * 4  # x-a against y-b, x-b against y-a
    assert judge(images[3:], [{"attributes": {"tone": "y"}}]) == [{"tone": True}]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        judge(images[:2], said[:1])


def test_scenes_show_what_they_say(scenes):
    answers = check_scenes(scenes.image, scenes.metadata)
    assert score(answers).exact == 1.0
    named = [answer.keys() for answer in answers]
    assert all(
        ("position" in names) == (group_of(s) == "unseen")
        for names, s in zip(named, scenes.metadata, strict=True)
    )
    assert all(
        ("relation" in names) == (group_of(s) != "unseen")
        for names, s in zip(named, scenes.metadata, strict=True)
    )


def test_scenes_of_others_do_not(scenes):
    turned = score(check_scenes(scenes.image.roll(1, dims=0), scenes.metadata))
    assert turned.exact < 0.3
    assert score(check_scenes(torch.zeros_like(scenes.image), scenes.metadata)).by_attribute["shape"] == 0.0
    with pytest.raises(ValueError, match=r"shorter|longer"):
        check_scenes(scenes.image[:2], scenes.metadata[:1])


def test_groups_are_scored_apart(scenes):
    """Blank out one of the eight pictures with one object, and all those with two."""
    images = scenes.image.clone()
    groups = [group_of(sample) for sample in scenes.metadata]
    images[groups.index("unseen")] = 0
    images[[i for i, group in enumerate(groups) if group == "unseen_two_objects"]] = 0
    scores = score_groups(check_scenes, images, scenes)
    assert {name: (each.drawn.count, each.drawn.exact, each.real.exact) for name, each in scores.items()} == {
        "unseen": (8, 7 / 8, 1.0),
        "unseen_two_objects": (4, 0.0, 1.0),
    }


@pytest.mark.parametrize("count", [1, 2, 3, 5, 384])
def test_each_prompt_gets_the_picture_of_another(count):
    made = derangements(count)
    assert len(made) == min(4, count - 1)
    for other in made:
        assert sorted(other.tolist()) == list(range(count))
        assert (other != torch.arange(count)).all()
    assert len({tuple(other.tolist()) for other in made}) == len(made)


def test_chance_is_what_pictures_of_other_prompts_score():
    """Five pictures of one tone and one of another: of the 30 pairs of two, 20 agree in tone, and none in number. Drawn
    pictures do not matter."""
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 4, 4)
    said = [{"tone": "dark" if i < 5 else "light", "number": i} for i in range(6)]

    def judge(images: torch.Tensor, metadata: list[dict[str, Any]]) -> list[dict[str, bool]]:
        shown = [said[int(image[0, 0, 0])] for image in images]
        return [
            {key: found[key] == wanted[key] for key in wanted}
            for found, wanted in zip(shown, metadata, strict=True)
        ]

    chance = score_groups(judge, torch.zeros_like(images), batch(images, said))["unseen"].chance
    assert chance is not None
    assert chance.by_attribute == {"tone": pytest.approx(20 / 30), "number": 0.0}
    assert (chance.count, chance.exact) == (24, 0.0)


def test_chance_is_over_the_pictures_of_all_groups(scenes):
    """A picture that knows nothing of its prompt may have any number of objects."""
    scores = score_groups(check_scenes, scenes.image, scenes)
    for group, others in (("unseen", 7), ("unseen_two_objects", 3)):
        chance = scores[group].chance
        assert chance is not None
        assert 0 < chance.by_attribute["count"] < 1
        assert abs(chance.by_attribute["count"] - others / 11) < 0.3
        assert chance.exact < 0.3


def test_one_prompt_alone_has_no_level_of_chance(scenes):
    alone = batch(scenes.image[:1], scenes.metadata[:1])
    (scores,) = score_groups(check_scenes, alone.image, alone).values()
    assert scores.chance is None
    assert scores.to_json().keys() == {"count", "exact", "by_attribute", "real"}
