"""Tokens shown: nothing lost, nothing hidden, nothing obeyed, for every kind of vocabulary."""
import html
import re
import subprocess
import sys
import time
from functools import cache
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sage_finetune.chat_format.tokens import (
    TokenView,
    _token_bytes,
    escape_control_chars,
    token_texts,
    tokens_ansi,
    tokens_html,
    tokens_text,
)
from sage_finetune.config import tiny_path
from sage_finetune.core.errors import DataError

TEXTS = ["The lamp costs 3 €.", "你好, wie geht's? 👩‍🚀", "a  b\n\n\tc", "Grüße\r\n", "نص عربي", "<|im_start|>user\n<b>&amp;</b>"]
CORPUS = ["the lamp and the light costs a boat", "你好 Grüße wie geht es dir", "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "3 € . , ? ! ' < > | & ; / _"] * 20


def sentencepiece_like(model, trainer):
    "A vocabulary in SentencePiece's spelling, with bytes for what it does not know"
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def bytes_by_fallback():
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = sentencepiece_like(models.BPE(unk_token="<unk>", byte_fallback=True),
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False))
    pieces = list(dict.fromkeys([*special, *made.get_vocab()]))
    backend = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer, backend.decoder = made.backend_tokenizer.normalizer, made.backend_tokenizer.decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def metaspace():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>",
        special_tokens=["<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def word_piece():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class OnlyDecodes:
    "A tokenizer that knows nothing but `decode`"
    def __init__(self, tokenizer): self.tokenizer = tokenizer
    def decode(self, ids): return self.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def tiny(): return AutoTokenizer.from_pretrained(tiny_path())


def line_of(text, tokenizer, **fields):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return TokenView(ids, fields.pop("labels", list(ids)), tokenizer, **fields)


# ---- nothing lost -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(text, tiny):
    ids = tiny(text, add_special_tokens=False)["input_ids"]
    assert b"".join(_token_bytes(ids, tiny)).decode() == text
    assert b"".join(_token_bytes(ids, OnlyDecodes(tiny))).decode() == text


@given(st.text(max_size=60))
@example("\ufa25")  # a letter the tokenizer itself writes in another way (Unicode's NFC, as Qwen2 has it)
@settings(deadline=None)
def test_no_text_loses_anything(text):
    tokenizer, text = _shared(), text.encode("utf-8", "replace").decode()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(_token_bytes(ids, tokenizer)).decode() == tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    line = TokenView(ids, list(ids), tokenizer)
    for shown in (repr(line), line._repr_html_(), line.ansi()): shown.encode()  # can be written to any file


@cache
def _shared(): return AutoTokenizer.from_pretrained(tiny_path())


def test_spaces_and_bytes_of_sentencepiece_are_kept():
    tokenizer = bytes_by_fallback()
    text = "the lamp 3 € 👩"
    ids = tokenizer(text)["input_ids"]
    assert b"".join(_token_bytes(ids, tokenizer)).decode() == text
    assert "⟨F0⟩" in token_texts(ids, tokenizer) and " " in "".join(token_texts(ids, tokenizer))
    assert "the lamp 3 € 👩" in repr(TokenView(ids, list(ids), tokenizer))


def test_metaspace_and_word_pieces_are_readable():
    spaces = metaspace()
    ids = spaces("the lamp and a boat")["input_ids"]
    assert b"".join(_token_bytes(ids, spaces)).decode().strip() == "the lamp and a boat"
    assert "".join(token_texts(ids, spaces)) == " the lamp and a boat"  # that is how such a vocabulary begins
    pieces = word_piece()
    ids = pieces("the lamp and a boat")["input_ids"]
    assert b"".join(_token_bytes(ids, pieces)).decode() == "the lamp and a boat"


def test_half_a_character_is_shown_as_bytes(tiny):
    ids = tiny("€")["input_ids"]
    assert token_texts(ids, tiny) == ["⟨E2⟩", "⟨82⟩", "⟨AC⟩"]
    assert "⟦€⟧" in repr(TokenView(ids, list(ids), tiny))                       # neighbours of one kind are whole again
    assert "⟨E2⟩⟦⟨82⟩⟨AC⟩⟧" in repr(TokenView(ids, [-100, *ids[1:]], tiny))    # unless only a part is trained on
    page = TokenView(ids, list(ids), tiny)._repr_html_()
    assert "\ufffd" not in page and page.count("· part of €") == 3


def test_ids_that_do_not_exist_are_named(tiny):
    assert token_texts([len(tiny), -100, 10**7], tiny) == [f"⟨id {len(tiny)}⟩", "⟨id -100⟩", "⟨id 10000000⟩"]


# ---- nothing hidden, nothing obeyed -----------------------------------------------------------------------------------

NASTY = "".join(map(chr, [0, 7, 8, 13, 27, 127, 0x85, 0x200B, 0x200E, 0x200F, 0x202A, 0x202E, 0x2028, 0x2066,
    0x2069, 0xFEFF, 0xAD, 0xE0041]))


def test_what_is_not_seen_is_named():
    shown = escape_control_chars(NASTY + "\ud800")
    assert shown.startswith("␀␇␈␍␛␡⟨U+0085⟩⟨U+200B⟩") and shown.endswith("⟨U+E0041⟩⟨U+D800⟩")
    assert not set(shown) & set(NASTY) and shown.encode()
    assert escape_control_chars("tab\tline\nGrüße نص 👩‍🚀") == "tab\tline\nGrüße نص 👩‍🚀"


@pytest.mark.parametrize("form", [tokens_text, tokens_ansi, tokens_html])
def test_no_form_lets_the_data_act(form, tiny):
    names = ['"><script>alert(1)</script>'] * len(tiny(f"x{NASTY}<script>\x1b[31mred")["input_ids"])
    shown = form([line_of(f"x{NASTY}<script>\x1b[31mred", tiny, names=names, title=f"<script>{NASTY}")])
    own = html.unescape(re.sub(r"<[^>]*>", "", shown)) if form is tokens_html else re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert not set(own) & (set(NASTY) - {"\n"}) and "[31mred" in own
    if form is tokens_html: assert "<script" not in shown


class Reader(HTMLParser):
    "The tags of a page that carry a tooltip"
    def __init__(self, page):
        super().__init__()
        self.open, self.found = [], []
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        if tag not in ("br", "wbr"): self.open.append(tag)
        assert not any(name.startswith("on") for name, _ in attributes) and tag not in ("script", "style", "link", "img")
        self.found.append([tag, dict(attributes).get("title", ""), ""])

    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data):
        if self.found: self.found[-1][2] += data


def test_the_page_says_everything_without_its_colours(tiny):
    question, answer = tiny("Who keeps the light?")["input_ids"], tiny(" Ada.")["input_ids"]
    line = TokenView(question + answer + question + [0] * 37, [-100] * len(question) + answer + [-100] * (len(question) + 37), tiny,
        kinds=["context"] * len(question) + ["target"] * len(answer) + ["cut"] * len(question) + ["padding"] * 37,
        names=["user"] * len(question) + ["turn 2, assistant"] * len(answer) + ["user"] * len(question) + [""] * 37,
        weights=[0.] * len(question) + [1.] * len(answer) + [0.] * (len(question) + 37), borders=[len(question + answer)])
    found = Reader(re.sub(r' style="[^"]*"', "", line._repr_html_())).found
    target = [text for tag, title, text in found if tag == "ins" and title]
    assert "".join(target).replace("·", " ") == " Ada."
    assert ("ins", f"id {answer[0]} · label {answer[0]} · turn 2, assistant · weight 1") in {(tag, title) for tag, title, _ in found}
    assert sum(tag == "del" and bool(title) for tag, title, _ in found) == len(question)
    assert [text for tag, title, text in found if tag == "sub" and title] == ["… 37 padding"]
    assert [text.strip() for tag, title, text in found if "another example" in title] == ["┃"]
    assert f"{len(answer)} of {len(line.ids)} tokens are trained on, 37 are padding, {len(question)} are cut" in line._repr_html_()


def test_brackets_in_the_data_are_not_taken_for_ours(tiny):
    shown = repr(line_of("⟦not trained on⟧", tiny, labels=[-100] * len(tiny("⟦not trained on⟧")["input_ids"])))
    assert "⟦" not in shown and "⟨U+27E6⟩not trained on⟨U+27E7⟩" in shown


# ---- size -------------------------------------------------------------------------------------------------------------

def test_long_lines_show_head_and_tail_quickly(tiny):
    ids = tiny("The keeper lit the lamp. ", add_special_tokens=False)["input_ids"] * 30_000
    line, began = TokenView(ids, list(ids), tiny), time.perf_counter()
    for form in (tokens_text, tokens_ansi, tokens_html):
        shown = form([line], limit=40)
        assert f"… {len(ids) - 40:,} tokens …" in shown and len(shown) < 10_000
    assert len(line._repr_html_()) < 100_000
    assert time.perf_counter() - began < 5
    assert "tokens …" not in repr(TokenView(ids[:400], ids[:400], tiny))


def test_lists_that_do_not_fit_are_refused(tiny):
    for name in ("labels", "kinds", "names", "weights"):
        with pytest.raises(DataError, match=f"{name} has 1 values for 2 ids. Give one for each token"):
            TokenView(**dict(ids=[1, 2], labels=[1, 2], tokenizer=tiny) | {name: [1]})


def test_no_tokens_at_all(tiny):
    line = TokenView([], [], tiny)
    assert "0 of 0 tokens" in repr(line) and html.escape("0 of 0") in line._repr_html_() and line.ansi()
    assert tokens_text([]) == tokens_html([]) == tokens_ansi([]) == ""


def test_looking_at_tokens_loads_no_heavy_library():
    code = ("import sys, sage_finetune.chat_format.tokens; print([name for name in ('torch', 'transformers', 'datasets', "
        "'numpy') if name in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
