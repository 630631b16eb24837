"""Launch scripts' descriptions of models: read, compared with config.json, and made from it."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from miles.core.config import Config
from miles.core.errors import TrainingError
from miles.megatron.architecture_flags import checked
from miles.megatron.constants import model_map
from miles.megatron.model_args import layer_pattern, window
from miles.megatron.recipe import main, script

RECIPES = Path(__file__).parents[3] / "tools" / "recipes" / "models"
CONFIGS = sorted(RECIPES.glob("configs/*.json"))
# As their model cards count, without layers of multi-token prediction and biases of routers.
PARAMETERS = {
    "DeepSeek-V3": 671_026_404_352,
    "GLM-4-9B-0414": 9_400_279_040,
    "GLM-4.5": 352_797_814_784,
    "GLM-4.5-Air": 106_852_245_504,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,
}


def architecture(path):
    hf = json.loads(path.read_text())
    return model_map(hf).architecture(hf)


def read(*flags):
    """The configuration of a command line, and what is wrong with these flags."""
    config, problems = Config.examine(["--rollout-batch-size", "8", "--train-backend", "megatron", *flags])
    spellings = {flag for flag in flags if flag.startswith("--")}
    return config, [problem for problem in problems if any(spelling in problem for spelling in spellings)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipes_are_what_their_configurations_say(path):
    recipe = RECIPES / f"{path.stem}.sh"
    assert recipe.read_text() == script(path.stem, architecture(path))
    # Through a shell, as a launch script has it.
    command = f'source {recipe}; printf "%s\\n" "${{MODEL_ARGS[@]}}"'
    args = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout.split()
    config, problems = read(*args)
    assert problems == []
    assert checked(architecture(path), config).rotary == architecture(path).rotary


def test_recipes_have_the_sizes_that_were_published():
    sizes = {}
    for path in CONFIGS:
        hf = json.loads(path.read_text())
        config = transformers.AutoConfig.for_model(hf.pop("model_type"), **hf)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        sizes[path.stem] = sum(parameter.numel() for parameter in model.parameters())
    assert sizes == PARAMETERS


def test_every_recipe_has_a_configuration():
    assert {path.stem for path in RECIPES.glob("*.sh")} == {path.stem for path in CONFIGS} == set(PARAMETERS)


def test_the_command_prints_and_writes(tmp_path, capsys):
    source = RECIPES / "configs" / "Qwen3-0.6B.json"
    assert main([str(source)]) == 0
    printed = capsys.readouterr().out
    assert main([str(source), "--into", str(tmp_path)]) == 0
    assert printed == (tmp_path / "Qwen3-0.6B.sh").read_text() == (RECIPES / "Qwen3-0.6B.sh").read_text()
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    assert main([str(tmp_path / "config.json")]) == 1
    assert "knows no model of model_type 'unheard-of'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--num-layers 12", r"--num-layers 12 \(config.json: 28\)"),
        ("--norm-epsilon 1e-5", r"--norm-epsilon 1e-05 \(config.json: 1e-06\)"),
        ("--rotary-base 10000", r"--rotary-base 10000.* \(config.json: 1000000\)"),
        ("--vocab-size 32000 --swiglu", r"--vocab-size 32000 \(config.json: 151936\). "),
        ("--untie-embeddings-and-output-weights", r"--untie-embeddings-and-output-weights True \(config.json: False\)"),
        ("--num-experts 8", r"--num-experts 8 \(config.json: None\)"),
        ("--quick-geglu", r"--quick-geglu True \(config.json: False\)"),
        ("--multi-latent-attention", r"--multi-latent-attention True \(config.json: False\)"),
    ],
)
def test_a_contradiction_is_an_error_with_both_values(flags, complaint):
    qwen3 = architecture(RECIPES / "configs" / "Qwen3-0.6B.json")
    config, problems = read(*flags.split())
    assert problems == []
    with pytest.raises(TrainingError, match=complaint):
        checked(qwen3, config)
    config, _ = read(*flags.split(), "--allow-model-args-mismatch")
    checked(qwen3, config)


def test_rotary_positions_follow_the_flags_where_contradictions_are_allowed():
    config, _ = read("--rotary-base", "5000", "--allow-model-args-mismatch")
    assert checked(architecture(RECIPES / "configs" / "Qwen3-0.6B.json"), config).rotary["rotary_base"] == 5000


# What a script for DeepSeek-V3 says, beside the architecture too.
DEEPSEEK = """
    --disable-bias-linear --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128
    --kv-channels 128 --normalization RMSNorm --position-embedding-type rope --norm-epsilon 1e-6 --swiglu
    --untie-embeddings-and-output-weights --vocab-size 129280 --multi-latent-attention --q-lora-rank 1536
    --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128 --qk-layernorm
    --rotary-scaling-factor 40 --rotary-base 10000 --mscale 1.0 --mscale-all-dim 1.0 --attention-softmax-in-fp32
    --no-rope-fusion --num-experts 256 --moe-layer-freq '([0]*3+[1]*58)' --moe-ffn-hidden-size 2048
    --moe-router-topk 8 --moe-shared-expert-intermediate-size 2048 --moe-router-pre-softmax
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-load-balancing-type seq_aux_loss
    --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 0 --moe-router-bias-update-rate 0
    --moe-router-group-topk 4 --moe-router-num-groups 8 --moe-grouped-gemm --moe-router-topk-scaling-factor 2.5
    --moe-router-dtype fp32 --moe-permute-fusion --moe-token-drop-policy probs --attention-backend flash
    --decoder-last-pipeline-num-layers 13
"""


def test_spellings_of_public_scripts_are_taken():
    config, problems = read(*DEEPSEEK.split())
    assert problems == []
    checked(architecture(RECIPES / "configs" / "DeepSeek-V3.json"), config)


def test_patterns_of_layers_have_several_forms():
    assert layer_pattern("2") == 2
    assert layer_pattern("[0, 1, 1]") == [0, 1, 1]
    assert layer_pattern("'([0]*1+[1,0]*2)'") == [0, 1, 0, 1, 0]
    assert window("127,0") == window("(127, 0)") == (127, 0)
    for flags in ("--moe-layer-freq [0]*x", "--window-size 127"):
        assert any(flags.split()[0] in problem for problem in read(*flags.split())[1])


def test_a_model_trains_with_its_own_arguments(config, rollout, on_ranks):
    """And with fusions that only Transformer Engine has, which are left out where it is not."""
    described = {
        "num_layers": 3,
        "swiglu": True,
        "num_experts": 8,
        "moe_layer_freq": "[0]*1+[1]*2",
        "moe_permute_fusion": True,
        "moe_grouped_gemm": True,
        "moe_router_load_balancing_type": ["seq_aux_loss"],
        "moe_aux_loss_coeff": [0.0],
        "attention_backend": "flash",
        "attention_softmax_in_fp32": True,
    }

    def trained(**flags):
        return on_ranks(1, lambda make: make(config("deepseek", **flags)).train(rollout()).steps)[0]

    assert trained(**described) == trained()


@pytest.mark.parametrize("flag", ["fp8", "fp8_format"])
def test_precisions_of_transformer_engine_are_refused_without_it(config, on_ranks, flag):
    def run(make):
        with pytest.raises(TrainingError, match="--fp8 e4m3 needs Transformer Engine and a GPU"):
            make(config("qwen3", **{flag: "e4m3"}))
        return True

    assert on_ranks(1, run) == [True]
