"""The key tables of the text encoders (`layout` says how to read them).

Names: transformers `models/t5/modeling_t5.py` and `models/clip/modeling_clip.py`, which FLUX's diffusers folders
(`text_encoder_2`, `text_encoder`) and ComfyUI's `t5xxl_*.safetensors` and `clip_l.safetensors` share.
"""

from acejax.weights.layout import Layout

LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "embedding": "weight"}

# Whole-checkpoint files of ComfyUI put "text_encoders.NAME.transformer." before the keys and a logit_scale beside them.
T5 = {"hf": Layout(LEAVES, {
    "shared": "token_embedding",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "relative_bias",
    "encoder.block.{i}.layer.0.layer_norm": "blocks/attention_norm",
    "encoder.block.{i}.layer.0.SelfAttention.q": "blocks/qkv[0]",
    "encoder.block.{i}.layer.0.SelfAttention.k": "blocks/qkv[1]",
    "encoder.block.{i}.layer.0.SelfAttention.v": "blocks/qkv[2]",
    "encoder.block.{i}.layer.0.SelfAttention.o": "blocks/proj",
    "encoder.block.{i}.layer.1.layer_norm": "blocks/mlp_norm",
    "encoder.block.{i}.layer.1.DenseReluDense.wi_0": "blocks/mlp_gate",
    "encoder.block.{i}.layer.1.DenseReluDense.wi_1": "blocks/mlp_in",
    "encoder.block.{i}.layer.1.DenseReluDense.wo": "blocks/mlp_out",
    "encoder.final_layer_norm": "final_norm",
}, marker="relative_bias/embedding", prefixes=("", "text_encoders.t5xxl.transformer."),
    twins={"encoder.embed_tokens.weight": "shared.weight"}, ignored=frozenset({"logit_scale"}))}

CLIP = {"hf": Layout(LEAVES, {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "position_embedding",
    "encoder.layers.{i}.layer_norm1": "blocks/attention_norm",
    "encoder.layers.{i}.self_attn.q_proj": "blocks/qkv[0]",
    "encoder.layers.{i}.self_attn.k_proj": "blocks/qkv[1]",
    "encoder.layers.{i}.self_attn.v_proj": "blocks/qkv[2]",
    "encoder.layers.{i}.self_attn.out_proj": "blocks/proj",
    "encoder.layers.{i}.layer_norm2": "blocks/mlp_norm",
    "encoder.layers.{i}.mlp.fc1": "blocks/mlp_in",
    "encoder.layers.{i}.mlp.fc2": "blocks/mlp_out",
    "final_layer_norm": "final_norm",
    # transformers 4 and the published file have "text_model.", 5 reads both and saves without
}, marker="token_embedding/embedding", prefixes=("text_model.", "", "text_encoders.clip_l.transformer.text_model."),
    ignored=frozenset({"embeddings.position_ids", "text_projection.weight", "logit_scale"}))}
