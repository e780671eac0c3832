"""A checkpoint counts once it is verified; a damaged one is skipped, and only then is an older one removed."""

from __future__ import annotations

import json
import os
import warnings

import pytest

from qlora_helpers.base.errors import RunError
from qlora_helpers.training.checkpoint_choice import after_failure, choice_in_words, go_back_to, set_aside
from qlora_helpers.training.checkpoints import (
    NEEDED,
    SEAL,
    UNFINISHED,
    all_checkpoints,
    is_good,
    last_good_step,
    newest_good,
    put_in_place,
    rotate,
    step_of,
    verify,
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def write(folder, step: int, *, value: float = 1.0, sealed: bool = True):
    """A checkpoint as Trainer leaves it."""
    import torch
    from safetensors.torch import save_file

    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (path / name).write_bytes(b"x" * 100)
    save_file({"lora_A": torch.full((2, 3), value), "lora_B": torch.zeros(3, 2)}, path / "adapter_model.safetensors")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if sealed:
        verify(path)
    return path


def steps(folder) -> list[int]:
    return [step_of(path) for path in all_checkpoints(folder)]


def test_a_sealed_checkpoint_is_good(folder):
    path = write(folder, 10, sealed=False)
    assert not is_good(path)
    verify(path)
    assert is_good(path)
    assert newest_good(folder) == path
    assert not (path / "training_args.bin").exists()  # a pickle
    assert set(json.loads((path / SEAL).read_text())["files"]) == {*NEEDED, "rng_state.pth"}


@pytest.mark.parametrize(
    "seal",
    ['{"files": "abc"}', '{"files": [1]}', '{"files": {"a\\u0000b": [1, "x"]}}', "[]", "3", '{"files": {"..": 1}}'],
)
def test_a_seal_that_holds_anything_else_is_no_seal(folder, seal):
    good = write(folder, 10)
    (write(folder, 20) / SEAL).write_text(seal)
    with pytest.warns(UserWarning, match="checkpoint-20 is incomplete or damaged; resuming from an older one"):
        assert newest_good(folder) == good


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "link", "../checkpoint-9/optimizer.pt", "folder"])
def test_a_seal_that_names_anything_but_its_own_plain_files_is_no_seal(folder, name):
    """`/dev/zero` was hashed for ever, and a pipe waited for ever."""
    path = write(folder, 10)
    write(folder, 9)
    os.mkfifo(path / "pipe")
    (path / "link").symlink_to(path / "optimizer.pt")
    (path / "folder").mkdir()
    seal = json.loads((path / SEAL).read_text())
    mark = seal["files"]["optimizer.pt"]
    (path / SEAL).write_text(json.dumps({"files": seal["files"] | {name: [0 if name[0] == "/" else mark[0], mark[1]]}}))
    assert not is_good(path)


@pytest.mark.parametrize("name", NEEDED)
def test_a_seal_covers_every_file_that_is_needed(folder, name):
    """A seal that leaves the adapter out let another file stand in for it."""
    path = write(folder, 10)
    seal = json.loads((path / SEAL).read_text())
    del seal["files"][name]
    (path / SEAL).write_text(json.dumps(seal))
    assert not is_good(path)


def test_checkpoints_that_were_set_aside_are_not_resumed_from(folder):
    """From the step itself on; they are whole, and stay."""
    for step in (10, 20, 30):
        write(folder, step)
    set_aside(folder, 20, "the loss exploded at step 21")
    assert [is_good(path) for path in all_checkpoints(folder)] == [True, False, False]
    assert last_good_step(folder) == 10
    assert step_of(newest_good(folder)) == 10
    assert choice_in_words(folder) == (
        "Training goes on from checkpoint 10, the last healthy one: checkpoints 20 and 30 are set aside "
        "(the loss exploded at step 21)."
    )
    write(folder, 40)
    assert choice_in_words(folder) == "", "the run has gone on since"


def test_a_failure_sets_aside_what_its_first_abnormal_step_was_measured_on(folder):
    """The values of step 21 are those of the weights that step 20 left."""
    for step in (10, 20, 30):
        write(folder, step)
    assert after_failure(folder, None, "") == "its last good checkpoint, of step 30"
    assert after_failure(folder, 22, "it rose") == (
        "its last healthy checkpoint, of step 20: checkpoint 30 is set aside (it rose)"
    )
    assert after_failure(folder, 21, "it rose") == (
        "its last healthy checkpoint, of step 10: checkpoint 20 is set aside (it rose)"
    )
    assert after_failure(folder, 2, "it rose") == "the untrained adapter: checkpoint 10 is set aside (it rose)"
    assert newest_good(folder) is None and steps(folder) == [10, 20, 30]
    assert choice_in_words(folder) == (
        "Training starts anew from the untrained adapter, because no checkpoint is healthy: "
        "checkpoints 10, 20 and 30 are set aside (it rose)."
    )
    assert after_failure(folder / "empty", 5, "it rose") == "its start: it had no checkpoint yet"


def test_a_person_may_go_on_from_a_checkpoint_that_was_set_aside(folder):
    for step in (10, 20, 30):
        write(folder, step)
    set_aside(folder, 20, "it rose")
    go_back_to(folder, 20)
    assert step_of(newest_good(folder)) == 20
    assert choice_in_words(folder) == (
        "Training goes on from checkpoint 20, as you asked, although it had been set aside (it rose)."
    )
    go_back_to(folder, 10)
    assert step_of(newest_good(folder)) == 10
    assert "checkpoints 20 and 30 are set aside (you asked to go on from checkpoint 10)" in choice_in_words(folder)


@pytest.mark.parametrize("step", [15, 20])
def test_a_person_can_t_go_on_from_a_damaged_checkpoint_or_none(folder, step):
    for each in (10, 20):
        write(folder, each)
    set_aside(folder, 20, "it rose")
    (folder / "checkpoint-20/optimizer.pt").write_bytes(b"y")
    before = (folder / "checkpoint-20" / SEAL).read_bytes()
    with pytest.raises(RunError, match=f"no whole checkpoint of step {step}; expected one of 10"):
        go_back_to(folder, step)
    assert (folder / "checkpoint-20" / SEAL).read_bytes() == before
    assert step_of(newest_good(folder)) == 10


def test_the_last_checkpoint_from_before_a_suspicion_is_kept(folder):
    for step in (10, 20, 30, 40, 50):
        write(folder, step)
    rotate(folder, 2, suspect_from=20)
    assert steps(folder) == [10, 40, 50]
    rotate(folder, 2)
    assert steps(folder) == [40, 50]


def test_an_adapter_file_without_weights_is_not_sealed(folder):
    from safetensors.torch import save_file

    path = write(folder, 10, sealed=False)
    save_file({}, path / "adapter_model.safetensors")
    with pytest.raises(RunError, match="not finite"):
        verify(path)


def test_files_reach_the_disk_before_a_checkpoint_gets_its_name(folder, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *paths, **folders: order.append("replace") or replace(*paths, **folders))
    written = write(folder / UNFINISHED, 10, sealed=False)
    files = len(list(written.iterdir()))
    put_in_place(written)
    assert order[: files + 1] == ["fsync"] * (files + 1)  # the folder too
    assert order[-1] == "replace"


def test_they_are_counted_by_step(folder):
    assert all_checkpoints(folder) == []
    assert newest_good(folder) is None
    for step in (9, 100, 20):
        write(folder, step)
    for name in ("checkpoint-x", "checkpoint-", "tmp-checkpoint-30", "checkpoint-40.tmp"):
        (folder / name).mkdir()
    assert steps(folder) == [9, 20, 100]
    assert step_of(newest_good(folder)) == 100


@pytest.mark.parametrize("name", NEEDED)
def test_an_incomplete_one_is_not_sealed(folder, name):
    path = write(folder, 3, sealed=False)
    (path / name).unlink()
    with pytest.raises(RunError, match=f"checkpoint-3 is incomplete: {name} is missing"):
        verify(path)
    assert not is_good(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_with_weights_that_are_no_numbers_is_not_sealed(folder, value):
    path = write(folder, 3, value=value, sealed=False)
    with pytest.raises(RunError, match="checkpoint-3 holds weights that are not finite"):
        verify(path)
    assert not is_good(path)


def test_one_of_another_step_is_not_sealed(folder):
    path = write(folder, 3, sealed=False)
    (path / "trainer_state.json").write_text('{"global_step": 2}')
    with pytest.raises(RunError, match="checkpoint-3 holds step 2"):
        verify(path)


def test_a_second_save_at_the_same_step_is_good_too(folder):
    """As where a save is asked for in the last step of an epoch."""
    path = write(folder, 3)
    assert is_good(write(folder, 3, value=2.0))
    (path / "optimizer.pt").write_bytes(b"damaged")
    assert not is_good(path)
    assert is_good(write(folder, 3, value=3.0))


def cut(path):
    (path / "adapter_model.safetensors").write_bytes((path / "adapter_model.safetensors").read_bytes()[:-1])


def flip(path):
    content = bytearray((path / "adapter_model.safetensors").read_bytes())
    content[-3] ^= 1
    (path / "adapter_model.safetensors").write_bytes(content)


def rewrite_seal(text):
    return lambda path: (path / SEAL).write_text(text)


DAMAGES = {
    "cut": cut,
    "one bit": flip,
    "a file gone": lambda path: (path / "optimizer.pt").unlink(),
    "no seal": lambda path: (path / SEAL).unlink(),
    "half a seal": rewrite_seal("{"),
    "an empty seal": rewrite_seal('{"files": {}}'),
    "a seal of another kind": rewrite_seal("[]"),
    "null": rewrite_seal("null"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_with_a_warning(folder, damage):
    for step in (2, 4):
        write(folder, step)
    DAMAGES[damage](folder / "checkpoint-4")
    with pytest.warns(UserWarning, match="checkpoint-4 is incomplete or damaged; resuming from an older one"):
        assert newest_good(folder) == folder / "checkpoint-2"


def test_a_good_one_gives_no_warning(folder):
    write(folder, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_good(folder) == folder / "checkpoint-2"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_are_kept(folder, keep):
    for number in range(1, 6):
        write(folder, 10 * number)
        rotate(folder, keep)
        assert steps(folder) == [10 * n for n in range(max(1, number - keep + 1), number + 1)]


def test_none_is_removed_for_one_that_is_not_verified(folder):
    write(folder, 2)
    write(folder, 4, sealed=False)  # just written; or left by a process that was killed
    rotate(folder, 1)
    assert steps(folder) == [2, 4]
    rotate(folder / "nothing", 1)


def test_none_is_removed_for_one_that_is_damaged(folder):
    """After a resume from step 2, the damaged one of step 4 must not push out what is good."""
    write(folder, 2)
    cut(write(folder, 4))
    write(folder, 3)
    rotate(folder, 1)
    assert steps(folder) == [3, 4]
    assert is_good(folder / "checkpoint-3")


def test_old_leftovers_go(folder):
    write(folder, 1, sealed=False)
    cut(write(folder, 2))
    write(folder, 3)
    write(folder, 4)
    rotate(folder, 2)
    assert steps(folder) == [3, 4]


# written aside, then put in place


def test_what_is_written_aside_is_verified_before_it_counts(folder):
    write(folder, 2)
    put_in_place(write(folder / UNFINISHED, 4, sealed=False))
    assert steps(folder) == [2, 4]
    assert is_good(folder / "checkpoint-4")
    with pytest.raises(RunError, match="not finite"):
        put_in_place(write(folder / UNFINISHED, 6, value=float("nan"), sealed=False))
    assert [path.name for path in sorted(folder.iterdir())] == ["checkpoint-2", "checkpoint-4"]


def test_one_that_is_written_anew_takes_the_place_of_the_old(folder):
    write(folder, 2)
    put_in_place(write(folder / UNFINISHED, 2, value=5.0, sealed=False))
    from safetensors.torch import load_file

    assert float(load_file(folder / "checkpoint-2" / "adapter_model.safetensors")["lora_A"][0, 0]) == 5.0
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]


def test_a_kill_between_the_two_renames_loses_nothing(folder, monkeypatch):
    """Where the only good checkpoint is written anew."""
    import os

    write(folder, 2)
    rename, calls = os.replace, []

    def killed(source, target, **folders):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target, **folders)

    written = write(folder / UNFINISHED, 2, sealed=False)
    monkeypatch.setattr("os.replace", killed)
    monkeypatch.setattr("qlora_helpers.training.checkpoints.verify", lambda path: None)  # it renames its seal too
    with pytest.raises(KeyboardInterrupt):
        put_in_place(written)
    monkeypatch.undo()
    assert steps(folder) == []
    assert newest_good(folder) == folder / "checkpoint-2"
