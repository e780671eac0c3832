"""A stranger's model folder: exactly the checked files are loaded, nothing asks for more than the weights hold, nothing hangs."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
from tiny import tiny_llama

from qlora_helpers.base.config import AdapterConfig, ModelConfig
from qlora_helpers.base.errors import ModelError
from qlora_helpers.model import loading_folder as opened
from qlora_helpers.model import trial
from qlora_helpers.model.adapter_files import check_adapter, read_adapter_settings
from qlora_helpers.model.checkpoints import base_fingerprint, find_checkpoint
from qlora_helpers.model.inspection import read_shape
from qlora_helpers.model.loading import load_model
from qlora_helpers.model.shapes.lookup import find_shape
from qlora_helpers.model.tokenizers import load_tokenizer

pytestmark = pytest.mark.usefixtures("cache", "torch")


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A copy of the tiny Llama's folder, to be spoilt."""
    return shutil.copytree(llama_folder, tmp_path / "model")


def quiet(text: str) -> None:
    pass


def load(folder, **settings):
    return load_model(ModelConfig(name=str(folder), **{"quantization": "none"} | settings), say=quiet)


def refusal(folder, do=load) -> str:
    with pytest.raises(ModelError) as caught:
        do(folder)
    return str(caught.value)


def edit(path, **changes) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def index(folder, file: str) -> None:
    """Renames the weights and writes an index that names `file` for all of them."""
    from safetensors.torch import load_file

    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    places = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))


# weights


class Evil:
    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_a_pickle_beside_any_safetensors_file_is_not_loaded(folder, tmp_path, torch):
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    torch.save({name: torch.full_like(value, 0.125) for name, value in weights.items()}, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "holds no weights as safetensors; expected model.safetensors" in message and "x.safetensors" in message
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    refusal(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("../outside.safetensors", "names a file outside its folder"),
        ("sub/x.safetensors", "names a file outside its folder"),
        ("w.bin", "names 'w.bin', which is not a safetensors file"),
        ("absent.safetensors", "absent.safetensors is damaged or incomplete: it is not in the folder"),
    ],
)
def test_an_index_names_safetensors_files_of_its_own_folder_alone(folder, torch, file, expected):
    (folder / "sub").mkdir()
    for place in ("../outside.safetensors", "sub/x.safetensors", "w.bin"):
        shutil.copy(folder / "model.safetensors", folder / place)
    index(folder, file)
    assert expected in refusal(folder)


def test_weights_that_are_not_a_plain_file_are_refused(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    assert "it is not a plain file" in refusal(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")
    assert "it is not a plain file" in refusal(folder)


def test_the_fingerprint_is_of_the_files_that_are_loaded(folder, torch):
    """Other weights under the same name are noticed, other files beside them are not part of the model."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    index(folder, "x.safetensors")
    before = base_fingerprint(folder)
    save_file(weights, folder / "consolidated.safetensors")
    assert base_fingerprint(folder) == before
    save_file(
        {name: value + 0.01 for name, value in weights.items()}, folder / "x.safetensors", metadata={"format": "pt"}
    )
    assert base_fingerprint(folder) != before
    loaded = load(folder).model.state_dict()
    assert torch.equal(loaded["model.norm.weight"], weights["model.norm.weight"] + 0.01)


@pytest.mark.parametrize("how", ["setting", "shards", "adapter's weights"])
def test_no_setting_and_no_other_file_chooses_other_weights(folder, torch, how):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    names = {"shards": "shard-00001-model-00001-of-00001.safetensors", "adapter's weights": "adapter_model.safetensors"}
    other = folder / names.get(how, "other.safetensors")
    save_file({name: value * 0 for name, value in weights.items()}, other, metadata={"format": "pt"})
    if how == "setting":
        edit(folder / "config.json", transformers_weights=other.name)
    assert torch.equal(load(folder).model.model.norm.weight, weights["model.norm.weight"])


# an adapter inside a model's folder


def adapter(folder, torch, **settings) -> None:
    from peft import LoraConfig, get_peft_model

    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    get_peft_model(tiny_llama(), LoraConfig(**values | settings)).save_pretrained(folder)


def test_an_adapter_beside_a_model_is_refused_with_a_way_out(folder, torch):
    """transformers would load it in silence: other answers than those of the files that are fingerprinted."""
    adapter(folder, torch)
    message = refusal(folder)
    assert "model holds a model and an adapter beside it" in message
    assert "Move the files whose names begin with adapter_ into a folder of their own" in message
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    assert not hasattr(load(folder).model, "peft_config")


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_is_not_a_model(folder, torch, with_config):
    adapter(folder, torch)
    edit(folder / "adapter_config.json", base_model_name_or_path="/home/someone/m/llama")
    (folder / "model.safetensors").unlink()
    if not with_config:
        (folder / "config.json").unlink()
    message = refusal(folder)
    assert (
        "model holds an adapter and no model; expected the model that the adapter was trained on (m/llama)" in message
    )
    assert "someone" not in message


@pytest.mark.parametrize("name", ["adapter_config.json", "generation_config.json", "tokenizer.json", "config.json"])
def test_a_pipe_or_a_device_is_never_read(folder, name):
    """Reading a pipe waits for ever, and `/dev/zero` has no end."""
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        try:
            load(folder)
        except ModelError:
            continue
        assert name == "generation_config.json"  # as if it were not there


# what a configuration asks for


def built(monkeypatch) -> list:
    """Collects the classes that are built as models, on whatever device."""
    from transformers import LlamaModel

    found, original = [], LlamaModel.__init__
    monkeypatch.setattr(LlamaModel, "__init__", lambda self, config: (found.append(config), original(self, config))[1])
    return found


@pytest.mark.parametrize("layers", [3, 20_000, 10**9])
def test_more_layers_than_the_files_hold_are_refused_before_any_is_built(folder, monkeypatch, layers):
    models = built(monkeypatch)
    edit(folder / "config.json", num_hidden_layers=layers)
    expected = "lacks some of its weights: its files hold 2 layers" if layers == 3 else "asks for more layers than any"
    assert expected in refusal(folder)
    assert expected in refusal(folder, lambda place: read_shape(find_checkpoint(ModelConfig(name=str(place)))))
    if layers > 3:
        assert expected in refusal(folder, lambda place: find_shape(ModelConfig(name=str(place))))
    assert not models


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"vocab_size": 10**8},
            "its weights have other sizes than its config.json says, model.embed_tokens.weight first",
        ),
        ({"intermediate_size": 10**8}, "its weights have other sizes than its config.json says"),
        ({"hidden_size": 65536}, "its weights have other sizes than its config.json says"),
    ],
)
def test_sizes_beyond_the_tensors_are_refused_before_memory_is_taken(folder, monkeypatch, changes, expected):
    models = built(monkeypatch)
    edit(folder / "config.json", **changes)
    message = refusal(folder)
    assert expected in message and message.count(".") < 12
    assert len(models) == 1  # without memory, to compare it


def test_weights_under_other_names_are_counted(folder):
    """Where no name fits, as in files of another layout, the sums are compared."""
    from safetensors.torch import load_file, save_file

    weights = {f"other.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", vocab_size=10**8)
    assert "asks for more than its files hold; expected at most" in refusal(folder)


def test_tables_larger_than_the_model_are_refused(tmp_path, torch):
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_helpers.model.checkpoints import corpus_tokenizer

    sizes = {"vocab_size": 2048, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64}
    config = AutoConfig.for_model("gptj", rotary_dim=32, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    corpus_tokenizer().save_pretrained(tmp_path)
    load(tmp_path)
    edit(tmp_path / "config.json", n_positions=10**9)
    assert "asks for tables that are larger than the model" in refusal(tmp_path)


def test_a_configuration_of_megabytes_is_refused(folder):
    edit(folder / "config.json", more="x" * (9 << 20))
    assert "the config.json of model is over the limit of 8 MiB" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "many"},
        {"num_hidden_layers": None},
        {"rope_parameters": 5},
        {"hidden_act": "evil"},
        {"model_type": ["llama"]},
        {"layer_types": ["none"] * 2},
        {"num_key_value_heads": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_values_that_make_no_sense_are_one_message(folder, changes):
    edit(folder / "config.json", **changes)
    assert "model" in refusal(folder)


# what a model's files may not choose


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_the_attention_is_ours(folder, key):
    before = load(folder).audit.attention
    edit(folder / "config.json", **{key: "evil/kernel"})
    assert load(folder).audit.attention == before


def test_of_the_generation_settings_only_token_ids_of_the_vocabulary_are_taken(folder):
    path = folder / "generation_config.json"
    evil = {"custom_generate": "evil/x", "penalty_alpha": 0.6, "top_k": 4, "repetition_penalty": 1.3, "max_length": 9}
    edit(path, **evil, eos_token_id=[5, 0, 99_999, -1], cache_implementation="evil")
    with opened.loading_folder(find_checkpoint(ModelConfig(name=str(folder)))) as place:
        assert json.loads((place / path.name).read_text()) == {"bos_token_id": 0, "eos_token_id": [5, 0]}
    kept = load(folder).model.generation_config
    assert (kept.repetition_penalty, kept.top_k) in {(1.0, 50), (None, None)}
    edit(path, eos_token_id="</s>")
    assert "names a token that is not a number" in refusal(folder)
    path.write_text("[" * 100_000)
    assert "the generation_config.json of model can't be read" in refusal(folder)


# chat templates and tokenizers


@pytest.fixture
def short(monkeypatch):
    """Trials may compute for three seconds, of which starting takes one."""
    monkeypatch.setattr(trial, "CPU_S", 3)


QUESTION = "{{ messages[0]['content'] }}"
TEMPLATES = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ (9**(9**9))|string|length }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "product": "{% set x = 'a' * 4000000000 %}",
    "format": "{{ '%1000000000s'|format('x')|length }}",
    "flood": "{{ 'x' * 90000000 }}",
    "second turn": "{% if messages|length > 1 %}{{ (9**(9**9))|string|length }}{% endif %}",
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_template_that_hangs_or_asks_for_everything_is_refused(folder, kind):
    (folder / "chat_template.jinja").write_text(QUESTION + TEMPLATES[kind])
    message = refusal(folder, lambda place: load_tokenizer(ModelConfig(name=str(place)), say=quiet))
    assert "the chat template of model is not used: it " in message
    assert "did not end within 3 s of computing" in message or "takes too much memory" in message


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("where", ["tokenizer_config.json", "additional"])
def test_a_template_is_tried_wherever_it_is(folder, where):
    evil = QUESTION + TEMPLATES["power"]
    if where == "additional":
        (folder / "chat_template.jinja").write_text(QUESTION)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(evil)
    else:
        templates = [{"name": "default", "template": QUESTION}, {"name": "tool_use", "template": evil}]
        edit(folder / where, chat_template=templates)
    assert "the chat template of model is not used" in refusal(
        folder, lambda place: load_tokenizer(ModelConfig(name=str(place)), say=quiet)
    )


def definition(folder, **changes) -> None:
    edit(folder / "tokenizer.json", **changes)


def sequence(kind: dict, times: int) -> dict:
    return {"type": "Sequence", "normalizers": [kind] * times}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"normalizer": sequence({"type": "Replace", "pattern": {"String": "q"}, "content": "qq"}, 40)}, "normalizer"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 1000}}, "normalizer"),
        ({"normalizer": sequence({"type": "Prepend", "prepend": "x" * 10_000}, 200)}, "normalizer"),
    ],
)
def test_a_normalizer_that_lengthens_a_text_without_end_is_refused(folder, changes, expected):
    definition(folder, **changes)
    message = refusal(folder, lambda place: load_tokenizer(ModelConfig(name=str(place)), say=quiet))
    assert f"the tokenizer of model is not used: its {expected} makes far more of a text than it is" in message


def test_another_tokenizer_than_the_one_that_was_tried_is_not_loaded(folder):
    """transformers takes tokenizer.4.0.0.json instead of tokenizer.json where tokenizer_config.json says so."""
    good = (folder / "tokenizer.json").read_text()
    definition(folder, normalizer=sequence({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}, 10))
    (folder / "tokenizer.json").rename(folder / "tokenizer.4.0.0.json")
    (folder / "tokenizer.json").write_text(good)
    edit(folder / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"])
    message = refusal(folder, lambda place: load_tokenizer(ModelConfig(name=str(place)), say=quiet))
    assert "tokenizer_config.json of model names other files than tokenizer.json" in message
    edit(folder / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json"])
    assert len(load_tokenizer(ModelConfig(name=str(folder)), say=quiet)("a" * 10)["input_ids"]) <= 10


def test_thousands_of_tokens_around_a_text_are_refused(folder):
    pieces = [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}] * 3 + [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|pad|>": {"id": "<|pad|>", "ids": [1] * 2000, "tokens": ["<|pad|>"] * 2000}}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    processor = {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": special}
    definition(folder, post_processor=processor)
    message = refusal(folder, lambda place: load_tokenizer(ModelConfig(name=str(place)), say=quiet))
    assert "it puts thousands of tokens around a text" in message


def test_padding_and_truncation_of_a_file_do_not_count(folder):
    plain = load_tokenizer(ModelConfig(name=str(folder)), say=quiet)("a" * 400)["input_ids"]
    definition(
        folder,
        padding={
            "strategy": {"Fixed": 10**11},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
    )
    assert load_tokenizer(ModelConfig(name=str(folder)), say=quiet)("a" * 400)["input_ids"] == plain


def test_a_good_tokenizer_and_template_are_tried_once(folder, monkeypatch):
    """A load pays for one process; the same content in another folder pays nothing."""
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    started, run = [], trial.subprocess.run
    monkeypatch.setattr(trial.subprocess, "run", lambda *a, **k: (started.append(a), run(*a, **k))[1])
    for place in (folder, shutil.copytree(folder, folder.parent / "again")):
        tokenizer = load_tokenizer(ModelConfig(name=str(place)), say=quiet)
        chat = [{"role": "user", "content": "hi"}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == "[user] hi"
    assert len(started) == 1
    load_tokenizer(ModelConfig(name="random:falcon-tiny"), say=quiet)  # our own
    assert len(started) == 1


@pytest.mark.parametrize("value", ["many", [1], {}])
def test_a_setting_of_the_tokenizer_that_makes_no_sense_is_one_message(folder, value):
    edit(folder / "tokenizer_config.json", model_max_length=value)
    message = refusal(folder, lambda place: load_tokenizer(ModelConfig(name=str(place)), say=quiet))
    assert message.startswith("the tokenizer of model could not be loaded (TypeError: ")


def test_a_template_that_refuses_a_conversation_is_not_refused(folder):
    """Many raise for a system message; whether one can be used is seen where it is used."""
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert load_tokenizer(ModelConfig(name=str(folder)), say=quiet).chat_template


def test_the_trial_imports_neither_torch_nor_the_working_directory(tmp_path, monkeypatch):
    import subprocess
    import sys

    for name in ("jinja2", "tokenizers", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('from the working directory')")
    monkeypatch.chdir(tmp_path)
    trial.try_out(trial.Programs("", (QUESTION,)), "model")
    code = (
        "import runpy, sys\n"
        "sys.stdin = open(sys.argv[1])\n"
        "runpy.run_path(sys.argv[2], run_name='__main__')\n"
        "print('torch' in sys.modules)"
    )
    (tmp_path / "in").write_text(
        json.dumps({"tokenizer": "", "templates": [QUESTION], "special": {}, "cpu_s": 60, "memory_bytes": 1 << 30})
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "in"), str(trial._SCRIPT)], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr


# adapters


GOOD = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"target_modules": None, "target_parameters": ["mlp.down_proj.weight"]},
    {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
]
EVIL = {
    "target_modules": ["(a|a)*$", ["(.*)*q_proj"], ["q_proj", 5], {"a": 1}],
    "exclude_modules": ["(a+)+$"],
    "modules_to_save": [["(a+)+$"]],
    "layers_pattern": ["(a+)+$", ["(a+)+$"]],
    "rank_pattern": [{"(a+)+$": 4}, {"q_proj": 10**9}],
    "alpha_pattern": [{"(a+)+$": 4}],
    "target_parameters": [["(a+)+$"]],
    "r": [0, -1, 10**9, "8", True, None],
    "lora_alpha": [float("nan"), float("inf"), "x", None],
    "lora_dropout": [1.0, 2],
    "bias": ["everything"],
    "use_dora": ["yes"],
    "init_lora_weights": ["evil", 1],
    "layer_replication": [[[0, 20_000]]],
    "megatron_config": [{"a": 1}],
    "loftq_config": [{"loftq_bits": 4}],
    "peft_type": ["LOHA", None],
    "task_type": ["SEQ_CLS"],
    "new_in_a_later_version": [{"a": 1}],
}


@pytest.mark.parametrize("settings", GOOD, ids=str)
def test_known_settings_of_an_adapter_are_taken(tmp_path, torch, settings):
    from safetensors.torch import load_file

    from qlora_helpers.model.adapter_loading import load_adapter

    adapter(tmp_path, torch, **settings)
    check_adapter(tmp_path)
    loaded = load_adapter(tiny_llama(), tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = [weight for name, weight in loaded.named_parameters() if "lora_" in name]
    assert sum(each.numel() for each in trained) == sum(tensor.numel() for tensor in saved.values()) > 0


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in EVIL.items() for value in values], ids=str)
def test_other_settings_of_an_adapter_are_refused_before_peft_reads_them(tmp_path, torch, key, value):
    from qlora_helpers.model.adapter_loading import load_adapter

    folder = tmp_path / "adapter"
    adapter(folder, torch)
    edit(folder / "adapter_config.json", **{key: value})
    with pytest.raises(ModelError, match=f"has settings that are not taken from a file\\); .*{key}="):
        load_adapter(tiny_llama(), folder)
    with pytest.raises(ModelError, match=f"{key}="):
        read_adapter_settings(folder)


def test_a_rank_beyond_the_weights_is_refused(tmp_path, torch):
    adapter(tmp_path, torch)
    edit(tmp_path / "adapter_config.json", r=60_000)
    with pytest.raises(ModelError, match=r"asks for a rank that .* does not hold; expected at most 4; got 60000"):
        check_adapter(tmp_path)


def test_a_pickled_adapter_is_refused(tmp_path, torch):
    from safetensors.torch import load_file

    from qlora_helpers.model.adapter_loading import load_adapter

    adapter(tmp_path, torch)
    path = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "adapter_model.bin")
    load_adapter(tiny_llama(), tmp_path)
    path.unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model.safetensors\); got adapter_model.bin. Pickled weights"):
        load_adapter(tiny_llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('["r"]')
    with pytest.raises(ModelError, match=r"adapter_config.json is damaged\); expected an object; got list"):
        load_adapter(tiny_llama(), tmp_path)


def test_our_own_adapters_are_among_the_known_ones(tmp_path, torch):
    from qlora_helpers.model.adapter_loading import load_adapter
    from qlora_helpers.model.lora import add_adapters

    for number, config in enumerate((AdapterConfig(), AdapterConfig(use_dora=True), AdapterConfig(use_rslora=True))):
        add_adapters(tiny_llama(), config, seed=0).save_pretrained(tmp_path / str(number))
        found = load_adapter(tiny_llama(), tmp_path / str(number)).active_peft_config
        assert (found.use_dora, found.use_rslora) == (config.use_dora, config.use_rslora)
