"""Registry of architectures for benchmarks: every entry is built from its configuration with small random weights.

Nothing is downloaded. Widths differ wherever a design leaves a choice (hidden 48, intermediate 88, vocabulary 101),
and parameters that start out constant (biases, norm scales, layer scales) as well as batch statistics get random
values, so that a fault cannot hide behind equal sizes or behind zeros and ones.

Run as a script, this prints one row per architecture: parameters, seconds and size of ``torch.export``.

    python benchmarks/architectures.py [NAME ...]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

try:
    import transformers
except ImportError:
    transformers = None

if __package__:
    from . import architectures_conv as hand
else:
    import architectures_conv as hand

FAMILIES = (
    "convolutional",
    "vision-transformer",
    "encoder",
    "decoder",
    "encoder-decoder",
    "mixture-of-experts",
    "state-space",
    "recurrent",
    "transformer",
    "other",
)
SEED = 20
VOCABULARY = 101

Built = tuple[nn.Module, tuple, dict]


@dataclass(frozen=True)
class Architecture:
    """A named recipe: ``build()`` gives (model in eval mode, args, kwargs), equal on every call."""

    name: str
    family: str
    build: Callable[[], Built]

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"The family of {self.name} must be one of {FAMILIES}. Got {self.family!r} instead.")


class Ids(NamedTuple):
    """Shape of an integer input with values in [low, high)."""

    shape: tuple[int, ...]
    low: int = 3
    high: int = VOCABULARY


class Ones(NamedTuple):
    """Shape of an integer input of ones, such as an attention mask."""

    shape: tuple[int, ...]


class Floats(NamedTuple):
    """Shape of a normally distributed input."""

    shape: tuple[int, ...]


Spec = Ids | Ones | Floats


def draw(spec: Spec) -> Tensor:
    """Draw the input a specification describes from the global generator."""
    if isinstance(spec, Ids):
        return torch.randint(spec.low, spec.high, spec.shape)
    return torch.ones(spec.shape, dtype=torch.long) if isinstance(spec, Ones) else torch.randn(spec.shape)


def fan_in(parameter: Tensor, module: nn.Module) -> int:
    """Count the terms that one output of a weight sums over; kernels count for convolutions."""
    return parameter[0].numel() if isinstance(module, nn.modules.conv._ConvNd) else parameter.shape[-1]


def scale_up_(parameter: Tensor, size: float) -> None:
    """Multiply a parameter, in place, so that its root mean square is at least ``size``."""
    parameter.mul_(max(1.0, size / float(parameter.square().mean().sqrt())))


@torch.no_grad()
def enliven_(model: nn.Module) -> None:
    """Give every parameter and batch statistic a size at which it shows in the output, in place.

    Weights smaller than the He scale are scaled up to it: with a usual initial deviation of 0.02, narrow and deep
    networks forget their input, and every edit would look exact. Constant parameters get noise, norms that start at a
    deviation of 0.02 get scale 1, batch norms random statistics.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.ndim > 1:
                scale_up_(parameter, math.sqrt(2 / fan_in(parameter, module)))
            elif name == "weight" and parameter.square().mean() < 0.01:
                scale_up_(parameter, 1.0)
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.normal_(std=0.2)
            elif name == "running_var":
                buffer.uniform_(0.5, 1.5)


def build(make: Callable[[], nn.Module], args: tuple[Spec, ...] = (), kwargs: dict[str, Spec] | None = None) -> Built:
    """Build a model and its inputs from a fixed seed, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = make()
        enliven_(model)
        model.eval()
        return model, tuple(map(draw, args)), {name: draw(spec) for name, spec in (kwargs or {}).items()}


# Hugging Face models


def make_hf(model_class: str, config: dict[str, Any]) -> nn.Module:
    """Build a transformers model from the name of its class and the keywords of its configuration."""
    cls = getattr(transformers, model_class)
    made = cls.config_class(**config)
    return cls(made)


B, L = 2, 11
TOKENS = {"input_ids": Ids((B, L))}
MASKED_TOKENS = {"input_ids": Ids((B, L)), "attention_mask": Ones((B, L))}
SEQ2SEQ = {"input_ids": Ids((B, L)), "decoder_input_ids": Ids((B, 7))}
PIXELS = {"pixel_values": Floats((B, 3, 32, 32))}
PIXELS_64 = {"pixel_values": Floats((B, 3, 64, 64))}
PIXELS_128 = {"pixel_values": Floats((B, 3, 128, 128))}
PICTURE_AND_TOKENS = {"input_ids": Ids((B, L)), "pixel_values": Floats((B, 3, 32, 32))}
WAVE = {"input_values": Floats((B, 640))}

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 37,
    "num_labels": 5,
    **SPECIAL,
}
UNBOUNDED = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_labels": 5, **SPECIAL}
GQA = {**TEXT, "num_key_value_heads": 2, "head_dim": 16}
GQA_PLAIN = {**TEXT, "num_key_value_heads": 2}
VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 5,
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 37, "n_inner": 88, **SPECIAL}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 88,
    "decoder_ffn_dim": 72,
    "max_position_embeddings": 37,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **SPECIAL,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 10,
    "d_ff": 88,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    **SPECIAL,
}
CLIP_TEXT = {**TEXT, "projection_dim": 28}
CLIP_VISION = {**VIT, "projection_dim": 28}
SPEECH = {
    **{k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    "vocab_size": 31,
    "conv_dim": (18, 26, 34),
    "conv_stride": (4, 2, 2),
    "conv_kernel": (8, 3, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}
PYRAMID = {
    "image_size": 64,
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "sr_ratios": [2, 1],
    "sequence_reduction_ratios": [2, 1],
    "hidden_sizes": [20, 36],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 3],
    "mlp_ratios": [3, 2],
    "num_labels": 5,
}
WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 5,
}
STAGES = {"num_labels": 5, "hidden_sizes": [24, 40], "depths": [2, 2]}

EAGER, SDPA = {"attn_implementation": "eager"}, {"attn_implementation": "sdpa"}

# Rows: name, model class, configuration, inputs.
HF_CONVOLUTIONAL = [
    ("resnet-basic", "ResNetForImageClassification", {**STAGES, "embedding_size": 16, "layer_type": "basic"}, PIXELS),
    (
        "resnet-bottleneck",
        "ResNetForImageClassification",
        {**STAGES, "hidden_sizes": [32, 56], "embedding_size": 16, "layer_type": "bottleneck"},
        PIXELS,
    ),
    ("convnext", "ConvNextForImageClassification", {**STAGES, "num_stages": 2}, PIXELS),
    ("convnextv2", "ConvNextV2ForImageClassification", {**STAGES, "num_stages": 2}, PIXELS),
    ("dinov3-convnext", "DINOv3ConvNextModel", {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}, PIXELS),
    (
        "regnet-x",
        "RegNetForImageClassification",
        {**STAGES, "embedding_size": 12, "groups_width": 8, "layer_type": "x"},
        PIXELS,
    ),
    (
        "regnet-y",
        "RegNetForImageClassification",
        {**STAGES, "embedding_size": 12, "groups_width": 8, "layer_type": "y"},
        PIXELS,
    ),
    ("mobilenet-v1", "MobileNetV1ForImageClassification", {"depth_multiplier": 0.25, "num_labels": 5}, PIXELS_64),
    ("mobilenet-v2", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, "num_labels": 5}, PIXELS_64),
    (
        "efficientnet",
        "EfficientNetForImageClassification",
        {
            "image_size": 64,
            "width_coefficient": 0.25,
            "depth_coefficient": 1.0,
            "kernel_sizes": [3, 5, 3],
            "in_channels": [32, 16, 24],
            "out_channels": [16, 24, 40],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 2, 1],
            "expand_ratios": [1, 3, 3],
            "hidden_dim": 320,
            "num_labels": 5,
        },
        PIXELS_64,
    ),
    (
        "poolformer",
        "PoolFormerForImageClassification",
        {
            **STAGES,
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
            "mlp_ratio": 2.0,
        },
        PIXELS,
    ),
    (
        "bit",
        "BitForImageClassification",
        {**STAGES, "hidden_sizes": [32, 64], "embedding_size": 16, "num_groups": 4},
        PIXELS,
    ),
    (
        "textnet",
        "TextNetForImageClassification",
        {
            "stem_out_channels": 12,
            "hidden_sizes": [12, 16, 20, 28, 36],
            "conv_layer_kernel_sizes": [[[3, 3], [3, 1]], [[3, 3], [1, 3]], [[3, 3]], [[3, 3]]],
            "conv_layer_strides": [[1, 1], [2, 1], [2], [1]],
            "num_labels": 5,
        },
        PIXELS,
    ),
    (
        "hgnet-v2",
        "HGNetV2ForImageClassification",
        {
            "embedding_size": 12,
            "stem_channels": [3, 12, 20],
            "depths": [1, 2],
            "hidden_sizes": [28, 44],
            "stage_in_channels": [20, 28],
            "stage_mid_channels": [14, 22],
            "stage_out_channels": [28, 44],
            "stage_num_blocks": [1, 2],
            "stage_downsample": [False, True],
            "stage_downsample_strides": [2, 2],
            "stage_light_block": [False, True],
            "stage_kernel_size": [3, 5],
            "stage_numb_of_layers": [2, 3],
            "num_labels": 5,
        },
        PIXELS,
    ),
    (
        "focalnet",
        "FocalNetForImageClassification",
        {**WINDOWS, "focal_levels": [2, 2], "focal_windows": [3, 3]},
        PIXELS,
    ),
]

HF_VISION = [
    ("vit-sdpa", "ViTForImageClassification", {**VIT, **SDPA}, PIXELS),
    ("vit-eager", "ViTForImageClassification", {**VIT, **EAGER}, PIXELS),
    ("deit", "DeiTForImageClassificationWithTeacher", VIT, PIXELS),
    ("beit", "BeitForImageClassification", {**VIT, "use_relative_position_bias": True}, PIXELS),
    ("data2vec-vision", "Data2VecVisionForImageClassification", VIT, PIXELS),
    ("swin", "SwinForImageClassification", WINDOWS, PIXELS),
    ("swinv2", "Swinv2ForImageClassification", WINDOWS, PIXELS),
    (
        "swin2sr",
        "Swin2SRForImageSuperResolution",
        {**WINDOWS, "upscale": 2, "image_size": 16, "patch_size": 1},
        {"pixel_values": Floats((B, 3, 16, 16))},
    ),
    ("dinov2", "Dinov2ForImageClassification", {**VIT, "mlp_ratio": 2}, PIXELS),
    ("dinov2-swiglu", "Dinov2ForImageClassification", {**VIT, "mlp_ratio": 2, "use_swiglu_ffn": True}, PIXELS),
    (
        "dinov2-registers",
        "Dinov2WithRegistersForImageClassification",
        {**VIT, "mlp_ratio": 2, "num_register_tokens": 3},
        PIXELS,
    ),
    ("dinov3-vit", "DINOv3ViTModel", {**VIT, "num_register_tokens": 3}, PIXELS),
    ("ijepa", "IJepaForImageClassification", VIT, PIXELS),
    ("clip-vision", "CLIPVisionModelWithProjection", CLIP_VISION, PIXELS),
    (
        "clip",
        "CLIPModel",
        {"text_config": {**CLIP_TEXT, "hidden_size": 40}, "vision_config": CLIP_VISION, "projection_dim": 28},
        PICTURE_AND_TOKENS,
    ),
    ("siglip-vision", "SiglipVisionModel", VIT, PIXELS),
    (
        "siglip",
        "SiglipModel",
        {"text_config": {**TEXT, "projection_size": 48}, "vision_config": VIT},
        PICTURE_AND_TOKENS,
    ),
    ("aimv2", "Aimv2VisionModel", VIT, PIXELS),
    ("pvt", "PvtForImageClassification", {**PYRAMID, "patch_sizes": [4, 2]}, PIXELS_64),
    ("pvt-v2", "PvtV2ForImageClassification", PYRAMID, PIXELS_64),
    ("segformer", "SegformerForSemanticSegmentation", {**PYRAMID, "decoder_hidden_size": 28}, PIXELS_64),
    (
        "glpn",
        "GLPNForDepthEstimation",
        {
            **PYRAMID,
            "num_encoder_blocks": 4,
            "depths": [1, 1, 1, 1],
            "sr_ratios": [4, 2, 1, 1],
            "hidden_sizes": [16, 20, 28, 36],
            "patch_sizes": [7, 3, 3, 3],
            "strides": [4, 2, 2, 2],
            "num_attention_heads": [1, 2, 2, 3],
            "mlp_ratios": [2, 3, 2, 3],
            "decoder_hidden_size": 24,
        },
        PIXELS_64,
    ),
    (
        "cvt",
        "CvtForImageClassification",
        {
            "patch_sizes": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [2, 1],
            "embed_dim": [20, 36],
            "num_heads": [1, 3],
            "depth": [1, 2],
            "mlp_ratio": [2.0, 3.0],
            "attention_drop_rate": [0.0, 0.0],
            "drop_rate": [0.0, 0.0],
            "drop_path_rate": [0.0, 0.0],
            "qkv_bias": [True, True],
            "cls_token": [False, True],
            "qkv_projection_method": ["dw_bn", "dw_bn"],
            "kernel_qkv": [3, 3],
            "padding_kv": [1, 1],
            "stride_kv": [2, 2],
            "padding_q": [1, 1],
            "stride_q": [1, 1],
            "num_labels": 5,
        },
        PIXELS_64,
    ),
    (
        "levit",
        "LevitForImageClassification",
        {
            "image_size": 128,
            "hidden_sizes": [32, 44, 56],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "num_labels": 5,
        },
        PIXELS_128,
    ),
    (
        "mobilevit",
        "MobileViTForImageClassification",
        {
            "image_size": 128,
            "hidden_sizes": [32, 44, 52],
            "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 72],
            "num_attention_heads": 4,
            "num_labels": 5,
        },
        PIXELS_128,
    ),
    (
        "mobilevitv2",
        "MobileViTV2ForImageClassification",
        {
            "image_size": 128,
            "width_multiplier": 0.25,
            "n_attn_blocks": [1, 1, 1],
            "base_attn_unit_dims": [128, 192, 256],
            "num_labels": 5,
        },
        PIXELS_128,
    ),
    (
        "swiftformer",
        "SwiftFormerForImageClassification",
        {"depths": [1, 1, 2, 1], "embed_dims": [16, 24, 32, 44], "mlp_ratio": 2, "num_labels": 5, "image_size": 64},
        PIXELS_64,
    ),
    (
        "vit-mae",
        "ViTMAEForPreTraining",
        {
            **VIT,
            "decoder_num_attention_heads": 4,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_intermediate_size": 56,
        },
        {**PIXELS, "noise": Floats((B, 16))},
    ),
    ("vit-msn", "ViTMSNForImageClassification", VIT, PIXELS),
    (
        "dpt",
        "DPTForSemanticSegmentation",
        {
            **VIT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [12, 20, 28, 36],
            "fusion_hidden_size": 24,
        },
        PIXELS,
    ),
    ("yolos", "YolosForObjectDetection", {**VIT, "image_size": [32, 32], "num_detection_tokens": 6}, PIXELS),
    (
        "hiera",
        "HieraForImageClassification",
        {
            "embed_dim": 24,
            "image_size": [32, 32],
            "patch_size": [3, 3],
            "patch_stride": [2, 2],
            "patch_padding": [1, 1],
            "mlp_ratio": 2.0,
            "depths": [1, 2],
            "num_heads": [1, 2],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
            "num_labels": 5,
        },
        PIXELS,
    ),
    (
        "videomae",
        "VideoMAEForVideoClassification",
        {**VIT, "num_frames": 4},
        {"pixel_values": Floats((B, 4, 3, 32, 32))},
    ),
    (
        "timesformer",
        "TimesformerForVideoClassification",
        {**VIT, "num_frames": 3},
        {"pixel_values": Floats((B, 3, 3, 32, 32))},
    ),
    (
        "detr",
        "DetrForObjectDetection",
        {
            "backbone_config": {"model_type": "resnet", **STAGES, "embedding_size": 16, "layer_type": "basic"},
            "d_model": 48,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 88,
            "decoder_ffn_dim": 72,
            "num_queries": 6,
            "num_labels": 5,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
        },
        PIXELS_64,
    ),
]

HF_ENCODER = [
    ("bert-sdpa", "BertForMaskedLM", {**TEXT, **SDPA}, MASKED_TOKENS),
    ("bert-eager", "BertForMaskedLM", {**TEXT, **EAGER}, MASKED_TOKENS),
    ("bert-classifier", "BertForSequenceClassification", TEXT, TOKENS),
    ("roberta", "RobertaForMaskedLM", TEXT, TOKENS),
    ("roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM", TEXT, TOKENS),
    ("camembert", "CamembertForTokenClassification", TEXT, TOKENS),
    ("xlm-roberta", "XLMRobertaForSequenceClassification", TEXT, TOKENS),
    (
        "distilbert",
        "DistilBertForMaskedLM",
        {**TEXT, "dim": 48, "hidden_dim": 88, "n_layers": 2, "n_heads": 4},
        TOKENS,
    ),
    ("electra", "ElectraForPreTraining", {**TEXT, "embedding_size": 28}, TOKENS),
    ("albert", "AlbertForMaskedLM", {**TEXT, "embedding_size": 28}, TOKENS),
    (
        "deberta",
        "DebertaForSequenceClassification",
        {**TEXT, "relative_attention": True, "pos_att_type": "c2p|p2c"},
        TOKENS,
    ),
    (
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        {**TEXT, "relative_attention": True, "pos_att_type": "c2p|p2c", "position_buckets": 8, "share_att_key": True},
        TOKENS,
    ),
    ("mpnet", "MPNetForMaskedLM", TEXT, TOKENS),
    ("modernbert", "ModernBertForMaskedLM", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}, TOKENS),
    ("squeezebert", "SqueezeBertForMaskedLM", {**TEXT, "embedding_size": 48}, TOKENS),
    ("fnet", "FNetForMaskedLM", TEXT, TOKENS),
    (
        "layoutlm",
        "LayoutLMForTokenClassification",
        {**TEXT, "max_2d_position_embeddings": 64},
        {**TOKENS, "bbox": Ids((B, L, 4), 5, 6)},
    ),
    (
        "lilt",
        "LiltForTokenClassification",
        {**TEXT, "max_2d_position_embeddings": 64},
        {**TOKENS, "bbox": Ids((B, L, 4), 5, 6)},
    ),
    ("convbert", "ConvBertForMaskedLM", {**TEXT, "embedding_size": 28, "conv_kernel_size": 5}, TOKENS),
    (
        "mobilebert",
        "MobileBertForMaskedLM",
        {**TEXT, "embedding_size": 28, "intra_bottleneck_size": 32, "true_hidden_size": 32},
        TOKENS,
    ),
    ("nomic-bert", "NomicBertModel", TEXT, TOKENS),
    ("eurobert", "EuroBertForMaskedLM", {**GQA, "mask_token_id": 4}, TOKENS),
    ("megatron-bert", "MegatronBertForMaskedLM", TEXT, TOKENS),
    ("ernie", "ErnieForMaskedLM", TEXT, TOKENS),
    ("rembert", "RemBertForMaskedLM", {**TEXT, "input_embedding_size": 28, "output_embedding_size": 36}, TOKENS),
    ("roformer", "RoFormerForMaskedLM", TEXT, TOKENS),
    ("esm", "EsmForMaskedLM", {**TEXT, "mask_token_id": 4, "position_embedding_type": "rotary"}, TOKENS),
    (
        "xlnet",
        "XLNetForSequenceClassification",
        {**UNBOUNDED, "d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 88},
        TOKENS,
    ),
    ("nystromformer", "NystromformerForMaskedLM", {**TEXT, "num_landmarks": 11, "segment_means_seq_len": 11}, TOKENS),
    ("big-bird-full", "BigBirdForMaskedLM", {**TEXT, "attention_type": "original_full"}, TOKENS),
    ("ibert", "IBertForMaskedLM", TEXT, TOKENS),
    (
        "funnel",
        "FunnelForMaskedLM",
        {
            **UNBOUNDED,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": 48,
            "n_head": 4,
            "d_head": 10,
            "d_inner": 88,
        },
        TOKENS,
    ),
    (
        "longformer",
        "LongformerForMaskedLM",
        {**TEXT, "attention_window": 4},
        {"input_ids": Ids((B, 12)), "attention_mask": Ones((B, 12))},
    ),
    ("clip-text", "CLIPTextModelWithProjection", CLIP_TEXT, TOKENS),
    ("wav2vec2", "Wav2Vec2ForCTC", SPEECH, WAVE),
    ("hubert", "HubertForCTC", SPEECH, WAVE),
    ("wavlm", "WavLMForCTC", SPEECH, WAVE),
    (
        "data2vec-audio",
        "Data2VecAudioForCTC",
        {**SPEECH, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5},
        WAVE,
    ),
    (
        "ast",
        "ASTForAudioClassification",
        {**VIT, "num_mel_bins": 16, "max_length": 24, "frequency_stride": 8, "time_stride": 8},
        {"input_values": Floats((B, 24, 16))},
    ),
    (
        "perceiver",
        "PerceiverForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 37,
            "num_latents": 7,
            "d_latents": 40,
            "d_model": 48,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "num_labels": 5,
        },
        {"inputs": Ids((B, L))},
    ),
]

HF_DECODER = [
    ("gpt2-sdpa", "GPT2LMHeadModel", {**GPT, **SDPA}, TOKENS),
    ("gpt2-eager", "GPT2LMHeadModel", {**GPT, **EAGER}, TOKENS),
    (
        "gpt-neo",
        "GPTNeoForCausalLM",
        {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5},
        TOKENS,
    ),
    ("gpt-neox", "GPTNeoXForCausalLM", TEXT, TOKENS),
    ("gptj", "GPTJForCausalLM", {**GPT, "rotary_dim": 8}, TOKENS),
    ("gpt-bigcode", "GPTBigCodeForCausalLM", GPT, TOKENS),
    ("codegen", "CodeGenForCausalLM", {**GPT, "n_ctx": 37, "rotary_dim": 8}, TOKENS),
    ("openai-gpt", "OpenAIGPTLMHeadModel", GPT, TOKENS),
    ("ctrl", "CTRLLMHeadModel", {**GPT, "dff": 88}, TOKENS),
    ("opt", "OPTForCausalLM", {**TEXT, "ffn_dim": 88, "word_embed_proj_dim": 28}, TOKENS),
    ("bloom", "BloomForCausalLM", {**TEXT, "n_layer": 2, "n_head": 4}, TOKENS),
    ("llama-sdpa", "LlamaForCausalLM", {**GQA, **SDPA}, TOKENS),
    ("llama-eager", "LlamaForCausalLM", {**GQA, **EAGER}, TOKENS),
    ("mistral", "MistralForCausalLM", {**GQA, "sliding_window": 5}, TOKENS),
    ("qwen2", "Qwen2ForCausalLM", GQA_PLAIN, TOKENS),
    ("qwen3", "Qwen3ForCausalLM", GQA, TOKENS),
    ("gemma", "GemmaForCausalLM", GQA, TOKENS),
    ("gemma2", "Gemma2ForCausalLM", GQA, TOKENS),
    ("gemma3-text", "Gemma3ForCausalLM", {**GQA, "sliding_window": 5}, TOKENS),
    ("phi", "PhiForCausalLM", GQA_PLAIN, TOKENS),
    ("phi3", "Phi3ForCausalLM", GQA_PLAIN, TOKENS),
    (
        "falcon",
        "FalconForCausalLM",
        {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 88},
        TOKENS,
    ),
    (
        "mpt",
        "MptForCausalLM",
        {
            **SPECIAL,
            "vocab_size": VOCABULARY,
            "d_model": 48,
            "n_heads": 4,
            "n_layers": 2,
            "expansion_ratio": 2,
            "max_seq_len": 37,
        },
        TOKENS,
    ),
    ("stablelm", "StableLmForCausalLM", {**GQA_PLAIN, "partial_rotary_factor": 0.5}, TOKENS),
    ("starcoder2", "Starcoder2ForCausalLM", GQA_PLAIN, TOKENS),
    ("olmo", "OlmoForCausalLM", GQA_PLAIN, TOKENS),
    ("olmo2", "Olmo2ForCausalLM", GQA_PLAIN, TOKENS),
    ("cohere", "CohereForCausalLM", GQA_PLAIN, TOKENS),
    ("smollm3", "SmolLM3ForCausalLM", GQA_PLAIN, TOKENS),
    ("granite", "GraniteForCausalLM", GQA_PLAIN, TOKENS),
    ("glm", "GlmForCausalLM", GQA, TOKENS),
    ("glm4", "Glm4ForCausalLM", GQA, TOKENS),
    ("nemotron", "NemotronForCausalLM", GQA, TOKENS),
    ("persimmon", "PersimmonForCausalLM", TEXT, TOKENS),
    ("helium", "HeliumForCausalLM", {**GQA, "head_dim": 12}, TOKENS),
    ("biogpt", "BioGptForCausalLM", TEXT, TOKENS),
    ("diffllama", "DiffLlamaForCausalLM", GQA, TOKENS),
    ("bitnet", "BitNetForCausalLM", GQA_PLAIN, TOKENS),
    ("nanochat", "NanoChatForCausalLM", GQA_PLAIN, TOKENS),
    ("imagegpt", "ImageGPTForImageClassification", {**GPT, "num_labels": 5}, TOKENS),
]

HF_ENCODER_DECODER = [
    ("t5", "T5ForConditionalGeneration", T5, SEQ2SEQ),
    (
        "t5-gated",
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        SEQ2SEQ,
    ),
    ("mt5", "MT5ForConditionalGeneration", T5, SEQ2SEQ),
    ("bart", "BartForConditionalGeneration", BART, SEQ2SEQ),
    ("mbart", "MBartForConditionalGeneration", BART, SEQ2SEQ),
    ("marian", "MarianMTModel", BART, SEQ2SEQ),
    ("pegasus", "PegasusForConditionalGeneration", BART, SEQ2SEQ),
    ("m2m100", "M2M100ForConditionalGeneration", BART, SEQ2SEQ),
    ("blenderbot", "BlenderbotForConditionalGeneration", BART, SEQ2SEQ),
    ("plbart", "PLBartForConditionalGeneration", BART, SEQ2SEQ),
    (
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        {
            **UNBOUNDED,
            "max_position_embeddings": 37,
            "encoder_ffn_dim": 88,
            "decoder_ffn_dim": 72,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
        },
        SEQ2SEQ,
    ),
    (
        "led",
        "LEDForConditionalGeneration",
        {**BART, "attention_window": 4, "max_encoder_position_embeddings": 37, "max_decoder_position_embeddings": 37},
        {"input_ids": Ids((B, 12)), "decoder_input_ids": Ids((B, 7))},
    ),
    (
        "whisper",
        "WhisperForConditionalGeneration",
        {**BART, "num_mel_bins": 20, "max_source_positions": 15, "max_target_positions": 37},
        {"input_features": Floats((B, 20, 30)), "decoder_input_ids": Ids((B, 7))},
    ),
    (
        "speech-to-text",
        "Speech2TextForConditionalGeneration",
        {
            **BART,
            "input_feat_per_channel": 20,
            "max_source_positions": 60,
            "max_target_positions": 37,
            "conv_channels": 56,
        },
        {"input_features": Floats((B, 40, 20)), "decoder_input_ids": Ids((B, 7))},
    ),
]

EXPERTS = {"moe_intermediate_size": 40, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
MIXTRAL = {**GQA, **EXPERTS, "num_local_experts": 3}
HF_EXPERTS = [
    ("mixtral", "MixtralForCausalLM", MIXTRAL, TOKENS),
    ("mixtral-loop", "MixtralForCausalLM", {**MIXTRAL, "experts_implementation": "eager"}, TOKENS),
    (
        "qwen2-moe",
        "Qwen2MoeForCausalLM",
        {**GQA_PLAIN, **EXPERTS, "num_experts": 3, "shared_expert_intermediate_size": 56},
        TOKENS,
    ),
    ("qwen3-moe", "Qwen3MoeForCausalLM", {**GQA, **EXPERTS, "num_experts": 3}, TOKENS),
    ("olmoe", "OlmoeForCausalLM", {**GQA_PLAIN, **EXPERTS, "num_experts": 3}, TOKENS),
    ("granitemoe", "GraniteMoeForCausalLM", {**GQA_PLAIN, **EXPERTS, "num_local_experts": 3}, TOKENS),
    (
        "switch",
        "SwitchTransformersForConditionalGeneration",
        {**T5, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 3, "expert_capacity": 8},
        {**SEQ2SEQ, "attention_mask": Ones((B, L)), "decoder_attention_mask": Ones((B, 7))},
    ),
]

MAMBA = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "state_size": 6,
    "num_hidden_layers": 2,
    "time_step_rank": 5,
}
HF_STATE_SPACE = [
    ("mamba", "MambaForCausalLM", MAMBA, TOKENS),
    ("falcon-mamba", "FalconMambaForCausalLM", MAMBA, TOKENS),
    ("mamba2", "Mamba2ForCausalLM", {**MAMBA, "num_heads": 8, "head_dim": 12, "n_groups": 2, "chunk_size": 4}, TOKENS),
    (
        "rwkv",
        "RwkvForCausalLM",
        {
            **SPECIAL,
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "attention_hidden_size": 56,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
        },
        TOKENS,
    ),
    (
        "jamba",
        "JambaForCausalLM",
        {
            **GQA_PLAIN,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 6,
            "mamba_dt_rank": 5,
        },
        TOKENS,
    ),
    (
        "recurrent-gemma",
        "RecurrentGemmaForCausalLM",
        {
            **TEXT,
            "lru_width": 56,
            "num_key_value_heads": 1,
            "block_types": ["recurrent", "attention"],
            "attention_window_size": 5,
        },
        TOKENS,
    ),
    (
        "lfm2",
        "Lfm2ForCausalLM",
        {**GQA_PLAIN, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "conv_L_cache": 3},
        TOKENS,
    ),
]

HF_TABLES = {
    "convolutional": HF_CONVOLUTIONAL,
    "vision-transformer": HF_VISION,
    "encoder": HF_ENCODER,
    "decoder": HF_DECODER,
    "encoder-decoder": HF_ENCODER_DECODER,
    "mixture-of-experts": HF_EXPERTS,
    "state-space": HF_STATE_SPACE,
}


def available(model_class: str) -> bool:
    """Tell whether the installed transformers has a class and can import it."""
    try:
        return hasattr(transformers, model_class)
    except (ImportError, RuntimeError) as error:
        print(f"architectures: {model_class} is left out: {error}".split("\n")[0])
        return False


def hf_architectures() -> list[Architecture]:
    """List the entries whose class transformers has; none, with a note, where transformers is not installed."""
    if transformers is None:
        print("architectures: transformers is not installed, its models are left out")
        return []
    rows = [(family, *row) for family, table in HF_TABLES.items() for row in table]
    return [
        Architecture(f"hf-{name}", family, partial(build, partial(make_hf, cls, config), (), inputs))
        for family, name, cls, config, inputs in rows
        if available(cls)
    ]


# Modules of torch.nn

STEPS, WIDE = Floats((B, 7, 12)), Floats((B, 7, 24))
CAUSAL = partial(nn.TransformerDecoderLayer, 24, 4, 44, batch_first=True)

# Rows: name, family, factory, inputs.
TORCH_ROWS = [
    ("lstm", "recurrent", partial(nn.LSTM, 12, 22, batch_first=True), (STEPS,)),
    ("lstm-2-layers", "recurrent", partial(nn.LSTM, 12, 22, 2, batch_first=True), (STEPS,)),
    ("lstm-bidirectional", "recurrent", partial(nn.LSTM, 12, 22, 2, batch_first=True, bidirectional=True), (STEPS,)),
    ("lstm-projected", "recurrent", partial(nn.LSTM, 12, 22, 2, batch_first=True, proj_size=8), (STEPS,)),
    ("gru", "recurrent", partial(nn.GRU, 12, 22, batch_first=True), (STEPS,)),
    ("gru-bidirectional", "recurrent", partial(nn.GRU, 12, 22, 2, bidirectional=True), (STEPS,)),
    ("rnn-tanh", "recurrent", partial(nn.RNN, 12, 22, 2, batch_first=True), (STEPS,)),
    ("rnn-relu", "recurrent", partial(nn.RNN, 12, 22, batch_first=True, nonlinearity="relu"), (STEPS,)),
    (
        "transformer-encoder",
        "transformer",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 44, batch_first=True), 2),
        (WIDE,),
    ),
    (
        "transformer-encoder-prenorm",
        "transformer",
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(24, 4, 44, batch_first=True, norm_first=True, activation="gelu"),
            2,
            nn.LayerNorm(24),
            enable_nested_tensor=False,
        ),
        (WIDE,),
    ),
    ("transformer-decoder", "transformer", lambda: nn.TransformerDecoder(CAUSAL(), 2), (WIDE, Floats((B, 9, 24)))),
    (
        "transformer",
        "transformer",
        partial(nn.Transformer, 24, 4, 2, 2, 44, batch_first=True),
        (Floats((B, 9, 24)), WIDE),
    ),
    (
        "cross-attention",
        "transformer",
        partial(nn.MultiheadAttention, 24, 4, kdim=20, vdim=16, batch_first=True),
        (WIDE, Floats((B, 9, 20)), Floats((B, 9, 16))),
    ),
]

SMALL, TINY, LINE = Floats((B, 3, 32, 32)), Floats((B, 3, 16, 16)), Floats((B, 12))

HAND_ROWS = [
    ("vgg-bn", "convolutional", hand.vgg_bn, (TINY,)),
    ("resnet-pad", "convolutional", hand.resnet_pad, (TINY,)),
    ("resnext", "convolutional", hand.resnext, (TINY,)),
    ("resnet-group-norm", "convolutional", hand.resnet_group_norm, (TINY,)),
    ("densenet", "convolutional", hand.densenet, (TINY,)),
    ("googlenet", "convolutional", hand.googlenet, (TINY,)),
    ("unet", "convolutional", hand.UNet, (TINY,)),
    ("shufflenet-v2", "convolutional", hand.shufflenet_v2, (TINY,)),
    ("mobilenet-v3", "convolutional", hand.mobilenet_v3, (TINY,)),
    ("squeezenet", "convolutional", hand.squeezenet, (TINY,)),
    ("res2net", "convolutional", hand.res2net, (TINY,)),
    ("conv3d", "convolutional", hand.conv3d_net, (Floats((B, 2, 8, 8, 8)),)),
    ("espcn", "convolutional", hand.espcn, (TINY,)),
    ("edsr", "convolutional", hand.EDSR, (TINY,)),
    ("style-transfer", "convolutional", hand.StyleTransfer, (TINY,)),
    ("autoencoder", "convolutional", hand.ConvAutoencoder, (TINY,)),
    ("discriminator-spectral-norm", "convolutional", hand.discriminator_spectral_norm, (TINY,)),
    ("wavenet", "convolutional", hand.WaveNet, (Floats((B, 3, 20)),)),
    ("tcn-weight-norm", "convolutional", hand.tcn_weight_norm, (Floats((B, 3, 20)),)),
    ("film", "convolutional", hand.FiLMNet, (TINY, Floats((B, 9)))),
    ("siamese", "convolutional", hand.Siamese, (TINY, TINY)),
    ("multi-exit", "convolutional", hand.MultiExit, (TINY,)),
    ("pointnet", "convolutional", hand.PointNet, (Floats((B, 3, 13)),)),
    ("mlp-mixer", "vision-transformer", hand.MLPMixer, (TINY,)),
    ("gmlp", "transformer", hand.GatedMLP, (Ids((B, L)),)),
    ("swiglu-transformer", "transformer", hand.SwiGLUTransformer, (Ids((B, L)),)),
    ("fused-qkv-transformer", "transformer", hand.FusedQKVTransformer, (Ids((B, L)),)),
    ("gru-cell-loop", "recurrent", hand.GRUClassifier, (Ids((B, 5)),)),
    ("crnn", "recurrent", hand.CRNN, (TINY,)),
    ("vae", "other", hand.VAE, (Floats((B, 40)), Floats((B, 6)))),
    ("tied-autoencoder", "other", hand.TiedAutoencoder, (Floats((B, 40)),)),
    ("highway", "other", hand.Highway, (LINE,)),
    ("maxout", "other", hand.Maxout, (LINE,)),
    ("kan", "other", hand.kan, (LINE,)),
    ("mlp", "other", hand.mlp_selu, (LINE,)),
    ("graph-convolution", "other", hand.GraphConvolution, (Floats((B, 7, 12)), Floats((B, 7, 7)))),
]


def plain_architectures() -> list[Architecture]:
    """List the modules of ``torch.nn`` (torch-) and the hand-written networks (hand-)."""
    tables = {"torch": TORCH_ROWS, "hand": HAND_ROWS}
    return [
        Architecture(f"{prefix}-{name}", family, partial(build, make, inputs))
        for prefix, rows in tables.items()
        for name, family, make, inputs in rows
    ]


@cache
def architectures() -> tuple[Architecture, ...]:
    """List all architectures that can be built here, in a fixed order, with unique names."""
    found = (*hf_architectures(), *plain_architectures())
    names = [a.name for a in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"The names of architectures must be unique. Got {sorted(twice)} more than once.")
    return found


def by_name(name: str) -> Architecture:
    """Give the architecture of that name; an unknown name lists the valid ones."""
    for architecture in architectures():
        if architecture.name == name:
            return architecture
    raise ValueError(f"The name must be one of {[a.name for a in architectures()]}. Got {name!r} instead.")


def to_double(built: Built) -> Built:
    """Convert the model and its floating inputs to float64; the model is converted in place."""
    model, args, kwargs = built

    def convert(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return model.double(), tuple(map(convert, args)), {name: convert(value) for name, value in kwargs.items()}


class KeepDouble(TorchFunctionMode):
    """Context in which tensors asked for in float32 come in float64.

    Norms, softmax and rotary positions of many models compute in float32 whatever the model's type, which would limit
    any comparison to seven digits.

    Example:
        >>> with KeepDouble():
        ...     torch.ones(2, dtype=torch.float64).float().dtype
        torch.float64
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widen, args), **wide)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


# Table


@dataclass(frozen=True)
class Measured:
    """What tracing one architecture took and gave; ``error`` is empty where it succeeded."""

    n_parameters: int
    export_s: float = float("nan")
    n_nodes: int = 0
    n_operators: int = 0
    error: str = ""


def measure(architecture: Architecture) -> Measured:
    """Build and export one architecture; a failure is returned, not raised."""
    model, args, kwargs = architecture.build()
    n_parameters = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    try:
        graph = torch.export.export(model, args, kwargs, strict=False).graph
    except Exception as error:
        return Measured(
            n_parameters, time.perf_counter() - start, error=f"{type(error).__name__}: {error}".split("\n")[0]
        )
    calls = [node for node in graph.nodes if node.op == "call_function"]
    return Measured(n_parameters, time.perf_counter() - start, len(graph.nodes), len({str(n.target) for n in calls}))


def print_table(chosen: list[Architecture]) -> None:
    """Print one row per architecture and the totals."""
    print(f"{'name':34s} {'family':20s} {'parameters':>10s} {'export s':>8s} {'nodes':>6s} {'operators':>9s}")
    n_exported = 0
    for a in chosen:
        m = measure(a)
        n_exported += not m.error
        row = f"{a.name:34s} {a.family:20s} {m.n_parameters:10d} {m.export_s:8.2f} {m.n_nodes:6d} {m.n_operators:9d}"
        print(f"{row}  {m.error[:110]}".rstrip(), flush=True)
    print(f"{len(chosen)} architectures, {n_exported} exported")


def main() -> None:
    """Print the table of all architectures, or of those named."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    print_table([by_name(name) for name in names] or list(architectures()))


if __name__ == "__main__":
    main()
