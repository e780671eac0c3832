"""A plan for a run's settings: where the shape, the hardware and the size of the data come from."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from fake_hub import hub

from qlora_helpers.base.config import DataConfig, ModelConfig, RunConfig
from qlora_helpers.base.errors import ModelError, UserError
from qlora_helpers.base.profiles import profile_config
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.machine.instances import INSTANCES
from qlora_helpers.machine.telemetry import GpuReading
from qlora_helpers.model import hub as model_hub
from qlora_helpers.model.shapes.catalog import SHAPES
from qlora_helpers.model.shapes.lookup import find_shape
from qlora_helpers.model.shapes.sizes import adapter_parameters
from qlora_helpers.planning import run_plan
from qlora_helpers.planning.fixes import cheapest_instance
from qlora_helpers.planning.layout import Layout
from qlora_helpers.planning.plan import make_plan
from qlora_helpers.planning.run_plan import estimated_tokens, plan_run, this_machine
from qlora_helpers.planning.workload import Workload


def test_a_catalogued_model_needs_no_file():
    assert find_shape(ModelConfig(name="tiiuae/falcon-40b")) == SHAPES["falcon-40b"]


def test_any_other_model_is_planned_from_its_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-3.1-8b"]))
    assert find_shape(ModelConfig(name=str(tmp_path))) == SHAPES["llama-3.1-8b"]
    config = profile_config("falcon-40b").with_settings({"model.name": str(tmp_path)})
    assert plan_run(config, gpus="H100").sizes.parameters == 8_030_261_248


@pytest.mark.parametrize(
    ("text", "message"), [("{", "can't be read"), ("[1]", "is not a JSON object"), ("{}", "names no family")]
)
def test_a_damaged_config_json_is_reported(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    config = profile_config("falcon-40b").with_settings({"model.name": str(tmp_path)})
    with pytest.raises(ModelError, match=message):
        plan_run(config, gpus="H100")


def test_a_folder_without_a_config_json_is_reported(tmp_path):
    with pytest.raises(ModelError, match="holds no model"):
        find_shape(ModelConfig(name=str(tmp_path)))


def test_the_size_of_the_data():
    assert estimated_tokens(DataConfig(source="knkarthick/samsum")) == round(14_732 * 189.9)
    assert estimated_tokens(DataConfig(source="embedded", train_rows=100)) == 22_670
    assert estimated_tokens(DataConfig(source="somebody/something")) is None
    assert 240 * 100 < estimated_tokens(DataConfig(source="embedded:tickets")) < 240 * 1000


def test_a_file_of_the_users_is_counted(tmp_path):
    rows = [
        {"dialogue": f"Ann: {'hello ' * 20}{number}\nBen: hi", "summary": f"They greet {number}."}
        for number in range(40)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = estimated_tokens(DataConfig(source=str(path)))
    longer = estimated_tokens(DataConfig(source=str(path), eval_rows=1, test_rows=1))
    assert 0 < found < longer


@pytest.mark.parametrize(
    ("text", "tokens"),  # counted with SmolLM2's tokenizer
    [
        ("阿丽：你明天能修蛋糕吗？小芳：好的，我会修蛋糕。我们下午三点在车站见面，然后一起去市场买水果和蔬菜。", 96),
        ("내일 회의는 몇 시에 시작하나요? 오후 세 시입니다. 자료를 잊지 마세요. 감사합니다.", 94),
        ("Привет, ты завтра придёшь на встречу? Да, в три часа у вокзала, не забудь документы, пожалуйста.", 75),
        ("مرحبا، هل ستأتي غدا إلى الاجتماع؟ نعم، في الساعة الثالثة عند المحطة، لا تنس الوثائق من فضلك.", 92),
        ("Hallo, kommst du morgen zur Besprechung? Ja, um drei am Bahnhof, vergiss bitte die Unterlagen nicht.", 39),
    ],
)
def test_tokens_are_estimated_by_the_script(tmp_path, text, tokens):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": f"{text} {n}"}, ensure_ascii=False) + "\n" for n in range(12)), "utf-8")
    found = estimated_tokens(DataConfig(source=str(path), eval_rows=1, test_rows=1)) / 10
    assert 0.7 * tokens < found < 1.4 * tokens


def test_a_profile_s_limits_hold_for_the_embedded_corpus_alone(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q {n}", "completion": "a"}) + "\n" for n in range(1000)))
    demo = profile_config("demo").data
    own = profile_config("demo").with_settings({"data.source": str(path)}).data
    assert estimated_tokens(demo) == round(144 * 226.7)
    assert estimated_tokens(own) > 940


def test_an_unknown_size_is_noted():
    config = profile_config("falcon-40b").with_settings({"data.source": "somebody/something"})
    assert any("--tokens" in note for note in plan_run(config, gpus="H100").notes)
    assert not any("--tokens" in note for note in plan_run(config, gpus="H100", tokens=5).notes)


def reading(index: int, name: str, total_gib: float) -> GpuReading:
    return GpuReading(
        index=index,
        name=name,
        memory_used_gib=0.5,
        memory_total_gib=total_gib,
        utilisation_percent=0,
        temperature_c=30,
        power_w=50.0,
    )


@pytest.mark.parametrize(
    ("name", "total_gib", "known", "usable_gib"),
    [
        ("NVIDIA A100-SXM4-80GB", 80.0, "A100-80GB", 79.14),
        ("NVIDIA H100 80GB HBM3", 79.6, "H100", 79.11),
        ("NVIDIA L40S", 44.99, "L40S", 44.40),
        ("NVIDIA GeForce RTX 4090", 23.99, "RTX-4090", 23.52),
        ("NVIDIA Something New", 100.0, None, 100.0),
    ],
)
def test_this_machines_gpus_are_recognised(monkeypatch, name, total_gib, known, usable_gib):
    monkeypatch.setattr(
        run_plan.telemetry, "read_gpus", lambda: [reading(0, name, total_gib), reading(1, name, total_gib)]
    )
    found = this_machine(price=3.0)
    assert (found.gpus, found.usable_gib, found.price_usd_per_hour) == (2, usable_gib, 3.0)
    assert (found.gpu.name if found.gpu else None) == known


def test_the_smallest_gpu_of_this_machine_counts(monkeypatch):
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(run_plan.telemetry, "read_gpus", lambda: [reading(0, name, 79.6), reading(1, name, 40.0)])
    assert this_machine().usable_gib == 40.0


def test_the_share_of_trained_tokens():
    assert [run_plan.trained_share(DataConfig(loss_on=what)) for what in ("all", "summary")] == [1.0, 0.2]


def test_a_machine_without_a_gpu_asks_for_a_name(monkeypatch):
    monkeypatch.setattr(run_plan.telemetry, "read_gpus", list)
    with pytest.raises(UserError, match="this machine has no GPU.* --gpus"):
        plan_run(profile_config("falcon-40b"))


@pytest.mark.parametrize("model", ["falcon-7b", "falcon-40b", "llama-3.1-70b", "mixtral-8x7b"])
def test_an_instance_with_a_price_is_preferred(model):
    """However small one without a price is; mixtral-8x7b takes 85 GiB."""
    workload = Workload(profile_config("falcon-40b"), SHAPES[model], parse_gpus("T4"), tokens=1000)
    found = cheapest_instance(workload)
    assert found.price_usd_per_hour is not None
    cheaper = [one for one in INSTANCES.values() if (one.price_usd_per_hour or 1e9) < found.price_usd_per_hour]
    without = [one for one in INSTANCES.values() if one.price_usd_per_hour is None]
    assert len(without) >= 10
    assert not any(make_plan(workload.on(parse_gpus(one.name)), fix=False).fits for one in cheaper)


def test_the_hub_is_asked_for_the_config_json_alone(from_hub, tmp_path):
    files = {"config.json": json.dumps(SHAPES["falcon-7b"]).encode(), "model.safetensors": b"x" * 999}
    with hub({"lab/new": files}) as endpoint:
        from_hub(endpoint)
        assert find_shape(ModelConfig(name="lab/new"))["hidden_size"] == 4544
    assert [path.name for path in (tmp_path / "hub").rglob("*") if path.name in files] == ["config.json"]
    from_hub(None)
    assert find_shape(ModelConfig(name="lab/new"))["hidden_size"] == 4544  # from the cache


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lab/unknown", "can't be downloaded: the hub has no model lab/unknown"),
        ("lab/gated", "can't be downloaded: lab/gated is gated"),
        ("lab/empty", "can't be downloaded: lab/empty has no config.json"),
    ],
)
def test_a_config_json_that_can_not_be_downloaded(from_hub, name, message):
    with hub({"lab/empty": {"README.md": b"x"}}, gated=("lab/gated",)) as endpoint:
        from_hub(endpoint)
        with pytest.raises(ModelError, match=message):
            find_shape(ModelConfig(name=name))


def test_no_network_and_no_catalogue_entry(from_hub):
    from_hub(None)
    with pytest.raises(ModelError, match="can't be reached.* Give a catalogued model"):
        find_shape(ModelConfig(name="lab/new"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("qwen3-8b-chat", "Qwen/Qwen3-8B"),
        ("qwen3 8b", "Qwen/Qwen3-8B"),
        ("llama3", "meta-llama/Llama-3.1-8B"),
        ("gemma3-12b-it", "google/gemma-3-12b-it"),
        ("Qwen/Qwen3-9B", "Qwen/Qwen3-8B"),
        ("gpt-oss", "openai/gpt-oss-20b"),
    ],
)
def test_a_name_as_people_type_it_is_answered_with_near_names(from_hub, typed, meant):
    from_hub(None)
    with pytest.raises(ModelError, match="Give a catalogued model") as error:
        find_shape(ModelConfig(name=typed))
    assert meant in str(error.value)


def closed_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def test_without_a_network_the_command_line_says_so_in_one_line(tmp_path):
    """huggingface_hub alone says it in eleven."""
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    environment |= {"HF_ENDPOINT": closed_port(), "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "qlora_helpers", "plan", "--model", "lab/new", "--gpus", "H100"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    message = "error: the shape of lab/new is not catalogued and can't be downloaded: lab/new is not in the cache"
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_without_a_network_the_cache_is_read_at_once(from_hub, monkeypatch):
    """Where huggingface_hub may ask the hub itself, it asks for half a minute before it reads its cache."""
    import huggingface_hub

    with hub({"lab/new": {"config.json": json.dumps(SHAPES["falcon-7b"]).encode()}}) as endpoint:
        from_hub(endpoint)
        find_shape(ModelConfig(name="lab/new"))
    from_hub(closed_port())
    real, local = huggingface_hub.hf_hub_download, []

    def download(*args, **options):
        local.append(options["local_files_only"])
        return real(*args, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_shape(ModelConfig(name="lab/new")) == SHAPES["falcon-7b"]
    assert local == [True]


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_hub_that_is_too_busy_is_asked_once(from_hub, code, capfd):
    asked = []

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(code)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        from_hub(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ModelError, match="the model hub can't be reached"):
            find_shape(ModelConfig(name="lab/new"))
        server.shutdown()
    assert asked == ["/lab/new/resolve/main/config.json"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("limit", ["CONFIG_S", "CONFIG_DEADLINE_S"])
def test_a_hub_that_never_answers_is_given_up(from_hub, limit, monkeypatch):
    """By the timeout of its connection, or by the deadline where each of many addresses has one."""
    monkeypatch.setattr(model_hub, "CONFIG_S", 60.0)
    monkeypatch.setattr(model_hub, "CONFIG_DEADLINE_S", 60.0)
    monkeypatch.setattr(model_hub, limit, 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        from_hub(f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ModelError, match="the model hub can't be reached"):
            find_shape(ModelConfig(name="lab/new"))
        assert time.monotonic() - started < 30, "the other limit is 60 s"


def test_the_hub_s_own_log_level_is_restored(from_hub):
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    from_hub(closed_port())
    with pytest.raises(ModelError):
        find_shape(ModelConfig(name="lab/new"))
    assert logging.get_verbosity() == before


def test_an_invalid_hub_id_is_reported(from_hub):
    from_hub(closed_port())
    with pytest.raises(ModelError, match="can't be downloaded: that is not the name of a model"):
        find_shape(ModelConfig(name="lab/new/newer"))


def test_the_prediction_for_a_runs_own_settings():
    config = profile_config("falcon-40b").with_settings({"train.micro_batch_size": 2})
    one, two = (
        run_plan.predicted_step(
            config, hardware=parse_gpus(gpus), compiled=True, checkpointed=6, trained_share=0.15, fill=0.5
        )
        for gpus in ("H100", "2xA100-80GB")
    )
    assert list(one["allocated_gib"]) == ["cuda:0"] and list(two["allocated_gib"]) == ["cuda:0", "cuda:1"]
    assert sum(two["allocated_gib"].values()) == pytest.approx(one["allocated_gib"]["cuda:0"], rel=0.05)
    assert one["reserved_gib"]["cuda:0"] > one["allocated_gib"]["cuda:0"] > 40
    assert not one["extrapolated"] and two["extrapolated"]
    assert 1000 < one["tokens_per_s"] < 2500  # half of each sequence is padding


def test_the_speed_of_several_processes_is_predicted():
    one, two = (
        run_plan.predicted_step(
            profile_config("falcon-40b"),
            hardware=parse_gpus(f"{copies}xH100"),
            compiled=True,
            checkpointed=60,
            trained_share=0.2,
            layout=Layout(copies=copies),
        )
        for copies in (1, 2)
    )
    assert one["tokens_per_s"] < two["tokens_per_s"] <= 2 * one["tokens_per_s"]
    weights = adapter_parameters(SHAPES["falcon-40b"], 8, None, False)
    buckets = 4 * weights / 2**30  # in which DDP sends the gradients
    assert two["allocated_gib"]["cuda:0"] - one["allocated_gib"]["cuda:0"] == pytest.approx(buckets, abs=2e-3)
    assert buckets > 0.2


def test_a_step_of_shards_is_predicted_as_the_plan_counts_it():
    """The same bytes, and tokens a second over PCIe 4; over a network between two machines it waits."""
    config = profile_config("falcon-40b").with_settings(
        ["train.micro_batch_size=1", "train.gradient_accumulation_steps=8"]
    )
    for gpus, layout in (("ml.g5.12xlarge", Layout(shards=4)), ("2xml.g5.12xlarge", Layout(copies=2, shards=4))):
        choice = plan_run(config.with_settings([f"train.share={layout.share}"]), gpus=gpus).choice
        each = config.with_settings(choice.settings)
        found = run_plan.predicted_step(
            each,
            hardware=parse_gpus(gpus),
            compiled=choice.compiled,
            checkpointed=choice.checkpointed,
            trained_share=0.2,
            layout=layout,
        )
        assert found["reserved_gib"] == {"cuda:0": pytest.approx(choice.to_dict()["reserved_gib"][0], abs=1e-3)}
        assert found["tokens_per_s"] == pytest.approx(choice.tokens_per_s, abs=0.1)


def test_a_limit_on_steps_is_what_a_plan_counts():
    config = RunConfig().with_settings(["model.name=tiiuae/falcon-7b", "train.max_steps=5", "train.epochs=3"])
    plan = plan_run(config, gpus="H100", tokens=1_000_000)
    per_step = config.train.micro_batch_size * config.train.gradient_accumulation_steps
    assert plan.tokens == 5 * per_step * config.data.seq_len_tokens


def test_a_note_says_that_padding_comes_on_top():
    config = profile_config("falcon-40b").with_settings(["data.packing=false"])
    notes = plan_run(config, gpus="H100", tokens=1_000_000).notes
    assert any("comes on top" in note for note in notes)
    counted = run_plan.forecast(config, hardware=parse_gpus("H100"), tokens=1_000_000).notes
    assert not any("comes on top" in note for note in counted), "a forecast counts each row at full length"
    assert any("upper limits" in note for note in counted)


@pytest.mark.parametrize("tokens", [0, -5])
def test_fewer_than_one_token_is_refused(tokens):
    with pytest.raises(UserError, match="the amount of data is not valid"):
        plan_run(RunConfig().with_settings(["model.name=tiiuae/falcon-7b"]), gpus="H100", tokens=tokens)
