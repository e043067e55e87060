"Unsloth: its FastLanguageModel under TRL's SFTTrainer, packed. It is imported before everything it changes, and runs on a GPU alone."
from .common import TARGETS, gpu_memory, told, trainer_settings, waiting


def train(asked):
    "The job, by Unsloth"
    import datasets
    import torch
    from peers.common import conversations, watched
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel
    datasets.disable_progress_bars()
    checkpointing = "unsloth" if asked.checkpointing else False
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=asked.model, max_seq_length=asked.length, dtype=torch.bfloat16,
        load_in_4bit=asked.method == "qlora", fix_tokenizer=False,
        use_gradient_checkpointing=checkpointing)
    model = FastLanguageModel.get_peft_model(model, r=asked.rank, lora_alpha=2 * asked.rank, lora_dropout=0,
                                             bias="none", target_modules=TARGETS,
                                             use_gradient_checkpointing=checkpointing, random_state=42)
    watch, marks = watched(tokenizer.pad_token_id)  # only now: loading a model replaces parts of the trainer
    rows = datasets.Dataset.from_list(conversations(asked.rows))
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows, args=SFTConfig(**trainer_settings(asked)),
                         callbacks=[waiting(asked), marks])
    trainer.train()
    how = dict(packing=bool(trainer.args.packing), checkpointing=asked.checkpointing)  # it may switch packing off by itself
    watch.report("unsloth", "unsloth_zoo", "trl", "bitsandbytes", "xformers", "flash-attn", outcome="ok", **gpu_memory(asked), how=how)


if __name__ == "__main__": told(train)
