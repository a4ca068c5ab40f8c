"""Settings of published autoencoders: those that are applied, and those that change no number of a
trained one. Any other is refused, as an unknown tensor is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from patchsweep.errors import BadInput


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What the modules of this package read, under SAE-Lens' names.
APPLIED = _words("""
    activation_fn activation_fn_kwargs activation_fn_str apply_b_dec_to_input architecture at
    d_in d_out d_sae finetuning_scaling_factor hook_head_index hook_head_index_out hook_layer
    hook_layer_out hook_name hook_name_out hook_point hook_point_head_index hook_point_layer k
    layer meta metadata model_from_pretrained_kwargs norm_scaling_factor normalize_activations
    rescale_acts_by_decoder_norm reshape_activations
    """)
SAE_LENS_ONLY = _words("""
    activation_fn activation_fn_kwargs activation_fn_str hook_head_index hook_head_index_out
    hook_point hook_point_head_index hook_point_layer meta metadata
    """)
# SAE-Lens: where it came from, and how it was trained.
TRAINING = _words("""
    _run_name act_store_device adam_beta1 adam_beta2 autocast autocast_data autocast_lm
    autocast_sae aux_loss_coefficient b_dec_init_method cached_activations_path checkpoint_path
    compile_llm compile_sae context_size dataset dataset_path dataset_trust_remote_code
    dead_feature_estimation_method dead_feature_threshold dead_feature_window
    decoder_heuristic_init decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init
    detach_matryoshka_losses device disable_concat_sequences dtype eval_batch_size_prompts
    eval_every_n_wandb_logs exclude_special_tokens expansion_factor feature_reinit_scale
    feature_sampling_method feature_sampling_window finetuning_method finetuning_tokens
    from_pretrained_path ghost_grads_coefficient hook_eval hook_point_eval
    init_encoder_as_decoder_transpose is_dataset_tokenized jumprelu_bandwidth
    jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_tanh_scale l0_coefficient
    l0_warm_up_steps l1_coefficient l1_loss_wd_norm l1_warm_up_steps llm_compilation_mode
    log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb logger lp_norm lr
    lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps matryoshka_widths model_batch_size
    model_class_name model_kwargs model_name mse_loss_normalization n_batches_for_norm_estimate
    n_batches_in_buffer n_checkpoints n_eval_batches n_restart_cycles neuronpedia_id
    new_cached_activations_path noise_scale normalize_sae_decoder pre_act_loss_coefficient
    prepend_bos resample_batches resume resume_from_checkpoint run_name sae_compilation_mode
    sae_lens_training_version sae_lens_version scale_sparsity_penalty_by_decoder_norm seed
    seqpos seqpos_slice sequence_separator_token sparsity_threshold store_batch_size
    store_batch_size_prompts streaming tokens_per_buffer topk_threshold_lr total_training_steps
    total_training_tokens train_batch_size train_batch_size_tokens training_tokens unique_id
    use_cached_activations use_error_term use_ghost_grads use_matryoshka_aux_loss
    use_sparse_activations verbose wandb_entity wandb_id wandb_log_frequency wandb_project
    """)
SPARSIFY = _words("""
    activation d_in expansion_factor gram_lookup hookpoint k multi_topk normalize_decoder
    num_latents signed skip_connection transcode
    """)
# Gemma Scope 2, and what the metadata of a file say of it.
BESIDE = _words("""
    affine_connection author description format hf_hook_point_in hf_hook_point_out l0 license
    name type width
    """)
# How TransformerLens is to load the model; the first change activations that can be read here.
CHANGING = ("center_writing_weights", "fold_value_biases", "refactor_factored_attn_matrices")
LOADING = _words("""
    attn_implementation cache_dir center_unembed checkpoint_index checkpoint_value device dtype
    default_padding_side default_prepend_bos first_n_layers fold_ln move_to_device n_devices
    revision torch_dtype trust_remote_code
    """)


def check_known(where: str, said: Mapping[str, Any], known: Collection[str]) -> None:
    """BadInput for settings that are not known here: what they do cannot be guessed."""
    unknown = [key for key, value in said.items() if key not in known and value is not None]
    if unknown:
        raise BadInput(
            f"SAE {where} has settings {', '.join(unknown)}, unknown here: they may change what it "
            "computes; take out those that do not"
        )


def merged(where: str, *parts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of several places as one; BadInput if two of them contradict."""
    out: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if value is None:
                continue
            if out.setdefault(key, value) != value:
                raise BadInput(f"SAE {where}: {key} is {out[key]!r} and {value!r}: keep one")
    return out


def check_loading(where: str, said: Mapping[str, Any]) -> None:
    """BadInput for an autoencoder of a model whose weights were processed so that it computes other
    activations."""
    kwargs = said.get("model_from_pretrained_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise BadInput(f"SAE {where}: model_from_pretrained_kwargs is no table: fetch it again")
    check_known(where, kwargs, {*LOADING, *CHANGING})
    if kwargs.get("center_writing_weights"):
        raise BadInput(
            f"SAE {where} reads activations without their mean (center_writing_weights), as this "
            "model's are not: fold that into it: b_enc -= b_dec @ W_enc, then W_enc -= "
            "W_enc.mean(0), apply_b_dec_to_input false, and take center_writing_weights out"
        )
    if changed := [key for key in CHANGING if kwargs.get(key)]:
        raise BadInput(
            f"SAE {where} is of a model loaded with {', '.join(changed)}, which has other "
            "activations than this one: use an autoencoder of the model as it is"
        )
