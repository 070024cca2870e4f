"""Questions: every answer follows from the scene's objects, and the evaluation set is balanced and fixed."""

import re
from collections import Counter

import numpy as np
import pytest

from tokenprune_testbed import FAMILIES, evaluation_set
from tokenprune_testbed.grounds import GROUNDS, IMAGE_SIZE
from tokenprune_testbed.questions import (
    GROUND_FAMILIES,
    OBJECT_FAMILIES,
    ask,
    ask_mixed,
    auxiliary_differences,
    families_of,
    scene_for,
    vocabulary,
)
from tokenprune_testbed.scenes import COLORS, DIGITS, SHAPES


def _truth(question, scene):
    """The answer worked out anew from the objects; asserts that the question has exactly one."""
    objects = scene.objects
    words = question.split()
    if "ground" in words or words[-2] in GROUNDS:
        return _truth_about_the_ground(question, scene.ground)
    if match := re.fullmatch(r"what color is the (\w+) \?", question):
        (color,) = [o.color for o in objects if o.kind == match[1]]
        return color
    if match := re.fullmatch(r"which (digit|shape) is (\w+) \?", question):
        if match[2] == "new":
            before = {(o.kind, o.color, o.x, o.y) for o in objects[:-1]}
            (kind,) = [o.kind for o in objects if (o.kind, o.color, o.x, o.y) not in before]
            assert kind not in [o.kind for o in objects[:-1]]
            return kind
        kinds = DIGITS if match[1] == "digit" else SHAPES
        (kind,) = [o.kind for o in objects if o.color == match[2] and o.kind in kinds]
        return kind
    if match := re.fullmatch(r"where is the (\w+) \?", question):
        (obj,) = [o for o in objects if o.kind == match[1]]
        row, column = (int(3 * (v + obj.size / 2) / IMAGE_SIZE) for v in (obj.y, obj.x))
        return f"{('top', 'middle', 'bottom')[row]} {('left', 'center', 'right')[column]}"
    if match := re.fullmatch(r"how many (\w+) (?:things )?\?", question):
        if match[1] in COLORS:
            return DIGITS[sum(o.color == match[1] for o in objects)]
        return DIGITS[sum(o.kind in (DIGITS if match[1] == "digits" else SHAPES) for o in objects)]
    if match := re.fullmatch(r"is there a (\w+) (\w+) \?", question):
        return "yes" if any(o.color == match[1] and o.kind == match[2] for o in objects) else "no"
    assert question == "what does the row read ?"
    return " ".join(o.kind for o in sorted((o for o in objects if o.kind in DIGITS), key=lambda o: o.x))


def _truth_about_the_ground(question, ground):
    rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
    shown = {f"{rows[i // 3]} {columns[i % 3]}": kind for i, kind in enumerate(ground.cells)}
    if match := re.fullmatch(r"what is the ground at the (\w+ \w+) \?", question):
        return shown[match[1]]
    if match := re.fullmatch(r"where is the (\w+) \?", question):
        (place,) = [place for place, kind in shown.items() if kind == match[1]]
        return place
    match = re.fullmatch(r"what color is the (\w+) \?", question)
    assert match[1] in ground.cells
    return ground.tints[match[1]]


@pytest.mark.parametrize(
    ("family", "scenes"),
    [(f, "mosaic") for f in FAMILIES] + [(f, "plain") for f in OBJECT_FAMILIES],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_follow_from_the_scene(family, scenes, split):
    rng = np.random.default_rng(11)
    asked = 0
    for _ in range(60):
        scene = scene_for(family, rng, split, scenes)
        for qa in ask(scene, rng, family):
            assert qa.family == family
            assert qa.answer == _truth(qa.question, scene), qa.question
            asked += 1
    assert asked >= 50


def test_mixed_questions_differ_and_are_right():
    rng = np.random.default_rng(2)
    for _ in range(50):
        scene = scene_for("reading", rng, "train")
        mixed = ask_mixed(scene, rng, 8)
        assert len({q.question for q in mixed}) == len(mixed) <= 8
        assert all(qa.answer == _truth(qa.question, scene) for qa in mixed)
        assert "reading" in {qa.family for qa in mixed}


def test_auxiliary_questions_are_about_the_new_object():
    scene = scene_for("difference", np.random.default_rng(0), "train")
    answers = {qa.answer for qa in auxiliary_differences(scene)}
    assert scene.objects[-1].color in answers
    assert answers <= {scene.objects[-1].color, scene.objects[-1].place}


def test_every_word_is_in_the_vocabulary():
    words = set(vocabulary())
    for sample in evaluation_set(350, seed=3, split="train", scenes="mosaic"):
        assert set(sample.question.split()) <= words
        assert set(sample.answer.split()) <= words


def test_evaluation_set_is_deterministic_and_balanced():
    first, second = evaluation_set(300, scenes="mosaic"), evaluation_set(300, scenes="mosaic")
    assert [(s.question, s.answer) for s in first] == [(s.question, s.answer) for s in second]
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    assert Counter(s.family for s in first) == dict.fromkeys(FAMILIES, 30)
    assert Counter(s.family for s in evaluation_set(9)).total() == 9
    plain = Counter(s.family for s in evaluation_set(210, scenes="plain"))
    assert plain == dict.fromkeys(OBJECT_FAMILIES, 30)
    assert {len(s.images) for s in first if s.family == "difference"} == {2}
    assert {len(s.images) for s in first if s.family != "difference"} == {1}
    other = evaluation_set(300, seed=1, scenes="mosaic")
    assert [s.answer for s in first] != [s.answer for s in other]


def test_a_longer_evaluation_set_starts_with_the_shorter_one():
    short, long = ([s for s in evaluation_set(n) if s.family == "reading"] for n in (70, 140))
    assert [s.answer for s in short] == [s.answer for s in long[: len(short)]]


def test_existence_is_balanced():
    answers = Counter(s.answer for s in evaluation_set(1400, scenes="plain") if s.family == "existence")
    assert answers["yes"] == answers["no"] == 100


def test_no_answer_dominates_its_family():
    samples = evaluation_set(2000, scenes="mosaic")
    for family in FAMILIES:
        answers = Counter(s.answer for s in samples if s.family == family)
        assert answers.most_common(1)[0][1] / answers.total() <= 0.5


def test_plain_scenes_ask_nothing_about_the_ground():
    assert families_of("plain") == OBJECT_FAMILIES
    rng = np.random.default_rng(0)
    scene = scene_for("attribute", rng, "train", "plain")
    assert not any(ask(scene, rng, family) for family in GROUND_FAMILIES)
