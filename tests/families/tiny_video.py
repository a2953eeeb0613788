"""Video pipelines of the real classes with random weights and vocabularies of a few words."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    SchedulerMixin,
    TextToVideoSDPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from timestep_experts.models.video_crafter import FpsUNet3DConditionModel

WORDS = ("a", "red", "star", "moves", "left", "slowly", "blue", "cross")


def tiny_fps_unet(seed: int = 0) -> FpsUNet3DConditionModel:
    """VideoCrafter2's graph with 8 and 16 channels; what is zero at first is random here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = FpsUNet3DConditionModel(
            block_out_channels=(8, 8, 16, 16), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4
        )
        for name, parameter in unet.named_parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1 if name.endswith("weight") else 0.02)
    return unet.eval()


def tiny_video_crafter(prediction_type: str = "epsilon", seed: int = 0) -> TextToVideoSDPipeline:
    """VideoCrafter2 with 16-pixel frames, 8x8 latents and 8 tokens."""
    blank = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    tokenizer = blank.train_new_from_iterator([" ".join(WORDS)], 60, show_progress=False)
    tokenizer.model_max_length = 8
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(text_config)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        steps_offset=1,
        clip_sample=False,
    )
    scheduler.register_to_config(least_signal=0.7)
    return TextToVideoSDPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=tiny_fps_unet(seed), scheduler=scheduler
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word and an end token, as T5 closes a text."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_wan(
    boundary_ratio: float | None = None, scheduler: SchedulerMixin | None = None, seed: int = 0
) -> WanPipeline:
    """Wan 2.1, or with a boundary Wan 2.2: clips of 4k + 1 frames, pixels in multiples of 16."""
    text_config = UMT5Config(
        vocab_size=len(WORDS) + 3,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers = [
            WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                text_dim=8,
                freq_dim=16,
                ffn_dim=16,
                num_layers=1,
                rope_max_seq_len=32,
            )
            for _ in range(1 if boundary_ratio is None else 2)
        ]
        text_encoder = UMT5EncoderModel(text_config)
        vae = AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        scheduler=scheduler
        or UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformers[0],
        transformer_2=transformers[1] if boundary_ratio is not None else None,
        boundary_ratio=boundary_ratio,
    )
