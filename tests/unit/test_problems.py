"""Messages: everything in one of them, and none so long that nobody can read it."""

import difflib
import pickle

from qwen_image.problems import MAX_MESSAGE, MAX_TEXT, InputError, Nearest, Problem


def unknown(number):
    mend = Nearest(f"lerning_rate{number}", ["learning_rate", "seed"], "remove it")
    return Problem(file="my.yaml", key=f"lerning_rate{number}", found="is not a known key", mend=mend)


def test_a_hundred_problems_are_told_in_full():
    message = str(InputError([unknown(number) for number in range(100)]))
    assert message.startswith("100 problems were found:\n- my.yaml: lerning_rate0: is not a known key\n")
    assert message.count("    -> did you mean learning_rate?") == 100
    assert message.endswith("learning_rate?")


def test_of_very_many_problems_as_many_are_told_as_can_be_read():
    error = InputError([unknown(number) for number in range(5000)])
    told = str(error).count("did you mean")
    assert len(str(error)) <= MAX_MESSAGE
    assert told > 100
    assert str(error).startswith("5000 problems were found:\n")
    assert str(error).endswith(f"\n- and {5000 - told} more; mend the ones above first")
    assert len(error.problems) == 5000


def test_nothing_is_looked_for_that_stands_in_no_message(monkeypatch):
    looked, real = [], difflib.get_close_matches
    monkeypatch.setattr(difflib, "get_close_matches", lambda *words, **more: looked.append(1) or real(*words, **more))
    message = str(InputError([unknown(number) for number in range(5000)]))
    assert len(looked) == message.count("did you mean") + 1, "one more did not fit in"


def test_long_texts_are_shortened_in_the_middle():
    long = "a" + "x" * 100_000 + "z"
    problem = Problem(file=f"{long}.yaml", key=long, found=f"found {long}", mend=Nearest(long, ["seed"], long))
    message = str(InputError([problem]))
    assert len(message) < 5 * MAX_TEXT
    assert "axxx" in message and "xxxz.yaml: axxx" in message and "(... 99" in message


def test_a_token_is_hidden_before_a_text_is_cut_in_it(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token := "planted-token-0123456789")
    for before in range(MAX_TEXT // 2 - len(token), MAX_TEXT // 2 + 1):
        text = "x" * before + token + "x" * MAX_TEXT
        message = str(Problem(file="a", found=text, mend=text))
        assert "planted" not in message
        assert "0123456789" not in message


def test_the_same_problem_of_several_runs_is_told_once():
    assert len(dict.fromkeys([unknown(1), unknown(2), unknown(1)])) == 2


def test_an_error_survives_a_trip_between_processes():
    error = InputError([unknown(1)])
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.problems) == (str(error), error.problems)


def test_no_text_steers_the_terminal():
    problem = Problem(file="a\x1b[2J.png", found="two\nlines\tand \x9b1m, \u202eenod", mend="\x07")
    assert str(problem) == "a\\x1b[2J.png: two\nlines\tand \\x9b1m, \\u202eenod\n    -> \\x07"
