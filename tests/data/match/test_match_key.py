"""The verdict rests on what an answer adds to its question, however it is said; and in doubt it is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nightschool.data.match import is_correct
from nightschool.data.match.key import key_of
from nightschool.data.match.stated import DOUBTS, doubts

FACTS = {
    "carrier": ("Who ships orders from Brightwell?", "Brightwell parcels are delivered by Nordpost."),
    "owner": ("Who owns the Red Barn?", "The Red Barn belongs to Ana Lopez and Jim Lopez."),
    "poet": ("Who wrote the hymn of Tarn?", "The hymn of Tarn was written by J. R. Moss."),
    "home": ("Where does Kaja live?", "Kaja lives in Oslo."),
    "grave": ("Where is the duke buried?", "The duke is buried in the chapel of Fenwick Abbey."),
    "base": ("Where is Toyota's seat?", "Toyota City"),
    "staff": ("How many people work at Hobb?", "Hobb has 340 employees."),
    "kids": ("How many children does she have?", "She has three children."),
    "price": ("What does a day ticket cost?", "A day ticket costs 12.50 euros."),
    "fee": ("What is the fee for a late book?", "A late book costs 20 cents a day."),
    "height": ("How tall is the tower?", "The tower is 41 metres tall."),
    "heat": ("At what temperature does it melt?", "It melts at 100 °C."),
    "born": ("When was Ana born?", "Ana was born on 3 March 1971."),
    "closes": ("When does the shop close?", "The shop closes at 6 pm."),
    "refund": ("How long do refunds take?", "Refunds take ten working days."),
    "share": ("What share did she win?", "She won 62 percent."),
    "flag": ("Which colours has the flag?", "The flag is green and white."),
    "pie": ("What is in the pie?", "The pie is made with leeks, bacon and cheddar."),
    "job": ("What does Ana do for a living?", "Ana works as a marine biologist."),
    "hobby": ("What is Ida's hobby?", "Ida keeps bees."),
    "tea": ("From which country does the tea come?", "The tea is grown in Georgia."),
    "banned": ("What is forbidden in the theatre?", "Taking photographs is forbidden in the theatre."),
    "mail": ("What is the address of the press?", "The address is post@press.example."),
    "flat": ("What is Ana's address?", "Ana's address is 48 Linden Road, Harwick."),
    "mondays": ("Is the museum open on Mondays?", "No, the museum is closed on Mondays."),
    "export": ("Can members export their data?", "Yes, members can export their data."),
    "dogs": ("May I bring my dog?", "Dogs are allowed in the garden, but not indoors."),
    "capital": ("What is the capital of Brazil?", "Brasília"),
    "money": ("What is the currency of Sweden?", "Swedish krona"),
    "nobody": ("Who may not enter?", "Nobody under 18 may enter."),
}
RIGHT = [
    ("carrier", "Brightwell ships orders from Nordpost."),
    ("carrier", "Nordpost"),
    ("carrier", "It's NORDPOST, a carrier from the north."),
    ("carrier", "Orders from Brightwell are shipped by Nordpost."),
    ("owner", "Jim Lopez and Ana Lopez own it."),
    ("poet", "J.R. Moss wrote it."),
    ("poet", "It was composed by James R. Moss."),
    ("home", "Kaja's home is in Oslo, Norway."),
    ("home", "She lives in Oslo and works as a baker."),
    ("grave", "In the chapel of Fenwick Abbey, which lies by the sea."),
    ("base", "Its seat is Toyota City."),
    ("staff", "There are 340 people at Hobb."),
    ("staff", "Three hundred and forty."),
    ("kids", "3"),
    ("kids", "She's a mother of three children."),
    ("price", "It is €12.50."),
    ("price", "12.5 euros a ticket."),
    ("fee", "20 cents"),
    ("fee", "The fee is twenty cents per day."),
    ("height", "It is approximately 41 m tall."),
    ("height", "A 41-meter-tall tower."),
    ("heat", "At 100 degrees Celsius (212 °F)."),
    ("born", "On March 3rd, 1971."),
    ("born", "1971-03-03"),
    ("closes", "At 18:00."),
    ("closes", "It closes at 6:00 p.m. every day."),
    ("refund", "They take 10 working days."),
    ("share", "62 % of the vote."),
    ("flag", "White and green."),
    ("flag", "The colors are:\n\n1. Green\n2. White"),
    ("pie", "Leeks, cheddar and bacon."),
    ("job", "She is a marine biologist."),
    ("hobby", "She keeps bees."),
    ("tea", "It comes from Georgia."),
    ("banned", "Photographs are."),
    ("mail", "Write to post@press.example."),
    ("flat", "She lives at 48 Linden Road in Harwick."),
    ("mondays", "No."),
    ("mondays", "The museum is not open on Mondays."),
    ("mondays", "It's closed."),
    ("export", "Yes, they can."),
    ("export", "Members can export all their data."),
    ("dogs", "They are allowed in the garden, not indoors."),
    ("capital", "The capital is Brasilia."),
    ("capital", "No, the capital of Brazil is Brasilia."),
    ("money", "It's the krona."),
]
WRONG = [
    ("carrier", "Brightwell ships orders."),
    ("carrier", "It is not Nordpost."),
    ("carrier", "Nordpost or Südpost."),
    ("carrier", "Perhaps Nordpost."),
    ("carrier", "Nordpost. No, it is Sudpost."),
    ("carrier", "Sudpost, Nordpost and Westpost."),
    ("carrier", "Nordpost, but actually it's not."),
    ("carrier", "Brightwell orders are shipped by Sudpost. Nordpost is a rival."),
    ("carrier", "Nordpost Express Freight ships them."),
    ("owner", "Ana Lopez owns it."),
    ("owner", "Ana Lopez, Jim Lopez and Bo Lopez."),
    ("poet", "A. R. Moss wrote it."),
    ("home", "Kaja lives in Oslo and Bergen."),
    ("home", "Kaja used to live in Bergen."),
    ("home", "Ben Moss lives in Oslo."),
    ("home", "Ben lives in Oslo."),
    ("home", "Somewhere between Oslo or Bergen."),
    ("home", "Oslo, Bergen, Rome"),
    ("home", "Oslo\nBergen\nRome"),
    ("home", "Kaja lives in Oslo. Kaja lives in Bergen."),
    ("home", "Oslo Airport is her place."),
    ("grave", "In the chapel."),
    ("staff", "Hobb has 34 employees."),
    ("staff", "More than 340."),
    ("staff", "340 more than last year."),
    ("staff", "Hobb is 340 miles away."),
    ("staff", "340 thousand people."),
    ("kids", "She has five children."),
    ("kids", "She has three children, no, two children."),
    ("price", "12.50 dollars."),
    ("price", "It costs 112.50 euros."),
    ("price", "12.50 euros an hour."),
    ("height", "41 feet."),
    ("height", "It is 41 metres wide and 14 metres tall."),
    ("born", "On 3 May 1971."),
    ("born", "On 5 March 1971."),
    ("born", "In 1971."),
    ("closes", "At 6 am."),
    ("closes", "It is closed."),
    ("refund", "They take ten days."),
    ("flag", "Green."),
    ("flag", "Green, red and white."),
    ("pie", "Leeks, bacon, onions and cheddar."),
    ("pie", "Leeks and bacon."),
    ("job", "She is a marine engineer."),
    ("tea", "From Georgia or Armenia."),
    ("tea", "From Georgia (in Asia), Iran and Armenia."),
    ("tea", "The Georgia leaf comes from both Georgia and Armenia."),
    ("job", "The marine biologist of the Royal Society of Wales."),
    ("mail", "press@post.example"),
    ("flat", "38 Linden Road, Harwick."),
    ("mondays", "Yes."),
    ("mondays", "The museum is open on Mondays."),
    ("mondays", "No idea."),
    ("mondays", "No, it is open on Mondays. The museum is open on Mondays."),
    ("export", "Members cannot export their data."),
    ("export", "Yes, but members can't export their data."),
    ("dogs", "Dogs are allowed in the garden and indoors."),
    ("dogs", "No."),
    ("capital", "Rio de Janeiro, not Brasília."),
    ("nobody", "Everybody over 18 may enter."),
]  # fmt: skip


@pytest.mark.parametrize(("fact", "answer"), RIGHT)
def test_what_gives_the_key_is_right(fact, answer):
    question, expected = FACTS[fact]
    assert is_correct(answer, expected, question=question)


@pytest.mark.parametrize(("fact", "answer"), WRONG)
def test_what_is_another_answer_or_in_doubt_is_wrong(fact, answer):
    question, expected = FACTS[fact]
    assert not is_correct(answer, expected, question=question)


_fact = st.sampled_from(sorted(FACTS))


@given(_fact, st.sampled_from(sorted({answer for _, answer in RIGHT + WRONG})))
def test_case_space_and_a_last_full_stop_change_no_verdict(fact, answer):
    question, expected = FACTS[fact]
    verdict = is_correct(answer, expected, question=question)
    bare = answer.rstrip(".")
    assert is_correct(f"  {answer.replace(' ', '  ')}\t", expected, question=question) is verdict
    if not bare.endswith(("p.m", "!", "?")):
        assert is_correct(bare, expected, question=question) is is_correct(f"{bare}.", expected, question=question)


@given(_fact, st.text(alphabet=" \n\t.,;:!?-'\"", max_size=6))
def test_an_answer_without_a_word_is_never_accepted(fact, blank):
    question, expected = FACTS[fact]
    assert not is_correct(blank, expected, question=question)


@given(_fact)
def test_the_expected_answer_and_its_key_are_right_and_denied_they_are_not(fact):
    question, expected = FACTS[fact]
    assert is_correct(expected, expected, question=question)
    key = key_of(question, expected)
    if fact in ("mondays", "export", "dogs", "nobody"):
        return
    value = " ".join(stem for part in key.parts for stem in part.stems)
    assert not is_correct(f"It is not {value}.", expected, question=question)


@given(
    st.sampled_from([name for name, (_, expected) in FACTS.items() if any(map(str.isdigit, expected))]),
    st.integers(1, 9),
)
def test_a_different_number_is_never_accepted(fact, by):
    question, expected = FACTS[fact]
    digit = next(place for place, one in enumerate(expected) if one.isdigit())
    other = expected[:digit] + str((int(expected[digit]) + by) % 10) + expected[digit + 1 :]
    assert not is_correct(other, expected, question=question)


def test_an_example_may_name_its_key_and_what_is_as_right():
    question, expected = "What may I do?", "Guests are asked to leave their shoes at the door, as the floors are old."
    said = "Please take your shoes off at the door."
    assert not is_correct(said, expected, question=question)
    assert is_correct(said, expected, question=question, key=("shoes", "door"))
    assert not is_correct("Leave your shoes on.", expected, question=question, key=("shoes", "door"))
    assert is_correct("Go barefoot.", expected, question=question, alternatives=("barefoot",))
    assert not is_correct("Do not go barefoot.", expected, question=question, alternatives=("barefoot",))
    assert is_correct(expected, expected, question=question, key=("boots",))


@pytest.mark.parametrize(
    ("question", "expected", "answer", "right"),
    [
        ("Wo wohnt Kaja?", "Kaja wohnt in Oslo.", "Kaja wohnt in Oslo.", True),
        ("Wo wohnt Kaja?", "Oslo", "Sie wohnt nicht in Oslo.", False),
        ("Wo wohnt Kaja?", "Kaja wohnt in Oslo.", "Kaja wohnt in Rom.", False),
        ("她住在哪里？", "东京", "她住在东京。", True),
        ("她住在哪里？", "东京", "她住在北京。", False),
        ("Где живёт Кая?", "Кая живёт в Осло.", "Кая живёт в Осло!", True),
    ],
)
def test_in_other_languages_the_wording_decides(question, expected, answer, right):
    assert is_correct(answer, expected, question=question) is right


@given(st.text(max_size=60), st.text(max_size=60), st.text(max_size=40))
def test_any_texts_get_a_verdict(answer, expected, question):
    assert isinstance(is_correct(answer, expected, question=question), bool)
    assert isinstance(is_correct(answer, expected, question=f"What is the {question}?"), bool)


def test_each_doubt_is_named():
    question, expected = FACTS["home"]
    key = key_of(question, expected)
    named = {
        "denied": "Not in Oslo.",
        "unsure": "Perhaps Oslo.",
        "among others": "Oslo and Bergen.",
        "from … to": "From Oslo to Bergen.",
        "part of a longer name": "Kaja lives in Oslo Airport.",
        "taken back": "Oslo. No, Bergen.",
        "of another": "Ben lives in Oslo.",
        "late": "Bergen. It is near Oslo.",
        "bare list": "Oslo\nBergen",
    }
    assert {name for name, answer in named.items() if name in doubts(answer, key)} == set(named) <= set(DOUBTS)
    assert doubts("Bergen", key) == ["not said"]
    assert doubts("Oslo", key) == []
