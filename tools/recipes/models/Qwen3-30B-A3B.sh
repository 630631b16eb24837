# Qwen3-30B-A3B, from its config.json: python -m miles.megatron.recipe
MODEL_ARGS=(
    --num-layers 48
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 4
    --kv-channels 128
    --qk-layernorm
    --swiglu
    --disable-bias-linear
    --normalization RMSNorm
    --norm-epsilon 1e-06
    --position-embedding-type rope
    --rotary-base 1000000
    --num-experts 128
    --moe-layer-freq '[1]*48'
    --moe-ffn-hidden-size 768
    --moe-router-topk 8
    --moe-router-score-function softmax
    --vocab-size 151936
    --untie-embeddings-and-output-weights
)
