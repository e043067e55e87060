"The form: every field there and back, reasons beside the fields, memory that follows, and nothing that a name could break"
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import NoneType

import ipywidgets
import pytest
from helpers import tiny_config
from hypothesis import HealthCheck, given, settings, strategies as st

from sage_finetune.config import PRESETS, LoRAConfig, PresetConfigs, TrainingConfig, preset
from sage_finetune.core.errors import ConfigError, DataError
from sage_finetune.core.storage import checked_path
from sage_finetune.trainer import LoRATrainer
from sage_finetune.training.available_memory import available_memory
from sage_finetune.training.memory import estimate_memory
from sage_finetune.training.memory_measurement import measure_memory
from sage_finetune.ui import fields as field_controls
from sage_finetune.ui.fields import all_keys, format_value, grouped, kinds_of, parse_value
from sage_finetune.ui.form import DEBOUNCE_SECONDS, ConfigForm
from sage_finetune.ui.memory_worker import MEMORY
from sage_finetune.ui.presets import python_code
from sage_finetune.ui.upload import UPLOAD_LIMIT, save_upload, uploads

HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>\x1b[31m'


# ---- every field there and back -----------------------------------------------------------------------------------------

TEXTS = st.text(max_size=12) | st.sampled_from(['', ' ', '"', '["a"]', '{"a": "b"}', '[', 'a, b', 'a=b', 'all-linear',
    'q_proj', '"q"', 'x\ny', '\u202e', '\x00', HOSTILE, 'näm', '-1', 'None'])


def values(field):
    "Any value a field takes, as the config keeps it"
    low, high, choices = (field.metadata.get(name) for name in ('low', 'high', 'choices'))
    if choices: return st.sampled_from(choices)
    if dataclasses.is_dataclass(field.type): return configs(field.type)
    kinds = {NoneType: st.none(), bool: st.booleans(), str: TEXTS, Path: TEXTS.map(Path),
        list[str]: st.lists(TEXTS, max_size=4), dict[str, str]: st.dictionaries(TEXTS, TEXTS, max_size=4)}
    numbers = {int: lambda: st.integers(low, high), float: lambda: st.floats(low, high, allow_nan=False, allow_infinity=False)}
    return st.one_of(*(numbers[kind]() if kind in numbers else kinds[kind] for kind in kinds_of(field)))


def can_be_set(value):
    "A path no file system takes, or the home folder of nobody, is refused at the assignment"
    if not isinstance(value, Path): return True
    try: return bool(checked_path(value, "path"))
    except ConfigError: return False


def configs(kind=TrainingConfig):
    "Valid configs with any value in any field"
    fields = st.fixed_dictionaries({field.name: values(field).filter(can_be_set) for field in dataclasses.fields(kind)})
    if kind is LoRAConfig: return fields.map(lambda given: LoRAConfig(**given))
    return fields.map(lambda given: given | dict(load_in_4bit=given['load_in_4bit'] and not given['load_in_8bit'],
        bf16=given['bf16'] and not given['fp16'])).map(lambda given: TrainingConfig(**given))


@pytest.fixture(scope='module')
def still(): return ConfigForm(counts=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs())
def test_form_and_config_are_the_same(still, config):
    heard = []
    still.listeners[:] = [heard.append]
    before = still.config
    still.config = config
    assert still.config == config and still.valid and still.failure is None
    assert still.controls.read() == config  # as the controls alone say it
    assert heard == [config] * (before != config)  # not once per control


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(all_keys()), data=st.data())
def test_a_value_survives_as_text(key, data):
    field = (LoRAConfig if key.startswith('lora.') else TrainingConfig).__dataclass_fields__[key.removeprefix('lora.')]
    value = data.draw(values(field))
    text = format_value(field, value)
    assert all(line.isprintable() for line in text.split('\n'))
    if field.metadata.get('choices') or bool in kinds_of(field): return
    assert field.type and (parse_value(field, text) == value or type(value)(parse_value(field, text)) == value)


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_there_and_back(still, name):
    still.config = preset(name)
    assert (still.config, still.preset.value, still.presets.base) == (preset(name), name, name)


def test_every_field_has_a_control_with_its_phrase(still, monkeypatch):
    from sage_finetune.config import field_help
    phrases = field_help(TrainingConfig) | {f'lora.{name}': phrase for name, phrase in field_help(LoRAConfig).items()}
    assert {*still.fields} == {*all_keys()} - {'load_in_4bit'}
    for key, control in still.controls.by_key.items():
        css = {name for name in control.row._dom_classes if name.startswith('sage-field-')}
        assert f'sage-field-{key.replace(".", "-")}' in css
        if key == 'load_in_8bit': continue
        said = control.widget.tooltip if control.widget.has_trait('tooltip') else control.widget.description_tooltip
        assert said.startswith(phrases[key]) and control.widget.description == key.removeprefix('lora.')
    monkeypatch.setitem(field_controls.MORE, 'data', tuple(key for key in field_controls.MORE['data'] if key != 'packing'))
    assert grouped()['others'] == ('packing',)


def test_a_form_holds_its_own_config(still):
    config = PresetConfigs.tiny(new_tokens=['<a>'])
    still.config = config
    config.new_tokens.append('<b>')
    still.config.new_tokens.append('<c>')
    still.config.lora.r = 99
    assert still.config == PresetConfigs.tiny(new_tokens=['<a>'])
    with pytest.raises(ConfigError, match='not a dict'): still.config = {}
    torn = PresetConfigs.tiny()
    torn.load_in_8bit = torn.load_in_4bit = True
    with pytest.raises(ConfigError, match='contradict'): still.config = torn
    assert still.config == PresetConfigs.tiny(new_tokens=['<a>'])


# ---- wrong values -------------------------------------------------------------------------------------------------------

WRONG = {'learning_rate': '2', 'lora.r': '0', 'max_steps': '1.5', 'eval_ratio': 'nan', 'seed': '-1', 'num_train_epochs': '',
    'warmup_ratio': '0,1', 'neftune_noise_alpha': 'inf'}


@pytest.mark.parametrize('key', WRONG)
def test_a_wrong_value_says_why_in_the_configs_own_words(still, key):
    still.config = PresetConfigs.tiny()
    still.fields[key].value = WRONG[key]
    owner, name = (LoRAConfig, key.removeprefix('lora.')) if key.startswith('lora.') else (TrainingConfig, key)
    with pytest.raises(ConfigError) as said: owner(**{name: WRONG[key]})
    assert still.problem_text == str(said.value) and not still.valid and still.config == PresetConfigs.tiny()
    whys = [other for other, control in still.controls.by_key.items() if 'sage-why' in control.note.value]
    assert whys == [key] and still.failure is None and f'refused: {key}.' in still.refused.value
    still.fields['logging_steps'].value = '7'  # waits until all is well again
    assert still.config.logging_steps == 10
    still.fields[key].value = format_value(owner.__dataclass_fields__[name],
        getattr(PresetConfigs.tiny().lora if owner is LoRAConfig else PresetConfigs.tiny(), name))
    assert still.valid and still.problem_text == still.refused.value == '' and still.config == PresetConfigs.tiny(logging_steps=7)


def test_half_a_number_does_not_disturb(still):
    still.config = PresetConfigs.tiny()
    seen = []
    for typed in ('2', '2e', '2e-', '2e-4'):
        still.fields['learning_rate'].value = typed
        seen.append((still.valid, still.config.learning_rate))
    assert seen == [(False, 0.002), (False, 0.002), (False, 0.002), (True, 0.0002)]


def test_contradictions_stand_beside_both_fields(still):
    still.config = TrainingConfig()
    still.fields['fp16'].value = still.fields['bf16'].value = 'yes'
    assert {*still.controls.wrong} == {'fp16', 'bf16'} and 'contradict each other' in still.problem_text
    assert still.config == TrainingConfig(fp16=True)
    still.fields['fp16'].value = 'no'
    assert still.config == TrainingConfig(fp16=False, bf16=True)


def test_a_listener_that_fails_is_shown(still):
    form = ConfigForm(counts=False)
    form.on_change(lambda config: 1 / 0)
    form.fields['seed'].value = '7'
    assert form.config.seed == 7 and isinstance(form.failure, ZeroDivisionError) and 'ZeroDivisionError' in form.problem.value


# ---- presets ------------------------------------------------------------------------------------------------------------

def test_a_preset_keeps_what_was_named(still):
    still.config = PresetConfigs.tiny()
    still.preset.value = 'minimal'
    assert still.config == PresetConfigs.minimal()  # nothing was named: the packaged model and data go with their preset
    still.fields['model_name'].value, still.fields['data_path'].value, still.fields['seed'].value = 'tiny', 'mine.jsonl', '7'
    assert (still.preset.value, still.presets.base) == ('custom', 'minimal')
    still.preset.value = 'a100'
    assert still.config == PresetConfigs.a100(model_name='tiny', data_path='mine.jsonl') and still.preset.value == 'a100'
    still.fields['lora.use_dora'].value = True
    assert still.preset.value == 'custom'
    still.fields['lora.use_dora'].value = False
    assert still.preset.value == 'a100'
    still.preset.value = 'custom'  # not a preset one could choose
    assert still.preset.value == 'a100'


def test_sliders_and_boxes_follow_each_other(still):
    for key in field_controls.STOPS:
        control = still.controls.by_key[key]
        for stop in control.stops:
            control.slider.value = stop
            of = still.config.lora if key.startswith('lora.') else still.config
            assert getattr(of, control.name) == stop and control.slider.value == stop, key
    still.fields['max_length'].value = '1000'
    assert still.config.max_length == 1000 and still.controls.by_key['max_length'].slider.value == 1024


def test_models_and_quantisation(still):
    still.config = PresetConfigs.rtx_3060()
    still.models.value = 'Qwen/Qwen2.5-7B-Instruct'
    still.fields['load_in_8bit'].value = 4
    assert (still.config.model_name, still.config.load_in_8bit, still.config.load_in_4bit) == ('Qwen/Qwen2.5-7B-Instruct', False, True)
    still.fields['model_name'].value = './mine'
    assert still.models.value == '' and still.config.model_name == './mine'


# ---- as Python ----------------------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs())
def test_the_code_makes_the_same_config(config):
    space = {}
    exec(python_code(config), space)
    assert space['config'] == config


def test_the_code_works_in_a_fresh_process(tmp_path):
    wanted = [*(preset(name) for name in PRESETS), TrainingConfig(), PresetConfigs.rtx_3060(model_name="'); import os; os._exit(9) #",
        data_path='"""\n', lora=LoRAConfig(r=16, target_modules=['q_proj'])),
              PresetConfigs.tiny(output_dir=HOSTILE, new_tokens=["\\'", '\ud800'], column_map={'{': '}'}, learning_rate=1e-5)]
    each = 'import json, sys\nfor code in json.load(sys.stdin): exec(code, space := {}); print(json.dumps(space["config"].to_dict()))'
    codes = json.dumps([*map(python_code, wanted)])
    done = subprocess.run([sys.executable, '-c', each], input=codes, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [TrainingConfig(**json.loads(line)) for line in done.stdout.splitlines()] == wanted
    assert len(python_code(wanted[-2]).splitlines()) <= 10 and python_code(preset('a100')).count('\n') == 3


# ---- uploads ------------------------------------------------------------------------------------------------------------

ROWS = b'{"question": "Who?", "answer": "Me."}\n'


@pytest.mark.parametrize('name', ['rows.jsonl', '../../rows.jsonl', '/etc/rows.jsonl', 'C:\\rows\\..\\rows.jsonl',
    '.jsonl.jsonl', f'{HOSTILE}.jsonl', 'a' * 500 + '.jsonl', '数据 שורות.JSONL', '\x00.jsonl', '..jsonl'])
def test_an_upload_lands_in_its_folder_whatever_its_name(tmp_path, name):
    path = save_upload(name, ROWS, tmp_path/'run')
    assert path.parent == tmp_path/'run'/'uploads' and path.read_bytes() == ROWS
    assert path.suffix == '.jsonl' and not path.name.startswith('.') and not {*path.name} & {*'<>"\'/\\ \x1b\x00'}
    assert [file for file in tmp_path.rglob('*') if file.is_file()] == [path]
    if name.endswith('rows.jsonl'): assert path.name == 'rows.jsonl'


def test_uploads_are_not_overwritten_and_not_too_large(tmp_path):
    first, second, again = (save_upload('rows.jsonl', content, tmp_path) for content in (ROWS, ROWS * 2, ROWS))
    assert first == again != second and first.read_bytes() == ROWS and second.read_bytes() == ROWS * 2
    with pytest.raises(DataError, match='type its path'): save_upload('rows.jsonl', bytes(UPLOAD_LIMIT + 1), tmp_path)
    for name in ('rows.exe', 'rows', '', 'rows.jsonl/'):
        with pytest.raises(DataError, match='ends in'): save_upload(name, ROWS, tmp_path)


def test_uploading_in_the_form(tmp_path):
    form = ConfigForm(PresetConfigs.tiny(output_dir=tmp_path/'run'), counts=False)
    seven, eight = ({'a/b.jsonl': dict(metadata=dict(name='a/b.jsonl', size=len(ROWS)), content=ROWS)},
        (dict(name='c.csv', type='text/csv', size=11, content=memoryview(b'question,answer\nWho?,Me.\n'), last_modified=0),))
    assert uploads(seven) == [('a/b.jsonl', ROWS)] and uploads(eight)[0][0] == 'c.csv'
    if ipywidgets.__version__ >= '8': form.upload.value = [dict(eight[0], last_modified=__import__('datetime').datetime.now())]
    else: form.upload.metadata, form.upload.data, form.upload._counter = [dict(name='c.csv')], [bytes(eight[0]['content'])], 1
    assert form.config.data_path == tmp_path/'run'/'uploads'/'c.csv' and form.failure is None
    if ipywidgets.__version__ >= '8':
        form.upload.value = [dict(eight[0], name=HOSTILE, last_modified=__import__('datetime').datetime.now())]
    else: form.upload.metadata, form.upload._counter = [dict(name=HOSTILE)], 2
    assert isinstance(form.failure, DataError) and '<img' not in form.problem.value and form.config.data_path.name == 'c.csv'


# ---- steps, time, memory ------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def live():
    form = ConfigForm()
    assert form.wait() and form.failure is None
    yield form
    MEMORY.close()


def size_of(form): return float(form.memory.status.text.split('total')[1].split()[0])


def test_the_bar_follows_the_settings(live):
    live.config = PresetConfigs.tiny(device='cpu')
    assert live.wait()
    small, process = size_of(live), MEMORY.process.pid
    live.controls.by_key['max_length'].slider.value = 2048
    assert live.wait() and size_of(live) > 1.5 * small and '2048 tokens' in live.memory.view.value
    bar = live.memory.view.value
    live.fields['seed'].value = '7'  # nothing to do with memory: nobody is asked
    asked = MEMORY.pending.numbers.__reduce__()
    assert live.wait() and live.memory.view.value == bar and MEMORY.pending.numbers.__reduce__() == asked
    assert (MEMORY.process.pid == process and '★ suggested'
        in {name: label for label, name in live.preset.options}[live.presets.suggested[0]])


def test_sliding_never_waits(live):
    start = time.monotonic()
    for _ in range(10):
        for stop in (64, 512, 4096): live.controls.by_key['max_length'].slider.value = stop
    live.controls.by_key['max_length'].slider.value = 256
    assert time.monotonic() - start < 5  # 31 moves; counting once takes a second
    assert live.wait() and '256 tokens' in live.memory.view.value and live.failure is None


def test_what_does_not_fit_is_mended_by_a_click(live):
    config = PresetConfigs.tiny(device='cpu', max_length=4096, per_device_train_batch_size=1, engine='plain', packing=False)
    estimate, free = estimate_memory(config), available_memory('cpu')
    config.per_device_train_batch_size = 2**math.ceil(math.log2(1.5 * free / estimate.step))
    live.config = config
    assert live.wait() and 'does not fit' in live.memory.view.value and live.memory.button.layout.display == ''
    sentence, changes = live.memory.status.fix
    assert changes, sentence
    live.memory.button.click()
    assert live.wait() and live.failure is None and 'this fits' in live.memory.view.value and live.memory.button.layout.display == 'none'
    for name, value in changes.items(): assert getattr(live.config, name) == value


def test_a_model_that_is_not_there_is_said(live):
    for name in ('nobody/nothing', './' + HOSTILE, '/no/such/folder'):
        live.config = PresetConfigs.tiny(model_name=name)
        assert (live.wait() and 'memory is not known' in live.memory.view.value and '<img' not in live.memory.view.value
            and live.failure is None)
    live.config = PresetConfigs.tiny()
    assert live.wait() and 'this fits' in live.memory.view.value


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere there are no copies')
def test_an_ended_process_is_said_and_replaced(live):
    live.config = PresetConfigs.tiny(max_length=96)
    assert live.wait()
    process = MEMORY.process
    process.send_signal(signal.SIGSTOP)  # the question will be on its way
    live.config = PresetConfigs.tiny(max_length=112)
    time.sleep(2 * DEBOUNCE_SECONDS)
    process.kill()
    assert live.wait() and 'ended (-9)' in live.memory.view.value
    live.config = PresetConfigs.tiny(max_length=128)
    assert live.wait() and '128 tokens' in live.memory.view.value and MEMORY.process.pid != process.pid


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere there are no copies')
def test_a_copy_that_is_killed_is_said(tmp_path):
    import psutil
    form = ConfigForm()
    assert form.wait()
    # its layers are not alike, so it takes long
    deep = dict(model_type='gemma2', hidden_size=128, num_hidden_layers=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=512, vocab_size=4000)
    (tmp_path/'config.json').write_text(json.dumps(deep))
    copies = psutil.Process(MEMORY.process.pid).children
    earlier = {copy.pid for copy in copies()}  # one that has answered may still be about to end
    form.config = PresetConfigs.tiny(model_name=str(tmp_path))
    while not (later := {copy.pid for copy in copies()} - earlier): time.sleep(0.005)
    os.kill(later.pop(), signal.SIGKILL)
    assert form.wait() and 'was ended (9)' in form.memory.view.value


def test_two_forms_share_the_process_and_not_the_answers(live):
    second = ConfigForm(PresetConfigs.tiny(max_length=48))
    live.config = PresetConfigs.tiny(max_length=80)
    assert second.wait() and live.wait()
    assert '48 tokens' in second.memory.view.value and '80 tokens' in live.memory.view.value


def test_steps_and_time_come_from_rows_and_earlier_runs(live, tmp_path):
    config = tiny_config(tmp_path, output_dir=tmp_path/'first')
    LoRATrainer(config).train()
    live.config = tiny_config(tmp_path, output_dir=tmp_path/'second')
    assert live.wait()
    said = live.outlook.forecast.lines(live.config)
    assert ('note', 'steps: about 12 (24 rows, none held out, 2 epochs)') in said
    assert any('time: about' in line and 's a step of first' in line for _, line in said)
    live.fields['lora.r'].value = '64'
    assert live.wait() and ('note', 'time: unknown until the first step') in live.outlook.forecast.lines(live.config)
    live.fields['data_path'].value = HOSTILE
    assert live.wait() and 'there is no data file' in live.summary.value and '<img' not in live.summary.value
    live.fields['data_path'].value = ''
    assert live.wait() and 'data_path is empty' in live.summary.value
    for slow in ('somebody/data', '/'):  # one would have to be loaded, the other is on the way to a longer path
        start, live.fields['data_path'].value = time.monotonic(), slow
        assert live.wait() and 'known when the data set is loaded' in live.summary.value and time.monotonic() - start < 20


def test_a_measurement_replaces_the_prediction(live, tmp_path):
    config = tiny_config(tmp_path, max_steps=2)
    live.config = config
    assert live.wait()
    measurement = measure_memory(LoRATrainer(config).setup())
    live.show_measurement(measurement)
    assert ('a step, measured' in live.memory.view.value and f'{measurement.relative_error:+.0%}' in live.memory.view.value
        and 'predicted' in repr(live))
    live.fields['max_length'].value = '128'
    assert live.wait() and 'measured before' in live.memory.view.value and 'a step, measured' not in live.memory.view.value


# ---- what stays, and what is shown ----------------------------------------------------------------------------------------

def test_names_are_text_everywhere(live, tmp_path):
    (tmp_path/'<img src=x onerror=1>').mkdir()
    config = PresetConfigs.tiny(model_name=HOSTILE, data_path=HOSTILE, output_dir=tmp_path/'<img src=x onerror=1>'/'run',
        eval_path=HOSTILE, new_tokens=[HOSTILE], column_map={HOSTILE: HOSTILE}, lora=LoRAConfig(target_modules=HOSTILE))
    live.config = config
    assert live.wait() and live.config == config
    live.fields['seed'].value = HOSTILE
    pages = [live.static_html(), live.problem.value]
    todo = [live.box]
    while todo:
        widget = todo.pop()
        todo += getattr(widget, 'children', ())
        if isinstance(widget, ipywidgets.HTML) and not widget.value.startswith('<style>'): pages.append(widget.value)
    assert len(pages) > 50
    for page in pages: assert '<img' not in page and '<script' not in page and '\x1b' not in page
    assert any('&lt;img' in page for page in pages) and '\x1b' not in repr(live)


def test_the_saved_form_says_what_was_chosen(live):
    live.config = PresetConfigs.rtx_3060(model_name='tiny', data_path='example', weight_decay=0.5)
    assert live.wait()
    page, text = live.static_html(), repr(live)
    for shown in ('<b>True</b>', '<b>0.5</b>', 'effective batch: 16', 'what is free', '<code>weight_decay</code>'):
        assert shown in page, shown
    assert '<b>42</b>' not in page and 'weight_decay' in text and 'total' in text and '<' not in text


def test_it_is_light(tmp_path):
    code = "import sys; from sage_finetune.ui.form import ConfigForm; form = ConfigForm(); form.fields['lora.r'].value = '4'\n" \
        "assert form.wait() and 'this fits' in form.memory.view.value, form.memory.view.value\n" \
        "form.preset.value = 'rtx_3060'; form.static_html(); repr(form)\n" \
        "print(*({'torch', 'transformers', 'peft', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == '', done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_move_is_quick(still):
    still.config = PresetConfigs.tiny()
    start, moves = time.process_time(), 50
    for turn in range(moves): still.controls.by_key['lora.r'].slider.value = 2**(turn % 8)
    assert (time.process_time() - start) / moves < 0.03
