"""Every denoiser class at a tiny size, and what it is called with; two samples each."""

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Inputs = dict[str, Any]

BATCH, WORDS = 2, 6


def tokens(width: int, count: int = WORDS) -> Tensor:
    return torch.randn(BATCH, count, width)


def picture(channels: int, size: int = 8) -> Tensor:
    return torch.randn(BATCH, channels, size, size)


def video(channels: int, frames: int = 2, size: int = 8) -> Tensor:
    return torch.randn(BATCH, channels, frames, size, size)


def ones(count: int = WORDS) -> Tensor:
    return torch.ones(BATCH, count, dtype=torch.long)


def at(timestep: float) -> Tensor:
    return torch.full((BATCH,), timestep)


def picture_and_words() -> Inputs:
    return {"hidden_states": picture(4), "encoder_hidden_states": tokens(8)}


def video_and_words() -> Inputs:
    return {"hidden_states": video(4), "encoder_hidden_states": tokens(8)}


def pooled_video() -> Inputs:
    return {**video_and_words(), "encoder_attention_mask": ones(), "pooled_projections": torch.randn(BATCH, 8)}


def patches_and_words(axes: int = 3) -> Inputs:
    """A picture in 16 patches, and where patches and words are."""
    places = {"img_ids": torch.zeros(16, axes), "txt_ids": torch.zeros(WORDS, axes)}
    return {"hidden_states": tokens(4, 16), "encoder_hidden_states": tokens(8), **places}


def sizes() -> Inputs:
    """Original and target size and crop of each sample."""
    square = torch.full((BATCH, 2), 8.0)
    return {"original_size": square, "target_size": square, "crop_coords": torch.zeros(BATCH, 2)}


UNET = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
CROSS = {"cross_attention_dim": 8, "attention_head_dim": 4}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
LAYERS = {**HEADS, "num_layers": 2}
DUAL = {**LAYERS, "num_single_layers": 2}
CHANNELS = {"in_channels": 4, "out_channels": 4}
WAN = {**LAYERS, **CHANNELS, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16, "rope_max_seq_len": 16}
COGVIDEOX = {
    **LAYERS,
    **CHANNELS,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": WORDS,
}
HUNYUAN_VIDEO = {
    **DUAL,
    "num_refiner_layers": 1,
    **CHANNELS,
    "text_embed_dim": 8,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 2, 2),
    "guidance_embeds": False,
}
LTX2 = {
    **LAYERS,
    **CHANNELS,
    "cross_attention_dim": 16,
    "caption_channels": 8,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
}

TINY: dict[str, tuple[dict[str, Any], Callable[[], Inputs]]] = {
    "UNet2DModel": (
        {
            **UNET,
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 4,
        },
        lambda: {"sample": picture(3)},
    ),
    "UNet2DConditionModel": (
        {
            **UNET,
            **CROSS,
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        lambda: {"sample": picture(4), "encoder_hidden_states": tokens(8)},
    ),
    "UNet3DConditionModel": (
        {
            **UNET,
            **CROSS,
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda: {"sample": video(4), "encoder_hidden_states": tokens(8)},
    ),
    "UNetMotionModel": (
        {
            **UNET,
            "cross_attention_dim": 8,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        },
        lambda: {"sample": video(4), "encoder_hidden_states": torch.randn(2 * BATCH, WORDS, 8)},
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 8,
            "num_attention_heads": (2, 4),
            "sample_size": 8,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        lambda: {
            "sample": torch.randn(BATCH, 2, 8, 8, 8),
            "encoder_hidden_states": tokens(8, 1),
            "added_time_ids": torch.rand(BATCH, 3),
        },
    ),
    "I2VGenXLUNet": (
        {
            **UNET,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        lambda: {
            "sample": video(4),
            "fps": at(8.0),
            "image_latents": video(4),
            "image_embeddings": torch.randn(BATCH, 8),
            "encoder_hidden_states": tokens(8),
        },
    ),
    "Kandinsky3UNet": (
        {
            "block_out_channels": (32, 64),
            "time_embedding_dim": 16,
            "groups": 8,
            "attention_head_dim": 8,
            "layers_per_block": 2,
            "cross_attention_dim": 8,
            "encoder_hid_dim": 8,
        },
        lambda: {"sample": picture(4), "encoder_hidden_states": tokens(8), "encoder_attention_mask": ones()},
    ),
    "DiTTransformer2DModel": (
        {
            **LAYERS,
            "sample_size": 8,
            "norm_num_groups": 4,
            "num_embeds_ada_norm": 1000,
            "out_channels": 4,
        },
        lambda: {"hidden_states": picture(4), "class_labels": torch.tensor([1, 2])},
    ),
    "PixArtTransformer2DModel": (
        {
            **LAYERS,
            "sample_size": 8,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "use_additional_conditions": False,
            "out_channels": 4,
        },
        lambda: {
            "hidden_states": picture(4),
            "encoder_hidden_states": tokens(8),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "SD3Transformer2DModel": (
        {
            **LAYERS,
            "sample_size": 8,
            **CHANNELS,
            "joint_attention_dim": 8,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 8,
        },
        lambda: {
            "hidden_states": picture(4),
            "encoder_hidden_states": tokens(8),
            "pooled_projections": torch.randn(BATCH, 8),
        },
    ),
    "FluxTransformer2DModel": (
        {
            **DUAL,
            "in_channels": 4,
            "joint_attention_dim": 8,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda: {
            **patches_and_words(),
            "pooled_projections": torch.randn(BATCH, 8),
        },
    ),
    "Flux2Transformer2DModel": (
        {
            **DUAL,
            "in_channels": 4,
            "joint_attention_dim": 8,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (2, 2, 2, 2),
            "guidance_embeds": False,
        },
        lambda: patches_and_words(axes=4),
    ),
    "SanaTransformer2DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            **CHANNELS,
            "sample_size": 8,
        },
        picture_and_words,
    ),
    "HunyuanDiT2DModel": (
        {
            **LAYERS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 16,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "text_len": WORDS,
            "text_len_t5": WORDS,
            "use_style_cond_and_image_meta_size": False,
        },
        lambda: {
            "hidden_states": picture(4),
            "encoder_hidden_states": tokens(8),
            "text_embedding_mask": ones(),
            "encoder_hidden_states_t5": tokens(8),
            "text_embedding_mask_t5": ones(),
        },
    ),
    "HunyuanVideoTransformer3DModel": (
        HUNYUAN_VIDEO,
        pooled_video,
    ),
    "Lumina2Transformer2DModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": 8,
        },
        lambda: {
            "hidden_states": picture(4),
            "encoder_hidden_states": tokens(8),
            "encoder_attention_mask": ones().bool(),
        },
    ),
    "LuminaNextDiT2DModel": (
        {
            "sample_size": 8,
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "cross_attention_dim": 8,
        },
        lambda: {
            "hidden_states": picture(4),
            "encoder_hidden_states": tokens(8),
            "encoder_mask": ones().bool(),
            "image_rotary_emb": torch.ones(4, 4, 4, dtype=torch.complex64),
            "cross_attention_kwargs": {},
        },
    ),
    "AuraFlowTransformer2DModel": (
        {
            **HEADS,
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
        picture_and_words,
    ),
    "CogVideoXTransformer3DModel": (
        COGVIDEOX,
        lambda: {"hidden_states": torch.randn(BATCH, 2, 4, 8, 8), "encoder_hidden_states": tokens(8)},
    ),
    "CogView3PlusTransformer2DModel": (
        {
            **LAYERS,
            **CHANNELS,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        lambda: {"hidden_states": picture(4), "encoder_hidden_states": tokens(8), **sizes()},
    ),
    "CogView4Transformer2DModel": (
        {
            **LAYERS,
            **CHANNELS,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
        lambda: {"hidden_states": picture(4), "encoder_hidden_states": tokens(8), **sizes()},
    ),
    "LTXVideoTransformer3DModel": (
        {
            **LAYERS,
            **CHANNELS,
            "cross_attention_dim": 16,
            "caption_channels": 8,
        },
        lambda: {
            "hidden_states": tokens(4, 32),
            "encoder_hidden_states": tokens(8),
            "encoder_attention_mask": ones(),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    "MochiTransformer3DModel": (
        {
            **LAYERS,
            "in_channels": 4,
            "pooled_projection_dim": 8,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "max_sequence_length": WORDS,
        },
        lambda: {
            "hidden_states": video(4),
            "encoder_hidden_states": tokens(8),
            "encoder_attention_mask": ones().bool(),
        },
    ),
    "WanTransformer3DModel": (
        WAN,
        video_and_words,
    ),
    "QwenImageTransformer2DModel": (
        {
            **LAYERS,
            "in_channels": 4,
            "out_channels": 1,
            "joint_attention_dim": 8,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda: {
            "hidden_states": tokens(4, 16),
            "encoder_hidden_states": tokens(8),
            "encoder_hidden_states_mask": ones(),
            "img_shapes": [[(1, 4, 4)]] * BATCH,
        },
    ),
    "ChromaTransformer2DModel": (
        {
            **DUAL,
            "in_channels": 4,
            "joint_attention_dim": 8,
            "axes_dims_rope": (4, 2, 2),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 8,
            "approximator_layers": 1,
        },
        patches_and_words,
    ),
    "AllegroTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "caption_channels": 8,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
        },
        lambda: {
            "hidden_states": video(4),
            "encoder_hidden_states": torch.randn(BATCH, 1, WORDS, 8),
            "encoder_attention_mask": torch.ones(BATCH, 1, WORDS),
            "attention_mask": torch.ones(BATCH, 2, 8, 8),
        },
    ),
    "LatteTransformer3DModel": (
        {
            **LAYERS,
            **CHANNELS,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "video_length": 2,
        },
        video_and_words,
    ),
    "Kandinsky5Transformer3DModel": (
        {
            "in_text_dim": 8,
            "in_text_dim2": 8,
            "time_dim": 8,
            "model_dim": 16,
            "ff_dim": 16,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 2, 2),
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 2, 8, 8, 4),
            "encoder_hidden_states": tokens(8),
            "pooled_projections": torch.randn(BATCH, 8),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(WORDS),
        },
    ),
    "StableAudioDiTModel": (
        {
            "sample_size": 8,
            **CHANNELS,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 8),
            "encoder_hidden_states": tokens(8),
            "global_hidden_states": tokens(8, 1),
            "rotary_embedding": (torch.ones(9, 4), torch.zeros(9, 4)),
        },
    ),
    "ZImageTransformer2DModel": (
        {
            "in_channels": 4,
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 8,
            "axes_dims": [4, 2, 2],
            "axes_lens": [64, 16, 16],
        },
        lambda: {"x": list(video(4, frames=1)), "cap_feats": list(tokens(8))},
    ),
    "PRXTransformer2DModel": (
        {"in_channels": 4, "context_in_dim": 8, "hidden_size": 16, "num_heads": 2, "depth": 2, "axes_dim": [4, 4]},
        picture_and_words,
    ),
    "BriaTransformer2DModel": (
        {
            **DUAL,
            "in_channels": 4,
            "joint_attention_dim": 8,
            "axes_dims_rope": [4, 2, 2],
        },
        patches_and_words,
    ),
    "BriaFiboTransformer2DModel": (
        {
            **DUAL,
            "in_channels": 4,
            "joint_attention_dim": 8,
            "text_encoder_dim": 8,
            "axes_dims_rope": [4, 2, 2],
        },
        lambda: {
            **patches_and_words(),
            "text_encoder_layers": [tokens(8)] * 4,
        },
    ),
    "EasyAnimateTransformer3DModel": (
        {
            **HEADS,
            "attention_head_dim": 16,
            "num_layers": 2,
            "mmdit_layers": 1,
            **CHANNELS,
            "patch_size": 2,
            "time_embed_dim": 8,
            "text_embed_dim": 8,
            "sample_width": 8,
            "sample_height": 8,
        },
        video_and_words,
    ),
    "HunyuanVideo15Transformer3DModel": (
        {
            **LAYERS,
            "num_refiner_layers": 1,
            **CHANNELS,
            "text_embed_dim": 8,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "rope_axes_dim": (4, 2, 2),
            "task_type": "t2v",
        },
        lambda: {
            "hidden_states": video(4),
            "encoder_hidden_states": tokens(8),
            "encoder_attention_mask": ones(),
            "encoder_hidden_states_2": tokens(8),
            "encoder_attention_mask_2": ones(),
            "image_embeds": torch.zeros(BATCH, 3, 8),
        },
    ),
    "HunyuanImageTransformer2DModel": (
        {
            **DUAL,
            "num_refiner_layers": 1,
            **CHANNELS,
            "text_embed_dim": 8,
            "rope_axes_dim": (4, 4),
        },
        lambda: {"hidden_states": picture(4), "encoder_hidden_states": tokens(8), "encoder_attention_mask": ones()},
    ),
    "SkyReelsV2Transformer3DModel": (
        WAN,
        video_and_words,
    ),
    "WanVACETransformer3DModel": (
        {
            **WAN,
            "vace_layers": [0, 1],
            "vace_in_channels": 4,
        },
        lambda: {"hidden_states": video(4), "encoder_hidden_states": tokens(8), "control_hidden_states": video(4)},
    ),
    "ChronoEditTransformer3DModel": (
        WAN,
        video_and_words,
    ),
    "SanaVideoTransformer3DModel": (
        {
            **LAYERS,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            **CHANNELS,
            "sample_size": 8,
            "rope_max_seq_len": 16,
        },
        video_and_words,
    ),
    "LongCatImageTransformer2DModel": (
        {
            **DUAL,
            "in_channels": 4,
            "joint_attention_dim": 8,
            "axes_dims_rope": [4, 2, 2],
        },
        patches_and_words,
    ),
    "OvisImageTransformer2DModel": (
        {
            **DUAL,
            **CHANNELS,
            "joint_attention_dim": 8,
            "axes_dims_rope": (4, 2, 2),
        },
        patches_and_words,
    ),
    "PriorTransformer": (
        {**LAYERS, "embedding_dim": 8, "num_embeddings": WORDS},
        lambda: {
            "hidden_states": torch.randn(BATCH, 8),
            "proj_embedding": torch.randn(BATCH, 8),
            "encoder_hidden_states": tokens(8),
        },
    ),
    "HiDreamImageTransformer2DModel": (
        {
            **DUAL,
            "patch_size": 2,
            **CHANNELS,
            "caption_channels": [8, 8],
            "text_emb_dim": 8,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1, 0, 1],
        },
        lambda: {
            "hidden_states": picture(4),
            "encoder_hidden_states_t5": tokens(8),
            "encoder_hidden_states_llama3": torch.randn(2, BATCH, WORDS, 8),
            "pooled_embeds": torch.randn(BATCH, 8),
        },
    ),
    "StableCascadeUNet": (
        {
            **CHANNELS,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 8,
            "block_out_channels": (8, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_pooled_in_channels": 8,
            "clip_seq": 2,
            "dropout": (0.0, 0.0),
        },
        lambda: {"sample": picture(4), "clip_text_pooled": tokens(8, 1)},
    ),
    "Flux3Transformer2DModel": (
        {
            **DUAL,
            "in_channels": 4,
            "cond_in_channels": 4,
            "joint_attention_dim": 8,
            "timestep_channels": 16,
            "axes_dims_rope": (2, 2, 2, 2),
        },
        lambda: patches_and_words(axes=4),
    ),
    "GlmImageTransformer2DModel": (
        {
            **LAYERS,
            **CHANNELS,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 16,
        },
        lambda: {
            "hidden_states": picture(4),
            "encoder_hidden_states": tokens(8),
            "prior_token_id": torch.zeros(BATCH, 16, dtype=torch.long),
            "prior_token_drop": torch.zeros(BATCH, dtype=torch.bool),
            **{k: v for k, v in sizes().items() if k != "original_size"},
        },
    ),
    "JoyImageEditTransformer3DModel": (
        {
            "in_channels": 4,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "text_dim": 8,
            "num_layers": 2,
            "rope_dim_list": [4, 2, 2],
        },
        video_and_words,
    ),
    "ErnieImageTransformer2DModel": (
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 16,
            **CHANNELS,
            "text_in_dim": 8,
            "rope_axes_dim": (4, 2, 2),
        },
        lambda: {"hidden_states": picture(4), "text_bth": tokens(8), "text_lens": torch.full((BATCH,), WORDS)},
    ),
    "AnyFlowTransformer3DModel": (
        WAN,
        lambda: {
            "hidden_states": torch.randn(BATCH, 2, 4, 8, 8),
            "timestep": torch.ones(BATCH, 2),
            "r_timestep": torch.zeros(BATCH, 2),
            "encoder_hidden_states": tokens(8),
        },
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "in_channels": 4,
            "dim": 24,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "cap_feat_dim": 8,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 2,
            "max_num_gist_tokens": 4,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 8,
            "axes_dims": (4, 2, 2),
            "axes_lens": (16, 16, 16),
        },
        lambda: {"hidden_states": picture(4), "encoder_hidden_states": torch.randn(BATCH, 2, WORDS, 8)},
    ),
    "CosmosTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            **CHANNELS,
            "text_embed_dim": 8,
            "adaln_lora_dim": 8,
            "max_size": (2, 8, 8),
            "concat_padding_mask": False,
        },
        video_and_words,
    ),
    "ConsisIDTransformer3DModel": (
        {
            **COGVIDEOX,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 8,
            "LFE_vit_dim": 8,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 2,
            "LFE_output_dim": 10,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 2, 4, 8, 8),
            "encoder_hidden_states": tokens(8),
            "id_cond": torch.randn(BATCH, 8),
            "id_vit_hidden": [tokens(8)] * 5,
        },
    ),
    "Cosmos3OmniTransformer": (
        {
            "head_dim": 8,
            "hidden_size": 16,
            "intermediate_size": 16,
            "latent_channel": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 16,
            "vocab_size": 16,
            "rope_axes_dim": (2, 1, 1),
        },
        lambda: {
            "vision_tokens": list(torch.randn(BATCH, 1, 4, 2, 4, 4)),
            "vision_timesteps": torch.ones(BATCH * 8),
            "input_ids": torch.ones(WORDS, dtype=torch.long),
            "text_indexes": torch.arange(WORDS),
            "position_ids": torch.arange(WORDS + 16),
            "und_len": WORDS,
            "sequence_length": WORDS + 16,
            "vision_token_shapes": [(2, 2, 2)] * BATCH,
            "vision_sequence_indexes": torch.arange(WORDS, WORDS + 16),
            "vision_mse_loss_indexes": torch.arange(WORDS, WORDS + 16),
            "vision_noisy_frame_indexes": [torch.arange(2)] * BATCH,
        },
    ),
    "DreamLiteUNetModel": (
        {
            **UNET,
            **CROSS,
            "sample_size": 8,
            "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        },
        lambda: {"sample": picture(4), "encoder_hidden_states": tokens(8)},
    ),
    "HeliosTransformer3DModel": (
        {
            **LAYERS,
            **CHANNELS,
            "text_dim": 8,
            "freq_dim": 8,
            "ffn_dim": 16,
            "rope_dim": (4, 2, 2),
        },
        lambda: {
            **video_and_words(),
            "indices_hidden_states": torch.arange(7, 9).expand(BATCH, -1),
            "indices_latents_history_short": torch.arange(6, 7).expand(BATCH, -1),
            "indices_latents_history_mid": torch.arange(4, 6).expand(BATCH, -1),
            "indices_latents_history_long": torch.arange(0, 4).expand(BATCH, -1),
            "latents_history_short": video(4, frames=1),
            "latents_history_mid": video(4, frames=2),
            "latents_history_long": video(4, frames=4),
        },
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        {
            **HUNYUAN_VIDEO,
            "has_image_proj": True,
            "image_proj_dim": 8,
            "has_clean_x_embedder": True,
        },
        lambda: {
            **pooled_video(),
            "image_embeds": tokens(8, 3),
            "indices_latents": torch.arange(7, 9),
            "latents_clean": video(4, frames=1),
            "indices_latents_clean": torch.arange(6, 7),
            "latents_history_2x": video(4, frames=2),
            "indices_latents_history_2x": torch.arange(4, 6),
            "latents_history_4x": video(4, frames=4),
            "indices_latents_history_4x": torch.arange(0, 4),
        },
    ),
    "Ideogram4Transformer2DModel": (
        {
            **LAYERS,
            "in_channels": 4,
            "intermediate_size": 16,
            "adaln_dim": 8,
            "llm_features_dim": 8,
            "mrope_section": (2, 1, 1),
        },
        lambda: {
            "hidden_states": tokens(4, WORDS + 16),
            "encoder_hidden_states": tokens(8, WORDS + 16),
            "position_ids": torch.zeros(BATCH, WORDS + 16, 3, dtype=torch.long),
            "segment_ids": ones(WORDS + 16),
            "indicator": torch.tensor([3] * WORDS + [2] * 16).expand(BATCH, -1),
        },
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {
            "in_channels": 4,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "text_dim": 8,
            "num_layers": 2,
            "rope_dim_list": [4, 2, 2],
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 8, 4, 1, 2, 2),
            "encoder_hidden_states": tokens(8),
            "shape_list": [[(1, 2, 2)] * 2] * BATCH,
        },
    ),
    "Kandinsky6Transformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 8,
            "in_text_dim2": 8,
            "time_dim": 8,
            "model_dim": 16,
            "ff_dim": 16,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 2, 2),
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 2, 8, 8, 9),
            "encoder_hidden_states": tokens(8),
            "pooled_projections": torch.randn(BATCH, 8),
            "audio_hidden_states": tokens(4),
        },
    ),
    "Krea2Transformer2DModel": (
        {
            **LAYERS,
            "in_channels": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 1,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda: {
            "hidden_states": tokens(4, 16),
            "encoder_hidden_states": torch.randn(BATCH, WORDS, 2, 8),
            "position_ids": torch.zeros(WORDS + 16, 3),
        },
    ),
    "LTX2VideoTransformer3DModel": (
        LTX2,
        lambda: {
            "hidden_states": tokens(4, 32),
            "audio_hidden_states": tokens(4, 3),
            "encoder_hidden_states": tokens(8),
            "audio_encoder_hidden_states": tokens(8),
            "num_frames": 2,
            "height": 4,
            "width": 4,
            "audio_num_frames": 3,
        },
    ),
    "MiniMaxH3Transformer3DModel": (
        {
            **LAYERS,
            "hidden_size": 16,
            "num_refiner_layers": 1,
            "ffn_dim": 16,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 8,
            "freq_dim": 8,
            "time_embed_hidden_dim": 8,
            "time_embed_dim": 8,
            "rope_freq_dim": 1,
        },
        lambda: {
            "hidden_states": tokens(16, 16),
            "audio_hidden_states": tokens(4, 3),
            "encoder_hidden_states": tokens(8),
            "timestep_indices": torch.zeros(WORDS + 19, dtype=torch.long),
            "token_tags": torch.tensor([0] * WORDS + [1] * 16 + [2] * 3),
            "position_ids": torch.zeros(WORDS + 19, 3),
            "text_indices": torch.arange(WORDS),
            "video_indices": torch.arange(WORDS, WORDS + 16),
            "audio_indices": torch.arange(WORDS + 16, WORDS + 19),
        },
    ),
    "MotifVideoTransformer3DModel": (
        {**DUAL, **CHANNELS, "num_decoder_layers": 1, "text_embed_dim": 8, "rope_axes_dim": (4, 2, 2)},
        video_and_words,
    ),
    "NucleusMoEImageTransformer2DModel": (
        {
            **LAYERS,
            "in_channels": 4,
            "out_channels": 1,
            "joint_attention_dim": 8,
            "axes_dims_rope": (4, 2, 2),
            "dense_moe_strategy": "all_moe",
            "num_experts": 2,
            "moe_intermediate_dim": 16,
            "capacity_factors": 1.0,
        },
        lambda: {
            "hidden_states": tokens(4, 16),
            "img_shapes": [(1, 4, 4)] * BATCH,
            "encoder_hidden_states": tokens(8),
        },
    ),
    "OmniGenTransformer2DModel": (
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 16,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 16,
            "time_step_dim": 8,
            "pos_embed_max_size": 8,
            "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        },
        lambda: {
            "hidden_states": picture(4),
            "input_ids": ones(),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(BATCH, WORDS + 17, WORDS + 17),
            "position_ids": torch.arange(WORDS + 17).expand(BATCH, -1),
        },
    ),
    "QwenImage21Transformer2DModel": (
        {
            **LAYERS,
            **CHANNELS,
            "context_in_dim": 8,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda: {
            "hidden_states": tokens(4, 16),
            "encoder_hidden_states": tokens(8),
            "img_shapes": [[(1, 4, 4)]] * BATCH,
            "img_mask": torch.tensor([False] * WORDS + [True] * 4).expand(BATCH, -1),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (
        LTX2,
        lambda: {
            "hidden_states": tokens(4, 32),
            "encoder_hidden_states": tokens(8),
            "video_rotary_emb": (torch.ones(BATCH, 32, 16), torch.zeros(BATCH, 32, 16)),
        },
    ),
    "SanaWMTransformer3DModel": (
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 4,
            "caption_channels": 8,
            "image_size": 8,
        },
        lambda: {
            "hidden_states": video(4, size=4),
            "timestep": torch.ones(BATCH, 1, 2),
            "encoder_hidden_states": torch.randn(BATCH, 1, WORDS, 8),
            "encoder_attention_mask": ones(),
            "camera_conditions": torch.cat([torch.eye(4).flatten(), torch.full((4,), 2.0)]).expand(BATCH, 2, -1),
            "chunk_plucker": video(4, size=4),
        },
    ),
    "WanAnimateTransformer3DModel": (
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 8,
            "added_kv_proj_dim": 16,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8},
            "motion_encoder_size": 8,
            "motion_style_dim": 8,
            "motion_dim": 2,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        lambda: {
            "hidden_states": video(12),
            "encoder_hidden_states": tokens(8),
            "encoder_hidden_states_image": tokens(8, 3),
            "pose_hidden_states": video(4, frames=1),
            "face_pixel_values": video(3, frames=4),
        },
    ),
    "UNet1DModel": (
        {
            "sample_size": 16,
            "block_out_channels": (32, 32),
            "extra_in_channels": 64,
            "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"),
            "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"),
        },
        lambda: {"sample": torch.randn(BATCH, 2, 16)},
    ),
    "StableAudio3DiTModel": (
        {
            "io_channels": 4,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 8,
            "global_cond_dim": 8,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 8,
            "num_memory_tokens": 2,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 8),
            "encoder_hidden_states": tokens(8),
            "global_hidden_states": torch.randn(BATCH, 8),
            "local_add_cond": torch.randn(BATCH, 5, 8),
        },
    ),
    "AceStepTransformer1DModel": (
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 2,
        },
        lambda: {
            "hidden_states": tokens(4, 8),
            "timestep_r": at(0.0),
            "encoder_hidden_states": tokens(16),
            "context_latents": tokens(8, 8),
        },
    ),
}


UNSET = ("experts.gate_up_proj", "experts.down_proj", "pad_token")
"""Weights that diffusers leaves as the memory was."""


def denoiser(name: str, **config: Any) -> Any:
    """A tiny denoiser with random weights everywhere, some of its configuration changed."""
    torch.manual_seed(0)
    return stirred(getattr(diffusers, name)(**{**TINY[name][0], **config}))


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A denoiser, and what it is called with; a timestep only if it takes another than one per sample."""
    return denoiser(name), TINY[name][1]()


def stirred(denoiser: nn.Module) -> nn.Module:
    """Random weights everywhere: some classes start with zeros, which would hide every mistake."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if name.endswith(UNSET):
                parameter.zero_()
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return denoiser.eval()


def timestep_name(denoiser: nn.Module) -> str:
    """What a denoiser calls its timestep."""
    names = ("timestep", "timesteps", "t", "timestep_ratio", "vision_timesteps")
    return next(name for name in inspect.signature(denoiser.forward).parameters if name in names)


def sampler(denoiser: nn.Module, inputs: Inputs, steps: int) -> Callable[[], Tensor]:
    """A plain loop: x ← x − 0.1 · output, as far as the output reaches. Some take a list of samples, and give one.

    A timestep among the inputs is the share of the loop's own that each frame or token gets.
    """
    (name, start), timestep = next(iter(inputs.items())), timestep_name(denoiser)
    shares = inputs.get(timestep, at(1.0))

    def run() -> Tensor:
        x = torch.stack(start) if isinstance(start, list) else start
        for step in range(steps):
            given = {name: list(x) if isinstance(start, list) else x, timestep: shares * (900.0 - 100 * step)}
            output = denoiser(**{**inputs, **given}, return_dict=False)
            output = output if isinstance(output, Tensor) else output[0]
            output = torch.stack(output) if isinstance(output, list) else output
            reached = tuple(slice(min(sizes)) for sizes in zip(x.shape, output.shape, strict=True))
            change = torch.zeros_like(x)
            change[reached] = output[reached]
            x = x - 0.1 * change
        return x

    return run
