"""What answers say: as they are meant, and as the original reads them, whose mistakes are its own."""

import pytest

from mantis_lite.data.columns import Fault
from mantis_lite.evaluate import blink, mvbench, nlvr2
from mantis_lite.evaluate.mantis_rows import letter_of, parse, right
from mantis_lite.evaluate.parsing import bare, choice, labelled, upstream_choice
from mantis_lite.evaluate.question import Question

THREE = ("red", "dark red", "a dog")

ANSWERS = [
    # A letter alone, in any dress: both agree.
    *(
        (said, "B", "B")
        for said in ("B", "b", "(B)", "B.", "B)", "[B]", "**B**", '"B"', " B\n", "B:", "(b)", "`B`", "B,")
    ),
    # A letter and its option.
    *((said, "B", "B") for said in ("B) dark red", "(B) dark red", "B. dark red", "B: dark red", "**B.** dark red")),
    *((said, "C", "C") for said in ("C. a dog", "(C) A dog.", "c) a dog")),
    # Behind the words that announce an answer: the first of the original's three leads.
    *(
        (said, "B", "B")
        for said in ("Answer: B", "The answer is B", "The answer is (B).", "Final answer: B", "answer: b")
    ),
    *((said, "B", "B") for said in ("the answer is: B", "THE ANSWER IS B.", "Final Answer: (B) dark red")),
    ("It is small. The answer is (C).", "C", "C"),
    ("Answer: A. Final answer: B", "B", "B"),  # the last is meant; the original looks for "final answer:" first
    ("Final answer: A. No, the answer is B", "B", "A"),
    ("The answer is A. Answer: C", "C", "A"),  # its pattern "Answer: [A-Z]" is looked for at the beginning alone
    ("The answer is Answer: C", "C", "C"),
    ("The correct answer is C because it barks", "C", None),
    # Words that are no letters: the original takes the first letter of any.
    ("A cat", None, "A"),
    ("A dog", "C", "A"),
    ("a dog", "C", "A"),
    ("An animal", None, "A"),
    ("The answer is a dog", "C", "A"),
    ("Answer: A dog", "C", "A"),
    ("Both are fine", None, "B"),
    ("Cannot be said", None, "C"),
    ("Because it is red", "A", "B"),
    ("Clearly dark red", "B", "C"),
    ("All of them", None, "A"),
    ("Blue", None, "B"),
    # The option's text: where the first letter is out of range, only when it is all of the answer.
    ("red", "A", "A"),
    ("dark red", "B", "B"),
    ("It is red", "A", None),
    ("It is dark red.", "B", None),
    ("Red", "A", None),  # and by the same capitals
    ("The answer is red", "A", None),  # and without what announces it
    ("red, and the rest is a dog", "A", None),
    ("B\n\nThe first, A, is red", "B", "B"),
    ("\u00e9l\u00e9phant, so B", "B", None),
    ("The dog: a dog", "C", None),
    ("red or a dog", None, None),
    # A letter within a sentence.
    ("I think B", "B", None),
    ("I think it is A", "A", None),
    ("I choose option C", "C", None),
    ("Option B", "B", None),
    ("option b", "B", None),
    ("Choice (B)", "B", "C"),
    ("The correct answer is not A but C", "C", None),
    ("It must be (B), as the other is small", "B", None),
    ("My choice: C", "C", None),
    ("I would say C, it barks", "C", None),
    # What contradicts itself, or says nothing.
    ("Either (A) or (B)", None, None),
    ("(A) and (C)", None, "A"),
    ("A, B", None, "A"),
    ("A\nB", None, "A"),
    ("The answer is A or B", None, "A"),
    ("Answer: (A) and (B)", None, "A"),
    ("Both A and B", None, "B"),
    ("Of A and B the first is smaller, so C", "C", None),
    # What is denied.
    ("It is not B", None, None),
    ("Not A", None, None),
    ("Neither A nor B", None, None),
    ("This isn't red, but C", "C", None),
    ("(A), not (B)", "A", "A"),
    ("(B) is right, as (A) is small", "B", "B"),
    ("Maybe B, maybe C, who knows", None, None),
    ("", None, None),
    ("   ", None, None),
    ("?", None, None),
    ("42", None, None),
    ("D", None, None),
    ("(D)", None, None),
    ("The answer is D", None, None),
    ("None of these", None, None),
    ("I", None, None),
    ("I'm not sure", None, None),
    ("Yes", None, None),
]


def test_the_table_is_long_enough():
    assert len(ANSWERS) >= 60 and len({said for said, _, _ in ANSWERS}) == len(ANSWERS)
    assert sum(own != upstream for _, own, upstream in ANSWERS) >= 15


@pytest.mark.parametrize(("said", "own", "upstream"), ANSWERS)
def test_an_answers_letter(said, own, upstream):
    assert choice(said, THREE) == own
    assert upstream_choice(said, THREE) == upstream


def question(kind: str, answer: str, *options: str) -> Question:
    return Question("q", None, kind, answer, options)


@pytest.mark.parametrize(
    ("said", "own", "upstream"),
    [
        ("True", "B", "B"),  # T is out of range, so the options' texts are looked at
        ("It is true.", "B", "B"),
        ("False", "A", "A"),
        ("true or false", None, None),
        ("(A)", "A", "A"),
        ("Absolutely true", "B", "A"),
        ("It is not true.", None, "B"),
        ("untrue", None, "B"),
        ("The statement is not what I see", None, None),
    ],
)
def test_true_and_false_have_the_letters_of_their_row(said, own, upstream):
    asked = question("choice", "B", "False", "True")
    assert (nlvr2.parse(said, asked, "own"), nlvr2.parse(said, asked, "upstream")) == (own, upstream)


@pytest.mark.parametrize(
    ("said", "own", "upstream"),
    [
        ("B", "B", "B"),
        ("b", "B", None),
        ("the answer is b", "B", None),
        ("answer: C", "C", "C"),
        ("The answer is B", "B", None),  # its leads are looked for as they are written
        ("Best option: (B)", "B", "B"),
        ("(C) a dog", "C", "C"),
    ],
)
def test_a_clips_letter(said, own, upstream):
    asked = question("choice", "B", *THREE)
    assert (mvbench.parse(said, asked, "own"), mvbench.parse(said, asked, "upstream")) == (own, upstream)


@pytest.mark.parametrize(
    ("said", "own", "upstream"),
    [
        ("two", 1, 1),
        ("Two", 1, 1),
        ("Two.", 1, 0),
        ("I count them. Final Answer: two", 1, 1),
        ("Final answer: one, no. Final Answer: two.", 1, 0),
        ("two dogs", 0, 0),
        ("", 0, 0),
        ("(Two)", 0, 0),
    ],
)
def test_an_answer_in_words(said, own, upstream):
    asked = question("short", "Two")
    assert right(parse(said, asked, "own"), asked, "own") == own
    assert right(parse(said, asked, "upstream"), asked, "upstream") == upstream


@pytest.mark.parametrize(
    ("said", "own", "upstream"),
    [
        ("A", "A", "A"),
        ("(B)", "B", "B"),
        ("The answer is (B)", "B", "B"),
        ("The answer is (B).", "B", None),  # a word by itself is looked for
        ("B.", "B", None),
        ("b", "B", None),
        ("Of (A) and (B) it is\n\nthe second: (B)", None, "B"),  # the last paragraph has one
        ("(C)\n\nThat is all.", "C", "C"),
        ("Either (A) or (B)", None, None),
        ("(D)", None, None),
        ("dark red", "B", None),
        ("", None, None),
    ],
)
def test_blinks_own_code_looks_for_brackets(said, own, upstream):
    asked = question("choice", "B", *THREE)
    assert (blink.parse(said, asked, "own"), blink.parse(said, asked, "upstream")) == (own, upstream)


def test_options_of_one_word_or_letter_and_those_that_deny():
    assert [choice(said, ("Yes", "No")) for said in ("Yes, there is no dog", "No, it is not", "no", "Perhaps")] == [
        *("A", "B", "B"),
        None,
    ]
    assert choice("A cat, I think", "ABC") is None and choice("I see B", "ABC") == "B"
    assert choice("It is not moving", ("It is moving", "It is not moving")) == "B"


def test_a_right_answer_is_a_letter():
    wanted = {"B": "B", "(B)": "B", "b": "B", "(B) dark red": "B", "C. a dog": "C"}
    assert {given: letter_of(given, THREE) for given in wanted} == wanted
    for given in ("dark red", "D", "hidden", "BC", "()", "a dog"):
        with pytest.raises(Fault):
            letter_of(given, THREE)
    asked = question("short", "(2)")
    assert [right("2", asked, protocol) for protocol in ("own", "upstream")] == [0, 1]


def test_options_with_letters_and_without():
    assert [bare(option) for option in ("(A) a dog", "B. two", "C: x", "D) y", "plain", "A")] == [
        "a dog",
        "two",
        "x",
        "y",
        "plain",
        "A",
    ]
    assert labelled("(A) a dog", "A") and labelled("a: dog", "A") and not labelled("a dog", "A")
    assert labelled("see plan A.", "A"), "the original's test is of the letter anywhere"
