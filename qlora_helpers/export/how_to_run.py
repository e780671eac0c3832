"""The exact commands that run what was exported, and which of them somebody has run.

Each command names what it was tried with. What no server of this project has loaded is labelled `not run`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_helpers.base.config import RunConfig
from qlora_helpers.export.serving_files import server_options
from qlora_helpers.export.vllm import allowed_rank

NOT_RUN = "not run: no machine of this project has it"


@dataclass(frozen=True)
class RunCommand:
    """A program that runs the exported model, and its commands.

    Attributes:
        name: of the program.
        commands: to be typed in the exported folder.
        tried: what it was tried with, or that it was not run.
    """

    name: str
    commands: str
    tried: str


def run_commands(
    to: str,
    name: str,
    config: RunConfig,
    *,
    gguf: str = "",
    adapter: bool = False,
    on_experts: bool = False,
    question: str = "YOUR TEXT",
) -> tuple[RunCommand, ...]:
    """Returns how to run what was exported.

    Args:
        to: the target.
        name: the run's name.
        config: the run's settings.
        gguf: name of the GGUF file.
        adapter: whether the adapter alone was exported.
        on_experts: whether it is on a mixture's experts too, which vLLM takes in another form than peft's.
        question: an example of what the model is asked.
    """
    message = [{"role": "user", "content": question}]
    if to == "gguf":
        return _adapter_in_llama_cpp(gguf, config) if adapter else _with_llama_cpp(gguf, config, message)
    if to == "ollama":
        command = f"ollama create {shlex.quote(name)} -f Modelfile\nollama run {shlex.quote(name)}"
        return (
            RunCommand("Ollama", command, f"{NOT_RUN}; the template was rendered by Go's text/template in its tests"),
        )
    if adapter:
        found = _with_adapter(name, config, message, on_experts=on_experts)
        return (*found, _lmi()) if to == "lmi" else found
    if to == "vllm":
        return (_vllm(name, config),)
    if to == "lmi":
        return (_lmi(),)
    return _with_transformers(config, message)


def _adapter_in_llama_cpp(gguf: str, config: RunConfig) -> tuple[RunCommand, ...]:
    """An adapter as GGUF, beside a GGUF file of its base model."""
    command = f"llama-server -m BASE.gguf --lora {gguf} --jinja -c {config.data.seq_len_tokens}"
    return (
        RunCommand(
            "llama.cpp", command, "llama-cpp-python with a GGUF file of the base model, in this project's tests"
        ),
    )


def _with_llama_cpp(gguf: str, config: RunConfig, message: Sequence[Any]) -> tuple[RunCommand, ...]:
    """A merged model as GGUF."""
    return (
        RunCommand(
            "llama.cpp",
            _llama_server(gguf, config),
            "its library read and asked such files in this project's tests; the server itself was not run",
        ),
        RunCommand("llama-cpp-python", _llama_python(gguf, config, message), "in this project's tests"),
    )


def _with_adapter(name: str, config: RunConfig, message: Sequence[Any], *, on_experts: bool) -> tuple[RunCommand, ...]:
    """An adapter in peft's files, beside its base model."""
    base = config.model.name
    peft = RunCommand("peft", _peft(base, message), "in this project's tests")
    if on_experts:
        return (peft,)
    command = (
        f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {allowed_rank(config.adapter.r)} "
        f"--lora-modules {name}=. {server_options(config.evaluation)} "
        f"--max-model-len {config.data.seq_len_tokens} --chat-template chat_template.jinja"
    )
    return (peft, RunCommand("vLLM", command, NOT_RUN))


def _vllm(name: str, config: RunConfig) -> RunCommand:
    """A merged model in vLLM's server."""
    command = (
        f"vllm serve . --dtype bfloat16 --max-model-len {config.data.seq_len_tokens} "
        f"--served-model-name {shlex.quote(name)} {server_options(config.evaluation)}"
    )
    return RunCommand("vLLM", command, NOT_RUN)


def _with_transformers(config: RunConfig, message: Sequence[Any]) -> tuple[RunCommand, ...]:
    """A merged model in transformers, in a program and as a server."""
    return (
        RunCommand("transformers", _transformers(message), "in this project's tests"),
        RunCommand(
            "transformers serve",
            _transformers_serve(message, config.evaluation.max_new_tokens),
            "asked by the openai client, streaming too, in this project's tests",
        ),
    )


def _llama_server(gguf: str, config: RunConfig) -> str:
    evaluation = config.evaluation
    sampling = f"--temp {evaluation.temperature} --top-p {evaluation.top_p} --top-k 0 --min-p 0"
    greedy = "--temp 0"
    return (
        f"llama-server -m {gguf} --jinja -c {config.data.seq_len_tokens} -n {evaluation.max_new_tokens} "
        f"{sampling if evaluation.do_sample else greedy} --repeat-penalty 1.0"
    )


def _llama_python(gguf: str, config: RunConfig, message: Sequence[Any]) -> str:
    evaluation = config.evaluation
    sampling = f"temperature={evaluation.temperature if evaluation.do_sample else 0.0}, repeat_penalty=1.0, "
    sampling += f"top_p={evaluation.top_p}, top_k=0, min_p=0.0, " if evaluation.do_sample else ""
    sampling += f"max_tokens={evaluation.max_new_tokens}"
    return (
        "python - <<'END'\nfrom llama_cpp import Llama\n\n"
        f"model = Llama({gguf!r}, n_ctx={config.data.seq_len_tokens}, verbose=False)\n"
        f"answer = model.create_chat_completion({message!r}, {sampling})\n"
        'print(answer["choices"][0]["message"]["content"])\nEND'
    )


def _peft(base: str, message: Sequence[Any]) -> str:
    return (
        "python - <<'END'\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig\n\n"
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), '.')\n{_asked(message)}"
    )


def _transformers(message: Sequence[Any]) -> str:
    return (
        "python - <<'END'\nfrom transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig\n\n"
        f"model = AutoModelForCausalLM.from_pretrained('.')\n{_asked(message)}"
    )


def _asked(message: Sequence[Any]) -> str:
    return (
        "tokenizer = AutoTokenizer.from_pretrained('.')\n"
        f"prompt = tokenizer.apply_chat_template({message!r}, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "answer = model.generate(**prompt, generation_config=GenerationConfig.from_pretrained('.'))\n"
        "print(tokenizer.decode(answer[0, prompt['input_ids'].shape[1] :], skip_special_tokens=True))\nEND"
    )


def _transformers_serve(message: Sequence[Any], most: int) -> str:
    body = json.dumps({"model": "MODEL", "max_tokens": most, "messages": message}, ensure_ascii=False)
    before, after = (shlex.quote(part) for part in body.split("MODEL", 1))
    return (
        "pip install 'transformers[serving]'\n"
        'transformers serve "$PWD" --host 127.0.0.1 --port 8000 &\n'
        "# once it listens:\n"
        "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'  -d {before}"$PWD"{after}'
    )


def _lmi() -> RunCommand:
    command = (
        "aws s3 cp --recursive . s3://BUCKET/PREFIX/  # then a SageMaker model with the LMI container and ModelDataSource there;\n"
        "# notebook 07 of qlora_helpers deploys it: sagemaker.deploy"
    )
    return RunCommand("AWS's LMI container", command, NOT_RUN)


def run_section(found: Sequence[RunCommand]) -> str:
    """Writes the model card's section on how to run the model."""
    lines = ["## Run it", ""]
    for each in found:
        lines += [f"**{each.name}** ({each.tried}), in this folder:", "", "```bash", each.commands, "```", ""]
    return "\n".join(lines)
