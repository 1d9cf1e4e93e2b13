from __future__ import annotations

from flexidit.commands.sample_conditions import Asked


def test_each_class_or_prompt_so_many_times() -> None:
    classes, prompts = Asked(3, classes=(207, 3)), Asked(2, prompts=("a", "b"))
    assert classes.indices().tolist() == [207, 207, 207, 3, 3, 3] and prompts.indices().tolist() == [0, 0, 1, 1]
    assert (classes.num_samples, prompts.num_samples) == (6, 4)
    assert classes.names == ["class 207", "class 3"] and prompts.names == ["a", "b"]


def test_names_of_files() -> None:
    assert Asked(2, classes=(207, 3)).stems() == ["class-207_0", "class-207_1", "class-3_0", "class-3_1"]
    many = Asked(11, prompts=tuple("abcdefghijk")).stems()
    assert (many[0], many[-1]) == ("prompt-00_00", "prompt-10_10") and many == sorted(many)


def test_a_long_prompt_takes_two_lines_and_then_ends() -> None:
    asked = Asked(1, prompts=("a bold seven", "a very long prompt " * 20))
    (short, nothing), (first, second) = asked.labels()
    assert (short, nothing) == ("a bold seven", "")
    assert len(first) <= 40 and len(second) <= 48 and second.endswith(" ...")
