"sage_finetune. It packs, chooses its format and its engine by itself; the job's `set` changes any field of TrainingConfig."
from peers.common import LEARNING_RATE, Watch

from .common import gpu_memory, told, wait


def config_of(asked):
    "The job as a TrainingConfig"
    from sage_finetune.config import LoRAConfig, TrainingConfig
    config = TrainingConfig(
        model_name=asked.model, load_in_4bit=asked.method == "qlora", device=asked.device,
        lora=LoRAConfig(r=asked.rank, lora_alpha=2 * asked.rank),
        data_path=asked.rows, eval_ratio=0., max_length=asked.length, output_dir=asked.folder/"run", data_cache=asked.folder/"prepared",
        num_train_epochs=1, max_steps=asked.steps, per_device_train_batch_size=asked.batch, gradient_accumulation_steps=1,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_ratio=0.)
    if asked.checkpointing: config.gradient_checkpointing = True  # else it decides
    for name, value in asked.set.items(): setattr(config, name, value)
    return config


def chosen(trainer):
    "What the plan says about how it computes"
    try: plan = str(trainer.describe())
    except RuntimeError: return {}  # the plan tries a batch, for which there may be no room any more
    lines = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in plan.splitlines() if len(line.split()) > 1}
    return {name: lines[name] for name in ("engine", "precision") if name in lines}


def train(asked):
    "The job, step by step"
    from sage_finetune.trainer import LoRATrainer
    trainer, watch = LoRATrainer(config_of(asked)).setup(), Watch()
    watch.look(trainer.model)
    wait(asked)
    watch.begin()
    for step in trainer.steps():
        watch.read(step.tokens, step.target_tokens, 0)
        wait(asked)
        watch.step()
        watch.losses.append(step.loss)
    memory = gpu_memory(asked)  # before the plan is asked, which tries a batch
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    how = dict(checkpointing=checkpointing) | chosen(trainer)
    watch.report("sage-finetune", "bitsandbytes", outcome="ok", **memory, how=how)


if __name__ == "__main__": told(train)
