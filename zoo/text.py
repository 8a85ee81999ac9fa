"""Small text encoders with tokenizers of their own, trained on the captions."""

from collections.abc import Sequence

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

WIDTH = 128
VOCABULARY = 2000


def clip(captions: Sequence[str], length: int) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """CLIP's tokenizer, byte pairs of the captions, and an untrained encoder, shape (…, length, 128)."""
    tokenizer = CLIPTokenizer().train_new_from_iterator(list(captions), VOCABULARY)
    tokenizer.model_max_length = length
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=length,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, CLIPTextModel(config)


def t5(captions: Sequence[str], length: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """T5's tokenizer, unigrams of the captions, and an untrained encoder, shape (…, length, 128)."""
    tokenizer = T5Tokenizer(extra_ids=0).train_new_from_iterator(list(captions), VOCABULARY)
    tokenizer.model_max_length = length
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        d_ff=2 * WIDTH,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, T5EncoderModel(config)
