"""sage_finetune. Packed rows, a bf16 base where the CPU has it and the leaner paths of the engine are what it does by itself;
`--set NAME=VALUE` changes any field of TrainingConfig."""
from .common import LEARNING_RATE, Watch, arguments


def settings(asked):
    "The fields of TrainingConfig that stand for the reference work"
    from sage_finetune.config import LoRAConfig
    fields = dict(model_name=str(asked.model), data_path=asked.rows, eval_ratio=0., max_length=asked.max_length,
                  output_dir=asked.folder, device="cpu",
                  num_train_epochs=asked.passes, max_steps=asked.steps, per_device_train_batch_size=asked.batch,
                  gradient_accumulation_steps=1,
                  learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_ratio=0.,
                  lora=LoRAConfig(r=asked.rank, lora_alpha=2 * asked.rank))
    return fields | asked.set


def main():
    asked = arguments()
    from sage_finetune.config import TrainingConfig
    from sage_finetune.trainer import LoRATrainer
    trainer, watch = LoRATrainer(TrainingConfig(**settings(asked))).setup(), Watch()
    watch.look(trainer.model)
    watch.begin()
    for step in trainer.steps():
        watch.read(step.tokens, step.target_tokens, step.tokens)
        watch.step()
        watch.losses.append(step.loss)
    watch.report("sage-finetune", settings=asked.set)


if __name__ == "__main__": main()
