# GLM-4-9B-0414, from its config.json: python -m miles.megatron.recipe
MODEL_ARGS=(
    --num-layers 40
    --hidden-size 4096
    --ffn-hidden-size 13696
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 2
    --kv-channels 128
    --swiglu
    --disable-bias-linear
    --add-qkv-bias
    --normalization RMSNorm
    --norm-epsilon 1e-05
    --post-self-attn-layernorm
    --post-mlp-layernorm
    --position-embedding-type rope
    --rotary-base 10000
    --rotary-percent 0.5
    --rotary-interleaved
    --vocab-size 151552
    --untie-embeddings-and-output-weights
)
