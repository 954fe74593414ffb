import sys
from collections import Counter

import pytest

from loretta.tasks import stdlib

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def task():
    return stdlib.load()


def keys(dataset):
    return [text.casefold() for text in dataset["text"]]


def test_it_is_a_classification_of_texts_by_packages_of_python(task):
    assert (task.name, task.kind, task.columns) == ("stdlib", "classification", ("text",))
    assert task.metrics == ("accuracy",)
    assert all(getattr(task, split).column_names == ["text", "label"] for split in SPLITS)
    assert len(task.label_names) == 16
    assert list(task.label_names) == sorted(task.label_names)
    assert {"asyncio", "email", "xml", "multiprocessing"} <= set(task.label_names)
    assert set(task.label_names) <= sys.stdlib_module_names
    assert not set(task.label_names) & stdlib.LEFT_OUT


def test_three_splits_have_seven_one_and_two_tenths(task):
    sizes = [len(getattr(task, split)) for split in SPLITS]
    total = sum(sizes)
    assert 3000 <= total <= 3900
    assert [size / total for size in sizes] == [pytest.approx(share, abs=0.01) for share in (0.7, 0.1, 0.2)]
    assert f"{total:,}" in task.notes[0]


def test_every_part_is_in_every_split_and_none_dominates(task):
    counts = [Counter(getattr(task, split)["label"]) for split in SPLITS]
    assert all(set(count) == set(range(16)) for count in counts)
    assert max(sum(counts, Counter()).values()) <= stdlib.MAX_PER_PART


def test_no_sentence_is_there_twice(task):
    everything = [key for split in SPLITS for key in keys(getattr(task, split))]
    assert len(everything) == len(set(everything))


def test_sentences_are_prose(task):
    for text in task.train["text"]:
        assert stdlib.MIN_WORDS <= len(text.split()) <= stdlib.MAX_WORDS
        assert text == " ".join(text.split())
        assert text[0].isupper()
        assert text[-1] in ".!?"
        assert ">>>" not in text


def test_the_order_of_the_rows_tells_nothing(task):
    # sorted by the digest that cut the large parts, the first rows were all from these
    half = len(task.train) // 2
    counts = Counter(task.train["label"][:half])
    assert all(0.3 < counts[label] / n < 0.7 for label, n in Counter(task.train["label"]).items())


def test_a_second_build_is_the_same(task):
    again = stdlib.load()
    assert again.label_names == task.label_names
    assert all(getattr(again, split).to_dict() == getattr(task, split).to_dict() for split in SPLITS)


def test_modules_are_parsed_and_not_imported(tmp_path):
    (tmp_path / "trap.py").write_text(
        '"""The module must be parsed and never be imported at all."""\nraise SystemExit\n'
    )
    assert stdlib.sentences_by_part(tmp_path) == {"trap": ["The module must be parsed and never be imported at all."]}
    assert "trap" not in sys.modules


FIRST = "This first sentence has more than enough words to count."
SECOND = "This other sentence also has more than enough words to count."
THIRD = "The third sentence is the one that only its own part has."
INNER = "The inner sentence of the package has enough words too."


def docstring(*sentences):
    return f'"""{" ".join(sentences)}"""\n'


@pytest.fixture
def tree(tmp_path):
    files = {
        "alpha.py": docstring(FIRST, SECOND) + f"class A:\n    {docstring(THIRD)}",
        "beta/__init__.py": docstring(SECOND.replace("other", "OTHER"), INNER),
        "beta/deep/inner.py": f"async def f():\n    {docstring(INNER.replace('inner', 'INNER'))}",
        "beta/tests/test_it.py": docstring("The tests inside a package do not count for its sentences."),
        "beta/broken.py": "def (:\n",
        "_private.py": docstring("The private modules do not count for the parts at all."),
        "idlelib/a.py": docstring("The parts that are left out do not count at all here."),
        "site-packages/a.py": docstring("The packages of other people do not count at all here."),
        "notes.txt": "The text files do not count for the parts at all here.",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_each_part_has_the_sentences_that_are_its_own(tree):
    found = {part: sentences for part, sentences in stdlib.sentences_by_part(tree).items() if sentences}
    assert found == {"alpha": [FIRST, THIRD], "beta": [INNER]}


@pytest.mark.parametrize(
    ("docstring", "sentences"),
    [
        (f"{FIRST}  {SECOND}", [FIRST, SECOND]),
        (FIRST.replace("more ", "more\n"), [FIRST]),
        (f"{FIRST}\n\n    {SECOND}", [FIRST]),
        (f"{FIRST}\n\n>>> call()\n{SECOND}", [FIRST]),
        (f"Too short to count.\n\n{FIRST}", [FIRST]),
        ("call(first, second, third, *, key=None) -> value of the call.", []),
        ("A sentence about f(x), g(x), h(x) and k[0], k[1], k[2] names code.", []),
        ("The table | has | bars | between | its | many | cells.", []),
        ("This has enough words but it does not end as sentences do", []),
        ("and this does not begin as the sentences of a language do.", []),
    ],
)
def test_a_docstring_is_read_as_its_sentences_of_prose(docstring, sentences):
    assert list(stdlib.prose(docstring)) == sentences


def numbered(n, word):
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return [
        f"The {word} sentence {names[i // 100 % 10]} {names[i // 10 % 10]} {names[i % 10]} is just long enough."
        for i in range(n)
    ]


def test_parts_that_are_too_small_are_left_out_and_large_ones_cut(tmp_path):
    for part, n in {"large": 450, "small": 20, "tiny": 5}.items():
        (tmp_path / f"{part}.py").write_text(docstring(*numbered(n, part)))
    task = stdlib.load(tmp_path)
    assert task.label_names == ("large", "small")  # 5 sentences are too few for three splits
    assert [Counter(getattr(task, split)["label"]) for split in SPLITS] == [
        {0: 280, 1: 14},
        {0: 40, 1: 2},
        {0: 80, 1: 4},
    ]


@pytest.mark.parametrize("parts", [{}, {"only": 300}, {"one": 50, "two": 50}])
def test_too_little_documentation_is_refused(tmp_path, refused, parts):
    for part, n in parts.items():
        (tmp_path / f"{part}.py").write_text(docstring(*numbered(n, part)))
    refused(lambda: stdlib.load(tmp_path), f"'{tmp_path}'", f"{len(parts)} parts", f"{sum(parts.values())} sentences")


def test_a_python_without_sources_is_refused(tmp_path, refused):
    refused(lambda: stdlib.load(tmp_path / "python311.zip"), "python311.zip", "0 parts")
