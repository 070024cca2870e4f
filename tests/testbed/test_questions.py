"""Questions: every answer follows from the scene's objects, and the evaluation set is balanced and fixed."""

import re
from collections import Counter

import numpy as np
import pytest

from tokenprune.testbed import FAMILIES, evaluation_set
from tokenprune.testbed.questions import ask, ask_mixed, auxiliary_differences, scene_for, vocabulary
from tokenprune.testbed.scenes import COLORS, DIGITS, IMAGE_SIZE, SHAPES


def _truth(question, scene):
    """The answer worked out anew from the objects; asserts that the question has exactly one."""
    objects = scene.objects
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
        row, column = (int(3 * (v + 7) / IMAGE_SIZE) for v in (obj.y, obj.x))
        return f"{('top', 'middle', 'bottom')[row]} {('left', 'center', 'right')[column]}"
    if match := re.fullmatch(r"how many (\w+) (?:things )?\?", question):
        if match[1] in COLORS:
            return DIGITS[sum(o.color == match[1] for o in objects)]
        return DIGITS[sum(o.kind in (DIGITS if match[1] == "digits" else SHAPES) for o in objects)]
    if match := re.fullmatch(r"is there a (\w+) (\w+) \?", question):
        return "yes" if any(o.color == match[1] and o.kind == match[2] for o in objects) else "no"
    assert question == "what does the row read ?"
    return " ".join(o.kind for o in sorted((o for o in objects if o.kind in DIGITS), key=lambda o: o.x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_follow_from_the_objects(family, split):
    rng = np.random.default_rng(11)
    asked = 0
    for _ in range(60):
        scene = scene_for(family, rng, split)
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
    for sample in evaluation_set(350, seed=3, split="train"):
        assert set(sample.question.split()) <= words
        assert set(sample.answer.split()) <= words


def test_evaluation_set_is_deterministic_and_balanced():
    first, second = evaluation_set(210), evaluation_set(210)
    assert [(s.question, s.answer) for s in first] == [(s.question, s.answer) for s in second]
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    assert Counter(s.family for s in first) == dict.fromkeys(FAMILIES, 30)
    assert Counter(s.family for s in evaluation_set(10)).total() == 10
    assert {len(s.images) for s in first if s.family == "difference"} == {2}
    assert {len(s.images) for s in first if s.family != "difference"} == {1}
    other = evaluation_set(210, seed=1)
    assert [s.answer for s in first] != [s.answer for s in other]


def test_a_longer_evaluation_set_starts_with_the_shorter_one():
    short, long = ([s for s in evaluation_set(n) if s.family == "reading"] for n in (70, 140))
    assert [s.answer for s in short] == [s.answer for s in long[: len(short)]]


def test_existence_is_balanced():
    answers = Counter(s.answer for s in evaluation_set(1400) if s.family == "existence")
    assert answers["yes"] == answers["no"] == 100


def test_no_answer_dominates_its_family():
    samples = evaluation_set(2100)
    for family in FAMILIES:
        answers = Counter(s.answer for s in samples if s.family == family)
        assert answers.most_common(1)[0][1] / answers.total() <= 0.5
