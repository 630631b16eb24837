# GLM-4.5-Air, from its config.json: python -m miles.megatron.recipe
MODEL_ARGS=(
    --num-layers 46
    --hidden-size 4096
    --ffn-hidden-size 10944
    --num-attention-heads 96
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --swiglu
    --disable-bias-linear
    --add-qkv-bias
    --normalization RMSNorm
    --norm-epsilon 1e-05
    --position-embedding-type rope
    --rotary-base 1000000
    --rotary-percent 0.5
    --num-experts 128
    --moe-layer-freq '[0]*1+[1]*45'
    --moe-ffn-hidden-size 1408
    --moe-shared-expert-intermediate-size 1408
    --moe-router-topk 8
    --moe-router-score-function sigmoid
    --moe-router-topk-scaling-factor 1
    --moe-router-enable-expert-bias
    --vocab-size 151552
    --untie-embeddings-and-output-weights
)
