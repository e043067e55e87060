"""transformers' Trainer and PEFT with nothing added: bf16 weights, rows padded to the longest of the batch,
the model's own loss over its full logits"""
from .common import arguments, conversations, training_arguments, watched


def encoded(row, tokenizer):
    "A conversation as token ids, and as labels the answer alone"
    asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
    return dict(input_ids=ids, labels=[-100] * len(asked) + ids[len(asked):])


def main():
    asked = arguments()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    watch, marks = watched(tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.bfloat16)
    lora = LoraConfig(r=asked.rank, lora_alpha=2 * asked.rank, lora_dropout=0., target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    rows = [encoded(row, tokenizer) for row in conversations(asked.rows)]
    settings = TrainingArguments(**training_arguments(asked) | dict(bf16=True) | asked.set)
    trainer = Trainer(model, settings, DataCollatorForSeq2Seq(tokenizer), rows, callbacks=[marks])
    trainer.train()
    watch.report(settings=asked.set)


if __name__ == "__main__": main()
