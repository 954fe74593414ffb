import json
from pathlib import Path

import pytest

from loretta.tasks import load_task
from loretta.tasks.turns import asked_of

EXAMPLES = Path(__file__).parents[2] / "docs" / "data"


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("file", "kind", "columns", "rows"),
    [
        ("chat.jsonl", "chat", ("messages",), 12),
        ("completions.csv", "completion", ("prompt", "completion"), 10),
        ("alpaca.jsonl", "chat", ("messages",), 10),
        ("preferences.jsonl", "preference", ("prompt", "chosen", "rejected"), 10),
    ],
)
def test_the_columns_say_what_a_file_holds(file, kind, columns, rows):
    task = load_task(EXAMPLES / file)
    assert (task.name, task.kind, task.columns, task.test) == (file, kind, columns, None)
    assert (len(task.train), len(task.validation)) == (rows - 1, 1)
    assert tuple(task.train.column_names) == columns
    assert "held out for validation" in task.notes[0]


def test_an_alpaca_row_is_a_conversation(tmp_path):
    rows = [
        {"instruction": "Count.", "input": "a, b", "output": "2", "system": "Be brief."},
        {"instruction": "Name a tree.", "input": None, "output": "Oak."},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    task = load_task(path, validation=path)
    assert task.train["messages"][:] == [
        chat(("system", "Be brief."), ("user", "Count.\n\na, b"), ("assistant", "2")),
        chat(("user", "Name a tree."), ("assistant", "Oak.")),
    ]


def test_other_names_for_the_same(tmp_path):
    spoken = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    path = write(tmp_path / "s.jsonl", {"conversations": spoken})
    assert load_task(path, validation=path).train["messages"][:] == [chat(("user", "Hi"), ("assistant", "Hello"))]
    path = write(tmp_path / "p.jsonl", {"prompt": "Hi", "completion": "Hello"})
    as_text, as_chat = (load_task(path, validation=path, kind=kind) for kind in (None, "chat"))
    assert (as_text.kind, as_text.train[0]) == ("completion", {"prompt": "Hi", "completion": "Hello"})
    assert (as_chat.kind, as_chat.train["messages"][:]) == ("chat", [chat(("user", "Hi"), ("assistant", "Hello"))])


def test_rows_that_ask_the_same_stay_on_one_side(tmp_path):
    rows = [{"prompt": f"Question {k % 4}", "completion": f"Answer {k}"} for k in range(40)]
    task = load_task(write(tmp_path / "q.jsonl", *rows))
    asked = [set(split["prompt"]) for split in (task.train, task.validation)]
    assert len(asked[0] | asked[1]) == 4
    assert asked[1]
    assert not asked[0] & asked[1]


OK = chat(("user", "Hi"), ("assistant", "Hello"))


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        ({"messages": "Hi"}, ["column 'messages'", "'Hi' is not a list of messages"]),
        ({"messages": []}, ["the list of messages is empty"]),
        ({"messages": None}, ["None is not a list of messages"]),
        ({"messages": [{"role": "user"}]}, ["message 1 is {'role': 'user'}", "'content'"]),
        ({"messages": [*OK, "Bye"]}, ["message 3 is 'Bye'"]),
        ({"messages": chat(("bot", "Hi"))}, ["message 1 has the unknown role 'bot'", "'assistant'"]),
        ({"messages": chat(("user", "Hi"))}, ["no message is the assistant's"]),
        ({"messages": chat(("user", "Hi"), ("assistant", " "))}, ["message 2, of the assistant, is empty"]),
        ({"messages": [*OK, {"role": "user", "content": 3}]}, ["message 3 has the content 3"]),
        ({"messages": [{**OK[1], "tool_calls": [{}]}]}, ["message 1 calls tools"]),
    ],
)
def test_a_message_that_cannot_be_trained_is_named(row, pieces, tmp_path, refused):
    path = write(tmp_path / "c.jsonl", {"messages": OK}, row)
    refused(lambda: load_task(path), f"row 2 of '{path}', column 'messages'", *pieces)


@pytest.mark.parametrize(
    ("good", "bad", "pieces"),
    [
        ({"prompt": "a", "completion": "b"}, {"prompt": " ", "completion": "b"}, ["column 'prompt'", "empty"]),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, ["column 'completion'", "None is not text"]),
        ({"prompt": "a", "completion": "b"}, {"prompt": OK[:1], "completion": OK[:1]}, ["begins with the role 'user'"]),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}, ["column 'output'", "empty"]),
        ({"instruction": "a", "output": "b"}, {"instruction": 7, "output": "b"}, ["column 'instruction'", "7 is not"]),
        ({"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "input": 7}, ["column 'input'"]),
    ],
)
def test_a_cell_that_cannot_be_trained_is_named(good, bad, pieces, tmp_path, refused):
    path = write(tmp_path / "c.jsonl", good, bad)
    refused(lambda: load_task(path), f"row 2 of '{path}'", *pieces)


def test_forms_are_not_mixed(tmp_path, refused):
    mixed = [{"prompt": "a", "completion": "b"}, {"prompt": OK[:1], "completion": OK[1:]}]
    path = write(tmp_path / "m.jsonl", *mixed)
    refused(lambda: load_task(path), "holds text in some rows and messages in others")
    one, other = write(tmp_path / "1.jsonl", mixed[0]), write(tmp_path / "2.jsonl", {"messages": OK})
    refused(lambda: load_task(one, validation=other), f"'{other}' holds 'messages'", "'completion'")
    refused(lambda: load_task(one, kind="chat", label="x"), "--label", "read by its columns")
    refused(lambda: load_task(other, kind="completion", validation=other), "of the kind chat, and not completion")
    refused(lambda: load_task(one), "too few different rows to split (1 in all)")
    bare = write(tmp_path / "3.jsonl", {"message": OK})
    refused(lambda: load_task(bare, kind="chat"), "has the columns 'message'", "messages or chosen + rejected or")
    refused(lambda: load_task(bare), "needs labels", "prompt + completion")


def test_what_is_asked_ends_before_the_last_answer(tmp_path):
    path = tmp_path / "x.jsonl"
    more = [*OK, *chat(("user", "And?"))]
    assert asked_of({"messages": [OK, more]}, path, column="text") == [OK[:1], more]
    assert asked_of({"prompt": ["a", more]}, path, column="text") == ["a", more]
    assert asked_of({"instruction": ["a"], "input": ["b"]}, path, column="text") == [chat(("user", "a\n\nb"))]
    assert asked_of({"question": ["a"]}, path, column="question") == ["a"]


def test_pairs_of_answers_part_behind_the_prompt(tmp_path):
    """Of whole conversations, of answers alone with their prompt as text or messages, and of text."""
    good, bad = chat(("assistant", "Hello")), chat(("assistant", "Go"))
    whole = {"prompt": "Hi", "chosen": [*OK[:1], *good], "rejected": [*OK[:1], *bad]}
    for row in (whole, {"prompt": "Hi", "chosen": good, "rejected": bad}, {**whole, "prompt": OK[:1]}):
        path = write(tmp_path / "p.jsonl", row)
        task = load_task(path, validation=path)
        assert task.kind == "preference"
        assert task.train[0] == {"prompt": OK[:1], "chosen": good, "rejected": bad}
    path = write(tmp_path / "p.jsonl", row := {"prompt": "Hi", "chosen": " a", "rejected": " b"})
    assert load_task(path, validation=path).train[0] == row


@pytest.mark.parametrize(
    ("row", "pieces"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, ["column 'rejected'", "the same as 'chosen'"]),
        ({"prompt": "Hi", "chosen": "a", "rejected": ""}, ["column 'rejected'", "empty"]),
        ({"prompt": "Hi", "chosen": OK, "rejected": OK}, ["column 'rejected'", "the same as 'chosen'"]),
        ({"prompt": "Hi", "chosen": OK, "rejected": OK[:1]}, ["column 'rejected'", "no answer of the assistant"]),
        ({"prompt": "Hi", "chosen": chat(("bot", "a")), "rejected": OK}, ["column 'chosen'", "unknown role 'bot'"]),
    ],
)
def test_a_pair_that_cannot_be_trained_is_named(row, pieces, tmp_path, refused):
    path = write(tmp_path / "p.jsonl", {"prompt": "Hi", "chosen": "a", "rejected": "b"}, row)
    refused(lambda: load_task(path), f"row 2 of '{path}'", *pieces)
    path = write(tmp_path / "q.jsonl", {"chosen": "a", "rejected": "b"})
    refused(lambda: load_task(path), f"row 1 of '{path}'", "a column 'prompt'")
