"Configs: everything a person can get wrong is told in one line, and nothing that was written is dropped in silence."

import hashlib
import re
import tomllib

import pytest

from qwen_vl_kit.config import STAGES, to_toml, validate
from qwen_vl_kit.core import InputError, resolve
from qwen_vl_kit.foreign.tomls import NESTED, flat_keys, translate
from qwen_vl_kit.runner.configs import load_config, read_toml

SEED = {"crafter_qwen3vl_2b_gpt4o.toml": "efd6e19911bf1a81035e54fb0018555a30ae4dffcce3f143fc8c9daacb9ff52e",
        "crafter_rl_qwen3vl_2b.toml": "afd79731fcc3073cee37c6f2aac25102810e8e7c4109cbe6cb81f9662b815d98"}


def written(tmp_path, text, name="sft.toml"):
    (tmp_path / name).write_text(text + "\n")
    return tmp_path / name


@pytest.mark.parametrize(
    "text, says",
    [
        ("lerning_rate = 1e-4", "unknown key 'lerning_rate' for sft; did you mean 'learning_rate'?"),
        ('epochs = "many"', "key 'epochs': input should be a valid number"),
        ('learning_rate = "1e-4"', "key 'learning_rate': input should be a valid number"),
        ("bf16 = 1", "key 'bf16': input should be a valid boolean"),
        ("lora_rank = true", "key 'lora_rank': input should be a valid integer"),
        ("lora_dropout = 1.5", "key 'lora_dropout': input should be less than 1, not 1.5; its default is 0.0"),
        ("learning_rate = nan", "key 'learning_rate'"),
        ('variety = "loro"', "key 'variety': input should be 'lora', 'qlora' or 'full'"),
        ("epochs = ", "cannot be read as TOML (Invalid value (at line 1, column 10))"),
        ("epochs = 1\nepochs = 2", "cannot be read as TOML (Cannot overwrite a value (at line 2"),
        ("[hyperparametrs]\nlearning_rate = 1e-4", "table [hyperparametrs] is of no stage"),
        ('[algorithm]\nmethod = "ppo"', "unknown key 'algorithm.method' = \"ppo\""),
        ('[algorithm]\nmethod = "sft"\n[hyperparameters]\nn_epoch = 3', "did you mean 'hyperparameters.n_epochs'?"),
        (
            '[algorithm]\nmethod = "sft"\n[hyperparameters]\nn_epochs = 0',
            "key 'hyperparameters.n_epochs': input should be greater than 0",
        ),
        (
            '[algorithm]\nmethod = "sft"\n[hyperparameters]\nlora_target_modules = ["mm_projector"]',
            "not a set of layers the kit adapts",
        ),
        (
            '[algorithm]\nmethod = "sft"\n[hyperparameters]\nlora_rank = 8\n[lora]\nr = 16',
            "'hyperparameters.lora_rank' says 8",
        ),
        ('[algorithm]\nmethod = "grpo"', "is for grpo, not for sft"),
    ],
)
def test_bad_input_is_one_line_that_names_file_and_key(tmp_path, text, says):
    path = written(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_config(path, "sft")
    assert str(error.value).startswith(str(path)) and says in str(error.value) and "\n" not in str(error.value)


def test_horizons_and_seeds_are_checked(tmp_path):
    for text, says in (
        ('horizon = "50"', "unknown horizon '50'"),
        ('seeds = "9-3"', "run backwards"),
        ('seeds = "a"', "write seeds as"),
    ):
        with pytest.raises(InputError, match=says):
            load_config(written(tmp_path, text, "collect.toml"), "collect")


def test_files_are_read_as_editors_leave_them(tmp_path):
    path = tmp_path / "sft.toml"
    path.write_bytes("\ufeffepochs = 2\r\n# é\r\nseed = 3\r\n".encode())
    assert (load_config(path, "sft").epochs, load_config(path, "sft").seed) == (2, 3)
    path.write_text("epochs = 2", encoding="utf-16")
    with pytest.raises(InputError, match="cannot be read as TOML"):
        load_config(path, "sft")


def test_a_missing_file_is_answered_with_the_nearest(tmp_path):
    written(tmp_path, "")
    with pytest.raises(InputError, match="stf.toml: no such file; did you mean 'sft.toml'"):
        load_config(tmp_path / "stf.toml", "sft")


def test_shared_keys_go_to_the_stages_that_have_them(tmp_path):
    for stage in STAGES:
        written(tmp_path, "", f"{stage}.toml")
    written(tmp_path, 'model = "tiny"\nseed = 5\n', "run.toml")
    assert [load_config(tmp_path, stage).model for stage in ("collect", "sft", "grpo", "benchmark")] == ["tiny"] * 4
    assert load_config(tmp_path / "sft.toml", "sft").seed == 5
    written(tmp_path, "sead = 5\n", "run.toml")
    with pytest.raises(InputError, match="run.toml: no stage has the key 'sead'; did you mean"):
        load_config(tmp_path, "report")


def test_set_goes_before_file_and_run_toml(tmp_path):
    written(tmp_path, "seed = 1\n", "run.toml")
    path = written(tmp_path, "seed = 2\nepochs = 4.0\n")
    assert load_config(path, "sft").seed == 2
    loaded = load_config(path, "sft", ["seed=3", "model=tiny"])
    assert (loaded.seed, loaded.model, loaded.epochs) == (3, "tiny", 4.0)


@pytest.mark.parametrize("folder", ["demo", "h200", "seed"])
def test_every_config_folder_is_whole_and_reads_back(folder):
    for stage in STAGES:
        loaded = load_config(f"configs/{folder}", stage)
        assert validate(stage, tomllib.loads(to_toml(loaded))).model_dump() == loaded.model_dump()


def test_all_stages_of_a_folder_show_the_same_prompt():
    from qwen_vl_kit.protocol.turns import prompt_hash
    for folder in ("demo", "h200", "seed"):
        assert (
            len({prompt_hash(load_config(f"configs/{folder}", stage)) for stage in ("collect", "grpo", "benchmark")})
            == 1
        )


@pytest.mark.parametrize("name", SEED)
def test_the_seeds_own_tomls_are_letter_for_letter(name):
    assert hashlib.sha256(resolve(f"configs/seed/{name}").read_bytes()).hexdigest() == SEED[name]


def test_the_seeds_sft_toml_means_what_it_says():
    loaded = load_config("configs/seed/crafter_qwen3vl_2b_gpt4o.toml", "sft")
    assert (loaded.model, loaded.train) == ("Qwen/Qwen3-VL-2B-Instruct", "traces/gpt4o_vision_100/sft/train.jsonl")
    assert (loaded.variety, loaded.epochs, loaded.batch_size, loaded.gradient_accumulation_steps) == ("qlora", 3, 1, 16)
    assert (loaded.lora_rank, loaded.lora_alpha, loaded.lora_dropout, loaded.lora_targets) == (
        16,
        32,
        0.05,
        "all-linear",
    )
    assert (loaded.learning_rate, loaded.warmup_ratio, loaded.sequence_length) == (5e-5, 0.03, 2048)
    assert (loaded.bf16, loaded.gradient_checkpointing, loaded.eval_steps, loaded.keep_best) == (True, True, 50, True)
    [warning] = [line for line in loaded.notices if "warning" in line]
    for key in ("evaluation_strategy", "eval_steps", "save_best_model_at_end", "metric_for_best_model"):
        assert key in warning


def test_the_seeds_rl_toml_means_what_it_says():
    loaded = load_config("configs/seed/crafter_rl_qwen3vl_2b.toml", "grpo")
    assert (loaded.adapter, loaded.iterations, loaded.horizon) == ("lora_adapters/qwen3vl_2b_crafter_gpt4o", 20, "t50")
    assert loaded.groups * loaded.group_size == 50 and loaded.variety == "qlora"
    assert not any("use_qlora" in line for line in loaded.notices)
    assert (loaded.beta, loaded.epsilon, loaded.epsilon_high, loaded.scale_rewards) == (0.1, 0.2, 0.2, True)
    assert (loaded.batch_size, loaded.gradient_accumulation_steps, loaded.learning_rate) == (2, 8, 2e-6)
    assert any("value_clip_range: GRPO has no value function" in line for line in loaded.notices)


def test_keys_of_synth_ais_other_tomls_act(tmp_path):
    rl = """
        [algorithm]\ntype = "online"\nmethod = "policy_gradient"\nvariety = "gspo"
        [policy]\nmodel_name = "tiny"\ntrainer_mode = "lora"
        [training]\nnum_epochs = 2\niterations_per_epoch = 3\nmax_turns = 10\ngroup_size = 4\nlog_interval = 1
        [evaluation]\ninstances = 8
        [training.weight_sync]\nenable = true
        [rollout]\nepisodes_per_batch = 2
        [rollout.policy_config]\ntemperature = 0.6\nmax_tokens = 99"""
    loaded = load_config(written(tmp_path, rl, "rl.toml"), "grpo")
    assert (loaded.importance, loaded.model, loaded.iterations, loaded.horizon, loaded.group_size) == (
        "sequence",
        "tiny",
        6,
        "t10",
        4,
    )
    assert (loaded.temperature, loaded.max_new_tokens) == (0.6, 99)
    for key, reason in (
        ("variety", "its paper clips closer"),
        ("log_interval", "every iteration"),
        ("enable", "after every iteration"),
        ("episodes_per_batch", "groups x group_size"),
        ("instances", "the benchmark plays unseen seeds"),
    ):
        assert any(f"{key}:" in line and reason in line for line in loaded.notices), key
    sft = """[algorithm]\nmethod = "sft"\n[job]\ndata = "x/train.jsonl"
        [hyperparameters.parallelism]\nload_best_model_at_end = false"""
    loaded = load_config(written(tmp_path, sft), "sft")
    assert not loaded.keep_best and any(
        "load_best_model_at_end" in line and "[training.validation]" in line for line in loaded.notices
    )
    seen = """[eval]\nmodel = "m"\nprovider = "openai"\nseeds = [3, 1]\nmax_steps_per_episode = 20
        parallel_episodes = 5\ntrace_db = "t/rollouts.db\""""
    loaded = load_config(written(tmp_path, seen, "e.toml"), "collect")
    assert (loaded.seeds, loaded.horizon, loaded.concurrency, loaded.engine) == ("3,1", "t20", 5, "server")


@pytest.mark.parametrize("name, stage", [("crafter_qwen3vl_2b_gpt4o", "sft"), ("crafter_rl_qwen3vl_2b", "grpo"),
                                         ("eval_gpt4o_vision_proper", "collect"), ("filter_vision_test", "export")])
def test_every_key_of_a_nested_toml_acts_or_is_named(name, stage):
    document = read_toml(f"configs/seed/{name}.toml")
    translated = translate(document, stage)
    acting = {dotted for _, dotted in translated.names.values()}
    confirmed = {  # these repeat or decide what another key's field says
        "algorithm.type",
        "algorithm.method",
        "algorithm.variety",
        "training.mode",
        "hyperparameters.train_kind",
        "topology.type",
        "hyperparameters.parallelism.deepspeed_stage",
        "vllm.tensor_parallel_size",
        "eval.policy_config.model",
        "eval.policy_config.max_llm_calls",
        "eval.policy_config.use_vision",
    }
    for dotted, _ in flat_keys(document, NESTED[stage]):
        table, _, key = dotted.rpartition(".")
        notice = re.compile(rf"(\[{re.escape(table)}\]|warning:) [\w, ]*\b{key}\b")
        assert dotted in acting or dotted in confirmed or any(map(notice.match, translated.notices)), dotted
