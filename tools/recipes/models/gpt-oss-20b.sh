# gpt-oss-20b, from its config.json: python -m miles.megatron.recipe
MODEL_ARGS=(
    --num-layers 24
    --hidden-size 2880
    --ffn-hidden-size 2880
    --num-attention-heads 64
    --group-query-attention
    --num-query-groups 8
    --kv-channels 64
    --softmax-type learnable
    --window-size 127,0
    --window-attn-skip-freq '[1,0]*12'
    --quick-geglu
    --glu-linear-offset 1
    --activation-func-clamp-value 7
    --normalization RMSNorm
    --norm-epsilon 1e-05
    --position-embedding-type yarn
    --rotary-base 150000
    --rotary-scaling-factor 32
    --num-experts 32
    --moe-layer-freq '[1]*24'
    --moe-ffn-hidden-size 2880
    --moe-router-topk 4
    --moe-router-score-function softmax
    --vocab-size 201088
    --untie-embeddings-and-output-weights
)
