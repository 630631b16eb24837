# Qwen3-0.6B, from its config.json: python -m miles.megatron.recipe
MODEL_ARGS=(
    --num-layers 28
    --hidden-size 1024
    --ffn-hidden-size 3072
    --num-attention-heads 16
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
)
