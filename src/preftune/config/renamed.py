"""Arguments and values that TRL 1.16 and transformers 5 no longer have, and what to write instead.

An entry counts only where the trainer's config class has no such field: `max_completion_length` is CPO's and ORPO's
still. tests/config/test_renamed.py proves that each is gone from DPOConfig, and that what is advised exists.
"""

ONE_LIMIT = "TRL limits prompt and answer together now: write train.max_length=1024"
ADAPTER_REFERENCE = "is gone: with an adapter, the reference is the model with the adapter switched off; leave it out"
TOKENIZER = "preftune loads the tokenizer that belongs to model.path; leave it out"
DTYPE = "write model.dtype=bfloat16"

KEYS = {
    # TRL's trainers
    "max_prompt_length": ONE_LIMIT,
    "max_completion_length": ONE_LIMIT,
    "max_target_length": ONE_LIMIT,
    "max_seq_length": "is now train.max_length",
    "max_tokens": "write train.max_length=1024",
    "rpo_alpha": "is now a second loss with a weight: write loss=dpo_sft",
    "reference_free": "is gone: a loss without a reference is loss=simpo, loss=cpo or loss=orpo",
    "force_use_ref_model": ADAPTER_REFERENCE,
    "tokenizer": TOKENIZER,
    "processing_class": TOKENIZER,
    "padding_value": "is gone: write model.pad_token=<token> where the tokenizer's own is wrong",
    "use_liger_loss": "is gone: TRL's own fused head is always on",
    "tools": "is gone: tools are a column of the data",
    # transformers.TrainingArguments
    "evaluation_strategy": "is now train.eval_strategy",
    "no_cuda": "is now hardware.use_cpu: write hardware=cpu",
    "per_gpu_train_batch_size": "is now hardware.per_device_train_batch_size",
    "group_by_length": "is now train.train_sampling_strategy=group_by_length (SFT only; fastpath sorts pairs)",
    "warmup_ratio": "is now train.warmup_steps: below 1 it is a fraction of all steps, such as 0.1",
    "overwrite_output_dir": "is gone: a run is never overwritten; write resume=true, or another output_dir",
    "logging_dir": "is gone: metrics go to <output_dir>/metrics.jsonl and to tracking.report_to",
    "save_safetensors": "is gone: weights are always saved as safetensors; leave it out",
    "adafactor": "is now hardware.optim=adafactor",
    "include_tokens_per_second": "is gone: preftune logs tokens_per_second by itself; leave it out",
    # words of TRL's own command line, and common short forms
    "model_name": "write model=path model.path=<folder or hub id>",
    "model_name_or_path": "write model=path model.path=<folder or hub id>",
    "ref_model": "preftune derives the reference from model.path; leave it out",
    "dataset": "write data=<choice>, or data=file data.path=<file>",
    "dataset_name": "write data=<choice>, or data=file data.path=<file>",
    "torch_dtype": DTYPE,
    "use_peft": "write lora=lora, or lora=none for full fine-tuning",
    "lora_r": "write lora.r=16",
    "rank": "write lora.r=16",
    "load_in_4bit": "write lora=qlora",
    "load_in_8bit": "write lora=qlora lora.quantization.load_in_4bit=false lora.quantization.load_in_8bit=true",
    "lr": "write train.learning_rate=5e-6",
    "epochs": "write train.num_train_epochs=1",
    "num_epochs": "write train.num_train_epochs=1",
    "steps": "write train.max_steps=100",
    "batch_size": "write hardware.per_device_train_batch_size=4",
    "grad_accum": "write hardware.gradient_accumulation_steps=4",
    "gamma": "write loss=simpo loss.gamma_beta_ratio=0.5",
}

VALUES = {
    ("optim", "adam"): "is called adamw_torch",
    ("optim", "adamw"): "is called adamw_torch",
    ("optim", "adamw_hf"): "is gone: write adamw_torch",
    ("loss_type", "kto_pair"): "is gone: KTO is a trainer of its own: write loss=kto",
    ("loss_type", "aot_pair"): "is now aot: write loss=aot",
    ("loss_type", "simpo"): "needs another trainer: write loss=simpo",
    ("loss_type", "orpo"): "needs another trainer: write loss=orpo",
    ("loss_type", "kto"): "needs another trainer: write loss=kto",
    ("loss_type", "cdpo"): "write loss=robust; its file says which label_smoothing is cDPO's",
    ("loss_type", "dpo"): "is called sigmoid: write loss=dpo",
    ("loss_type", "slic"): "is called hinge: write loss=hinge",
    ("loss_type", "bco"): "is called bco_pair: write loss=bco",
}

# Trainer arguments that preftune sets from a key of its own
OURS = {
    "resume_from_checkpoint": "resume",
    "model_init_kwargs": "model.kwargs",
    "chat_template_path": "model.chat_template",
    "eos_token": "model.eos_token",
    "pad_token": "model.pad_token",
    "trust_remote_code": "model.trust_remote_code",
    "output_dir": "output_dir",
    "report_to": "tracking.report_to",
    "run_name": "tracking.run_name",
    "project": "tracking.project",
    "dataset_text_field": "data",
}
