"Every fault is planted, and exactly its finding must speak up, with the right rows; healthy data must leave it silent"
import json
import random
import re

import numpy as np
import pytest
from datasets import Dataset
from templates_table import TALKS, names, tokenizer_for
from transformers import AutoTokenizer

from sage_finetune.config import tiny_path
from sage_finetune.core.errors import ConfigError, DataError
from sage_finetune.data.dataset import prepare_dataset
from sage_finetune.data.findings import LEVELS, Finding
from sage_finetune.data.health import CHECKS, HealthReport, health_report
from sage_finetune.data.length_checks import histogram
from sage_finetune.data.measurements import survey
from sage_finetune.data.minhash import jaccard, near_pairs, shingles, signatures, token_codes, without_common
from sage_finetune.data.read_back import read_examples
from sage_finetune.data.text_measures import ending, guess_language, is_placeholder, odd_characters, opening, text_key
from sage_finetune.runs.plot import draw_lengths

TOWNS = ("Arbor Belmont Cedar Dunmore Easton Farley Glenwood Harrow Ivydale Juniper Kelso Linden Marlow Norwood Oakham "
    "Preston Quincy Redhill Selby Thornton".split())
THINGS = "bridge market school harbour library mill garden theatre".split()
ENDINGS = ("was built of grey stone", "stands beside the river", "is open on most mornings",
    "burned down and was never rebuilt", "belongs to a family of bakers", "has a roof of copper")


def asked(question, answer): return dict(instruction=question, output=answer)


def healthy(count=40, seed=0):
    "Rows that differ in question and answer"
    rng, rows = random.Random(seed), []
    for town in TOWNS:
        for thing in THINGS:
            opening = rng.choice(("Its", "The", "Our", "That", "Their", "This"))
            rows.append(asked(f"What do people say about the {thing} of {town}?",
                f"{opening} {thing} in {town} {rng.choice(ENDINGS)}, {rng.randrange(100, 999)} steps from {rng.choice(TOWNS)}."))
    rng.shuffle(rows)
    return rows[:count]


@pytest.fixture(scope="module")
def tokenizer(): return AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def made(tokenizer):
    "Rows to a prepared data set"
    def prepare(rows, **options): return prepare_dataset(rows, tokenizer, show=False, **options)
    return prepare


@pytest.fixture(scope="module")
def look(tokenizer, made):
    "A report on rows or on a prepared data set, with healthy held-out rows unless others are given"
    other = made([asked("Where does the ferry land?", "At the old pier, twice a day.")])
    def report(rows, evaluation=other, **options):
        return health_report(made(rows) if isinstance(rows, list) else rows,
            made(evaluation) if isinstance(evaluation, list) else evaluation, tokenizer=tokenizer, **options)
    return report


def alarms(report, *beside):
    "Names of the findings that are not ok, but for those named"
    return {one.name: one.level for one in report.findings if one.level != "ok" and one.name not in beside}


def replaced(dataset, at, **columns):
    "The same data set with other columns in some rows (places from 0)"
    return Dataset.from_dict({name: [columns[name](row) if place in at and name in columns else row[name]
        for place, row in enumerate(dataset)] for name in ("input_ids", "labels")})


# ---- health -----------------------------------------------------------------------------------------------------------

def test_healthy_data_raise_no_alarm(look):
    report = look(healthy(160), max_length=128)
    assert alarms(report) == {} and report.level == "ok"
    assert [one.name for one in report.findings] and len(report.findings) == len(CHECKS)
    assert all(one.message and one.advice and one.level in LEVELS for one in report.findings)


def test_figures_are_those_of_the_data(look, made):
    dataset = made(healthy(30))
    figures = look(dataset)["trained tokens"].figures
    target_tokens = [sum(label != -100 for label in row["labels"]) for row in dataset]
    assert (figures["rows"], figures["tokens"], figures["target_tokens"]) == (30,
        sum(len(row["input_ids"]) for row in dataset), sum(target_tokens))
    shares = [count / len(row["input_ids"]) for count, row in zip(target_tokens, dataset)]
    assert figures["smallest"][0]["row"] == shares.index(min(shares)) + 1
    answers = look(dataset)["answer length"]
    assert ((answers.figures["median"], answers.figures["longest"]) == (np.median(target_tokens), max(target_tokens))
        and answers.rows == [target_tokens.index(max(target_tokens)) + 1])
    longest = look(dataset)["longest rows"].figures["longest"]
    assert [one["tokens"] for one in longest] == sorted((len(row["input_ids"]) for row in dataset), reverse=True)[:10]
    assert longest[0]["head"] == healthy(30)[longest[0]["row"] - 1]["instruction"]


def test_the_same_data_give_the_same_report(look):
    rows = healthy(60) + healthy(5)
    assert look(rows).to_dict() == look(rows).to_dict()


# ---- each fault -------------------------------------------------------------------------------------------------------

def test_exact_duplicates(look):
    report = look(healthy(40) + [healthy(40)[7], healthy(40)[7], healthy(40)[30]])
    assert alarms(report) == {"exact duplicates": "warn"}
    assert report["exact duplicates"].rows == [41, 42, 43]
    assert report["exact duplicates"].figures["pairs"] == [[8, 41], [8, 42], [31, 43]]


def test_near_duplicates(look):
    long = ("Describe the harbour of Selby for a visitor who comes by boat in the evening, "
        "when the lamps are lit and the fish market has closed for the day.")
    answer = ("You see the lamps first, one on either pier, and then the long roof of the market, "
        "dark and quiet after five, with gulls asleep along its ridge.")
    report = look(healthy(40) + [asked(long, answer), asked(long.replace("visitor", "traveller"), answer.replace("quiet", "still")),
        asked(long.upper().capitalize(), answer)])
    assert alarms(report) == {"near duplicates": "warn"}
    assert 42 in report["near duplicates"].rows and report["near duplicates"].figures["pairs"][0][:2] == [41, 42]
    assert 0.8 <= report["near duplicates"].figures["pairs"][0][2] < 1


def test_many_copies_do_not_hide_near_duplicates(look, monkeypatch):
    monkeypatch.setattr("sage_finetune.data.minhash.MOST_PAIRS", 20)
    long = " ".join(row["output"] for row in healthy(3))
    report = look(healthy(20) * 5 + [asked("Tell me about them.", long), asked("Tell me about them.", long + " That is all.")])
    assert report["near duplicates"].rows == [102] and len(report["exact duplicates"].rows) == 80


def test_rows_that_share_a_long_text_but_teach_different_things_are_no_duplicates(look):
    text = " ".join(row["output"] for row in healthy(6))
    rows = [asked(f"{text} {row['instruction']}", row["output"]) for row in healthy(8, seed=1)]
    assert look(rows)["near duplicates"].level == "ok"


def test_a_system_prompt_makes_no_near_duplicates(look, made):
    prompt = " ".join(row["output"] for row in healthy(6))
    rows = [dict(row, system=prompt) for row in healthy(40)]
    report = look(rows, [dict(system=prompt, **asked("Where does the ferry land?", "At the old pier, twice a day."))])
    assert alarms(report) == {}


def test_parts_of_one_conversation_are_no_near_duplicates(made, look):
    dataset = made(healthy(20) + healthy(20))
    dataset = Dataset.from_dict(dict(input_ids=dataset["input_ids"], labels=dataset["labels"], row=[place % 20 + 1 for place in range(40)]))
    altered = [dict(row, input_ids=row["input_ids"] + [5], labels=row["labels"] + [-100]) if place >= 20 else row
        for place, row in enumerate(dataset)]
    apart = Dataset.from_list([dict(row, row=place + 1) for place, row in enumerate(altered)])
    assert len(look(apart)["near duplicates"].rows) == 20  # as rows of their own they are
    assert look(Dataset.from_list(altered))["near duplicates"].rows == []


def test_different_answers(look):
    rows = healthy(40)
    report = look(rows + [asked(rows[11]["instruction"].upper().replace(" ", "  "), "Nobody in the whole town can say.")])
    assert alarms(report) == {"answers differ": "warn"}
    assert report["answers differ"].rows == [41] and report["answers differ"].figures["pairs"] == [[12, 41]]


def test_different_answers_one_of_which_another_question_has(look):
    rows = healthy(40)
    assert look(rows + [asked(rows[11]["instruction"], rows[3]["output"])])["answers differ"].figures["pairs"] == [[12, 41]]


def test_rows_without_anything_are_not_in_both_splits(tokenizer):
    nothing = Dataset.from_dict(dict(input_ids=[[2]], labels=[[2]]))
    assert tokenizer.decode([2], skip_special_tokens=True) == ""
    assert health_report(nothing, evaluation=nothing, tokenizer=tokenizer)["in both splits"].level == "ok"


def test_a_question_in_both_splits(look):
    rows = healthy(60)
    same = asked(f" {rows[20]['instruction'].lower()} ", "It fell into the sea.")
    report = look(rows, [asked("Is it raining?", "It is not raining today."), same])
    assert alarms(report) == {"in both splits": "error"}
    assert report["in both splits"].rows == [2] and report["in both splits"].figures["pairs"] == [[21, 2]]


def test_a_question_nearly_in_both_splits(look):
    question = ("Describe the harbour of Selby for a visitor who comes by boat in the evening, "
        "when the lamps are lit and the fish market has closed for the day.")
    report = look(healthy(40) + [asked(question, "You see the lamps first, one on either pier.")],
        [asked(question.replace("a visitor", "the visitor"), "Fog, mostly.")])
    assert alarms(report) == {"nearly in both splits": "warn"}
    assert report["nearly in both splits"].rows == [1] and report["nearly in both splits"].figures["pairs"][0][:2] == [41, 1]


def test_plain_text_in_both_splits(look):
    texts = [dict(text=row["output"]) for row in healthy(30)]
    report = look(texts, [texts[3]])
    assert report["in both splits"].rows == [1] and report["in both splits"].level == "error"
    assert alarms(look(texts)) == {}


def test_empty_answers(look, made, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    hollow = replaced(made(healthy(40)), {4, 9}, labels=lambda row: [label if label == end else -100 for label in row["labels"]])
    report = look(hollow)
    assert report["empty answers"].level == "error" and report["empty answers"].rows == [5, 10]
    assert alarms(report) == {"empty answers": "error"}
    chinese = replaced(made([asked("桥在哪里", "在河边")]), {0}, labels=lambda row: [label if label == end else -100 for label in row["labels"]])
    assert look(chinese)["empty answers"].rows == [1] and look(chinese)["one-word answers"].rows == []


def test_one_word_answers(look):
    report = look(healthy(40) + [asked("Is there a bridge in Kelso?", "Yes."), asked("橋はありますか", "はい、橋は町の真ん中にあります")])
    assert report["one-word answers"].rows == [41] and report["one-word answers"].level == "note"
    talk = [dict(role=role, content=text) for role, text in (("user", "Is it far?"), ("assistant", "No."),
        ("user", "How far?"), ("assistant", "Half an hour on foot."))]
    assert look(healthy(40) + [dict(messages=talk)])["one-word answers"].level == "ok"


def test_no_trained_tokens(look, made):
    report = look(replaced(made(healthy(40)), {2}, labels=lambda row: [-100] * len(row["labels"])))
    assert report["trained tokens"].level == "error" and report["trained tokens"].rows == [3]
    assert alarms(report) == {"trained tokens": "error"}


def test_no_stop_token(look, made):
    cut = replaced(made(healthy(40)), {1, 6}, input_ids=lambda row: row["input_ids"][:-3], labels=lambda row: row["labels"][:-3])
    report = look(cut)
    assert alarms(report) == {"stop token": "error"} and report["stop token"].rows == [2, 7]


def test_a_stop_that_is_not_trained_on(look, made):
    def masked(row):
        return [-100 if place >= max(at for at, label in enumerate(row["labels"]) if label != -100) else label
            for place, label in enumerate(row["labels"])]
    report = look(replaced(made(healthy(40)), {0}, labels=masked))
    assert alarms(report) == {"stop token": "error"} and report["stop token"].rows == [1]


def test_only_a_stop_ends_the_last_answer_and_any_special_token_the_others(look, made, tokenizer):
    stop, other = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>"))
    turns = [dict(role=role, content=f"{role} says something here, number {at}") for at in range(2) for role in ("user", "assistant")]
    def ended(first, last):
        ids, labels = (list(made([dict(messages=turns)])[0][name]) for name in ("input_ids", "labels"))
        for place, token in zip([at for at, label in enumerate(labels) if label == stop], (first, last)): ids[place] = labels[place] = token
        return look(Dataset.from_dict(dict(input_ids=[ids], labels=[labels])))["stop token"].level
    word = tokenizer("word")["input_ids"][-1]
    assert (ended(stop, stop), ended(other, stop), ended(stop, other), ended(word, stop)) == ("ok", "ok", "error", "error")


def test_the_same_answer_everywhere(look):
    rows = [asked(row["instruction"], "I do not know.") for row in healthy(40)]
    report = look(rows)
    assert report["same answers"].level == "error" and report["same answers"].rows == list(range(1, 41))
    mixed = look(rows[:30] + healthy(160)[60:80])
    assert mixed["same answers"].level == "warn" and mixed["same answers"].rows == list(range(1, 31))


def test_the_same_opening(look):
    rows = [asked(row["instruction"], f"As an AI language model, I know: {row['output']}") if place % 3 == 0 else row
        for place, row in enumerate(healthy(40))]
    report = look(rows)
    assert alarms(report) == {"openings": "warn"} and report["openings"].rows == list(range(1, 41, 3))
    assert report["openings"].figures["words"] == "as an ai language model,"


def test_mixed_languages(look):
    report = look(healthy(40) + [asked("Wo steht die Brücke?", "Die Brücke ist nicht weit von dem Markt und sie ist alt."),
        asked("Где мост?", "Мост стоит у реки, недалеко от рынка.")])
    assert alarms(report) == {"languages": "note"} and report["languages"].rows == [41, 42]
    mix = report["languages"].figures["languages"]
    assert (mix["German"]["row"], mix["Cyrillic script"]["row"]) == (41, 42) and mix["English"]["share"] > 0.9


def test_rows_over_and_at_the_limit(look, made):
    dataset = made(healthy(40) + [asked("Tell me everything.", " ".join(row["output"] for row in healthy(9, seed=3)))])
    usual = max(len(row["input_ids"]) for row in dataset.select(range(40)))
    report = look(dataset, max_length=usual + 1)
    assert alarms(report) == {"length": "warn"} and report["length"].rows == [41] and report["length"].figures["over"] == 1
    report = look(dataset.select(range(40)), max_length=usual)
    assert report["length"].level == "warn" and report["length"].figures["over"] == 0 and report["length"].figures["at_or_over"] >= 1


@pytest.mark.parametrize("text, kind", [("a\x00b", "control"), ("a\x1b[31mred", "control"), ("caf\ufffd", "replacement"),
    ("cafÃ©", "encoding"), ("itâ€™s", "encoding"), ("a\u202eb", "direction")])
def test_odd_characters(look, text, kind):
    assert odd_characters(text) == kind
    report = look(healthy(40) + [asked("What is written there?", f"It says {text} in small letters.")])
    assert report["odd characters"].rows == [41] and set(report["odd characters"].figures["kinds"]) == {kind}
    assert alarms(report) == {"odd characters": "warn"}


@pytest.mark.parametrize("text", ["Grüße, señor", "naïve café — “quoted”", "Ação, São Paulo", "¿Qué? ÂNGELO",
    "你好", "\tone\nline\r\n", "👩‍🚀"])
def test_usual_characters_are_not_odd(text): assert odd_characters(text) == ""


def test_rows_that_were_left_out_are_told(made, look):
    rows = healthy(40)
    report = look(made(rows + [asked("What is this?", "")], on_bad_row="skip"))
    assert alarms(report) == {"preparation": "note"} and report["preparation"].figures["bad"] == 1
    long = look(made(rows + [asked("Tell me everything.", " ".join(row["output"] for row in healthy(9, seed=3)))], max_length=100))
    assert alarms(long) == {"preparation": "note"} and sum(long["preparation"].figures["overlong"].values()) == 1


def test_markup(look):
    report = look(healthy(40) + [asked("Say it in bold.", "<b>Gladly</b>, and loud &amp; clear."),
        asked("Which is less?", "We know that 3 < 4 and 5 > 4, R&D said.")])
    assert alarms(report) == {"markup": "note"} and report["markup"].rows == [41]


# ---- leaks, however they are dressed ----------------------------------------------------------------------------------

def chat(*said, system=""):
    "A row of several turns"
    turns = [("system", system)] * bool(system) + [("assistant" if at % 2 else "user", text) for at, text in enumerate(said)]
    return dict(messages=[dict(role=role, content=text) for role, text in turns])


TASKS = ("keeps the spare key to", "pays for the lamps in", "rings the small bell of", "sweeps the long stairs of",
    "counts the visitors of", "repairs the wooden roof of")
TIMES = ("when the old man is away in winter", "while the others are still asleep", "on the first evening of the fair",
    "after the boats have left the bay")
PEOPLE = "Ada Bruno Cora Dag Elin Finn Greta Hugo Ilse Jonas".split()


def wide(count, seed=0):
    "Questions of 12 to 17 words that ask for different facts by one pattern"
    rng, found = random.Random(seed), {}
    while len(found) < count:
        question = f"Who {rng.choice(TASKS)} the {rng.choice(THINGS)} of {rng.choice(TOWNS)} {rng.choice(TIMES)}?"
        found.setdefault(question, f"That is {rng.choice(PEOPLE)}, who has done it for {rng.randrange(2, 60)} years.")
    return list(found.items())


def leaked(look, training, held_out):
    "Held-out rows that either of the two findings names"
    report = look(training, held_out)
    return sorted({*report["in both splits"].rows, *report["nearly in both splits"].rows})


REWRITTEN = {
    "the same": lambda text: text, "capitals": str.upper, "small letters": str.lower,
    "spaces": lambda text: f"  {text.replace(' ', '  ')}\n", "no mark": lambda text: text.rstrip("?"),
    "typographic": lambda text: text.replace("the", "‘the’", 1).replace("'", "’"),
    "wide letters": lambda text: "".join(chr(ord(one) + 0xFEE0) if "a" <= one <= "z" else one for one in text),
    "please": lambda text: text.replace("?", ", please?"), "hello": lambda text: f"Hello! {text}",
    "tell me": lambda text: f"And tell me: {text}",
    "one word": lambda text: text.replace(" of ", " at ", 1), "another word": lambda text: text.replace("Who ", "Which ", 1),
    "dash": lambda text: text.replace("Who ", "Who – ", 1),
    "a word less": lambda text: text.replace(" the ", " ", 1), "hidden": lambda text: text.replace(" ", "\u200b ", 1)}


def test_planted_leaks_are_found_and_nothing_else(look):
    every = wide(220)
    lessons, fresh = every[:160], every[160:]
    curly = [(question.replace("the", "'the'", 1) if name == "typographic" else question, answer)
        for (question, answer), name in zip(lessons, REWRITTEN)]
    training = [asked(*pair) for pair in curly + lessons[len(curly):]]
    held = ([asked(change(question), answer) for (question, answer), change in zip(curly, REWRITTEN.values())]
        + [asked(*pair) for pair in fresh])
    found, planted = set(leaked(look, training, held)), set(range(1, len(REWRITTEN) + 1))
    recall, precision = len(found & planted) / len(planted), len(found & planted) / max(len(found), 1)
    print(f"planted {len(planted)}, recall {recall:.2f}, precision {precision:.2f} among {len(fresh)} clean ones; "
        f"missed: {[list(REWRITTEN)[at - 1] for at in planted - found]}")
    assert (recall, precision) == (1., 1.)


@pytest.mark.parametrize("systems", [("Be brief.", "You are a pirate."), ("", "Answer like a poet."),
    ("A long prompt. " * 60, "Another long prompt. " * 60), ("Use English.", "")])
def test_another_system_prompt_makes_no_other_question(look, systems):
    pairs = wide(40)
    lessons, exam = ([chat(*pair, system=system) for pair in some] for some, system in ((pairs[:30], systems[0]), (pairs[25:], systems[1])))
    assert look(lessons, exam)["in both splits"].rows == [1, 2, 3, 4, 5]
    assert leaked(look, lessons, exam) == [1, 2, 3, 4, 5]
    other = [chat(question, "Nobody knows that any more.", system=systems[1]) for question, _ in pairs[25:]]
    assert look(lessons, other)["in both splits"].rows == [1, 2, 3, 4, 5]


def test_a_text_in_the_system_prompt_is_a_part_of_the_question(look):
    texts = [" ".join(row["output"] for row in healthy(160, seed)[:8]) for seed in range(30)]
    lessons, exam = ([chat("What is this text about, in one sentence?", f"It is about {text[:60]}.", system=text) for text in some]
        for some in (texts[:20], texts[20:]))
    assert leaked(look, lessons, exam) == []
    assert leaked(look, lessons, [*exam, lessons[3]]) == [11]


def test_every_turn_is_compared(look):
    pairs = wide(60)
    lessons = [chat(*first, *second) for first, second in zip(pairs[:20], pairs[20:40])]
    hello = ("Good morning to you!", "Good morning, how can I help?")
    held = [chat(*pairs[25]), chat(*hello, *pairs[3]), chat(*hello, *pairs[30]), chat(*hello, *pairs[50]),
        chat(*pairs[51]), chat(*pairs[52], *pairs[53], *pairs[4])]
    assert leaked(look, lessons, held) == [1, 2, 3, 6]
    assert look(lessons, held)["in both splits"].level == "error"
    touched = [chat(*hello, pairs[7][0].replace("?", ", please?"), pairs[7][1]),
        chat(pairs[28][0].replace(" of ", " at ", 1), pairs[28][1])]
    assert look(lessons, touched)["nearly in both splits"].rows == [1, 2]


def test_small_talk_in_later_turns_is_no_leak(look):
    pairs, talk = wide(40), (("Thank you very much for that!", "You are welcome."),
        ("And why is that so?", "It has always been like that."), ("Go on.", "There is no more."))
    lessons = [chat(*pair, *(talk[at % 3])) for at, pair in enumerate(pairs[:30])]
    held = [chat(*pair, *(talk[at % 3])) for at, pair in enumerate(pairs[30:])] + [chat(*pairs[5], "And why?", "She likes it.")]
    assert leaked(look, lessons, held) == [11]


def test_what_is_not_trained_on_is_no_lesson(look, made, tokenizer):
    pairs = wide(20)
    shown = [dict(messages=[*chat(*pairs[0])["messages"], *chat(*pair)["messages"]]) for pair in pairs[1:12]]
    for row in shown: row["messages"][1]["train"] = False
    assert leaked(look, shown, [chat(*pairs[0])]) == [] and leaked(look, shown, [chat(*pairs[4])]) == [1]


@pytest.mark.parametrize("pattern, fills", [
    ("What is the colour of door {}?", [str(at) for at in range(1, 41)]),
    ("Which town has the number {} on the old map of the whole bay, my friend?", [str(at) for at in range(100, 140)]),
    ("Who is the mayor of {}?", TOWNS), ("Say, who was the very first mayor of {} after the long war was over?", TOWNS),
    ("Where does the {} stand when you come from the river and walk up the hill?", [f"{a} {b}" for a in ("old", "new") for b in THINGS]),
    ("What is {} + 17?", [str(at) for at in range(40)]), ("Is {} open?", [f"the {thing}" for thing in THINGS]),
    ("桥{}在哪里", list("一二三四五六七八九十甲乙丙丁戊己"))])
def test_a_blank_that_is_filled_in_makes_another_question(look, pattern, fills):
    rows = [asked(pattern.format(fill), f"It is {random.Random(fill).choice(THINGS)} {len(fill) * 7 + at}, as far as we know.")
        for at, fill in enumerate(fills)]
    cut = len(rows) * 3 // 4
    assert leaked(look, rows[:cut], rows[cut:]) == []
    assert leaked(look, rows[:cut], [rows[2], *rows[cut:]]) == [1]


@pytest.mark.parametrize("one, other, answers, same", [
    ("Who keeps the light in the tower?", "Who keeps the light in the tower, please?", ("Ada.", "Bruno."), True),
    ("Who keeps the light in the tower?", "Who does not keep the light in the tower?", ("Ada.", "Ada."), False),
    ("Is the ferry that leaves the old pier at dusk open to all guests?",
        "Isn't the ferry that leaves the old pier at dusk open to all guests?", ("Yes.", "Yes."), False),
    ("What is the answer to 5 + 3 when you count it all on your fingers?",
        "What is the answer to 5 - 3 when you count it all on your fingers?", ("It is 8.", "It is 2."), False),
    ("Wer hält das Licht im alten Turm am Ufer der Bucht heute Nacht?",
        "Wer hält das Licht im alten Turm am Ufer der Bucht heute Nacht bitte?", ("Ada.", "Ada."), True),
    ("灯塔的看守人每天晚上在什么时候点亮那盏灯？", "请问灯塔的看守人每天晚上在什么时候点亮那盏灯", ("黄昏时分。", "黄昏时分。"), True),
    ("Who lights the lamp of the tower at the end of the pier at dusk?",
        "Who lights the lantern of the tower at the end of the pier at dusk?", ("Ada Pell.", "It is Ada Pell who does."), True)])
def test_when_a_question_was_only_touched_up(look, one, other, answers, same):
    rows = healthy(30) + [asked(one, answers[0])]
    assert leaked(look, rows, [asked(other, answers[1])]) == [1] * same


def test_every_template_is_read_turn_by_turn():
    said = ("Who keeps the light?", "Ada.", "And the cat, who feeds it?", "Nora.")
    seen = 0
    for name in names():
        try: dataset = prepare_dataset([chat(*said, system="Be brief, always.")], tokenizer_for(name), show=False)
        except DataError: dataset = prepare_dataset([chat(*said)], tokenizer_for(name), show=False)  # it takes no system prompt
        turns = [turn for example in read_examples(dataset, tokenizer_for(name)) for turn in example.turns]
        assert turns[0][0] in (said[0], f"Be brief, always.\n\n{said[0]}") and turns[-1][0] == said[2], name
        seen += 1
    assert seen > 30


@pytest.mark.parametrize("name", ["gemma3", "deepseekv3", "llama3", "glm4moe"])
def test_leaks_behind_other_templates(name):
    pairs, tokenizer = wide(12), tokenizer_for(name)
    lessons = prepare_dataset([chat(*pair, *other, system="Be brief.") for pair, other in zip(pairs[:4], pairs[4:8])],
        tokenizer, show=False)
    held = prepare_dataset([chat(*pairs[1], system="You are a pirate."), chat(*pairs[6]), chat(*pairs[9], system="Be brief."),
        chat(*pairs[10], *pairs[2], system="Be kind.")], tokenizer, show=False)
    assert sorted(set(health_report(lessons, held, tokenizer=tokenizer)["in both splits"].rows)) == [1, 2, 4]


def test_the_result_of_a_tool_is_no_question():
    tokenizer = tokenizer_for("qwen3")
    messages, tools = TALKS["tools"]
    example = list(read_examples(prepare_dataset([dict(messages=messages, tools=tools)], tokenizer, show=False), tokenizer))[-1]
    assert [question for question, _ in example.turns] == ["What is dusk?"]


# ---- copies, and answers that say nothing -------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [str.upper, str.lower, lambda text: text.replace(" ", "  "),
    lambda text: text.rstrip(".?"), lambda text: f"{text} \n", lambda text: text.replace("'", "’")])
def test_copies_that_differ_in_case_or_spaces_only(look, change):
    rows = healthy(40)
    rows[4] = asked("What's on the miller's table?", "It's Ada's old hat, and nobody's book.")
    report = look(rows + [asked(change(rows[4]["instruction"]), change(rows[4]["output"])),
        asked(rows[6]["instruction"], change(rows[6]["output"]) + " ")])
    assert ({41} <= set(report["near duplicates"].rows) | set(report["exact duplicates"].rows)
        and alarms(report, "near duplicates", "exact duplicates", "cut-off answers") == {})
    assert [5, 41] in [pair[:2] for pair in report["near duplicates"].figures.get("pairs", [])
        + report["exact duplicates"].figures.get("pairs", [])]


def test_the_same_answer_in_other_words_is_wanted_in_training_and_a_leak_across(look):
    answer = " ".join(row["output"] for row in healthy(12, seed=5))
    question = "Describe the harbour of Selby for a visitor who comes by boat in the evening, when the lamps are lit."
    report = look(healthy(40) + [asked(question, answer), asked("Tell me how Selby looks from the sea at night.", answer)])
    assert alarms(report) == {} and report["near duplicates"].figures["paraphrases"] == 1
    across = look(healthy(40) + [asked(question, answer)],
        [asked(question.replace("visitor", "traveller"), answer)])["nearly in both splits"]
    assert across.rows == [1] and across.advice != look(healthy(40) + [asked(question, answer)]
        + [asked(question.replace("visitor", "traveller"), answer)])["near duplicates"].advice


@pytest.mark.parametrize("answer", ["N/A", "n/a.", "nan", "NaN", "null", "None", "-", "—", "...", "?", "[deleted]",
    "<NA>", "TBD", "#N/A", "无"])
def test_placeholders(answer): assert is_placeholder(answer) and is_placeholder(f" {answer}\n")


@pytest.mark.parametrize("answer", ["N/A", "null", "—"])
def test_rows_with_placeholders(look, answer):
    report = look(healthy(40) + [asked("What is there?", answer)])
    assert ((report["hollow answers"].level, report["hollow answers"].rows) == ("warn", [41])
        and report["hollow answers"].figures["kinds"]["placeholder"] == 1)
    assert look(healthy(150) + [asked("What is there?", answer)])["hollow answers"].level == "note"
    assert look(healthy(40) + [asked(f"What is in room {at}?", answer) for at in range(10)])["hollow answers"].level == "error"


@pytest.mark.parametrize("answer", ["No.", "42", "Nan Goldin.", "Null and void.", "👍", "∅", "None of them.", "a", "€", "是"])
def test_short_answers_are_no_placeholders(answer): assert not is_placeholder(answer)


@pytest.mark.parametrize("answer", ["<think>It may be Ada.</think>", "<think>\nSo, who is it\n</think>\n\n",
    "<think>I wonder who it may be", "[THINK]Ada?[/THINK]", "It may be Ada, or not.</think>"])
def test_answers_that_are_only_thoughts(look, answer):
    report = look(healthy(40) + [asked("Who is it?", answer)])
    assert report["hollow answers"].rows == [41] and report["hollow answers"].figures["kinds"]["thinking"] == 1
    assert look(healthy(40) + [asked("Who is it?", f"{answer}</think>[/THINK] It is Ada.")])["hollow answers"].level == "ok"


def test_thoughts_whose_tags_are_special_tokens():
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<think>", "</think>"]))
    rows = [asked("Who is it?", "<think>It may be Ada.</think>"), asked("Who was it?", "<think>It may be Ada.</think>It was Ada.")]
    assert health_report(prepare_dataset(rows, tokenizer, show=False, thinking="as_is"), tokenizer=tokenizer)["hollow answers"].rows == [1]


@pytest.mark.parametrize("answer", ["The keeper has lived in the old tower for nine years and",
    "The keeper has lived in the old tower for nine years, with his", "We saw the lamp, the bell, the boat that came in,",
    "Der Wärter wohnt seit neun Jahren in dem alten Turm und sieht", "灯塔看守人在灯塔里住了整整九年因为他很喜欢大海和"])
def test_answers_that_are_cut_off(look, answer):
    report = look(healthy(40) + [asked("What about it?", answer)])
    assert alarms(report, "languages") == {"cut-off answers": "warn"} and report["cut-off answers"].rows == [41]
    assert look(healthy(150) + [asked("What about it?", answer)])["cut-off answers"].level == "note"


@pytest.mark.parametrize("answer", ["salted figs", "The keeper said to all of us: “Nobody sleeps in here.”",
    "It is all on the page at https://light.example/keeper", "def light(lamp):\n    return lamp.on and lamp.bright",
    "There are three of them in the tower:\n- the lamp\n- the bell\n- the boat that hangs from the roof of the hall",
    "灯塔看守人在灯塔里住了整整九年。", "The keeper has lived in the tower for nine years!", "He has lived in the tower for many years (nine)",
    "The whole sum of what they paid us is 42", "You are very welcome, and do come again some day 👋",
    "เขาอาศัยอยู่ในหอคอยมาเก้าปีแล้ว", "क्या वह वहाँ नौ साल से रहता है और काम करता है।"])
def test_answers_that_are_not_cut_off(answer): assert ending(answer, guess_language(answer)) != "open"


def test_answers_without_full_stops_are_a_style_unless_all_have_one_length(look):
    bare = [asked(row["instruction"], row["output"].rstrip(".") + " or so") for row in healthy(40)]
    assert look(bare)["cut-off answers"].level == "ok"
    cut = [asked(row["instruction"], (row["output"] + " " + row["output"])[:61].replace(".", "").rstrip().ljust(61, "x"))
        for row in healthy(40)]
    report = look(cut)
    assert report["cut-off answers"].level == "warn" and report["cut-off answers"].figures["at_limit"]


@pytest.mark.parametrize("lost, level", [(0, "ok"), (1, "note"), (3, "note"), (6, "warn"), (60, "error"), (400, "error")])
def test_the_share_of_rows_left_out_decides(look, made, lost, level):
    long = asked("Tell me everything.", " ".join(row["output"] for row in healthy(9, seed=3)))
    report = look(made(healthy(40) + [long] * lost, max_length=100))["preparation"]
    assert report.level == level and report.figures["lost"] == lost
    if lost >= 6: assert f"{lost} were left out" in report.message
    bad = look(made(healthy(40) + [asked("What is this?", "")] * lost, on_bad_row="skip"))["preparation"]
    assert (bad.level, bad.figures["lost"]) == (level, lost)


# ---- what is below ----------------------------------------------------------------------------------------------------

def test_examples_are_read_back(tokenizer, made):
    rows = [dict(messages=[dict(role="system", content="Be brief."), dict(role="user", content="Who?"),
        dict(role="assistant", content="Ada."),
        dict(role="user", content="When?"), dict(role="assistant", content="At dusk.")]), dict(text="Plain words.")]
    first, second = read_examples(made(rows), tokenizer)
    assert first.answers == ["Ada.", "At dusk."] and "Be brief." in first.asked and first.asked.endswith("Who?")
    assert (second.asked, second.answers) == ("", ["Plain words."])
    assert [example.row for example in read_examples(made(healthy(30)).select([4, 2]), tokenizer)] in ([1, 2], [5, 3])


def test_rows_are_read_in_order_across_batches(tokenizer, made):
    rows = [asked(f"Number {at}?", f"It is {at}.") for at in range(2300)]
    dataset = made(rows)
    assert [example.answers[0] for example in read_examples(dataset, tokenizer)] == [row["output"] for row in rows]
    plain = Dataset.from_dict(dict(input_ids=dataset["input_ids"][:], labels=dataset["labels"][:]))
    assert [example.row for example in read_examples(plain, tokenizer)] == list(range(1, 2301))


def test_row_numbers_of_the_data_are_used(tokenizer, made):
    dataset = made(healthy(20) + healthy(1))
    dataset = Dataset.from_dict(dict(input_ids=dataset["input_ids"], labels=dataset["labels"], row=list(range(101, 122))))
    assert health_report(dataset, tokenizer=tokenizer)["exact duplicates"].rows == [121]


def test_signatures_estimate_likeness():
    rng = np.random.default_rng(1)
    for share in (0.1, 0.5, 0.9):
        common, size = int(share * 400), 400 - int(share * 400)
        pools = [rng.integers(0, 2**32, count, dtype=np.uint32) for count in (common, size // 2, size // 2)]
        one, other = np.concatenate(pools[:2]), np.concatenate([pools[0], pools[2]])
        marks = signatures([one, other])
        assert abs((marks[0] == marks[1]).mean() - jaccard(one, other)) < 0.2


def test_near_pairs_find_what_comparing_each_with_each_finds():
    rng = np.random.default_rng(2)
    sets = [rng.integers(0, 2**32, 60, dtype=np.uint32) for _ in range(120)]
    for at in range(0, 60, 2): sets[at + 1] = np.concatenate([sets[at][:60 - at // 4], rng.integers(0, 2**32, at // 4, dtype=np.uint32)])
    every = {(one, other) for one in range(120) for other in range(one + 1, 120) if jaccard(sets[one], sets[other]) >= 0.8}
    assert len(every) > 10 and {pair[:2] for pair in near_pairs(sets)} == every


def test_many_equal_rows_do_not_make_every_pair():
    sets = [np.arange(50, dtype=np.uint32)] * 3000
    pairs = near_pairs(sets)
    assert 2999 <= len(pairs) <= 2 * 2999 and {later for _, later, _ in pairs} == set(range(1, 3000))
    assert {(0, 2999, 1.), (2998, 2999, 1.)} <= set(pairs)


def test_what_nearly_all_rows_have_does_not_count():
    sets = [np.concatenate([np.arange(100, dtype=np.uint32), np.arange(1000 * at, 1000 * at + 5, dtype=np.uint32)]) for at in range(1, 41)]
    assert near_pairs(sets) and near_pairs(without_common(sets)) == []
    # what ten of eleven have counts no more
    assert near_pairs(without_common(sets + [np.arange(10**6, 10**6 + 30, dtype=np.uint32)] * 4))[0][0] == 40
    assert without_common(sets[:19])[0] is sets[0]  # too few to judge by


def test_openings_are_of_longer_answers():
    assert opening("As an AI  language Model, I am") == "as an ai language model," and opening("I do not know that") == ""


def test_what_a_template_writes_around_a_question_is_left_out(made):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    tokenizer.chat_template = (
        """{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""")
    example = next(read_examples(prepare_dataset([asked("Who keeps the light?", "Ada does.")], tokenizer, show=False), tokenizer))
    assert (example.asked, example.answers) == ("Who keeps the light?", ["Ada does."])


def test_upper_case_and_spaces_do_not_count(tokenizer, made):
    codes, text = token_codes(tokenizer), "the old mill stands beside the river"
    one, other = (shingles(example, codes)[0]
        for example in read_examples(made([dict(text=text), dict(text=text.replace(" ", "  "))]), tokenizer))
    assert jaccard(one, other) > 0.6 and text_key(text) == text_key(text.upper().replace(" ", " \n"))


def test_large_data_are_sampled_and_it_is_said(tokenizer, made, monkeypatch):
    monkeypatch.setattr("sage_finetune.data.measurements.NEAR_ROWS", 50)
    measured = survey(made(healthy(120)), tokenizer)
    assert len(measured.places) == 50 and measured.places[0] == 0 and measured.places[-1] == 119
    assert "Looked at: 50 of 120 rows." in health_report(made(healthy(120)), tokenizer=tokenizer)["near duplicates"].message


@pytest.mark.parametrize("text, language", [("The key is under the mat and the door is open.", "English"),
    ("Der Schlüssel ist unter der Matte.", "German"),
    ("La clé est sous le tapis et la porte est ouverte.", "French"),
    ("La llave está en el suelo y la puerta está abierta para los niños.", "Spanish"),
    ("A chave está em uma mesa, mas não há porta para o jardim.", "Portuguese"),
    ("La chiave è nella casa, ma non so dove sono gli altri.", "Italian"),
    ("De sleutel ligt op het bed en de deur is niet open.", "Dutch"), ("열쇠는 매트 아래에 있습니다", "Korean"),
    ("鍵はマットの下にあります", "Japanese"), ("钥匙在垫子下面", "Chinese"),
    ("המפתח מתחת לשטיח", "Hebrew"), ("المفتاح تحت السجادة", "Arabic script"), ("x = y + 1", "Latin script, unclear"),
    ("Open the door", "Latin script, unclear"), ("que no se", "Latin script, unclear"), ("1 2 3", "no letters"), ("", "no letters")])
def test_languages(text, language): assert guess_language(text) == language


@pytest.mark.parametrize("longest, limit", [(1, None), (3, 4), (50, 512), (900, 512), (512, 512), (513, 512), (200_000, 1024), (100, 1)])
def test_bars_hold_every_row_and_end_at_the_limit(longest, limit):
    lengths = np.array([*range(1, min(longest, 300)), longest])
    bars = histogram(lengths, limit)
    assert sum(bars["counts"]) == len(lengths) and len(bars["edges"]) == len(bars["counts"]) + 1 <= 140
    assert all(left < right for left, right in zip(bars["edges"], bars["edges"][1:]))
    if limit and limit <= bars["edges"][-1]: assert limit + 1 in bars["edges"]
    assert draw_lengths(**bars, max_length=limit).png.startswith(b"\x89PNG")


# ---- the report -------------------------------------------------------------------------------------------------------

NASTY = [asked("<script>alert(1)</script> Who is <b>it</b>?", "It is \x1b[2Jnobody \u202eat all, \x07they say & mean."),
    asked("<script>alert(1)</script> Who is <b>it</b>?", "Nobody \x1b[2Jknows <i>it</i>.")]


def test_what_comes_from_data_is_escaped(look):
    report = look(NASTY * 6, NASTY)
    page, text = report._repr_html_(), str(report)
    assert "<script" not in page and "<b>it" not in page and "<i>it" not in page and "&lt;script&gt;" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page + text)
    assert "␛" in text  # and is shown, not dropped


def test_a_finding_hides_nothing_wherever_it_came_from(look):
    finding, report = Finding("links", "warn", "a\x1b[31m<b>\u202e", "\x07 <i>", [1]), look(healthy(5))
    report.findings.append(finding)
    for shown in (repr(finding), finding._repr_html_(), str(report), report._repr_html_()):
        assert "␛" in shown and "⟨U+202E⟩" in shown and not re.search("[\x1b\x07\u202e]", shown)
    assert "<b>a" not in finding._repr_html_() and "&lt;b&gt;" in finding._repr_html_() and "<i>" not in report._repr_html_()


def test_the_report_shows_itself(look, monkeypatch):
    import IPython.display
    report, shown = look(healthy(20), max_length=256), []
    monkeypatch.setattr(IPython.display, "display", lambda value, **options: shown.append(value))
    report._ipython_display_()
    picture, table = shown
    assert picture._repr_png_().startswith(b"\x89PNG") and "max_length 256" in repr(picture)
    assert set(table) == {"text/html", "text/plain"} and "<script" not in table["text/html"] and "data:image" not in table["text/html"]
    assert all(f">{one.name}<" in table["text/html"] and one.name in table["text/plain"] for one in report.findings)
    assert "data:image/png;base64," in report._repr_html_()


def test_levels_are_words_and_colours_have_a_text_colour(look):
    page = look(healthy(20) + [healthy(20)[0]], None)._repr_html_()
    assert all(f"<b>{level}</b>" in page for level in ("ok", "note", "warn"))
    assert all("color:" in style.replace("background:", "") for style in re.findall(r'style="([^"]*background:[^"]*)"', page))


def test_a_report_survives_as_json(look, tmp_path):
    report = look(healthy(20) + [healthy(20)[0]], max_length=64)
    content = json.loads(report.save(tmp_path/"health.json").read_text(encoding="utf-8"))
    assert content == report.to_dict() and content["level"] == report.level
    assert str(HealthReport([Finding(**one) for one in content["findings"]])) == str(report)


def test_the_worst_come_first(look):
    levels = [LEVELS.index(one.level) for one in look(healthy(20) + [healthy(20)[0]], healthy(3), max_length=64).findings]
    assert levels == sorted(levels, reverse=True) and levels[0] == 3


def test_rows_and_files_are_prepared_on_the_way(tokenizer, look):
    report = health_report("example", evaluation="example_unseen", tokenizer=tokenizer)
    assert report["trained tokens"].figures["rows"] == 100 and report["in both splits"].level == "ok" and report.level == "warn"
    assert len(report["nearly in both splits"].rows) == 3  # the exam asks the same in other words
    assert health_report(healthy(20), tokenizer=tokenizer)["trained tokens"].figures["rows"] == 20


def test_what_cannot_be_looked_at(tokenizer, made):
    with pytest.raises(ConfigError, match="Pass tokenizer="): health_report(Dataset.from_dict(dict(input_ids=[[1]], labels=[[1]])))
    with pytest.raises(DataError, match="no labels"): health_report(made(healthy(5)).remove_columns("labels"), tokenizer=tokenizer)
    with pytest.raises(DataError, match="has no rows"): health_report(made(healthy(5)).select([]), tokenizer=tokenizer)
    with pytest.raises(DataError, match="row 1 has the id 999999"):
        health_report(Dataset.from_dict(dict(input_ids=[[999999]], labels=[[999999]])), tokenizer=tokenizer)
    with pytest.raises(KeyError, match="there are: "): health_report(made(healthy(5)), tokenizer=tokenizer)["beauty"]


def test_a_single_row_and_a_row_without_tokens(tokenizer, made):
    assert health_report(made(healthy(1)), tokenizer=tokenizer)["trained tokens"].figures["rows"] == 1
    report = health_report(Dataset.from_dict(dict(input_ids=[[], [5, 6, 7]], labels=[[], [5, 6, 7]])), tokenizer=tokenizer)
    assert report["trained tokens"].rows == [1]
