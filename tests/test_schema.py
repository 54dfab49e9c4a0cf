"""Every spelling of a row gives the same Sample, and every mistake says what to do."""

import base64
import pickle
from pathlib import Path

import pytest

from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.sample import Image, Sample
from mantis_lite.data.schema import parse
from mantis_lite.errors import SampleError

ROOT = Path("/data")
A, B, C = (Image(ROOT / name) for name in ("a.jpg", "b.jpg", "c.jpg"))


def chat(*texts, **row):
    """A row whose turns alternate from the user's."""
    roles = ("user", "assistant")
    return row | {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]}


def read(row) -> Sample:
    return parse(row, "train.json:7", MediaFolder(ROOT))


def contents(row) -> list[tuple]:
    return [turn.content for turn in read(row).turns]


@pytest.mark.parametrize("turns", ["conversation", "conversations", "messages"])
@pytest.mark.parametrize("speaker", ["from", "role"])
@pytest.mark.parametrize("text", ["content", "text", "value"])
@pytest.mark.parametrize(("user", "assistant"), [("human", "gpt"), ("user", "assistant")])
def test_every_spelling_is_the_same_sample(turns, speaker, text, user, assistant):
    row = {
        "id": 3,
        "images": ["a.jpg"],
        turns: [{speaker: user, text: "<image>Hi"}, {speaker: assistant, text: "Ho"}],
    }
    assert read(row) == read(chat("<image>Hi", "Ho", id="3", image="a.jpg"))
    arrow = dict.fromkeys(["conversation", "conversations", "messages", "image", "video", "labels"]) | row
    absent = dict.fromkeys(["from", "role", "content", "text", "value"])
    arrow[turns] = [absent | turn for turn in row[turns]]
    assert read(arrow) == read(row)


@pytest.mark.parametrize(
    "column",
    [
        {"image": "a.jpg"},
        {"images": ["a.jpg"]},
        {"images": "/data/a.jpg"},
        {"image": {"path": "a.jpg"}, "images": []},
        {"image": "", "images": [{"path": "a.jpg", "bytes": None}]},
        {"image": ["a.jpg"], "images": ["a.jpg"]},
    ],
)
def test_columns_of_pictures(column):
    sample = read(chat("Hi", "Ho", **column))
    assert sample.images == (A,)
    assert sample.notices == ()


@pytest.mark.parametrize(
    "picture",
    [b"PNG", {"bytes": b"PNG", "path": None}, {"bytes": b"PNG", "path": "a.jpg"}, {"bytes": b"PNG"}],
)
def test_bytes_win_over_a_path(picture):
    assert read(chat("Hi", "Ho", images=[picture])).images == (Image(b"PNG"),)
    assert read(chat("Hi", "Ho", image=picture)).images == (Image(b"PNG"),)


def test_data_uris_are_decoded():
    uri = "data:image/png;base64," + base64.b64encode(b"PNG").decode()
    encoded = uri.partition(",")[2]
    named = [{"type": "image", "base64": text} for text in (uri, encoded, f"{encoded[:2]}\n{encoded[2:]}\n")]
    for part in ({"type": "image_url", "image_url": {"url": uri}}, *named):
        assert contents(chat([part], "Ho")) == [(Image(b"PNG"),), ("Ho",)]
    assert contents(chat("<image>", "Ho", images=[uri])) == [(Image(b"PNG"),), ("Ho",)]


@pytest.mark.parametrize("row", [{}, {"images": None}, {"images": []}, {"image": None, "images": None}])
def test_text_only(row):
    sample = read(chat("Hi", "", **row))
    assert [turn.content for turn in sample.turns] == [("Hi",), ()]
    assert sample.images == ()
    assert sample.id is None


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("<image><image>x<image>", "y"), [(A, B, "x", C), ("y",)]),
        (("x <image> y", "<image>", "<image>z", ""), [("x ", A, " y"), (B,), (C, "z"), ()]),
        (("x", "y"), [(A, B, C, "x"), ("y",)]),
        (("x<image>", "y"), [(A, B, "x", C), ("y",)]),
        (("x", "<image>y"), [(A, B, "x"), (C, "y")]),
    ],
    ids=["in order", "over all turns", "no marks", "missing marks first", "before the assistant's"],
)
def test_marks_are_filled_in_order_of_reading(texts, expected):
    assert contents(chat(*texts, images=["a.jpg", "b.jpg", "c.jpg"])) == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([{"type": "text", "text": "x"}, {"type": "image"}, {"type": "image"}], ("x", A, B)),
        (["x", {"type": "text", "text": "y"}, {"type": "text", "text": ""}], (A, B, "xy")),
        ([{"type": "image"}, "x"], (A, B, "x")),
        ([{"type": "image", "text": None, "image": None}, "x", {"type": "image", "text": None}], (A, "x", B)),
        ([{"type": "text", "text": "a <image> b"}], (A, B, "a <image> b")),
        ([{"type": "image", "image": "c.jpg"}, {"type": "image"}, "x", {"type": "image"}], (C, A, "x", B)),
    ],
    ids=["marks", "merged", "left over", "arrow", "literal", "inline and column"],
)
def test_typed_parts(parts, expected):
    assert contents(chat(parts, "y", images=["a.jpg", "b.jpg"]))[0] == expected


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.jpg"},
        {"type": "image", "path": "a.jpg"},
        {"type": "image", "url": "a.jpg"},
        {"type": "image", "image": {"path": "a.jpg", "bytes": None}},
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "image_url", "image_url": "a.jpg"},
    ],
)
def test_pictures_inside_turns(part):
    assert contents(chat([part, "x"], [part])) == [(A, "x"), (A,)]


def test_system_turn_first():
    row = chat("<image>Hi", "Ho", images=["a.jpg", "b.jpg"])
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    sample = read(row)
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant"]
    assert [turn.content for turn in sample.turns] == [("Be brief.",), (A, B, "Hi"), ("Ho",)]


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]])
def test_a_first_turn_of_the_assistant_is_dropped_with_its_marks(system):
    row = chat("<image>", "Hi", "Ho", images=["a.jpg"])
    row["messages"][0]["role"], row["messages"][1]["role"], row["messages"][2]["role"] = "gpt", "user", "gpt"
    row["messages"] = system + row["messages"]
    sample = read(row)
    assert [turn.content for turn in sample.turns[-2:]] == [(A, "Hi"), ("Ho",)]
    assert sample.notices == ("first turn was the assistant's and was dropped",)


def test_a_last_turn_of_the_user_is_kept():
    assert contents(chat("a", "b", "c")) == [("a",), ("b",), ("c",)]


def test_image_wins_over_images_with_a_notice():
    sample = read(chat("Hi", "Ho", image="a.jpg", images=["a.jpg", "b.jpg"]))
    assert sample.images == (A,)
    assert sample.notices == ('"images" was ignored, as the row has "image" too',)


def test_turns_under_two_names_are_read_once_with_a_notice():
    row = chat("Hi", "Ho")
    other = [{"role": "user", "content": "other"}, {"role": "assistant", "content": "words"}]
    sample = read({"conversation": row["messages"], "messages": other})
    assert [turn.content for turn in sample.turns] == [("Hi",), ("Ho",)]
    assert sample.notices == ('"messages" was ignored, as the row has "conversation" too',)
    assert read({"conversation": row["messages"], "messages": row["messages"], "conversations": []}).notices == ()


@pytest.mark.parametrize("answer", ["", "  ", "\n\t ", [], [" ", {"type": "text", "text": ""}]])
def test_a_blank_answer_is_trained_as_it_stands_and_counted(answer):
    """Its end is trained, so a row is never without loss."""
    sample = read(chat("Hi", answer, "And?", "Ho"))
    assert "".join(sample.turns[1].content).strip() == ""
    assert sample.notices == ("an answer is blank: it trains that there is nothing to say",)


def test_an_answer_of_a_picture_is_not_blank():
    assert read(chat("Hi", "<image>", images=["a.jpg"])).notices == ()


def turns(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


def of_user(**turn):
    return {"messages": [{"role": "user"} | turn, {"role": "assistant", "content": "x"}]}


def picture(value):
    return chat("x", "y", images=[value])


@pytest.mark.parametrize(
    ("row", "found", "remedy"),
    [
        ([], "the row is a list", 'Give {"images"'),
        ({"id": 1, "text": "x"}, "none of .* has the turns", "the row's keys are: id, text"),
        ({}, "none of .* has the turns", "the row's keys are: none"),
        ({"messages": "x"}, '"messages" is a string', "Give a list of turns"),
        ({"messages": []}, '"messages" is empty', "Give at least"),
        ({"messages": ["x"]}, "turn 1 is a string", "Give an object"),
        (turns("user", "tool"), "turn 2 has the unknown role 'tool'", "user or human, assistant or gpt"),
        (turns("user", ["a"]), "turn 2 has the unknown role", "Use user"),
        (turns(None, "user"), "turn 1 has no role", "Use user"),
        (turns("user", "system"), "turn 2 is the system's", "Only the first turn"),
        (turns("user", "user", "gpt"), "turns 1 and 2 are both the user's", "Join them"),
        (turns("system", "user", "gpt", "gpt"), "turns 3 and 4 are both the assistant's", "Join them"),
        (turns("gpt", "gpt", "user"), "turns 1 and 2 are both the assistant's", "Join them"),
        (turns("gpt", "user", "user"), "turns 2 and 3 are both the user's", "Join them"),
        (turns("user"), "no assistant turn after a user turn", "Add the assistant's answer"),
        (turns("gpt"), "no assistant turn after a user turn", "Add the assistant's answer"),
        (turns("system"), "no assistant turn after a user turn", "Add the assistant's answer"),
        (of_user(), "turn 1 has no text", 'Give "content"'),
        (of_user(content=None, value=None), "turn 1 has no text", 'Give "content"'),
        (of_user(value=3), '"value" of turn 1 is a number', "Give a string"),
        (of_user(content="x", value="y"), '"content" and "value" of turn 1 differ', "Keep one"),
        ({"messages": [{"from": "gpt"} | turns("user")["messages"][0]]}, '"from" and "role" of turn 1 differ', "Keep"),
        (of_user(content={"type": "text"}), '"content" of turn 1 is an object', "Give a string"),
        (of_user(content=["x", 3]), "part 2 of turn 1 is a number", "Give {"),
        (of_user(content=[{"type": "text"}]), '"text" of part 1 of turn 1 is null', "Give a string"),
        (
            of_user(content=[{"type": "video"}]),
            "part 1 of turn 1 has the type 'video'",
            "task=chat reads text",
        ),
        (of_user(content=[{"type": "image_url"}]), "part 1 of turn 1 is null", "Give a path"),
        (
            of_user(content=[{"type": "image", "base64": ["x"]}]),
            '"base64" of part 1 of turn 1 is a list',
            "Give the pic",
        ),
        (
            of_user(content=[{"type": "image", "base64": "a.jpg"}]),
            '"base64" of part 1 of turn 1 is not base64',
            "Encode",
        ),
        (
            chat("<image>", "<image>x", images=["a"]),
            "1 image but 2 <image> marks",
            "Add the picture or remove",
        ),
        (chat([{"type": "image"}], "x"), "0 images but 1 <image> mark ", "Add the picture or remove"),
        (
            chat([{"type": "image", "path": "a"}], "x", images=["a", "b"]),
            "2 images beside the turns but 0 marks for them",
            "Add a {.* part, or drop the image",
        ),
        (picture(None), r'"images"\[0\] is null', "Give a path"),
        (picture(3), r'"images"\[0\] is a number', "Give a path"),
        (picture({"path": None, "bytes": None}), r'"images"\[0\] is null', "Give a path"),
        (picture({"path": "a", "bytes": "abc"}), r'"bytes" of "images"\[0\] is a string', "Give bytes"),
        (picture(""), r'"images"\[0\] is an empty path', "Give the file's path"),
        (chat("x", "y", image="http://x.org/a.jpg"), '"image" is a link', "Download the picture"),
        (picture("data:image/png,abc"), "a data: URI without ;base64", "Encode it as base64"),
        (picture("data:image/png;base64,a b" + "c" * 99), "not base64", "Encode it again"),
        (picture("data:" + "c" * 99), r"\.\.\. \(\d+ characters\)", "Encode it as base64"),
        (chat("x", "y", video="a.mp4"), 'a video row: it has "video"', "task=video"),
        (chat("x", "y", videos=["a.mp4"]), 'a video row: it has "videos"', "task=video"),
        ({"labels": {"a": 1}, "prompt": "x"}, "a classification row", "task=classify"),
    ],
)
def test_mistakes(row, found, remedy):
    with pytest.raises(SampleError, match=rf"^train.json:7.*: .*{found}.*\n  .*{remedy}"):
        read(row)


@pytest.mark.parametrize("column", [{}, {"images": None}, {"images": []}, {"image": ""}])
def test_in_a_row_without_pictures_a_mark_is_text_and_counted(column):
    sample = read(chat("HTML has <image> and <image>", "No: <image>", **column))
    assert [turn.content for turn in sample.turns] == [("HTML has <image> and <image>",), ("No: <image>",)]
    assert sample.notices == ('"<image>" was read as text, as the row has no picture',)
    assert not read(chat("HTML has pictures", "No", **column)).notices


def test_an_error_names_the_row_by_file_number_and_id():
    with pytest.raises(SampleError) as error:
        read(chat("<image><image>", "x", id=5, image="a.jpg"))
    assert str(error.value) == (
        'train.json:7 (id "5"): 1 image but 2 <image> marks in the turns\n'
        "  Add the picture or remove the mark. Marks and images pair up in order."
    )
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
