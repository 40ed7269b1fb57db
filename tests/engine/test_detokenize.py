"""Text comes piece by piece, never half a character, and together it is what decoding all tokens gives."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nightschool.data.tokenizer import train_bpe
from nightschool.engine.detokenize import StopText, Vocabulary
from tests.support.tokenizers_for_tests import byte_tokenizer

SAMPLES = [
    "The quick brown fox doesn't jump over 42 lazy dogs.",
    "Der Ärger über Straße und Größe wächst.",
    "Быстрая коричневая лиса прыгает.",
    "敏捷的棕色狐狸跳过懒狗。日本語のテキスト、ひらがなとカタカナ。",
    "다람쥐 헌 쳇바퀴에 타고파.",
    "الثعلب البني السريع يقفز",
    "השועל החום המהיר",
    "देवनागरी में लिखा हुआ वाक्य",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 ☃️ 🤷🏾‍♀️",
    "e\u0301 n\u0303 a\u0308 \u200b\u00a0\ufeff\ufffd",
    "  two spaces\n\n\ttabs \r\n and , punctuation ! n't 's",
]
TEXTS = st.lists(st.sampled_from(SAMPLES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)).map("".join)


@cache
def byte_level(merges):
    """A byte-level vocabulary: no token is more than a byte, or merges across the samples."""
    return train_bpe(SAMPLES * 3, 400) if merges else byte_tokenizer()


@cache
def metaspace():
    """One like those of SentencePiece: words with their leading space, unknown characters as their bytes."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = ["The quick brown fox", "over lazy dogs and foxes", "Der schnelle Fuchs"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special[:3], initial_alphabet=[], show_progress=False)
    backend.train_from_iterator(words * 3, trainer)
    model = backend.model
    vocab = backend.get_vocab()
    for token in special[3:]:
        vocab.setdefault(token, len(vocab))
    merges = []
    pieces = {token: token_id for token, token_id in vocab.items() if not token.startswith("<")}
    for token in sorted((t for t in pieces if len(t) > 1), key=len):
        for cut in range(1, len(token)):
            if token[:cut] in pieces and token[cut:] in pieces:
                merges.append((token[:cut], token[cut:]))
                break
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    backend.model = model
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "bytes": lambda: byte_level(merges=False),
    "byte-level BPE": lambda: byte_level(merges=True),
    "SentencePiece-like": metaspace,
}


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_of(tokenizer, ids):
    detokenizer = Vocabulary(tokenizer).detokenizer()
    return [*map(detokenizer.add, ids), detokenizer.end()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=TEXTS)
def test_all_pieces_together_are_the_text_and_none_ends_within_a_character(kind, text):
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    whole = decoded(tokenizer, ids)
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)
    assert Vocabulary(tokenizer).decode(ids) == whole


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_tokens_in_any_order_give_what_decoding_them_gives(kind, data):
    tokenizer = TOKENIZERS[kind]()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    if kind == "SentencePiece-like":
        # Broken bytes are decoded run by run there: what a run is, only its end tells. Whole characters are enough.
        ids = [token for token in ids if not tokenizer.convert_ids_to_tokens(token).startswith("<0x")]
    assert "".join(pieces_of(tokenizer, ids)) == decoded(tokenizer, ids)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_character_shows_with_its_last_byte_and_not_later(text):
    tokenizer = byte_level(merges=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = Vocabulary(tokenizer).detokenizer()
    shown = ""
    sent = b""
    for token_id, value in zip(ids, text.encode(), strict=True):
        shown += detokenizer.add(token_id)
        sent += bytes([value])
        assert shown == sent.decode(errors="ignore")


def test_a_character_that_stays_half_shows_as_broken_at_the_end():
    tokenizer = byte_level(merges=False)
    ids = tokenizer("a☃", add_special_tokens=False)["input_ids"][:-1]
    assert pieces_of(tokenizer, ids) == ["a", "", "", "\ufffd"]


def test_special_tokens_have_no_text_and_break_no_character():
    tokenizer = byte_level(merges=False)
    ids = tokenizer("☃", add_special_tokens=False)["input_ids"]
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert pieces_of(tokenizer, [*special, ids[0], *special, *ids[1:], *special]) == [""] * 6 + ["☃", "", "", ""]


def test_an_added_word_stands_for_itself():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["→word", "plain"])
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("→word", "plain", "→word")]
    assert "".join(pieces_of(tokenizer, ids)) == decoded(tokenizer, ids) == "→wordplain→word"


@given(
    st.lists(st.text("ab☃", max_size=4), max_size=12),
    st.lists(st.text("ab☃", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_text_goes_up_to_the_first_stop_string_however_it_is_cut(pieces, stop):
    text = "".join(pieces)
    # Whichever stop string is whole first ends the answer, as if letters came one by one; in a piece, the leftmost.
    filter_ = StopText(stop)
    shown = ""
    arrived = ""
    for piece in pieces:
        shown += filter_.add(piece)
        arrived += piece
        places = [arrived.find(string) for string in stop if string in arrived]
        assert filter_.stopped == bool(places)
        if places:
            assert shown == text[: min(places)]
            assert filter_.add("more") == ""
            break
        assert arrived.startswith(shown)
        held = arrived[len(shown) :]
        assert not held or any(string.startswith(held) for string in stop)
    else:
        shown += filter_.end()
        assert shown == text
    assert not any(string in shown for string in stop)
