"""The variables of the training service."""

import pytest

from nightschool.config.training_service import (
    DEFAULTS,
    JobSettings,
    TrainingServiceSettings,
    variable_of,
    variables_without_a_use,
)
from nightschool.errors import UsageError

# Rows 001-14 … 001-18, as their `.env.example` has them.
DOCUMENTED = {
    "DEFAULT_BASE_MODEL": "meta-llama/Llama-2-7b-chat-hf",
    "BATCH_SIZE": "4",
    "GRADIENT_ACCUMULATION_STEPS": "4",
    "LEARNING_RATE": "0.0002",
    "NUM_TRAIN_EPOCHS": "3",
    "MAX_SEQ_LENGTH": "2048",
    "WARMUP_STEPS": "100",
    "SAVE_STEPS": "500",
    "EVAL_STEPS": "500",
    "LOGGING_STEPS": "10",
    "LORA_R": "16",
    "LORA_ALPHA": "32",
    "LORA_DROPOUT": "0.05",
    "LORA_TARGET_MODULES": "q_proj,v_proj",
    "USE_4BIT": "true",
    "USE_8BIT": "false",
    "BNB_4BIT_COMPUTE_DTYPE": "float16",
    "BNB_4BIT_QUANT_TYPE": "nf4",
    "MIN_TRAINING_SAMPLES": "100",
    "VALIDATION_SPLIT": "0.1",
    "MAX_NEW_TOKENS": "500",
    "TEMPERATURE": "0.8",
    "TOP_P": "0.9",
    "TOP_K": "50",
}


def test_the_documented_environment_is_understood():
    settings = TrainingServiceSettings.of_environment(DOCUMENTED)
    assert settings.min_training_samples == 100
    assert settings.job.lora_target_modules == ["q_proj", "v_proj"]
    assert (settings.job.use_4bit, settings.job.use_8bit) == (True, False)
    told = settings.model_dump(exclude={"job"}) | settings.job.model_dump(exclude_none=True)
    assert {variable_of(name) for name in told} - {"ALLOWED_BASE_MODELS", "MODEL_ALIASES"} == set(DOCUMENTED)


def test_without_variables_the_documented_defaults_hold():
    settings = TrainingServiceSettings.of_environment({})
    documented = TrainingServiceSettings.of_environment(DOCUMENTED)
    same = ("max_new_tokens", "temperature", "top_p", "top_k")
    assert [getattr(settings, name) for name in same] == [getattr(documented, name) for name in same]
    for name, value in DEFAULTS.model_dump(exclude_none=True).items():
        if name not in ("logging_steps", "gradient_checkpointing"):
            assert value == getattr(documented.job, name), name
    assert settings.min_training_samples == 1


def test_an_empty_variable_is_none():
    assert TrainingServiceSettings.of_environment({"BATCH_SIZE": " ", "ALLOWED_BASE_MODELS": ","}).job == JobSettings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BATCH_SIZE", "many"),
        ("LEARNING_RATE", "nan"),
        ("NUM_TRAIN_EPOCHS", "0"),
        ("LORA_TARGET_MODULES", "q_proj,../v"),
        ("VALIDATION_SPLIT", "1"),
        ("USE_4BIT", "perhaps"),
        ("TOP_P", "0"),
    ],
)
def test_a_value_without_sense_is_refused_by_its_name(name, value):
    with pytest.raises(UsageError, match=f"^{name}={value}: "):
        TrainingServiceSettings.of_environment({name: value})


def test_the_request_goes_before_the_environment_and_that_before_the_defaults():
    asked, environment = JobSettings(batch_size=1), JobSettings(batch_size=2, lora_r=8)
    settings = asked.over(environment).over(DEFAULTS)
    assert (settings.batch_size, settings.lora_r, settings.num_epochs) == (1, 8, 3)


def test_only_allowed_bases_are_taken(tmp_path, monkeypatch):
    settings = TrainingServiceSettings(default_base_model="own/base", allowed_base_models=("other/base",))
    assert settings.base_for(None) == settings.base_for("own/base") == "own/base"
    assert settings.base_for(" other/base ") == "other/base"
    for wanted in ("third/base", "", "own/base\n../x", "/etc", "../own/base", "OWN/BASE"):
        with pytest.raises(UsageError, match="is not allowed here"):
            settings.base_for(wanted)
    with pytest.raises(UsageError, match="DEFAULT_BASE_MODEL is not set"):
        TrainingServiceSettings().base_for(None)


def test_a_folder_is_named_by_its_whole_path_to_a_job_that_runs_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = TrainingServiceSettings(default_base_model="base", allowed_base_models=("./other.gguf",))
    assert settings.base_for(None) == str(tmp_path / "base")
    assert settings.base_for("./other.gguf") == str(tmp_path / "other.gguf")


def test_what_has_no_use_here_is_said():
    said = variables_without_a_use({"ENV": "development", "CHECKPOINT_DIR": "./models/checkpoints", "REDIS_URL": ""})
    assert [sentence.split()[0] for sentence in said] == ["ENV", "CHECKPOINT_DIR"]


def test_another_name_of_a_base_stands_for_it():
    settings = TrainingServiceSettings.of_environment({"MODEL_ALIASES": " gpt-4o-mini = own/base , mini=other/base"})
    assert [settings.base_for(name) for name in ("gpt-4o-mini", "mini", "own/base")] == [
        "own/base",
        "other/base",
        "own/base",
    ]
    with pytest.raises(UsageError, match="is not allowed here"):
        settings.base_for("gpt-4o")


@pytest.mark.parametrize("text", ["gpt-4o-mini", "=", "gpt-4o-mini="])
def test_an_alias_of_nothing_is_refused(text):
    with pytest.raises(UsageError, match="MODEL_ALIASES"):
        TrainingServiceSettings.of_environment({"MODEL_ALIASES": text})
