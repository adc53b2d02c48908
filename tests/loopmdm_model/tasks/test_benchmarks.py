"""How benchmark items are read and which are left out; hand-written rows stand in for the archives."""

import json
import zipfile

import pytest

from loopmdm.model.corpora import fetch
from loopmdm.model.errors import UsageError
from loopmdm.model.tasks import benchmarks
from loopmdm.model.tasks.benchmarks import Choice, multiple_choice, word_problems
from loopmdm.model.tasks.gsm import Problem

PIQA = {"question": "dresser", "options": "A. drawer with pin \nB.  finish it ", "answer": "B.  finish it "}
OPENBOOKQA = {
    "question": "Predators eat ",
    "options": "A. lions\nB. A. b\nC. bunnies\nD. grass",
    "answer": "B. A. b",
}
SIQA = {
    "passage": "Tracy stayed.",
    "question": "Why?",
    "options": "A. to plan\nB. to see Riley\nC. to go",
    "answer": "C. to go",
}
BOOLQ = {"question": "is it so", "title": "It", "answer": "False", "passage": "It is not so."}
HELLASWAG = {
    "id": "hellaswag-val-00001",
    "ctx": "[header] How to run [title] Stand up. [step] Look ahead.",
    "endings": ["[substeps] Go.", "Sit.", "Wait. [title] Sleep.", "stop"],
    "expected_index": 2,
}
GSM8K = {
    "id": "gsm8k-test-0001",
    "prompt": "Tom sails 4-1 hours. How many?",
    "expected": "1,003",
    "upstream_answer": "He sails 4-1=<<4-1=3>>3 hours\nSo <<3+1000=1003>>1003\n#### 1,003",
}
EXCLUDED = [
    "Mary has 6 jars of sprinkles in her pantry. Each jar of sprinkles can decorate 8 cupcakes. Mary wants to "
    "bake enough cupcakes to use up all of her sprinkles. If each pan holds 12 cupcakes, how many pans worth "
    "of cupcakes should she bake?",
    "Prince Thaddeus slew 100 dragons with his mighty sword, while Prince Arthur, using a spear, slew three "
    "quarters as many dragons as Prince Thaddeus.  Using a rusty iron axe, Prince Walter slew twice as many "
    "dragons as Prince Arthur.  But Prince Bruce, having forgot his sword at home, slew one-fifth as many "
    "dragons as Prince Walter using a nail file.  How many Dragons has Prince Bruce slain?",
]
KEPT = [
    "If Ann is 9 years old and her brother is twice her age, how old will her brother be in 3 years?",
    "A tomato vendor decides to switch who he buys his tomatoes for.  He sells 500 tomatoes a day.  He used to "
    "buy them for $.5 each but he gets a new vendor who sells them for $.4 each.  How much money does he save "
    "a week?",
]


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Puts rows of one benchmark where its archive would be."""

    def write(name: str, *rows):
        path = tmp_path / "archive.whl"
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(fetch.source(name).member, text)
        monkeypatch.setattr(benchmarks, "cached_archive", lambda item: path)

    return write


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("piqa", PIQA, Choice("piqa-0000", "Question: dresser\nAnswer:", (" drawer with pin", " finish it"), 1)),
        ("openbookqa", OPENBOOKQA,
         Choice("openbookqa-0000", "Predators eat", (" lions", " A. b", " bunnies", " grass"), 1)),
        ("siqa", SIQA,
         Choice("siqa-0000", "Tracy stayed.\nQuestion: Why?\nAnswer:",
                (" to plan", " to see Riley", " to go"), 2)),
        ("boolq", BOOLQ,
         Choice("boolq-0000", "It is not so.\nQuestion: is it so?\nAnswer:", (" no", " yes"), 0)),
        ("boolq", BOOLQ | {"answer": "True"},
         Choice("boolq-0000", "It is not so.\nQuestion: is it so?\nAnswer:", (" no", " yes"), 1)),
        ("hellaswag-100", HELLASWAG,
         Choice("hellaswag-val-00001", "How to run. Stand up. Look ahead.",
                (" Go.", " Sit.", " Wait.. Sleep.", " stop"), 2)),
    ],
)  # fmt: skip
def test_choices_are_read_without_their_letters(archive, name, row, expected):
    archive(name, row)
    assert multiple_choice(name) == [expected]


def test_word_problems_lose_their_calculator_notes_and_known_items(archive):
    archive("gsm8k-100", GSM8K, *({**GSM8K, "id": identifier} for identifier in benchmarks.IN_GSM_SYMBOLIC))
    answer = "He sails 4-1=3 hours\nSo 1003\n#### 1,003"
    assert word_problems("gsm8k-100") == [Problem(None, GSM8K["prompt"], answer, "1003")]


def test_items_whose_answer_is_open_are_left_out(archive):
    asked = [SIQA | {"passage": f"Passage {number}."} for number in range(4)]
    again = asked[1] | {"answer": "A. to plan"}
    same = asked[2] | {"options": "A. to go\nB. to see Riley\nC. to go"}
    archive("siqa", *asked[:2], asked[0], again, same, asked[3])
    assert [item.id for item in multiple_choice("siqa")] == ["siqa-0000", "siqa-0005"]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("piqa", PIQA | {"answer": "C. none"}),
        ("piqa", PIQA | {"options": "A. drawer with pin"}),
        ("piqa", PIQA | {"options": "A. one\nC.  finish it ", "answer": "A. one"}),
        ("piqa", PIQA | {"options": "A. one\nB.  ", "answer": "A. one"}),
        ("piqa", {"question": "dresser"}),
        ("piqa", ["dresser"]),
        ("openbookqa", OPENBOOKQA | {"question": " "}),
        ("siqa", SIQA | {"options": "A. to plan\nB. to see Riley\nC. to go\nD. to stay"}),
        ("siqa", SIQA | {"passage": None}),
        ("boolq", BOOLQ | {"answer": "maybe"}),
        ("boolq", BOOLQ | {"answer": None}),
        ("hellaswag-100", HELLASWAG | {"expected_index": 4}),
        ("hellaswag-100", HELLASWAG | {"endings": ["a", "b", "c"]}),
        ("gsm8k-100", GSM8K | {"expected": "1004"}),
        ("gsm8k-100", GSM8K | {"upstream_answer": "He sails 3 hours"}),
        ("gsm8k-100", GSM8K | {"upstream_answer": "He sails 3 hours", "expected": "three"}),
    ],
)
def test_a_malformed_row_is_an_error_that_shows_it(archive, name, row):
    good = {"piqa": PIQA, "openbookqa": OPENBOOKQA, "siqa": SIQA, "boolq": BOOLQ}
    good |= {"hellaswag-100": HELLASWAG, "gsm8k-100": GSM8K}
    archive(name, good[name], row)
    read = word_problems if name == "gsm8k-100" else multiple_choice
    with pytest.raises(UsageError, match=f"row 1 of benchmark {name} is malformed"):
        read(name)


def test_a_broken_line_is_an_error(archive):
    archive("piqa", PIQA, '{"question": ')
    with pytest.raises(UsageError, match="piqa has a line that is not JSON"):
        multiple_choice("piqa")


def test_missing_archives_and_unknown_names_have_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("LOOPMDM_CACHE", str(tmp_path))
    for name in benchmarks.CHOICES:
        with pytest.raises(UsageError, match=f"`loopmdm data fetch {name}`"):
            multiple_choice(name)
    with pytest.raises(UsageError, match="`loopmdm data fetch gsm8k-100`"):
        word_problems("gsm8k-100")
    with pytest.raises(UsageError, match="did you mean piqa"):
        multiple_choice("piq")
    with pytest.raises(UsageError, match="multiple-choice"):
        multiple_choice("gsm8k-100")
    with pytest.raises(UsageError, match="unknown word-problem benchmark 'piqa'"):
        word_problems("piqa")


def test_every_registered_benchmark_has_a_reader():
    registered = {name for name, item in fetch.sources().items() if item.role == "benchmark"}
    assert registered == {*benchmarks.CHOICES, *benchmarks.WORD_PROBLEMS}


def test_overlap_tells_items_that_templates_were_made_from():
    assert all(benchmarks.overlap_with_templates(question) > benchmarks.OVERLAP_LIMIT for question in EXCLUDED)
    assert all(benchmarks.overlap_with_templates(question) < benchmarks.OVERLAP_LIMIT for question in KEPT)
    renamed = EXCLUDED[0].replace("Mary", "Zebulon").replace("12", "1,200")
    assert benchmarks.overlap_with_templates(renamed) == benchmarks.overlap_with_templates(EXCLUDED[0])
    assert benchmarks.overlap_with_templates("Too short.") == 0


@pytest.fixture
def real_archives():
    if any(fetch.cached_archive(fetch.source(name)) is None for name in ("gsm8k-100", "siqa")):
        pytest.skip("the real archives are not fetched")


def test_real_items_that_templates_were_made_from_are_exactly_those_left_out(real_archives, monkeypatch):
    kept = word_problems("gsm8k-100")
    monkeypatch.setattr(benchmarks, "IN_GSM_SYMBOLIC", ())
    left_out = [problem for problem in word_problems("gsm8k-100") if problem not in kept]
    assert len(kept) == 94 and len(left_out) == 6
    assert max(benchmarks.overlap_with_templates(p.question) for p in kept) < benchmarks.OVERLAP_LIMIT
    assert min(benchmarks.overlap_with_templates(p.question) for p in left_out) > benchmarks.OVERLAP_LIMIT


def test_real_benchmarks_have_these_many_items(real_archives):
    counts = {name: len(multiple_choice(name)) for name in benchmarks.CHOICES}
    assert counts == {"boolq": 3270, "hellaswag-100": 100, "openbookqa": 500, "piqa": 1500, "siqa": 1920}
    for name in benchmarks.CHOICES:
        items = multiple_choice(name)
        assert len({item.id for item in items}) == len(items)
        assert all(choice[0] == " " and choice == choice.rstrip() for item in items for choice in item.choices)
