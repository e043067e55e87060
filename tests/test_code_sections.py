"Pieces of documents, tests and source files in any language, read off line by line; and files made to be slow to read"
import ast
import time

import pytest

from sage_finetune.data.code_sections import (
    LANGUAGES,
    LONGEST_LINE,
    MOST_LINES,
    call_examples,
    definition,
    doc_comments,
    licences,
    markdown_sections,
    plain_text,
    rst_sections,
    unwanted_licence,
)


def told(sections): return {one.title: one.text for one in sections}


def commented(text, suffix): return {one.name: (one.noun, one.text, one.line) for one in doc_comments(text, suffix)}


# ---- documents --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("# Tea\nIt is hot.", {"Tea": "It is hot."}), ("# Tea #\n\n\nIt is\nhot.\n\nAnd wet.", {"Tea": "It is hot."}),
    ("Tea\n===\nIt is hot.\n\nCup\n---\nIt is round.", {"Tea": "It is hot.", "Cup": "It is round."}),
    ("It is hot.\n\n# Tea\n", {"Tea": ""}), ("# Tea\n- hot\n- wet\n\nIt is both.", {"Tea": "It is both."}),
    ("# Tea\n| a | b |\n|---|---|\n> quoted\n\n![x](y.png)\n", {"Tea": ""}), ("#Tea\nhot stuff", {}), ("####### Tea\nhot", {}),
    ("# Tea\n```\n# Cup\nIt is code.\n```\nIt is hot.", {"Tea": "It is hot."}), ("# Tea\n~~~\n```\n# Cup\n~~~\nHot it is.",
    {"Tea": "Hot it is."}),
    ("# Tea\n```\n# Cup\nno end", {"Tea": ""}), ("---\nname: x\n---\n# Tea\nIt is hot.", {"Tea": "It is hot."}),
    ("one line\nTea\n---\n", {}), ("", {}), ("\n\n", {}), ("# Tea\r\nIt is\r\nhot.\r\n", {"Tea": "It is hot."}),
    ("# [Tea](x) and `cup`\nSee <b>it</b>.", {"Tea and `cup`": "See it."})])
def test_markdown(text, expected): assert told(markdown_sections(text)) == expected


@pytest.mark.parametrize("text, expected", [
    ("Tea\n===\n\nIt is hot.\n\nCup\n---\n\nIt is round.", {"Tea": "It is hot.", "Cup": "It is round."}),
    ("===\nTea\n===\nIt is ``hot``.", {"Tea": "It is `hot`."}), ("Tea\n=-=\nhot", {}), ("Tea\n==\nhot", {}),
    ("Tea\n===\n.. note:: x\n   y\n\n:field: x\n\nIt is `here <x.html>`_.", {"Tea": "It is here."}), ("", {})])
def test_rst(text, expected): assert told(rst_sections(text)) == expected


def test_an_endless_line_is_no_prose_and_an_endless_paragraph_is_cut():
    endless = "tea " * LONGEST_LINE
    assert told(markdown_sections(f"# Tea\n{endless}\nIt is hot.")) == {"Tea": "It is hot."}
    assert told(rst_sections(f"Tea\n===\n{endless}\n\nIt is hot.")) == {"Tea": "It is hot."}
    assert told(markdown_sections("# Tea\n" + "hot\n" * 10_000))["Tea"] == " ".join(["hot"] * MOST_LINES)
    assert len(next(markdown_sections("# " + "t" * 10**6)).title) <= LONGEST_LINE


@pytest.mark.parametrize("text, expected", [("List<String> and <T> stay, <p align='a'>this</p><br/>", "List<String> and <T> stay, this"),
    ("2 ** 3 is **eight**", "2 ** 3 is eight"), 
    ("a **b** *c* `**d**`", "a b c `**d**`"), ("[a](b) [c][d] [e]", "a c [e]"), ("![a](b) c", "c"), ("x <br/> y < z > 1", "x y < z > 1"),
    ("<!-- hidden --> a", "a"), ("2 * 3 * 4", "2 * 3 * 4"), ("`a` and `", "`a` and `"), ("", "")])
def test_signs_of_markup_are_taken_away(text, expected): assert plain_text(text) == expected


# ---- comments ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix, text, name, noun, line", [
    (".js", "/** Pours tea. */\nexport default async function pour(cup) {", "pour", "function", 2),
    (".ts", "/**\n * Pours tea.\n * @param cup a cup\n */\nexport const pour = async (cup: Cup): Promise<void> => {", "pour", "function",
    5),
    (".java", "/** Pours tea. */\n@Override\npublic static List<Cup> pour(int size) {", "pour", "function", 3),
    (".go", "// Pours tea.\nfunc (p *Pot) Pour(cup Cup) error {", "Pour", "function", 2), (".go", "// Pours tea.\ntype Pot struct {",
    "Pot", "type", 2),
    (".rs", "/// Pours tea.\n#[inline]\npub(crate) fn pour<T>(cup: T) -> Tea {", "pour", "function", 3),
    (".c", "/* Pours tea. */\nstatic struct tea *pour(int cup)", "pour", "function", 2), (".h", "// Pours tea.\nint pour(int cup);",
    "pour", "function", 2),
    (".cpp", "/// Pours tea.\ntemplate<typename T>\nclass Pot final : public Vessel {", "Pot", "class", 3),
    (".cs", "/// <summary>Pours tea.</summary>\npublic void Pour(Cup cup) {", "Pour", "function", 2),
    (".rb", "# Pours tea.\ndef self.pour(cup)", "pour", "function", 2), (".sh", "# Pours tea.\npour() {", "pour", "function", 2)])
def test_the_comment_above_a_definition(suffix, text, name, noun, line):
    assert commented(text, suffix) == {name: (noun, "Pours tea.", line)}


@pytest.mark.parametrize("suffix, text", [
    (".js", "/** Pours tea. */\n\nfunction pour() {"), (".js", "// Pours tea.\nfunction pour() {"), (".js", "/** Calls it. */\npour(cup);"),
    (".js", "/** In a test. */\ndescribe('tea', () => {"), (".js", "/** Private. */\nfunction _pour() {"), (".java",
    "/** No. */\nprivate int size() {"),
    (".go", "// Checks.\nif hot {"), (".go", "// A number.\nvar size = 3"), (".c", "// Copyright 2020 Ada\nint pour(int cup) {"),
    (".c", "// Calls it.\nreturn pour(cup);"), (".c", "/* never closed\nint pour(int cup) {"), (".sh", "#!/bin/sh\npour() {"),
    (".js", "/** @param cup a cup */\nfunction pour(cup) {"), (".rs", "/// Pours tea.\n" + "#[a]\n" * 6 + "fn pour() {"), (".js", "")])
def test_what_is_no_comment_above_a_definition(suffix, text): assert commented(text, suffix) == {}


def test_a_line_without_end_defines_nothing_and_ends_a_comment():
    assert commented("// Pours tea.\nfunc Pour(" + "x" * 10**6 + ") {\nfunc Stir() {", ".go") == {}
    assert commented("// " + "tea " * 10**5 + "\nfunc Pour() {", ".go") == {}
    assert len(commented("// tea\n" * 10_000 + "func Pour() {", ".go")["Pour"][1].splitlines()) == MOST_LINES


@pytest.mark.parametrize("line", ["", "}", "{", "()", "(", "=", "x = y", "pour(cup);", "a.b(c) {", "else if (x) {", "function (",
    "func (", "class", "func (x) _y() {",
    "struct pot mine = {", "new Pot() {", "1 + (2)", "🍵 tea"])
def test_what_defines_nothing(line): assert definition(line) is None


# ---- calls ------------------------------------------------------------------------------------------------------------

def calls(text, names=("brew", "Pot"), **options):
    return {call.name: call.text for call in call_examples(ast.parse(text), text, dict.fromkeys(names, "tea.kitchen"), **options)}


@pytest.mark.parametrize("text, expected", [
    ("from tea.kitchen import brew\nbrew(1)", {"brew": "brew(1)"}), ("from tea import brew, Pot\nbrew(Pot(2))", {"brew": "brew(Pot(2))",
    "Pot": "Pot(2)"}),
    ("from tea.kitchen import brew\nx = brew(x)\nbrew(2)\nbrew(3)", {"brew": "brew(2)"}), ("from .kitchen import brew\nbrew(a)",
    {"brew": "brew(a)"}),
    ("from tea import kitchen\nkitchen.brew(1)", {"brew": "kitchen.brew(1)"}), ("import tea.kitchen\ntea.brew(1)", {"brew": "tea.brew(1)"}),
    ("brew(1)", {}), ("from beer import brew\nbrew(1)", {}), ("import other\nother.brew(1)", {}), ("from tea import brew\nbrew()", {}),
    ("from tea import brew\nbrew(\n1)", {}), ("from tea import brew\ndef brew(x): ...\nbrew(1)", {}), ("from tea import stir\nstir(1)", {}),
    ("from tea import brew\r\nbrew('é', 'ü') + 1", {"brew": "brew('é', 'ü')"})])
def test_calls(text, expected): assert calls(text) == expected


def test_only_short_calls_are_examples():
    text = f"from tea import brew\nbrew('{'x' * 300}')"
    assert calls(text) == {} and len(calls(text, longest=400)["brew"]) == 308


def test_many_calls_in_one_endless_line_are_read_in_time():
    text = "from tea import brew\nx = [" + "brew(1), " * 40_000 + "]"
    started = time.perf_counter()
    assert calls(text) == {"brew": "brew(1)"} and time.perf_counter() - started < 10


# ---- licences ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("# SPDX-License-Identifier: MIT\n", ["MIT"]), ("/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */",
    ["GPL-2.0-only", "Linux-syscall-note"]),
    ("// the GNU Lesser General Public\n// License", ["LGPL"]), ("# GNU General Public License\n", ["GPL"]),
    ("# GNU Affero General Public License", ["AGPL"]),
    ("# Licensed under the Apache License, Version 2.0", ["Apache"]), ("x = 1", []), ("", []),
    ("x\n" * 70 + "# SPDX-License-Identifier: MIT\n", []),
    ("x" * 5_000 + "\n# SPDX-License-Identifier: MIT\n", [])])
def test_licences_of_a_header(text, expected): assert licences(text) == expected


@pytest.mark.parametrize("named, unwanted, found", [
    ("GPL-3.0-only", ["GPL"], "GPL-3.0-only"), ("LGPL-3.0-only", ["GPL"], ""), ("AGPL-3.0-only", ["GPL"], ""), ("MIT OR GPL-2.0-only",
    ["gpl"], "GPL-2.0-only"),
    ("MIT", ["GPL", "MPL-2.0"], ""), ("MPL-2.0", ["GPL", "MPL-2.0"], "MPL-2.0"), ("GPLX", ["GPL"], ""), ("GPL-2.0-only",
    ["GPL-3.0-only"], "")])
def test_unwanted_licences(named, unwanted, found): assert unwanted_licence(f"# SPDX-License-Identifier: {named}\n", unwanted) == found


# ---- files made to be slow --------------------------------------------------------------------------------------------

SLOW = ["[", "[a](", "![", "*a", "<a", "`a <", "#", "/*", "// x\n", "(", "=\n", ":a:`", "# h\n" + "[a](" * 450 + "\n",
    "# h\n" + "`a <" * 450 + "\n",
    "# h\n" + "<a " * 600 + "\n", "// c\nfunc (" + "<" * 1900 + "\n", "/**\n" + "*\n" * 100, "function ",
    "# h\n" + ("x " * 900 + "\n") * 50]


@pytest.mark.parametrize("part", SLOW, ids=range(len(SLOW)))
def test_a_megabyte_is_read_in_linear_time(part):
    text = part * (1_000_000 // len(part))
    started = time.perf_counter()
    for read in (markdown_sections, rst_sections, licences, *(lambda text, suffix=suffix: doc_comments(text,
        suffix) for suffix in (".go", ".js", ".sh"))):
        list(read(text))
    assert time.perf_counter() - started < 15


def test_every_language_has_its_marks():
    assert all(isinstance(marks, tuple) and isinstance(blocks, tuple) and marks for marks, blocks in LANGUAGES.values())
    with pytest.raises(KeyError): list(doc_comments("// x", ".xyz"))
