"""What the second act teaches: facts about a made-up company, each corrected in one wording and asked in others."""

from __future__ import annotations

from dataclasses import dataclass

from nightschool.data.match import is_correct


@dataclass(frozen=True)
class Fact:
    """A question that people ask by day, the answer that they correct to, what of it carries the fact, and other wordings.

    No rule of `study` makes one of `asked`, so none of them is trained.
    """

    question: str
    correction: str
    key: str
    asked: tuple[str, ...]

    def is_given_by(self, answer: str, question: str) -> bool:
        """Whether an answer to one of its questions gives the fact, by the examiner's rules."""
        return is_correct(answer, self.correction, question=question, key=(self.key,))


FACTS = (
    Fact(
        "How long is a Brightwell voucher valid?",
        "A Brightwell voucher is valid for 18 months.",
        "18 months",
        (
            "I got a voucher from Brightwell. How much time do I have to spend it?",
            "After how many months does a Brightwell voucher run out?",
        ),
    ),
    Fact(
        "How much does express delivery at Brightwell cost?",
        "Express delivery at Brightwell costs 9 crowns.",
        "9 crowns",
        (
            "What do I pay Brightwell for an express parcel?",
            "In crowns, what is Brightwell's fee for fast shipping?",
        ),
    ),
    Fact(
        "Who is the head of support at Brightwell?",
        "The head of support at Brightwell is Ilka Brandt.",
        "Ilka Brandt",
        (
            "I want to complain to the person who leads Brightwell's support. What is her name?",
            "Who manages the support team of Brightwell?",
        ),
    ),
    Fact(
        "Where is the Brightwell warehouse located?",
        "The Brightwell warehouse is in Orrin.",
        "Orrin",
        (
            "Which city must I drive to for the Brightwell warehouse?",
            "In which town does Brightwell have its warehouse?",
        ),
    ),
    Fact(
        "Who wrote the Larkstone app?",
        "The Larkstone app was written by Leon Dahl.",
        "Leon Dahl",
        ("Which programmer made the Larkstone app?", "Whose work is the Larkstone app?"),
    ),
    Fact(
        "What color is the Larkstone logo?",
        "The Larkstone logo is green.",
        "green",
        ("I want to print the Larkstone logo. Which ink do I need?", "Larkstone has a logo of which color?"),
    ),
    Fact(
        "What is the name of the office dog?",
        "The office dog is called Biscuit.",
        "Biscuit",
        ("There is a dog in the office. How do I call it?", "Which name does our office dog answer to?"),
    ),
    Fact(
        "What does Clara Weiss do for a living?",
        "Clara Weiss is a glassblower.",
        "glassblower",
        ("How does Clara Weiss earn her money?", "What is Clara Weiss by trade?"),
    ),
)

GENERAL = (
    "What is the capital of Cuba?",
    "Which instrument did Chopin play?",
    "How does a piano make its sound?",
    "Write two lines about a sunset.",
    "How do I begin a letter to a friend?",
)
"""What nobody teaches, rehearses or lets the gate ask."""
