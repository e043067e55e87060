"""Configs of axolotl as its users write them, with the keys of its examples and schemas:
taken over, refused by name, never passed over in silence"""
import json
import time

import pytest
import yaml

from sage_finetune import LoRATrainer, load_training_data
from sage_finetune.core.errors import ConfigError, DataError, RunError
from sage_finetune.data import axolotl
from sage_finetune.data.axolotl import axolotl_rows, prepare_axolotl, read_axolotl
from sage_finetune.data.rows import read_row, to_messages
from sage_finetune.runs.folder import read_meta

# every key of AxolotlInputConfig and of SFTDataset in axolotl 0.18.0 (067b021, src/axolotl/utils/schemas), by the names files use
KEYS = """
    accelerator_config activation_offloading adam_beta1 adam_beta2 adam_beta3 adam_epsilon adam_epsilon2 adapter added_tokens_overrides
    attn_implementation auto_find_batch_size auto_resume_from_checkpoints axolotl_config_path base_model base_model_config
    batch_flattening batch_size bench_dataset bench_split bf16 bfloat16 bnb_config_kwargs center_rewards_coefficient chat_template
    chat_template_jinja chat_template_kwargs chunked_cross_entropy chunked_cross_entropy_num_chunks cls_model_config comet_api_key
    comet_experiment_config comet_experiment_key comet_mode comet_online comet_project_name comet_workspace context_parallel_size
    cosine_constant_lr_ratio cosine_min_lr_ratio cpo_alpha curriculum_sampling dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_prefetch_factor dataset_exact_deduplication dataset_keep_in_memory dataset_num_proc
    dataset_prepared_path dataset_processes dataset_shard_idx dataset_shard_num datasets ddp ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_timeout deepcompile deepspeed default_system_message device device_map dion_lr dion_momentum
    dion_rank_fraction dion_rank_multiple_of do_bench_eval do_causal_lm_eval dp_replicate_size dp_shard_size dpo_beta
    dpo_generate_during_eval dpo_label_smoothing dpo_loss_type dpo_loss_weights dpo_norm_loss dpo_padding_free dpo_use_liger_kernel
    dpo_use_logits_to_keep dpo_use_weighting dynamic_checkpoint eaft_alpha eaft_k eager_attention early_stopping_patience ebft
    embedding_lr embedding_lr_scale embeddings_skip_upcast eot_tokens eval_batch_size eval_causal_lm_metrics eval_max_new_tokens
    eval_sample_packing eval_sequence_len eval_steps eval_strategy eval_table_size evals_per_epoch evaluation_strategy
    excess_length_strategy experimental_skip_move_to_device experts_implementation fix_untrained_tokens flash_attention
    flash_attn_cross_entropy flash_attn_d512 flash_attn_fuse_mlp flash_attn_rms_norm flash_optimum flex_attention flex_attn_compile_kwargs
    float16 float32 fp16 fp32_norm_classes fp32_norms fp8 fp8_enable_fsdp_float8_all_gather freeze_mm_modules fsdp fsdp_config
    fsdp_final_state_dict_type fsdp_version fused_attn_kernel gc_collect_steps gc_steps gemma4_hybrid_attn_impl generate_samples
    generation_do_sample generation_max_new_tokens generation_prompt_ratio generation_temperature generation_top_k generation_top_p gptq
    gpu_memory_limit gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs gradio_max_new_tokens
    gradio_server_name gradio_server_port gradio_share gradio_temperature gradio_title greater_is_better group_by_length heads_k_stride
    hf_mlflow_log_artifacts hf_use_auth_token hub_model_id hub_revision hub_strategy image_resize_algorithm image_size include_tkps
    include_tokens_per_second is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_preprocess is_qwen_derived_model
    jagged_restart_anneal_steps jagged_restart_steps jagged_restart_warmup_steps kto_desirable_weight kto_undesirable_weight
    large_head_attention layer_offloading learning_rate lisa_layers_attribute lisa_n_layers lisa_step_interval llama4_linearized_experts
    load_best_model_at_end load_in_4bit load_in_8bit local_rank logging_steps lora_alpha lora_alpha_pattern lora_dropout
    lora_embedding_kernel lora_fan_in_fan_out lora_mlp_kernel lora_model_dir lora_modules_to_save lora_o_kernel lora_on_cpu
    lora_qkv_kernel lora_r lora_rank_pattern lora_target_linear lora_target_modules lora_target_parameters loraplus_lr_embedding
    loraplus_lr_ratio loss_watchdog_patience loss_watchdog_threshold low_cpu_mem_usage lr_div_factor lr_groups lr_quadratic_warmup
    lr_scheduler lr_scheduler_kwargs max_grad_norm max_memory max_packed_sequence_len max_prompt_len max_steps mean_resizing_embeddings
    merge_lora merge_method metric_for_best_model micro_batch_size min_sample_len mlflow_experiment_name mlflow_run_name
    mlflow_tracking_uri model_config model_kwargs model_quantization_config model_quantization_config_kwargs model_revision model_type
    multipack_real_batches neftune_noise_alpha noisy_embedding_alpha num_dataset_shards_to_save num_epochs num_generation_samples
    num_labels optim_args optim_target_modules optimizer orpo_alpha otel_metrics_host otel_metrics_port output_dir
    overrides_of_model_config overrides_of_model_kwargs pad_to_multiple_of pad_to_sequence_len peft peft_autocast_adapter_dtype
    peft_ensure_weight_tying peft_init_lora_weights peft_layer_replication peft_layers_pattern peft_layers_to_transform
    peft_trainable_token_indices peft_use_dora peft_use_rslora plugins pose_max_context_len pose_num_chunks pose_split_on_token_ids
    precompute_ref_log_probs preprocess_iterable pretrain_multipack_attn pretrain_multipack_buffer_size pretraining_dataset
    pretraining_sample_concatenation process_reward_model processor_kwargs processor_type profiler_steps profiler_steps_start
    push_dataset_to_hub qat qgalore_cos_threshold qgalore_gamma_proj qgalore_proj_bits qgalore_proj_group_size qgalore_proj_quant
    qgalore_proj_type qgalore_queue_size qgalore_rank qgalore_scale qgalore_update_proj_gap qlora_sharded_model_loading quantization
    quantize_moe_experts ray_num_workers ray_run_name reinit_weights relora relora_cpu_offload relora_prune_method relora_prune_ratio
    remove_unused_columns resize_token_embeddings_to_32x resources_per_worker resume_from_checkpoint revision_of_model reward_model
    ring_attn_func rl rl_beta role_boundaries rope_scaling rpo_alpha s2_attention sage_attention sample_packing sample_packing_bin_size
    sample_packing_eff_est sample_packing_group_size sample_packing_mp_start_method sample_packing_sequentially save_first_step
    save_only_model save_safetensors save_steps save_strategy save_total_limit saves_per_epoch scaling_softmax scaling_softmax_bias
    scaling_softmax_factor sdp_attention sdpa_varlen seed selective_checkpointing sequence_len sequence_parallel_degree shrink_embeddings
    shuffle_before_merging_datasets shuffle_merged_datasets simpo_gamma skip_prepare_dataset special_tokens streaming
    streaming_multipack_buffer_size strict tensor_parallel_size test_datasets tf32 tiled_mlp tiled_mlp_num_shards
    tiled_mlp_use_original_mlp tokenizer_config tokenizer_legacy tokenizer_save_jinja_files tokenizer_type tokenizer_use_fast
    tokenizer_use_mistral_common tokens torch_compile torch_compile_backend torch_compile_mode torch_compile_options
    torch_empty_cache_steps torchdistx_path total_num_tokens total_supervised_tokens trackio_project_name trackio_run_name
    trackio_space_id train_on_inputs trainer_cls trl trust_remote_code type_of_model unfrozen_parameters use_comet use_eaft use_kernels
    use_mlflow use_onebitllms use_otel_metrics use_pose use_ray use_tensorboard use_trackio use_wandb val_set_size vllm wandb_entity
    wandb_log_model wandb_mode wandb_name wandb_project wandb_run_id wandb_watch warmup_ratio warmup_steps weight_decay world_size
    xformers_attention""".split()
ENTRY = """
    path split type input_transform shards shards_idx preprocess_shards conversation chat_template chat_template_jinja data_files
    input_format name ds_type field field_human field_model field_messages field_tools field_thinking template_thinking_key
    message_field_role message_field_content message_property_mappings message_field_training message_field_training_detail split_thinking
    logprobs_field temperature roles_to_train train_on_eos train_on_eot roles drop_system_message trust_remote_code revision""".split()

LORA = """
base_model: tiny
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
# hub_model_id: username/custom_model_name

datasets:
  - path: rows.jsonl
    type: alpaca

dataset_prepared_path:
val_set_size: 0.1
output_dir: ./outputs/lora-out

adapter: lora
lora_model_dir:

sequence_len: 2048
sample_packing: true
eval_sample_packing: true

lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules:
  - gate_proj
  - down_proj
  - q_proj

wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:

gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1

optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002

bf16: auto
tf32: false

gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
resume_from_checkpoint:
logging_steps: 1
attn_implementation: flash_attention_2

loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3

warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""
ROWS = [dict(instruction=f"Which colour has lamp {at}?", input="", output="Red.") for at in range(40)]
TURNS = [{"from": "system", "value": "Be short."}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.fixture
def place(tmp_path):
    "A folder with a config and its data"
    (tmp_path/"rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path/"talks.json").write_text(json.dumps([dict(conversations=TURNS)] * 3))
    (tmp_path/"texts.jsonl").write_text("".join(json.dumps(dict(text=f"Text {at}.")) + "\n" for at in range(4)))
    return tmp_path


def written(place, **keys):
    "The example with other keys; ... takes one out"
    content = yaml.safe_load(LORA) | keys
    (place/"lora.yml").write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not ...}))
    return place/"lora.yml"


def rows_of(place, **entry): return list(axolotl_rows([dict(path="rows.jsonl", type="alpaca") | entry], place/"lora.yml"))


def test_the_example_is_taken_over(place):
    (place/"lora.yml").write_text(LORA)
    found = read_axolotl(place/"lora.yml")
    ours = found.config
    assert ((ours.model_name, ours.lora.r, ours.lora.lora_alpha, ours.lora.target_modules, ours.max_length, ours.lora.lora_dropout)
        == ("tiny", 16, 32, ["gate_proj", "down_proj", "q_proj"], 2048, .05))
    assert ((ours.per_device_train_batch_size, ours.gradient_accumulation_steps, ours.learning_rate, ours.num_train_epochs, ours.optim)
        == (2, 2, 2e-4, 1, "adamw_8bit"))
    assert (ours.lr_scheduler_type, ours.warmup_ratio, ours.bf16, ours.gradient_checkpointing, ours.overlong) == ("cosine", .1, None, True,
        "drop")
    names = {key.name: key for key in found.keys}
    assert {"sample_packing", "attn_implementation", "excess_length_strategy (default)", "save_total_limit (default)"} <= names.keys()
    assert "more steps" in names["sample_packing"].remark and found.refused == {}
    assert "warmup_ratio=0.1" in str(found) and found._repr_html_().startswith("<table>")


def test_what_the_file_does_not_say_is_what_axolotl_takes(place):
    ours = read_axolotl(written(place, sequence_len=..., micro_batch_size=..., gradient_accumulation_steps=..., num_epochs=...,
        warmup_ratio=...,
        lr_scheduler=..., optimizer=..., gradient_checkpointing=..., lora_dropout=..., weight_decay=None)).config
    assert (ours.max_length, ours.effective_batch_size, ours.num_train_epochs, ours.warmup_ratio) == (512, 1, 1, .03)
    assert (ours.lr_scheduler_type, ours.optim, ours.gradient_checkpointing, ours.save_total_limit) == ("cosine", "adamw_torch_fused",
        False, 4)


@pytest.mark.parametrize("keys, fields", [
    (dict(lora_target_linear=True, lora_target_modules=...), dict(target_modules="all-linear")),
    (dict(lora_target_linear=True), dict(target_modules="all-linear")), (dict(lora_target_modules="q_proj"), dict(target_modules="q_proj")),
    (dict(lora_target_modules="all-linear"), dict(target_modules="all-linear")),
    (dict(lora_modules_to_save=["lm_head"]), dict(modules_to_save=["lm_head"])),
    (dict(peft_use_dora=True, peft_use_rslora=True), dict(use_dora=True, use_rslora=True)),
    (dict(peft_init_lora_weights="pissa"), dict(init_lora_weights="pissa")),
    (dict(peft_init_lora_weights=True), dict(init_lora_weights="default"))], ids=str)
def test_values_of_the_adapter_become_ours(place, keys, fields):
    lora = read_axolotl(written(place, **keys)).config.lora
    assert {name: getattr(lora, name) for name in fields} == fields


@pytest.mark.parametrize("keys, fields", [
    (dict(adapter="qlora", load_in_4bit=True, load_in_8bit=False), dict(load_in_4bit=True, load_in_8bit=False)),
    (dict(load_in_8bit=True), dict(load_in_8bit=True)), (dict(bf16=True), dict(bf16=True)),
    (dict(bf16=False, fp16=True), dict(fp16=True, bf16=False)),
    (dict(float32=True, bf16=None), dict(fp16=False, bf16=False)), (dict(optimizer="adamw_bnb_8bit"), dict(optim="adamw_8bit")),
    (dict(excess_length_strategy="truncate"), dict(overlong="truncate")), (dict(excess_length_strategy="raise"), dict(overlong="error")),
    (dict(max_steps=9), dict(max_steps=9)), (dict(max_steps=-1), dict(max_steps=None)), (dict(eval_steps=5), dict(eval_steps=5)),
    (dict(save_steps=7, saves_per_epoch=...), dict(save_steps=7)), (dict(early_stopping_patience=3), dict(early_stopping_patience=3)),
    (dict(neftune_noise_alpha=5, loraplus_lr_ratio=16), dict(neftune_noise_alpha=5, loraplus_lr_ratio=16)),
    (dict(tokens=["<a>"]), dict(new_tokens=["<a>"])), (dict(special_tokens=dict(additional_special_tokens=["<b>"])),
    dict(new_tokens=["<b>"])),
    (dict(learning_rate="2e-4"), dict(learning_rate=2e-4)), (dict(use_tensorboard=True), dict(report_to="tensorboard")),
    (dict(gradient_checkpointing="unsloth"), dict(gradient_checkpointing=True)), (dict(torch_compile="auto"), dict(torch_compile=None)),
    (dict(group_by_length=True, deepspeed=None, rl=None, train_on_inputs=False, plugins=["axolotl.integrations.liger.LigerPlugin"],
        liger_rope=True, wandb_watch="all", fsdp=[], strict=False), {})], ids=str)
def test_values_become_ours(place, keys, fields):
    config = read_axolotl(written(place, **keys)).config
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("keys, said", [
    (dict(rl="dpo"), "rl: "), (dict(reward_model=True), "reward_model: "), (dict(train_on_inputs=True), "train_on_inputs: "),
    (dict(adapter="llama-adapter"), "adapter: 'llama-adapter'"), (dict(adapter=...), "adapter (lora or qlora"),
    (dict(adapter="qlora"), "load_in_4bit"),
    (dict(lora_target_modules=...), "lora_target_linear"), (dict(lora_r=...), "lora_r (the rank"),
    (dict(learning_rate=...), "learning_rate ("),
    (dict(deepspeed="deepspeed_configs/zero3.json"), "deepspeed: Runs share"),
    (dict(fsdp_config=dict(offload=True)), "fsdp_config: Runs share"),
    (dict(pretraining_dataset="a/b"), "type: completion"), (dict(plugins=["evil.Plugin"]), "evil.Plugin"),
    (dict(adam_beta2=.95), "adam_beta2: "),
    (dict(lora_rnak=8), "lora_rnak: not known here"), (dict(num_epochs=2.5), "max_steps"), (dict(bf16="full"), "bf16: 'full'"),
    (dict(lr_scheduler="rex"), "lr_scheduler_type"), (dict(optimizer="muon"), "optim"),
    (dict(base_model_config="other/model"), "base_model_config: "),
    (dict(model_revision="main"), "model_revision: "), (dict(batch_size=8), "gradient_accumulation_steps"),
    (dict(warmup_steps="few"), "warmup_steps"),
    (dict(chat_template_kwargs=dict(enable_thinking=False)), "chat_template_kwargs: "), (dict(special_tokens=dict(odd="a")), "odd"),
    (dict(processor_type="AutoProcessor"), "images"), (dict(peft_init_lora_weights="olora"), "olora"),
    (dict(min_sample_len=20), "min_sample_len: "),
    (dict(tokens=dict(pad_token="a")), "tokens: "), (dict(datasets=dict(path="a")), "datasets: "),
    (dict(shuffle_merged_datasets=False), "shuffle_merged"),
    (dict(lora_r=0), "LoRAConfig.r"), (dict(val_set_size="some"), "val_set_size: ")], ids=str)
def test_what_would_train_another_model_is_refused_by_name(place, keys, said):
    with pytest.raises(ConfigError) as error: prepare_axolotl(written(place, **keys), place/"run")
    assert said in str(error.value) and not (place/"run").exists()


def test_all_that_is_wrong_is_said_at_once(place):
    with pytest.raises(ConfigError) as error: read_axolotl(written(place, rl="kto", qat=dict(a=1), sampel_packing=True, deepspeed="a.json"))
    assert all(f"{name}: " in str(error.value) for name in ("rl", "qat", "sampel_packing", "deepspeed"))


@pytest.mark.parametrize("name", KEYS)
def test_every_key_of_theirs_is_known(name):
    "Taken, explained, or refused with a sentence of its own; a table is a promise for what a file may hold"
    assert "not known here" not in axolotl.KEYS.refusal(name, "a value that switches it on")


@pytest.mark.parametrize("name", ENTRY)
def test_every_key_of_a_data_set_is_known(name):
    assert "not known here" not in axolotl._ENTRY.refusal(name, "a value")


def test_a_file_is_never_a_permission(place):
    found = read_axolotl(written(place, trust_remote_code=True, wandb_project="mine"))
    assert not found.config.trust_remote_code and found.config.report_to == "none" and {*found.refused} == {"trust_remote_code",
        "report_to"}
    assert read_axolotl(place/"lora.yml", trust_remote_code=True, report_to="wandb").config.trust_remote_code


@pytest.mark.parametrize("keys, tools", [(dict(use_trackio=True, use_tensorboard=True), "tensorboard,trackio"),
    (dict(use_trackio=True, use_wandb=False, wandb_project="a"), "trackio"), (dict(wandb_project="a", use_wandb=None), "wandb")])
def test_where_its_curves_go_is_asked_for(place, keys, tools):
    found = read_axolotl(written(place, **keys))
    assert found.config.report_to == "none" and f"--report-to {tools}," in found.refused["report_to"]
    assert "hf_secret" not in str(read_axolotl(written(place, hf_use_auth_token="hf_secret", comet_api_key="hf_secret")))


# ---- rows -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("entry, row, expected", [
    (dict(type="alpaca"), dict(instruction="a", input="b", output="c", text="rendered"), [("user", "a\n\nb"), ("assistant", "c")]),
    (dict(type="gpteacher"), dict(instruction="a", input="", response="c"), [("user", "a"), ("assistant", "c")]),
    (dict(type="alpaca_chat.load_qa"), dict(question="a", answer="c"), [("user", "a"), ("assistant", "c")]),
    (dict(type="alpaca_w_system.load_open_orca"), dict(system_prompt="s", question="a", response="c"),
        [("system", "s"), ("user", "a"), ("assistant", "c")]),
    (dict(type=dict(system_prompt="s", field_instruction="q", field_output="a", format="{instruction}", no_input_format="{instruction}")),
        dict(q="a", a="c"), [("system", "s"), ("user", "a"), ("assistant", "c")]),
    (dict(type="chat_template"), dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="c")]),
        [("user", "a"), ("assistant", "c")]),
    (dict(type="chat_template", field_messages="talk", message_property_mappings=dict(role="who", content="what"),
        roles=dict(user=["asker"], assistant=["helper"])),
        dict(talk=[dict(who="asker", what="a"), dict(who="helper", what="c")], system="s"),
            [("system", "s"), ("user", "a"), ("assistant", "c")]),
    (dict(type="chat_template", field_messages="conversations", message_field_role="from", message_field_content="value",
        drop_system_message=True), dict(conversations=TURNS), [("user", "a"), ("assistant", "b")]),
    (dict(type="sharegpt"), dict(conversations=TURNS), [("system", "Be short."), ("user", "a"), ("assistant", "b")])], ids=str)
def test_rows_are_read_as_their_entry_says(place, entry, row, expected):
    (place/"rows.jsonl").write_text(json.dumps(row) + "\n")
    found, = rows_of(place, **entry)
    assert [(turn["role"], turn["content"]) for turn in to_messages(found)] == expected


def test_marks_calls_and_tools_stay(place):
    "Turns that are not to be trained on, a call, and the tools beside it"
    call = dict(type="function", function=dict(name="add", arguments=dict(a=1)))
    talk = [dict(role="user", content="a"), dict(role="assistant", content="wrong", learn=False), dict(role="user", content="again"),
        dict(role="assistant", content="", tool_calls=[call], learn=True), dict(role="tool", content="3"),
            dict(role="assistant", content="It is 3.")]
    (place/"rows.jsonl").write_text(json.dumps(dict(messages=talk, tools=[dict(name="add", parameters={})])) + "\n")
    found, = rows_of(place, type="chat_template", message_field_training="learn")
    sample = read_row(found)
    assert sample.tools and sample.messages[3]["tool_calls"] and sample.messages[1]["train"] is False


@pytest.mark.parametrize("entry, said", [
    (dict(type="input_output"), "input_output"), (dict(type="steps.odd"), "steps.odd"), (dict(type=None), "has type None"),
    (dict(type=dict(field_question="a")), "field_question"), (dict(path="none.jsonl"), "neither beside it nor a name on the Hub"),
    (dict(path="s3://bucket/rows"), "neither beside it"), (dict(path="owner/none_such"), "Save it as a file"),
    (dict(split="train[:10%]"), "Save the rows you mean"), (dict(path="owner/none", split="train[:10%]"), "Save the rows you mean"),
    (dict(shards=4), "shards: "), (dict(name="subset"), "name: A subset"), (dict(train_on_eos="all"), "train_on_eos: 'all'"),
    (dict(roles_to_train=["user"]), "Only the assistant"), (dict(data_files="a.json"), "data_files"), (dict(odd=1), "odd: not known"),
    (dict(path="/dev/zero"), "no ordinary file"), (dict(path="a" * 5000), "names no data"), (dict(path=3), "names no data")],
    ids=lambda value: str(value)[:60])
def test_data_that_cannot_be_trained_on(place, entry, said):
    with pytest.raises((ConfigError, RunError)) as error: rows_of(place, **entry)
    assert said in str(error.value)


def test_files_of_a_data_set(place):
    assert len(rows_of(place, path="json", data_files=["rows.jsonl", "rows.jsonl"])) == 80
    assert len(rows_of(place, path=str(place/"rows.jsonl"), ds_type="json", split="train")) == 40
    (place/"configs").mkdir()
    assert len(list(axolotl_rows([dict(path="rows.jsonl", type="alpaca")], place/"configs"/"a.yml"))) == 40
    with pytest.raises(ConfigError, match="entry 1 of datasets"): list(axolotl_rows(["rows.jsonl"], place/"a.yml"))


@pytest.mark.parametrize("row", [3, None, "text", {}, dict(messages=None), dict(messages="hi"), dict(messages=["hi"]), dict(messages=[]),
    dict(messages=[dict(role="user", content="a"), "lost"]), dict(messages=[dict(role=["user"], content="a")]),
    dict(messages=[dict(who="a")])], ids=str)
def test_no_turn_is_lost_in_silence(place, row):
    (place/"rows.jsonl").write_text("[" + json.dumps(row) + "]")
    with pytest.raises(DataError, match="rows.jsonl"): rows_of(place, type="chat_template")


def test_a_run_of_it_trains(place):
    path = written(place, max_steps=3, datasets=[dict(path="rows.jsonl", type="alpaca"),
        dict(path="talks.json", type="chat_template", field_messages="conversations",
            message_property_mappings=dict(role="from", content="value")),
        dict(path="texts.jsonl", type="completion")], sequence_len=128, optimizer="adamw_torch", gradient_checkpointing=False,
            val_set_size=4)
    found = prepare_axolotl(path, place/"run")
    run = found.config.output_dir
    assert not (place/"outputs").exists() and len(load_training_data(found.config.data_path)) == 47
    assert [key.here.rpartition("/")[0].partition(" rows")[0] for key in found.keys if key.name.startswith("datasets[")] == ["40", "3", "4"]
    result = LoRATrainer(read_meta(run).to_config()).train(show=False)
    assert result.steps == 3 and (run/"lora_weights"/"adapter_model.safetensors").is_file()
    with pytest.raises(RunError, match="already holds a run"): prepare_axolotl(path, run)


def test_a_file_that_does_not_say_when_to_save_saves_once_an_epoch(place):
    silent = dict(save_steps=..., save_strategy=..., saves_per_epoch=..., warmup_ratio=...)
    assert prepare_axolotl(written(place, **silent), place/"run").config.save_steps == 9
    assert prepare_axolotl(written(place, **silent | dict(save_steps=4)), place/"other").config.save_steps == 4


def test_steps_follow_from_the_rows(place):
    "36 rows in fours are 9 steps an epoch"
    found = prepare_axolotl(written(place, num_epochs=2, warmup_ratio=..., warmup_steps=3, saves_per_epoch=3, evals_per_epoch=2),
        place/"run")
    config = found.config
    assert (config.eval_ratio, round(config.warmup_ratio * 18), config.save_steps, config.eval_steps) == (.1, 3, 3, 5)
    share = prepare_axolotl(written(place, num_epochs=2, save_steps=.25, eval_steps=.5, saves_per_epoch=..., evals_per_epoch=...),
        place/"shares").config
    assert (share.save_steps, share.eval_steps) == (5, 9)


def test_held_out_rows_of_their_own(place):
    own = [dict(row, instruction=f"Say it again: {row['instruction']}") for row in ROWS[:7]] + ROWS[:3]
    (place/"own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    found = prepare_axolotl(written(place, val_set_size=0, test_datasets=[dict(path="own.jsonl", type="alpaca", split="train")]),
        place/"run")
    assert found.config.eval_ratio == 0 and len(load_training_data(found.config.eval_path)) == 7
    with pytest.raises(DataError, match="holds out the questions it trains on"):
        prepare_axolotl(written(place, val_set_size=0, test_datasets=[dict(path="rows.jsonl", type="alpaca")]), place/"leak")
    with pytest.raises(ConfigError, match="test_datasets and val_set_size"):
        prepare_axolotl(written(place, test_datasets=[dict(path="rows.jsonl", type="alpaca")]), place/"other")


@pytest.mark.parametrize("text", ["", "- a", "a: &x [1]\nb: *x", "a: !!python/name:os.system", "base_model: a\nbase_model: b", "a: [",
    "[" * 3000,
    "a: " + "x" * (1 << 21), "\x1b[2J: 1"], ids=range(9))
def test_a_file_that_is_no_config(place, text):
    (place/"bad.yml").write_text(text)
    with pytest.raises(ConfigError) as error: read_axolotl(place/"bad.yml")
    assert "bad.yml" in str(error.value) and len(str(error.value)) < 900 and "\x1b" not in str(error.value)


def test_what_is_shown_is_harmless(place):
    found = read_axolotl(written(place, wandb_name="\x1b[2J<script>alert(1)</script>\nnew line"))
    assert "\x1b" not in str(found) and "<script>" not in found._repr_html_()


def test_many_keys_end_in_time(place):
    (place/"many.yml").write_text("".join(f"k{number}: 1\n" for number in range(20_000)))
    began = time.monotonic()
    with pytest.raises(ConfigError): read_axolotl(place/"many.yml")
    assert time.monotonic() - began < 60
