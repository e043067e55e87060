"""Chat templates in Ollama's language: those that trl ships, rendered by Go itself where it is installed, beside the model's own."""
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import templates_table as templates
from helpers import tiny_config

from sage_finetune import LoRATrainer
from sage_finetune.chat_format.rendering import render_prompt
from sage_finetune.chat_format.template import template_text
from sage_finetune.cli import main
from sage_finetune.core.errors import ModelError
from sage_finetune.core.places import own_files
from sage_finetune.inference.export import load_run, merge
from sage_finetune.inference.llama_cpp import compare_answer, llama_cpp_server
from sage_finetune.inference.ollama import _chats, modelfile, ollama_template, render_go, takes_system
from sage_finetune.modeling.tokenizer import load_tokenizer

# What no translation without a count of the messages can say.
REFUSED = {"mistral_nemo", "last_is_marked"}
TOKENIZERS = dict.fromkeys(templates.names(), templates.tokenizer_for) | dict.fromkeys(templates.PUBLIC, templates.public_tokenizer)
GO = """package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template string; Messages []Message }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	for _, one := range cases {
		parsed := template.Must(template.New("").Parse(one.Template))
		var file, _ = os.CreateTemp("", "")
		if err := parsed.Execute(file, one); err != nil { panic(err) }
		file.Close()
		text, _ := os.ReadFile(file.Name())
		os.Remove(file.Name())
		json.NewEncoder(os.Stdout).Encode(string(text))
	}
}
"""


def chats(tokenizer):
    "Conversations of every shape a template takes"
    return list(_chats(takes_system(tokenizer)))


def own(tokenizer, messages):
    "What the model's own template writes"
    return template_text(messages, tokenizer, add_generation_prompt=True)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_translation_writes_the_same_or_is_refused(name):
    tokenizer = TOKENIZERS[name](name)
    if name in REFUSED:
        with pytest.raises(ModelError, match="cannot be translated for Ollama.*llama.cpp"): ollama_template(tokenizer)
        return
    made = ollama_template(tokenizer)
    assert len(chats(tokenizer)) in (3, 6)
    for messages in chats(tokenizer): assert render_go(made, messages) == own(tokenizer, messages)


@pytest.mark.skipif(not shutil.which("go"), reason="Go is not installed")
def test_go_itself_writes_the_same(tmp_path):
    "All templates in one program"
    named = {name: make(name) for name, make in TOKENIZERS.items() if name not in REFUSED}
    pairs = [(tokenizer, messages) for tokenizer in named.values() for messages in chats(tokenizer)]
    asked = [dict(Template=ollama_template(tokenizer), Messages=[dict(Role=one["role"], Content=one["content"]) for one in messages])
        for tokenizer, messages in pairs]
    (tmp_path/"main.go").write_text(GO)
    done = subprocess.run(["go", "run", "main.go"], input=json.dumps(asked), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    wrote = [json.loads(line) for line in done.stdout.splitlines()]
    assert wrote == [own(*pair) for pair in pairs] and len(wrote) > 150


def test_braces_and_quotes_in_a_template():
    "They are the language's own, and are written all the same or refused"
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = "{% for m in messages %}{{ '{{' }}{{ m.role }}}}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>> {% endif %}"
    made = ollama_template(tokenizer)
    assert '{{ "{{" }}' in made and render_go(made, [dict(role="user", content="{{ .Content }}")]) == "{{user}}: {{ .Content }}\n>> "
    tokenizer.chat_template = tokenizer.chat_template.replace("}}: ", '}}""" ')
    with pytest.raises(ModelError, match="three quotes"): ollama_template(tokenizer)


@pytest.mark.parametrize("template, said", [
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "leaves out a message"),
    ("{{ messages[-1].content }}", "leaves out a message"),
    ("{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}", "twice")])
def test_a_template_that_changes_what_is_said(template, said):
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=said): ollama_template(tokenizer)


def test_a_system_message_before_the_first_question():
    "As Llama 2 writes it"
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = ("{% if messages[0].role == 'system' %}{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set talk = messages[1:] %}{% else %}{% set first = '' %}{% set talk = messages %}{% endif %}{% for m in talk %}"
        "{% if m.role == 'user' %}[INST] {{ first if loop.first else '' }}{{ m.content }} [/INST]{% else %} {{ m.content }} <|im_end|>{% endif %}{% endfor %}")
    made = ollama_template(tokenizer)
    for messages in chats(tokenizer): assert render_go(made, messages) == own(tokenizer, messages)
    assert "<<SYS>>" in made and len(chats(tokenizer)) == 6


def test_a_modelfile():
    text = modelfile(templates.tokenizer_for("llama3"), "./a.gguf", 4096, dict(temperature=0.7, top_p=0.9))
    assert text.startswith('FROM ./a.gguf\nTEMPLATE """')
    assert text.endswith('PARAMETER num_ctx 4096\nPARAMETER temperature 0.7\nPARAMETER top_p 0.9\n')
    assert 'PARAMETER stop "<|eot_id|>"' in text and "<|start_header_id|>assistant<|end_header_id|>\n\n\"\"\"" in text


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ollama")
    LoRATrainer(tiny_config(folder, num_train_epochs=4)).train(show=False)
    merge(folder/"run")
    return folder/"run"


def test_a_run_for_ollama(merged, capsys):
    "Weights and Modelfile stand beside each other; through the Modelfile's template the file says what the model says"
    assert main(["ollama", str(merged), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    text = Path(said["modelfile"]).read_text()
    assert text.startswith("FROM ./run-q8_0.gguf\n") and Path(said["modelfile"]).parent == Path(said["path"]).parent == merged/"exports"
    assert {"exports/run-q8_0.gguf", "exports/run-q8_0.Modelfile"} <= set(own_files(merged))
    assert said["command"].startswith("ollama create run-q8_0 -f ")
    model, tokenizer = load_run(merged, merged=True, device="cpu")
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.S)[1]
    question = [dict(role="user", content="Which colour has lamp 3?")]
    ids = tokenizer.encode(render_go(template, question), add_special_tokens=False)
    assert ids == render_prompt(question, tokenizer)
    with llama_cpp_server(said["path"]) as server: assert compare_answer(server, model, tokenizer, ids).equal
    assert main(["ollama", str(merged)]) == 2 and "--overwrite" in capsys.readouterr().err


def test_a_template_ollama_cannot_have_is_refused_first(merged, tmp_path, capsys):
    run = shutil.copytree(merged, tmp_path/"run", ignore=shutil.ignore_patterns("exports"))
    (run/"merged_model"/"chat_template.jinja").write_text(templates.PUBLIC["mistral_nemo"])
    assert main(["ollama", str(run)]) == 2 and "cannot be translated" in capsys.readouterr().err
    assert not (run/"exports").exists()
