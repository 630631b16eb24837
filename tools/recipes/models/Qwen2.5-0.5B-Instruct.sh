# Qwen2.5-0.5B-Instruct, from its config.json: python -m miles.megatron.recipe
MODEL_ARGS=(
    --num-layers 24
    --hidden-size 896
    --ffn-hidden-size 4864
    --num-attention-heads 14
    --group-query-attention
    --num-query-groups 2
    --kv-channels 64
    --swiglu
    --disable-bias-linear
    --add-qkv-bias
    --normalization RMSNorm
    --norm-epsilon 1e-06
    --position-embedding-type rope
    --rotary-base 1000000
    --vocab-size 151936
)
