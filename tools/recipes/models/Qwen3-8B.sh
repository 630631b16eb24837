# Qwen3-8B, from its config.json: python -m miles.megatron.recipe
MODEL_ARGS=(
    --num-layers 36
    --hidden-size 4096
    --ffn-hidden-size 12288
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --qk-layernorm
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --norm-epsilon 1e-06
    --position-embedding-type rope
    --rotary-base 1000000
    --vocab-size 151936
    --untie-embeddings-and-output-weights
)
