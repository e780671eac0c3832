"""Settings of a new run: by lengths that are counted by hand, and never against what a person has set."""

from __future__ import annotations

import pytest

from qlora_helpers.base.config import RunConfig
from qlora_helpers.data.lengths import RowLengths, covering
from qlora_helpers.machine.hardware import parse_gpus
from qlora_helpers.model.shapes.catalog import known_shape
from qlora_helpers.planning.decide_lengths import context_tokens, rounded
from qlora_helpers.planning.decided import BY_HAND, Decided
from qlora_helpers.planning.decisions import decide_training

LLAMA, SMALL = known_shape("random:llama-3-8b"), known_shape("random:falcon-tiny")
UNDECIDED = {"evaluation.max_new_tokens": 1, "data.seq_len_tokens": 1 << 24}


def conversations(totals, answer: int) -> RowLengths:
    totals = tuple(sorted(totals))
    prompts = tuple(total - answer for total in totals)
    return RowLengths(len(totals), totals, prompts, (answer,) * len(totals), answer * len(totals))


def documents(totals) -> RowLengths:
    return RowLengths(len(totals), tuple(sorted(totals)), (), (), sum(totals))


THOUSAND = conversations(range(41, 1041), 40)  # 1,000 rows of 41 to 1,040 tokens, 40 of each an answer


def decide(lengths, shape=SMALL, gpus=None, cores=2, **by_hand) -> Decided:
    named = {name.replace("__", "."): value for name, value in by_hand.items()}
    decided = Decided(RunConfig().with_settings(UNDECIDED).with_settings(named), frozenset(named))
    decide_training(decided, lengths, shape, parse_gpus(gpus) if gpus else None, cores=cores)
    return decided


@pytest.mark.parametrize(
    ("lengths", "share", "expected"),
    [((5,), 0.99, 5), (tuple(range(1, 101)), 0.99, 99), (tuple(range(1, 1001)), 0.99, 990), ((), 0.99, 0)],
)
def test_the_length_that_covers_a_share_of_the_rows(lengths, share, expected):
    assert covering(lengths, share) == expected


@pytest.mark.parametrize(("tokens", "expected"), [(1, 64), (64, 64), (65, 128), (512, 512), (513, 640), (1030, 1152)])
def test_lengths_are_rounded_up(tokens, expected):
    assert rounded(tokens) == expected


def test_settings_of_a_thousand_rows_on_a_cpu():
    """99 % of the rows have at most 1,030 tokens; their prompts 990, and with 56 for an answer 1,046: 1,152."""
    config = decide(THOUSAND).config
    assert config.evaluation.max_new_tokens == 56  # 40 and a quarter, in eights
    assert config.data.seq_len_tokens == 1152
    assert config.train.epochs == 2.0
    assert config.adapter.lora_dropout == 0.0
    assert config.train.learning_rate == 2e-3
    # 540,500 tokens make 470 sequences, seen twice: four a step, one at a time on a CPU
    assert (config.train.micro_batch_size, config.train.gradient_accumulation_steps) == (1, 4)
    assert config.train.activation_checkpointing is False
    # 470 batches, 118 steps an epoch, 236 in all
    assert (config.train.eval_steps, config.train.save_steps) == (48, 48)
    assert (config.train.warmup_steps, config.train.logging_steps) == (11, 5)


def test_adapters_on_experts_get_no_dropout_however_often_rows_are_seen():
    few, mixtral = conversations(range(41, 141), 40), known_shape("random:mixtral-8x7b")
    assert decide(few, mixtral, "H100").config.adapter.lora_dropout == 0.05
    named = decide(few, mixtral, "H100", adapter__target_modules=["q_proj", "experts"])
    assert named.config.adapter.lora_dropout == 0.0
    assert decide(few, mixtral, "H100", adapter__target_modules=["q_proj"]).config.adapter.lora_dropout == 0.05


def test_on_gpus_the_settings_are_the_plan_s():
    found = decide(THOUSAND, LLAMA, "L4")
    train = found.config.train
    assert train.micro_batch_size * train.gradient_accumulation_steps == 16  # 940 sequences in all: 58 steps
    assert train.learning_rate == 2e-4
    reasons = {each.setting: each.reason for each in found.decisions}
    assert "fastest that fits on L4" in reasons["train.micro_batch_size"]
    assert train.checkpointed_layers is not None and train.compile in ("on", "off")
    less = decide(THOUSAND, LLAMA, "8GiB").config.train
    assert (less.checkpointed_layers or 0) > train.checkpointed_layers, "less memory recomputes more"


LEFT_TO_THE_START = {
    "train.activation_checkpointing": True,
    "train.checkpointed_layers": None,
    "train.compile": "auto",
    "train.offload_embeddings": False,
}


@pytest.mark.parametrize(("gpus", "sizes"), [("2xL4", (4, 4)), ("4xL4", (4, 4)), ("8xL4", (2, 8))])
def test_on_several_gpus_a_step_is_decided_and_the_rest_is_the_start_s(gpus, sizes):
    """Sixteen sequences a step, in the micro-batch of each process; as the trainer of one process would take them, too."""
    found = decide(THOUSAND, LLAMA, gpus)
    assert (found.config.train.micro_batch_size, found.config.train.gradient_accumulation_steps) == sizes
    assert {name: found.value(name) for name in LEFT_TO_THE_START} == LEFT_TO_THE_START
    assert not LEFT_TO_THE_START.keys() & {each.setting for each in found.decisions}
    alone = decide(THOUSAND, LLAMA, gpus, train__share="one")
    assert alone.config.train == decide(THOUSAND, LLAMA, "L4", train__share="one").config.train
    assert alone.config.train.checkpointed_layers == 0


def test_shards_take_the_length_that_a_card_alone_has_no_room_for():
    falcon = known_shape("random:falcon-40b")
    assert any("GiB are missing" in note for note in decide(THOUSAND, falcon, "L4").notes)
    four = decide(THOUSAND, falcon, "4xL4")
    assert four.config.data.seq_len_tokens == 1152 and not four.notes


def test_what_does_not_fit_is_shorter_or_said():
    long = conversations([7000] * 1000, 40)
    short = decide(long, LLAMA, "8GiB")
    assert 256 <= short.config.data.seq_len_tokens < 7000
    reason = next(each.reason for each in short.decisions if each.setting == "data.seq_len_tokens")
    assert "7,040 tokens don't fit on 8GiB; 1,000 of 1,000 rows are longer" in reason
    nothing = decide(THOUSAND, known_shape("random:falcon-40b"), "8GiB")
    assert any("GiB are missing on 8GiB" in note for note in nothing.notes)
    assert nothing.config.data.seq_len_tokens == 1152, "a model that fits with no length keeps the one that was wanted"


def test_short_rows_share_a_sequence_in_which_examples_fit():
    labels = conversations([60] * 1000, 3)
    config = decide(labels).config  # 57 + 16 + three examples of 60 are 253
    assert (config.data.seq_len_tokens, config.evaluation.max_new_tokens) == (256, 16)
    assert decide(conversations([100] * 1000, 3)).config.data.seq_len_tokens == 448  # 97 + 16 + 300 are 413
    assert decide(labels, data__packing=False).config.data.seq_len_tokens == 128  # 57 + 16 are 73


def test_documents_are_split_and_have_no_answers():
    config = decide(documents([5000] * 20)).config
    assert (config.data.seq_len_tokens, config.evaluation.max_new_tokens) == (1024, 80)
    assert config.train.epochs == 5.0 and config.adapter.lora_dropout == 0.05
    # 98 sequences, five times: four a step, so 125 steps
    assert config.train.eval_steps == 25


def test_a_model_s_context_is_the_limit():
    long = conversations([9000] * 100, 40)
    assert context_tokens(SMALL) == 2048
    found = decide(long)
    assert found.config.data.seq_len_tokens == 2048
    assert any("100 of 100 training rows are longer than 2,048 tokens" in note for note in found.notes)
    assert context_tokens({"text_config": {"max_position_embeddings": 4096}}) == 4096
    assert context_tokens({"n_positions": 1024}) == 1024 and context_tokens({}) == 2048


@pytest.mark.parametrize(("rows", "epochs"), [(199, 5), (200, 3), (999, 3), (1000, 2), (9999, 2), (10000, 1)])
def test_fewer_rows_are_seen_more_often(rows, epochs):
    assert decide(conversations([64] * rows, 8), cores=10_000).config.train.epochs == epochs


def test_on_a_slow_cpu_fewer_epochs_are_taken_and_that_is_said():
    few = conversations([500] * 100, 40)
    assert decide(few, LLAMA, cores=2).config.train.epochs == 1.0
    found = decide(few, LLAMA, cores=2)
    reason = next(each.reason for each in found.decisions if each.setting == "train.epochs")
    assert "on this CPU" in reason and "5 on a GPU" in reason
    assert decide(few, LLAMA, "L4").config.train.epochs == 5.0


OTHER = {
    "data.seq_len_tokens": 640,
    "evaluation.max_new_tokens": 33,
    "train.epochs": 1.5,
    "adapter.r": 3,
    "adapter.lora_dropout": 0.25,
    "train.learning_rate": 1e-5,
    "train.micro_batch_size": 4,
    "train.gradient_accumulation_steps": 3,
    "train.activation_checkpointing": True,
    "train.checkpointed_layers": 1,
    "train.compile": "auto",
    "train.offload_embeddings": True,
    "train.warmup_steps": 1,
    "train.eval_steps": 9,
    "train.save_steps": 9,
    "train.logging_steps": 9,
}


@pytest.mark.parametrize("gpus", [None, "L4", "8GiB", "4xL4"])
def test_every_setting_that_is_decided_is_tried_by_hand(gpus):
    decided = {each.setting for each in decide(THOUSAND, LLAMA, gpus).decisions}
    assert decided <= set(OTHER)


@pytest.mark.parametrize("gpus", [None, "L4", "8GiB", "4xL4"])
@pytest.mark.parametrize("setting", OTHER)
def test_a_value_set_by_hand_is_never_changed(setting, gpus):
    found = decide(THOUSAND, LLAMA, gpus, **{setting.replace(".", "__"): OTHER[setting]})
    assert found.value(setting) == OTHER[setting]
    for each in found.decisions:
        assert (each.reason == BY_HAND) == (each.setting == setting)
        assert each.value == found.value(each.setting), "what is written down is what is taken"


def test_an_answer_set_by_hand_has_room():
    found = decide(conversations([100] * 1000, 3), evaluation__max_new_tokens=900).config
    assert found.evaluation.max_new_tokens == 900
    assert found.data.seq_len_tokens == 1024  # 97 + 900 are 997


def test_a_short_sequence_set_by_hand_leaves_half_for_the_answer():
    found = decide(conversations([300] * 1000, 200), data__seq_len_tokens=128).config
    assert (found.data.seq_len_tokens, found.evaluation.max_new_tokens) == (128, 64)
