"What Colab brings along and gets in the way"
import subprocess
import sys

ATTACH = """
from sage_finetune import PresetConfigs, attach_lora, load_base
from sage_finetune.config import ModelError
config = PresetConfigs.tiny()
try: attach_lora(load_base(config)[0], config.lora)
except ModelError as error: print(error)
"""


def attach(path):
    "What attaching an adapter says in a process of its own, with a folder first on its path"
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{ATTACH}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_old_torchao_is_named_with_its_cure(tmp_path):
    (tmp_path/"torchao").mkdir()
    (tmp_path/"torchao"/"__init__.py").write_text("__version__ = '0.10.0'\n")
    (tmp_path/"torchao-0.10.0.dist-info").mkdir()
    (tmp_path/"torchao-0.10.0.dist-info"/"METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    said = attach(tmp_path)
    assert "torchao" in said and 'pip install --no-deps -U "torchao>=0.16"' in said, said


def test_without_it_the_adapter_is_attached(tmp_path): assert attach(tmp_path) == ""
