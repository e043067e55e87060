"""TRL's SFTTrainer with bf16 weights, its fused output head, Liger's layers where they are installed, and flash_attention_2 or else sdpa.

packed  rows packed into lines of max_length by best fit, the lines of a step one behind the other
lines   the same, a line at a time: without flash attention several lines at once cost the square of them all
padded  rows of similar length together, padded
"""
from importlib.util import find_spec

from peers.common import conversations, watched

from .common import TARGETS, attention, four_bits, gpu_memory, told, trainer_settings, waiting


def train(asked):
    "The job, by SFTTrainer"
    import datasets
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    watch, marks = watched(tokenizer.pad_token_id)
    liger = asked.cuda and bool(find_spec("liger_kernel"))
    how = dict(attention=attention(asked), liger=liger, checkpointing=asked.checkpointing)
    load = dict(dtype="bfloat16", attn_implementation=how["attention"], device_map={"": asked.device})
    settings = dict(use_liger_kernel=liger, model_init_kwargs=load) | trainer_settings(asked)
    lora = LoraConfig(r=asked.rank, lora_alpha=2 * asked.rank, lora_dropout=0., target_modules=TARGETS, task_type="CAUSAL_LM")
    rows, four = datasets.Dataset.from_list(conversations(asked.rows)), four_bits() if asked.method == "qlora" else None
    trainer = SFTTrainer(asked.model, SFTConfig(**settings), train_dataset=rows, processing_class=tokenizer, peft_config=lora,
                         quantization_config=four, callbacks=[waiting(asked), marks])
    trainer.train()
    watch.report("trl", "bitsandbytes", "liger-kernel", "flash-attn", outcome="ok", **gpu_memory(asked), how=how)


if __name__ == "__main__": told(train)
