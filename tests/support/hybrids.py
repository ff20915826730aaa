"""Tiny transformers models whose tokens meet outside of attention: settings of rows of the zoo."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_HEADS = {**_GROUPED, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
_LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_local_experts": 4,
    "n_shared_experts": 1,
    **_EXPERTS,
}
# Six heads of values over three of keys: neither is a multiple of four.
_GATED = {
    **_HEADS,
    **_LAYERS,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
_MAMBA2 = {
    **_GROUPED,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 4,
    "mamba_chunk_size": 8,
}
#: Settings of all of them: with small weights, hardly anything comes of the tokens of other slices.
STRONG = {"initializer_range": 0.2}

#: Arguments of `zoo.Entry`.
HYBRIDS: list[dict[str, Any]] = [
    {"family": "Qwen3Next", "sizes": {**_GATED, **_EXPERTS, "num_experts": 4}, "why": "gated delta rule, experts"},
    {"family": "Qwen3_5", "config": "Qwen3_5TextConfig", "sizes": _GATED, "why": "gated delta rule"},
    {
        "family": "Qwen3_5Moe",
        "config": "Qwen3_5MoeTextConfig",
        "sizes": {**_GATED, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
        "why": "gated delta rule, experts",
    },
    {
        "family": "OlmoHybrid",
        "sizes": {**_GATED, "linear_num_key_heads": 5, "linear_num_value_heads": 5},
        "why": "gated delta rule",
    },
    {
        "family": "LaraMini",
        "sizes": {**_GATED, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
        "why": "gated delta rule, experts",
    },
    {
        "family": "KimiLinear",
        "sizes": {
            **_SIZES,
            **_LATENT,
            **_LAYERS,
            "num_key_value_heads": 4,
            "linear_head_dim": 8,
            "linear_num_heads": 5,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "why": "delta rule gated by channels, latent attention, experts",
    },
    {
        "family": "BailingHybrid",
        "sizes": {
            **_SIZES,
            **_LATENT,
            **_LAYERS,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "num_mtp_layers": 0,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "why": "delta rule gated by channels, latent attention, experts",
    },
    {"family": "Mamba", "sizes": {"hidden_size": 31, "num_hidden_layers": 2, "state_size": 4}, "why": "selective scan"},
    {
        "family": "FalconMamba",
        "sizes": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "why": "selective scan",
    },
    {
        "family": "Jamba",
        "sizes": {
            **_GROUPED,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
        },
        "why": "selective scan, experts",
    },
    {
        "family": "Zamba",
        "sizes": {
            **_SIZES,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        "why": "selective scan, a shared layer of attention",
    },
    {
        "family": "Mamba2",
        "sizes": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "state_size": 4,
            "chunk_size": 8,
        },
        "why": "state spaces",
    },
    {"family": "Bamba", "sizes": {**_MAMBA2, "attn_layer_indices": [1]}, "why": "state spaces"},
    {
        "family": "GraniteMoeHybrid",
        "sizes": {
            **_MAMBA2,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
        },
        "why": "state spaces, experts",
    },
    {
        "family": "FalconH1",
        "sizes": {**_MAMBA2, "mamba_n_heads": 6, "mamba_d_ssm": 48},
        "why": "state spaces beside attention",
    },
    {
        "family": "NemotronH",
        "sizes": {
            **_HEADS,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "attention", "moe", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 4,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 16,
            **_EXPERTS,
        },
        "why": "state spaces, experts",
    },
    {
        "family": "Zamba2",
        "sizes": {
            **_SIZES,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "mamba_d_state": 4,
            "n_mamba_heads": 8,
            "mamba_ngroups": 2,
            "chunk_size": 8,
            "adapter_rank": 4,
        },
        "why": "state spaces, a shared layer of attention",
    },
    {"family": "Lfm2", "sizes": {**_GROUPED, "layer_types": ["conv", "full_attention"]}, "why": "convolutions"},
    {
        "family": "Lfm2Moe",
        "sizes": {
            **_GROUPED,
            **_EXPERTS,
            "layer_types": ["conv", "full_attention"],
            "num_dense_layers": 1,
            "num_experts": 4,
        },
        "why": "convolutions, experts",
    },
    {
        "family": "Lfm3",
        "sizes": {**_HEADS, "sliding_window": 7, "layer_types": ["conv", "full_attention"]},
        "why": "convolutions",
    },
    {
        "family": "Inkling",
        "config": "InklingTextConfig",
        "sizes": {
            **_HEADS,
            **_EXPERTS,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 7,
            "d_rel": 4,
            "rel_extent": 16,
            "n_routed_experts": 4,
            "unpadded_vocab_size": None,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "why": "position bias, joined",
    },
]


def decay_slowly(model: nn.Module) -> None:
    """Has states remember many tokens."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.linspace(-3, 0, parameter.numel()).view_as(parameter))
