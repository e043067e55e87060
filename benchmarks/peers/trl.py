"""TRL's SFTTrainer. Its loss takes the output head only where a token is trained on, chunk by chunk, in every variant: that is its default.

default       as it comes: weights in fp32 under bf16 autocast, gradient checkpointing, padding
padding_free  bf16 weights, no checkpointing, the rows of a step one behind the other in one line without padding
packed        the same, and rows packed into lines of max_length by best fit (`packing=True`, strategy bfd);
as many lines a step as hold its rows on average
padded        bf16 weights, no checkpointing, rows of similar length together
rows          bf16 weights, no checkpointing, the rows of a step one after the other: nothing to pad, and the least memory
"""
from .common import arguments, conversations, row_by_row, training_arguments, watched

BF16 = dict(gradient_checkpointing=False, bf16=True, completion_only_loss=True, model_init_kwargs=dict(dtype="bfloat16"))
VARIANTS = dict(default={}, padding_free=BF16 | dict(padding_free=True, max_length=None),
                packed=BF16 | dict(packing=True, packing_strategy="bfd"),
                padded=BF16 | dict(train_sampling_strategy="group_by_length"), rows=BF16)


def settings(asked):
    "What SFTConfig is told"
    found = training_arguments(asked) | dict(max_length=asked.max_length) | VARIANTS[asked.variant]
    if asked.variant == "packed": found["per_device_train_batch_size"] = asked.lines
    if asked.variant == "rows": found |= row_by_row(asked)
    return found | asked.set


def main():
    asked = arguments(*VARIANTS)
    import datasets
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    watch, marks = watched(tokenizer.pad_token_id)
    lora = LoraConfig(r=asked.rank, lora_alpha=2 * asked.rank, lora_dropout=0., target_modules="all-linear", task_type="CAUSAL_LM")
    rows = datasets.Dataset.from_list(conversations(asked.rows))
    trainer = SFTTrainer(str(asked.model), SFTConfig(**settings(asked)), train_dataset=rows, processing_class=tokenizer,
        peft_config=lora, callbacks=[marks])
    trainer.train()
    watch.report("trl", attention=trainer.model.config._attn_implementation, settings=asked.set)


if __name__ == "__main__": main()
