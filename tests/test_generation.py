"Everything that answers obeys one set of generation settings, whatever the base brings, and they are saved beside adapter and merged model"
import json
import shutil

import pytest
import torch
from helpers import rows, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sage_finetune import LoRATrainer, load_run, merge
from sage_finetune.chat_format.rendering import stop_ids
from sage_finetune.config import TrainingConfig, tiny_path
from sage_finetune.core.errors import ModelError
from sage_finetune.inference.chat import Chat
from sage_finetune.inference.evaluation import compare
from sage_finetune.inference.generation import generate, generate_batch
from sage_finetune.modeling.base import generation_settings, load_base
from sage_finetune.modeling.decoding import generation_arguments

QUESTIONS = [row["instruction"] for row in rows(12)]
END = 2  # <|im_end|>, which the template writes
BASE_END = 7  # what the altered base calls its end
LEAKS = dict(no_repeat_ngram_size=2, repetition_penalty=1.9, suppress_tokens=[END, 40, 41], begin_suppress_tokens=[43],
    min_new_tokens=12, min_length=30, forced_eos_token_id=9,
    forced_bos_token_id=11, bad_words_ids=[[50], [51, 52]], do_sample=True, temperature=3., top_k=3,
    exponential_decay_length_penalty=[1, 0.1], max_time=1e-6, max_length=9)


def base_with(folder, settings):
    "The packaged model with other generation settings; text is written as it is, None leaves the file out"
    shutil.copytree(tiny_path(), folder)
    place = folder/"generation_config.json"
    place.unlink()
    if settings is not None: place.write_text(settings if isinstance(settings, str) else json.dumps(settings), encoding="utf-8")
    return folder


def settings_of(folder): return json.loads((folder/"generation_config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    "A trainer on a base that names another end token and sets whatever can be set, and what it said at its last evaluation"
    folder, seen = tmp_path_factory.mktemp("leaks"), []
    base = base_with(folder/"base", LEAKS | dict(eos_token_id=BASE_END, pad_token_id=0))
    trainer = LoRATrainer(tiny_config(folder, model_name=str(base), num_train_epochs=4, eval_ratio=0.1, bf16=False, eval_prompts=QUESTIONS))
    trainer.train(show=False, callbacks=[type("Look", (), dict(on_evaluate=staticmethod(lambda step: seen.append(step))))()])
    return trainer, seen[-1]


def test_all_that_answers_says_the_same(tuned):
    trainer, last = tuned
    expected = [answer.text for answer in generate_batch(*load_run(trainer.config.output_dir), QUESTIONS, 64)]
    assert len(set(expected)) > 2 and all(answer.finished for answer in generate_batch(trainer.model, trainer.tokenizer, QUESTIONS, 64))
    assert trainer.generate(QUESTIONS, 64) == expected
    assert last.generations == expected
    model, tokenizer = load_run(trainer.config.output_dir)
    chat = Chat(model, tokenizer, max_new_tokens=64)
    for question, text in zip(QUESTIONS, expected):
        chat.reset()
        assert chat(question) == text and not chat.cut
        assert "".join(generate(model, tokenizer, question, 64)).strip() == text
    assert [row[2] for row in compare(model, tokenizer, QUESTIONS[:4], 64).rows] == expected[:4]


def test_plain_transformers_stops_by_itself_from_adapter_and_merged_model(tuned):
    trainer, _ = tuned
    merge(trainer.config.output_dir)
    folder = trainer.config.merged_dir
    assert settings_of(folder) == settings_of(trainer.config.lora_dir)
    kept = {name: value for name, value in settings_of(folder).items()
        if name not in ("transformers_version", "bos_token_id", "pad_token_id")}
    assert kept == dict(do_sample=False, use_cache=True, eos_token_id=[END, BASE_END])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    expected = [answer.text for answer in generate_batch(*load_run(trainer.config.output_dir, merged=True), QUESTIONS, 64)]
    for question, text in zip(QUESTIONS, expected):
        asked = tokenizer.apply_chat_template([dict(role="user", content=question)], add_generation_prompt=True,
            return_tensors="pt", return_dict=True)
        grown = model.generate(**asked, max_new_tokens=200)[0, asked["input_ids"].shape[1]:]
        assert len(grown) < 100 and grown[-1] == END and tokenizer.decode(grown, skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("leak", [*(dict([leak]) for leak in LEAKS.items()), dict(num_beams=3),
    dict(num_beams=2, num_return_sequences=2), dict(stop_strings=["a"]), dict(guidance_scale=3.),
    dict(sequence_bias=[[[60], 9.]]), dict(eos_token_id=BASE_END), dict(eos_token_id=None),
    dict(watermarking_config=dict(bias=9.)), dict(penalty_alpha=0.6, top_k=4), dict(num_beam_groups=2, num_beams=2),
    dict(dola_layers="low"), dict(return_dict_in_generate=True, output_scores=True), dict(prompt_lookup_num_tokens=3),
    dict(cache_implementation="static"), dict(use_cache=False),
    dict(renormalize_logits=True, typical_p=0.2, do_sample=True)], ids=lambda leak: ",".join(leak))
def test_nothing_of_a_model_that_somebody_else_loaded_acts(leak):
    plain, tokenizer = (AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(tiny_path()))
    expected = generate_batch(plain, tokenizer, QUESTIONS[:3], 24)
    for name, value in leak.items(): setattr(plain.generation_config, name, value)
    assert generate_batch(plain, tokenizer, QUESTIONS[:3], 24) == expected
    assert "".join(generate(plain, tokenizer, QUESTIONS[0], 24)).strip() == expected[0].text


@pytest.mark.parametrize("settings", [None, "", "{", "[1, 2]", "null", "\x00\xff", dict(), dict(num_return_sequences=3),
    dict(temperature="hot", do_sample=True), dict(max_new_tokens=-1),
    dict(suppress_tokens=[1], forced_eos_token_id=1), dict(cache_implementation="none"),
    dict(watermarking_config=dict(bias="x")), dict(logits_processor=[1]), dict(early_stopping="maybe")], ids=str)
def test_settings_that_are_missing_or_broken_keep_no_model_from_loading(tmp_path, settings):
    base = base_with(tmp_path/"base", settings)
    model, _ = load_base(TrainingConfig(model_name=str(base), device="cpu", bf16=False))
    assert model.generation_config.eos_token_id == [END] and model.generation_config.do_sample is False
    model.save_pretrained(tmp_path/"saved")
    assert settings_of(tmp_path/"saved")["eos_token_id"] == [END]


@pytest.mark.parametrize("ends", ["2", {}, [2, "x"], True, 2.5], ids=repr)
def test_an_end_that_is_no_token_is_refused(tmp_path, ends):
    with pytest.raises(ModelError, match="where the number of a token belongs"):
        load_base(TrainingConfig(model_name=str(base_with(tmp_path/"base", dict(eos_token_id=ends))), device="cpu"))


def test_ends_are_those_of_template_tokenizer_and_base():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_path()), AutoTokenizer.from_pretrained(tiny_path())
    assert set(generation_settings(model, tokenizer).eos_token_id) == stop_ids(tokenizer) | {END}
    model.generation_config = GenerationConfig(eos_token_id=[5, BASE_END])
    assert (generation_settings(model, tokenizer).eos_token_id[0] == END
        and set(generation_settings(model, tokenizer).eos_token_id) == {END, 5, BASE_END})
    tokenizer.chat_template = ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
        "<|endoftext|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<|endoftext|>"]))
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") in generation_settings(model, tokenizer).eos_token_id
    tokenizer.chat_template = tokenizer.eos_token = tokenizer.pad_token = None  # only documents can be trained on
    assert (set(generation_settings(model, tokenizer).eos_token_id) == {5, BASE_END}
        and generation_arguments(model, tokenizer, 8)["pad_token_id"] == 5)
