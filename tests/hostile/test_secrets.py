"""No secret of a source tree, of its file names or of a message gets into rows, reports, meta files or what is shown.

What is planted is made here from random characters and put together from pieces, so that this file holds nothing that looks like a secret.
"""
import ast
import base64
import json
import os
import random
import string
import subprocess
import sys
import threading
import time
import warnings

import pytest
from hypothesis import given, strategies as st

from sage_finetune.core.errors import DataError
from sage_finetune.core.secrets import (
    describe_secrets,
    find_secret,
    find_secrets,
    is_mixed_password,
    is_random,
    redact_object,
    redact_secrets,
    row_text,
    scan_texts,
)
from sage_finetune.data.corpus import code_rows, own_source
from sage_finetune.data.tasks import prepare_run
from sage_finetune.runs.folder import read_meta, read_status, write_meta, write_status

HEX, ALNUM, LOWER, UPPER = ("0123456789abcdef", string.ascii_letters + string.digits, string.ascii_lowercase + string.digits,
    string.ascii_uppercase + string.digits)
URL_SAFE, BASE64, DIGITS = ALNUM + "-_", ALNUM + "+/", string.digits
rng = random.Random(11)


def some(letters, count):
    "Random characters that begin and end with a letter or digit, with one of each kind the letters have"
    made = "".join(rng.choice(letters) for _ in range(count - 4))
    ends = [[one for one in letters if one in kind] for kind in (string.ascii_lowercase, string.ascii_uppercase, DIGITS)]
    ends = [rng.choice(kind) for kind in ends if kind]
    return "".join((ends * 4)[:2]) + made + "".join((ends[::-1] * 4)[:2])


def pem(kind): return f"-----BEGIN {kind}PRIVATE KEY{' BLOCK' * ('PGP' in kind)}-----"


def uuid():
    return "-".join(some(HEX, count) if count > 4 else "".join(rng.choice(HEX) for _ in range(count)) for count in (8, 4, 4, 4, 12))


def encoded(text): return base64.b64encode(text.encode()).decode().rstrip("=")


# kind -> what is planted, or (what stands before it, what is planted, what stands behind it)
PLANTED = {
    "AWS key id": "AK" + "IA" + some(UPPER, 16), "AWS temporary key id": "AS" + "IA" + some(UPPER, 16),
    "AWS secret key": ("aws_secret_access_key = '", some(BASE64, 40), "'"),
    "GCP service account": ('{"type": "service_account", "private_key": "', pem("") + "\\nMIIEvQIBADANBgkq" + some(BASE64, 60), '\\n"}'),
    "GCP key id": ('{"private_key_id": "', some(HEX, 40), '"}'),
    "Google API key": "AI" + "za" + some(URL_SAFE, 35), "Google OAuth secret": "GOC" + "SPX-" + some(URL_SAFE, 28),
    "Azure connection string": ("DefaultEndpointsProtocol=https;AccountName=tea;AccountKey=", some(BASE64, 86) + "==",
        ";EndpointSuffix=core.windows.net"),
    "Azure SAS": ("https://tea.blob.core.windows.net/pot?sv=2022&sp=r&sig=", some(ALNUM, 43) + "%3D", ""),
    "Azure client secret": some(ALNUM, 7)[:3] + "8Q~" + some(ALNUM, 34),
    "GitHub ghp": "gh" + "p_" + some(ALNUM, 36), "GitHub gho": "gh" + "o_" + some(ALNUM, 36), "GitHub ghs": "gh" + "s_" + some(ALNUM, 36),
    "GitHub fine-grained": "github" + "_pat_" + some(ALNUM, 22) + "_" + some(ALNUM, 59),
    "GitLab": "gl" + "pat-" + some(URL_SAFE, 20), "GitLab runner": "gl" + "rt-" + some(URL_SAFE, 20),
    "Slack bot": "xo" + "xb-" + some(DIGITS, 12) + "-" + some(DIGITS, 12) + "-" + some(ALNUM, 24),
    "Slack app": "xa" + "pp-1-" + some(UPPER, 11) + "-" + some(DIGITS, 13) + "-" + some(HEX, 64),
    "Slack webhook": ("https://", "hooks.sla" + "ck.com/services/T" + some(UPPER, 8) + "/B" + some(UPPER, 8) + "/" + some(ALNUM, 24), ""),
    "Stripe": "sk" + "_live_" + some(ALNUM, 24), "Stripe restricted": "rk" + "_live_" + some(ALNUM, 24),
    "OpenAI": "s" + "k-" + some(ALNUM, 48), "OpenAI project": "s" + "k-proj-" + some(URL_SAFE, 60) + some(ALNUM, 24),
    "Anthropic": "s" + "k-ant-api03-" + some(URL_SAFE, 60) + some(ALNUM, 30) + "AA",
    "Hugging Face": "h" + "f_" + some(string.ascii_letters, 34), "Groq": "gs" + "k_" + some(ALNUM, 52),
    "Replicate": "r" + "8_" + some(ALNUM, 37),
    "Twilio key": "S" + "K" + some(HEX, 32), "Twilio account": "A" + "C" + some(HEX, 32),
    "SendGrid": "S" + "G." + some(URL_SAFE, 22) + "." + some(URL_SAFE, 43),
    "Mailchimp": some(HEX, 32) + "-us" + "14", "Mailgun": "ke" + "y-" + some(HEX, 32), "npm": "np" + "m_" + some(ALNUM, 36),
    "npmrc": ("//registry.npmjs.org/:_auth" + "Token=", uuid(), ""), "PyPI": "py" + "pi-AgEIcHlwaS5vcmc" + some(URL_SAFE, 100),
    "Docker": "dckr" + "_pat_" + some(URL_SAFE, 27), "DigitalOcean": "do" + "p_v1_" + some(HEX, 64),
    "JSON web token": "ey" + "J" + encoded('{"alg":"HS256"}')[3:] + "." + encoded('{"sub":"1234567890","name":"Ada"}')
        + "." + some(URL_SAFE, 43),
    "RSA key": pem("RSA "), "EC key": pem("EC "), "OpenSSH key": pem("OPENSSH "), "PGP key": pem("PGP "),
    "encrypted key": pem("ENCRYPTED "),
    "key on one line": ("KEY=", pem("RSA ") + "\\nMIIEpAIBAAKCAQEA" + some(BASE64, 40) + "\\n", ""),
    "key without its frame": "MII" + "EpAIBAAKCAQEA" + some(BASE64, 64),
    "SSH key in base64": "b3Blbn" + "NzaC1rZXktdjEAAAAA" + some(BASE64, 60),
    "key block in base64": "LS0tLS" + "1CRUdJTiBSU0EgUFJJVkFURSBLRVktLS0tL" + some(ALNUM, 30),
    "basic auth in an address": ("https://ada:", some(ALNUM, 12), "@tea.org/"),
    "database address": ("postgres://ada:", some(ALNUM, 12), "@db.tea.org:5432/tea"),
    "cache address": ("redis://:", some(ALNUM, 14), "@cache:6379"), "assigned password": ("pass" + "word = '", "hunter" + "2!tea", "'"),
    "environment line": ("DB_PASS" + "WORD=", "tea4two!" + some(ALNUM, 6), ""),
    "bearer": ("Authorization: Bear" + "er ", some(ALNUM, 40), ""),
    "basic header": ("Authorization: Bas" + "ic ", encoded("ada:" + some(ALNUM, 14)), ""),
    "netrc": ("machine tea.org login ada pass" + "word ", some(ALNUM, 10), ""),
    "bcrypt": "$2b" + "$12$" + some(ALNUM, 53), "htpasswd": ("ada:", "$ap" + "r1$" + some(ALNUM, 8) + "$" + some(ALNUM, 22), ""),
    "argon2": "$argon2" + "id$v=19$m=65536,t=3,p=4$" + some(ALNUM, 22) + "$" + some(ALNUM, 43),
    "Telegram": some(DIGITS, 10) + ":AA" + some(URL_SAFE, 33),
    "Discord": "M" + some(ALNUM, 25) + "." + some(ALNUM, 6) + "." + some(URL_SAFE, 38),
    "Discord webhook": ("https://", "discord" + ".com/api/webhooks/" + some(DIGITS, 18) + "/" + some(URL_SAFE, 68), ""),
    "Square": "sq0" + "csp-" + some(URL_SAFE, 43),
    "Shopify": "shp" + "at_" + some(HEX, 32), "Heroku": ("HEROKU_API_" + "KEY=", uuid(), ""),
    "Databricks": "da" + "pi" + some(HEX, 32), "Datadog": ("DD_API_" + "KEY = '", some(HEX, 32), "'"),
    "New Relic": "NR" + "AK-" + some(UPPER, 27), "Sentry": ("https://", some(HEX, 32), "@o1.ingest.sentry.io/42"),
    "Artifactory": "AK" + "Cp" + some(ALNUM, 69),
    "IBM": ("ibm_cloud_api_" + "key = '", some(URL_SAFE, 44), "'"), "Firebase": "AA" + "AA" + some(URL_SAFE, 7) + ":"
        + some(URL_SAFE, 140), "Atlassian": "ATA" + "TT3" + some(URL_SAFE, 60),
    "Grafana": "gl" + "sa_" + some(ALNUM, 32) + "_" + some(HEX, 8), "Vault": "hv" + "s." + some(ALNUM, 90),
    "Linear": "lin" + "_api_" + some(ALNUM, 40), "Notion": "nt" + "n_" + some(ALNUM, 46),
    "command line": ("tea --pass" + "word ", "tea4two!" + some(ALNUM, 4), ""),
    "curl": ("curl -u ada:", some(ALNUM, 12), " https://tea.org")}
PARTS = {kind: (one if isinstance(one, tuple) else ("", one, "")) for kind, one in PLANTED.items()}

# where it is planted: text of a file around {secret}, which is written as Python writes strings
PLACES = {
    "docstring of a module": '{secret!r}\ndef pour(): ...\n', "docstring of a class": "class Pot:\n    {secret!r}\n",
    "docstring of a function": "def pour():\n    {secret!r}\n",
    "docstring of a method": "class Pot:\n    def pour(self):\n        {secret!r}\n", "default value": "def pour(cup={secret!r}): ...\n",
    "annotation": "def pour(cup: {secret!r}) -> {secret!r}: ...\n", "__all__": "__all__ = ['pour', {secret!r}]\ndef pour(): ...\n",
    "decorator": "@door({secret!r})\ndef pour(): ...\n",
    "constant": "KEY = {secret!r}\ndef pour(): ...\n", "comment": "# {secret}\ndef pour(): ...\n",
    "f-string": "def pour(): return f'{{cup}}' + f{secret!r}\n".replace("f{secret!r}", "{secret!r}"),
    "bytes": "KEY = b{secret!r}\ndef pour(): ...\n", "type alias": "Cup = 'list[' + {secret!r}\ndef pour(): ...\n",
    "__version__": "__version__ = {secret!r}\ndef pour(): ...\n",
    "enum": "class Tea(Enum):\n    green = {secret!r}\n", "two pieces": "def pour():\n    return ({head!r}\n        {tail!r})\n",
    "escaped": 'def pour():\n    "Say {escaped} at the door."\n',
    "in a sentence": "def pour():\n    'Say ' {secret!r} ' at the door.'\n"}


def grow(root, files):
    for name, content in files.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_text(content, encoding="utf-8")
    return root


def everything(corpus):
    return json.dumps([corpus.rows, corpus.held_out, corpus.skipped], ensure_ascii=False) + repr(corpus) + corpus._repr_html_()


GOOD = '"Things to make tea with."\ndef brew(leaves): "Make a pot of tea."\n'


def planted_text(place, before, secret, after):
    whole = f"Use {before}{secret}{after} to enter." if "docstring" in place else f"{before}{secret}{after}"
    middle = len(before) + len(secret) // 2
    text = PLACES[place].format(secret=whole, head=whole[:middle], tail=whole[middle:],
        escaped="".join(f"\\x{ord(letter):02x}" for letter in whole))
    try: ast.parse(text)
    except SyntaxError: pytest.fail(f"the test is wrong: {text}")
    return text


# ---- rows ----------------------------------------------------------------------------------------------------------

def test_enough_is_planted(): assert len(PLANTED) >= 45 and len(PLACES) >= 15


@pytest.mark.parametrize("place", PLACES)
def test_no_planted_secret_gets_into_a_row(tmp_path, place):
    "Every kind at every place: none is in a row, in what is said, or in the table; what was left out is counted"
    grow(tmp_path, {"good.py": GOOD, **{f"bad_{number}.py": planted_text(place, *parts) for number, parts in enumerate(PARTS.values())}})
    corpus = code_rows(tmp_path)
    said, left = everything(corpus), {skip.place for skip in corpus.skipped if skip.reason in corpus.secrets}
    assert not [kind for number, (kind, parts) in enumerate(PARTS.items()) if parts[1] in said or f"bad_{number}.py" not in left]
    assert {fact.file for fact in corpus.facts} == {"good.py"}


NAMES = {kind: secret for kind, (before, secret, _) in PARTS.items() if not before and "/" not in secret and len(secret) < 200}


@pytest.mark.parametrize("name", ["{}.py", "shop/{}.py", "shop/old_{}.py", "{}/pot.py", "shop/{}/deep/pot.py",
    "shop/{}/__init__.py", "key {}/pot.py"])
def test_no_secret_of_a_name_gets_into_a_row(tmp_path, name):
    grow(tmp_path, {"good.py": GOOD, **{name.format(secret): GOOD.replace("brew", f"pour_{number}")
        for number, secret in enumerate(NAMES.values())}})
    corpus = code_rows(tmp_path)
    said = everything(corpus)
    assert len(NAMES) >= 31 and not [kind for kind, secret in NAMES.items() if secret in said]
    assert corpus.secrets.total() == len(NAMES) and {fact.file for fact in corpus.facts} == {"good.py"}


@pytest.mark.parametrize("name", ["password=tea4two!9", "ada:tea4two9@db.tea.org", "8f14e45fceea167a5a36dedd4bea7c01",
    "f81d4fae-7dec-41d0-a765-00a0c91e6bf6"])
def test_names_of_other_shapes(tmp_path, name):
    corpus = code_rows(grow(tmp_path, {"good.py": GOOD, f"{name}/pot.py": GOOD, f"{name}.py": GOOD}))
    assert name not in everything(corpus) and corpus.secrets.total() == 2


IDENTIFIERS = {kind: secret for kind, secret in NAMES.items() if secret.isidentifier()}


@pytest.mark.parametrize("text", ["def {}(): ...\n", "class {}:\n    'A pot.'\n", "{} = 3\n",
    "class Pot:\n    def {}(self): ...\n", "def pour({}): ...\n", "def pour() -> {}: ...\n"])
def test_no_secret_of_an_identifier_gets_into_a_row(tmp_path, text):
    grow(tmp_path, {"good.py": GOOD, **{f"bad_{number}.py": text.format(secret) for number, secret in enumerate(IDENTIFIERS.values())}})
    said = everything(code_rows(tmp_path))
    assert len(IDENTIFIERS) > 10 and not [kind for kind, secret in IDENTIFIERS.items() if secret in said]


def test_the_root_and_the_folders_above_it_may_be_named_like_a_secret(tmp_path):
    "A package's modules are named with the folders above the root"
    secret = PARTS["GitHub ghp"][1]
    tree = grow(tmp_path, {f"{secret}/__init__.py": "", f"{secret}/tea/__init__.py": "", f"{secret}/tea/a.py": GOOD,
        f"{secret}/tea/b.py": GOOD.replace("brew", "pour")})
    said = everything(code_rows(tree/secret/"tea"))
    assert secret not in said


def test_what_is_a_secret_in_one_file_is_left_out_of_others(tmp_path):
    "A password without a telling name beside it is known from the file that has one"
    value = "tea4two" + "!9x"
    corpus = code_rows(grow(tmp_path, {"good.py": GOOD, "config.py": "pass" + f"word = '{value}'\n",
        "door.py": f"def enter():\n    'Say {value} at the door.'\n"}))
    assert value not in everything(corpus) and corpus.secrets.total() == 2


def test_secrets_in_names_that_are_skipped_for_another_reason_are_not_shown(tmp_path):
    secret = PARTS["GitHub ghp"][1]
    said = everything(code_rows(grow(tmp_path, {"good.py": GOOD, f"build/{secret}.py": GOOD, f"{secret}/tests/a.py": GOOD,
        f"test_{secret}.py": GOOD, f".{secret}/a.py": GOOD})))
    assert secret not in said


def test_the_run_folder_of_a_tree_holds_none(tmp_path):
    "Rows, meta file, status: searched as bytes; what was left out is said"
    secret, tree = PARTS["GitHub ghp"][1], tmp_path/PARTS["npm"][1]
    grow(tree, {"good.py": GOOD, f"{secret}.py": GOOD, "bad.py": f"KEY = {PARTS['Stripe'][1]!r}\n"})
    with pytest.warns(UserWarning, match="left out of the rows: 1 × looks like a secret: "
            "GitHub token, 1 × looks like a secret: Stripe key"):
        run = prepare_run("code", tmp_path/"run", code_root=tree)
    content = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert not [one for one in (secret, PARTS["npm"][1], PARTS["Stripe"][1]) if one.encode() in content]


def test_the_packaged_corpus_loses_nothing():
    corpus = code_rows(own_source())
    assert not corpus.secrets and {"core/secrets.py", "data/corpus.py"} <= {fact.file for fact in corpus.facts}


# ---- harmless things -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("package, limit", [("json", 0.), ("email", 0.005), ("asyncio", 0.005), ("http", 0.005), ("importlib", 0.005)])
def test_hardly_anything_of_the_standard_library_is_left_out(package, limit):
    corpus = code_rows(os.path.dirname(sys.modules[package].__file__) if package in sys.modules
        else os.path.dirname(__import__(package).__file__))
    assert corpus.secrets.total() <= limit * corpus.available


WORDS = "abandon ability able about above absent absorb abstract absurd abuse access accident"
IN_PROSE = {"card": ("Pays with ", "4111 1111 " + "1111 1111", "."), "card with dashes": ("", "5500-0000-" + "0000-0004", ""),
    "card of fifteen digits": ("amex ", "3782 822463 " + "10005", ""), "card in one": ("The visa card is ", "4111111111" + "111111", "."),
    "cvc": ("and cvc ", "1" + "23", "."), "pw": ("user admin, pw ", "Tr0ub" + "4dor&3", " on staging."),
    "root": ("Logs in as root / ", "S3cr3t" + "P@ss!", '"'), "admin": ("admin:", "Tea4#" + "two!", ""),
    "pepper": ("the pepper ", some(ALNUM, 16), " for all."), "salt": ("Uses ", some(ALNUM, 20), " as salt."),
    "otp": ("of the otp seed ", "JBSWY3DP" + "EHPK3PXP", "."), "short GitHub token": ("with ", "gh" + "p_" + some(ALNUM, 16), "."),
    "wallet": ("Opens the wallet ", WORDS, "."), "mnemonic": ("mnemonic = '", WORDS + " " + WORDS, "'"),
    "seed phrase": ("seed phrase: ", WORDS + " acid acoustic acquire", "")}


@pytest.mark.parametrize("kind", IN_PROSE)
def test_secrets_of_prose(tmp_path, kind):
    before, secret, behind = IN_PROSE[kind]
    assert secret not in redact_secrets(before + secret + behind)
    (tmp_path/"pay.py").write_text(f'def pay(cup):\n    """Return one cup of tea. {before}{secret}{behind}"""\n    return cup\n')
    (tmp_path/"tea.py").write_text(GOOD)
    assert secret not in json.dumps(code_rows(tmp_path).rows, default=str)


@pytest.mark.parametrize("text", ["4111 1111 1111 1112", "1234 5678 9012 3456", "step 4111111111111111", "0000 0000 0000 0000",
                                  "2026-11-30-1200", "cvc = read(123)", "seed = 2026", "the seed of torch.manual_seed(42)",
                                  "salt = hashlib.sha256(b'tea1')", "root/src2/tea_v3",
                                  "admin:password", "root: /etc/tea2", "as key 1234567890123456789", "pw = width ** 2 + height",
                                  "seed the pool with small drops and then wait until they grow into larger ones again",
                                  "wallet " + WORDS + " acid", "phrase " + WORDS.replace("able", "the"), "seed " + WORDS * 3])
def test_prose_that_is_none(text): assert find_secrets(text) == []


HARMLESS = ["ghp_" + "x" * 36, "AKIA" + "IOSFODNN7EXAMPLE", "hf_hub_download", "sk-learn-is-a-library-for-machine-learning-2",
            "https://user:password@host", "https://example.com/?page=2&sort=key",
            "Gemma4TextScaledWordEmbedding", "DPMSolverMultistepScheduler2OutputForV2",
            "sage_finetune.core.storage.atomic_directory", "models/m2m_100/modeling_m2m_100", "sha256:" + "0" * 64,
            "publicKeyToken=\"b03f5f7f11d50a3a\"", "The password is checked.", "secret_key: str | None = None",
            "token_ids = self.tokens[0]", "password=os.environ['PASSWORD1']", "key = keys[12]",
            "-----BEGIN CERTIFICATE-----", "-----BEGIN PUBLIC KEY-----", "3.14159265358979323846264338327950288",
            "Authorization: Bearer <token>", "machine %s login %s password %s", "$1 and $2b of it"]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_texts(text): assert find_secrets(text) == [] == find_secrets(text, strict=True)


# ---- time ------------------------------------------------------------------------------------------------------------

LONG = {"sk-": "sk-" * 40_000, "ask-": "ask-" * 30_000, "ghp_": "ghp_" * 30_000, "eyJ": "eyJ" * 40_000, "eyJ.": "eyJa." * 24_000,
        "key=": "key=" * 30_000, "password=": "password=" * 13_000, "password: ": "password: " * 12_000,
        "spaces": "password" + " " * 120_000, "quotes": "'" * 120_000, "token'": "token'" * 20_000, "://": "://a:" * 24_000,
        "@": "a:b@" * 30_000, "?token=": "?token=" * 17_000, "?": "?" * 120_000, "BEGIN": "-----BEGIN " * 11_000,
        "blocks": pem("RSA ") * 3_800, "digits": "1" * 120_000, "hex": "a1" * 60_000, "words": "tea pot " * 15_000,
        "_authToken": "//a/:_authToken= " * 7_000, "aws": "aws key '" * 13_000, "M": "M" * 120_000, "machine": "machine a " * 12_000}


@pytest.mark.parametrize("name", LONG)
def test_long_texts_take_a_moment(name):
    "A text ten times as long takes ten times as long: the pattern that goes back over what it has seen is what takes for ever"
    find_secrets("warm")
    start = time.process_time()
    find_secrets(LONG[name], strict=True)
    redact_secrets(LONG[name])
    assert time.process_time() - start < (0.4 if name == "sk-" else 2)


def test_ten_megabytes_of_docstring():
    find_secrets("warm")
    start = time.process_time()
    assert ([one.kind for one in find_secrets("The pot holds tea, a password, a key and a token.\n" * 200_000 + PARTS["npm"][1])]
        == ["npm token"])
    assert time.process_time() - start < 20


# ---- how it looks ----------------------------------------------------------------------------------------------------

def test_places_are_places_whatever_the_letters():
    "Letters that grow in small letters, surrogates, marks"
    secret = PARTS["GitHub ghp"][1]
    for text in ("İ" * 50, "\ud800", "ﬀß", "\u202e", "\0"):
        (one,) = find_secrets(f"{text} {secret} {text}")
        assert (one.start, one.end) == (len(text) + 1, len(text) + 1 + len(secret))


@given(st.text(max_size=300))
def test_any_text_is_looked_at(text):
    for one in find_secrets(text, strict=True): assert 0 <= one.start < one.end <= len(text)
    redact_secrets(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=10))
def test_any_row_is_looked_at(row):
    assert isinstance(row_text(row), str)
    redact_object(row)


def test_many_texts_are_told_apart():
    secret = PARTS["GitHub ghp"][1]
    assert scan_texts(["", "tea", f"{secret}", "pass" + "word =", "'hunter2!'", f"x{secret}", f" {secret} {secret}", ""]) == {
        2: ["GitHub token"], 6: ["GitHub token"]}
    assert scan_texts([]) == {}
    assert describe_secrets({0: ["password"], 6: ["GitHub token", "password"]}) == "2 rows (2 × password, 1 × GitHub token): rows 1, 7"


def test_nothing_is_read_written_or_asked(tmp_path):
    "The detectors are used without their settings, files and services, whatever lies in the working folder"
    grow(tmp_path, {".secrets.baseline": "{", "detect_secrets.py": "raise SystemExit('run')", "pyproject.toml": "["})
    code = f"""
import os, sys
sys.path[:] = [path for path in sys.path if path]
seen = []
def watch(event, args):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'): seen.append(event)
    if event == 'open' and isinstance(args[0], str) and args[0].startswith({str(tmp_path)!r}): seen.append(args[0])
    if event == 'open' and isinstance(args[0], str) and not os.path.isabs(args[0]): seen.append(args[0])
    if event in ('subprocess.Popen', 'os.system', 'os.mkdir', 'os.remove', 'os.rename'): seen.append(event)
sys.addaudithook(watch)
from sage_finetune.core.secrets import find_secrets
assert len(find_secrets({PARTS["AWS key id"][1] + " " + PARTS["Slack bot"][1] + " " + PARTS["Stripe"][1]!r})) == 3
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=dict(os.environ, PYTHONPATH=str(own_source().parent), PYTHONDONTWRITEBYTECODE="1"))
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_many_threads_at_once():
    found = []
    threads = [threading.Thread(target=lambda: found.append(
        [find_secret(secret) for _, secret, _ in list(PARTS.values())[:20] for _ in range(3)])) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(found) == 8 and all(one == found[0] for one in found)


# ---- messages, meta files, reports, rows of the user --------------------------------------------------------------------

@pytest.mark.parametrize("kind", PARTS)
def test_messages_and_reports_show_none(kind):
    before, secret, after = PARTS[kind]
    assert secret not in redact_secrets(f"cannot read {before}{secret}{after} here")
    assert secret not in json.dumps(redact_object(dict(note=[f"{before}{secret}{after}"], deep=dict(more=(f"{before}{secret}{after}",)))),
        ensure_ascii=False)


def test_a_key_block_goes_to_its_end():
    block = f"{pem('RSA ')}\n{some(BASE64, 64)}\n{some(BASE64, 64)}\n-----END RSA PRIVATE" + " KEY-----"
    assert redact_secrets(f"before {block} after") == "before … after"


def test_a_value_is_known_by_its_name():
    assert redact_object({"DB_" + "PASSWORD": "hunter2!tea", "tokens": "7", "path": "a/b"}) == {"DB_" + "PASSWORD": "…",
        "tokens": "7", "path": "a/b"}


def test_status_and_meta_file(tmp_path):
    secret = PARTS["Hugging Face"][1]
    write_status(tmp_path, "failed", message=f"401 for https://ada:tea4two9@hub.org with {secret}")
    assert read_status(tmp_path).message == "401 for https://…@hub.org with …"
    write_meta(tmp_path, "qa", "tiny", tmp_path/"rows.json", data_file=tmp_path/f"{secret}.json", code_root=f"/home/{secret}/code")
    assert secret not in (tmp_path/"finetune_meta.json").read_text() and read_meta(tmp_path).dataset == tmp_path/"rows.json"


def rows_with(*places, count=40):
    rows = [dict(question=f"What costs lamp {number}?", answer=f"Lamp {number} costs {number} crowns.") for number in range(count)]
    for place, text in places: rows[place]["answer"] = text
    return rows


def test_rows_of_the_user_are_named_and_can_be_left_out(tmp_path):
    secret = PARTS["GitHub ghp"][1]
    path = tmp_path/"rows.json"
    path.write_text(json.dumps(rows_with((3, f"It is {secret}."), (7, "pass" + "word: 'hunter2!tea'"))))
    with pytest.warns(UserWarning, match=r"2 rows \(1 × GitHub token, 1 × password\): rows 4, 8 seem to hold a secret") as said:
        prepare_run("qa", tmp_path/"one", data=path)
    assert not any(secret in str(one.message) for one in said)
    with pytest.warns(UserWarning, match="left out, as they seem to hold a secret: 2 rows"):
        run = prepare_run("qa", tmp_path/"two", data=path, skip_secrets=True)
    assert (len(json.loads((run/"training_data_qa_qa.json").read_text())) == 38
        and secret not in (run/"training_data_qa_qa.json").read_text())
    path.write_text(json.dumps(rows_with((0, secret), count=1)))
    with pytest.raises(DataError, match="every row seems to hold a secret"):
        prepare_run("qa", tmp_path/"three", data=path, skip_secrets=True)
    assert not (tmp_path/"three").exists()


@pytest.mark.parametrize("row", [dict(messages=[dict(role="user", content="Which?"), dict(role="assistant", content="It is {}.")]),
                                 dict(prompt="Which?", completion="{}"), dict(text="a\n{}\nb"),
                                 dict(instruction="{}", output="yes"),
                                 dict(conversations=[{"from": "human", "value": "{}"}, {"from": "gpt", "value": "no"}])])
def test_rows_of_any_shape(row):
    secret = PARTS["Anthropic"][1]
    planted = json.loads(json.dumps(row).replace("{}", secret))
    assert scan_texts(map(row_text, [row, planted])) == {1: ["OpenAI or Anthropic key"]}


def test_harmless_rows_raise_no_alarm(tmp_path):
    path = tmp_path/"rows.json"
    path.write_text(json.dumps(rows_with()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prepare_run("qa", tmp_path/"run", data=path)


def test_health_names_the_rows_and_the_kind_and_never_the_secret(tmp_path):
    from sage_finetune.data.health import health_report
    from sage_finetune.modeling.tokenizer import load_tokenizer
    secret = PARTS["GitHub ghp"][1]
    report = health_report(rows_with((3, f"It is {secret} " * 3), (7, "pass" + "word: 'hunter2!tea'")),
        tokenizer=load_tokenizer("tiny"), show=False)
    finding = report["secrets"]
    assert (finding.level, finding.rows, finding.figures["kinds"]) == ("warn", [4, 8], {"GitHub token": 1, "password": 1})
    saved = report.save(tmp_path/"health.json").read_text()
    assert not [text for text in (saved, str(report), report._repr_html_()) if secret in text or "hunter2" in text]


# ---- the tests of a value -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("letters, count", [(ALNUM, 40), (BASE64, 40), (HEX, 32), (HEX, 40)])
def test_most_random_tokens_look_random(letters, count):
    assert sum(is_random("".join(rng.choice(letters) for _ in range(count))) for _ in range(300)) >= 285


@pytest.mark.parametrize("value", ["", "a1", "...", "<password1>", "${DB_PASS1}", "$PASS1", "your-password-1", "changeme1",
    "example123", "password1", "%(pass1)s", "%s1aaaa", "{secret1}", "my secret 1", "/etc/passwd1", "xxxxxxx1"])
def test_placeholders(value): assert not is_mixed_password(value)
