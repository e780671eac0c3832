"""Greedy answers in a fixed number of slots: a slot whose answer has ended takes the next prompt.

Prompts are read by length, the longest first, padded on the left as `model.generate` pads them. All slots take a step together,
each at a position of its own (iteration-level scheduling: Yu et al. 2022, Orca). Knows nothing of text, settings or scores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qlora_helpers.evaluation.fast_answers.cache import SlotCache
from qlora_helpers.evaluation.fast_answers.graphs import CapturedStep
from qlora_helpers.model.sharding import as_in_first, is_sharded
from qlora_helpers.model.wiring import takes_logits_to_keep

STEPS_BETWEEN_LOOKS = 4  # on a GPU, which then rarely waits; an answer that has ended is noticed this late at most
LENGTH_STEP = 256  # the places that a captured step sees grow by so many
FEWEST_ROWS = 8  # of a captured step
PROMPT_TOKENS = 16_384  # of prompts read in one pass; an eighth where the model computes logits at every token


@dataclass(frozen=True)
class Questions:
    """Prompts to be answered greedily.

    Attributes:
        prompts: token ids of each.
        pad: the padding token.
        ends: the tokens that end an answer.
        most: longest answer, tokens.
    """

    prompts: Sequence[Sequence[int]]
    pad: int
    ends: frozenset[int]
    most: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(map(len, self.prompts)) + self.most

    def trim(self, answer: list[int]) -> bool:
        """Cuts an answer after the token that ends it and at the longest answer; returns whether it is finished."""
        place = next((index for index, token in enumerate(answer) if token in self.ends), None)
        if place is not None:
            del answer[place + 1 :]
        del answer[self.most :]
        return len(answer) == self.most or (bool(answer) and answer[-1] in self.ends)


class NotFast(Exception):
    """This model can't be asked the fast way; the message says why."""


@contextmanager
def unusable_cache_explained() -> Iterator[None]:
    """While open, errors of a model's own code become the reason why it can't use our cache.

    Raises:
        NotFast: in their place.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise NotFast(f"the model can't use our cache ({type(error).__name__}: {reason})") from error


class SlotDecoder:
    """Answers prompts greedily in slots.

    Args:
        model: a causal language model in eval mode, with or without adapters.
        slots: answers that grow at once.
        capacity: tokens of the longest prompt with its answer.
        graph_refusal: why steps can't be captured as CUDA graphs, or None.
    """

    def __init__(self, model: torch.nn.Module, *, slots: int, capacity: int, graph_refusal: str | None) -> None:
        self.model, self.slots, self.capacity = model, slots, capacity
        weight = model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, model.dtype
        self.cache = SlotCache(slots, capacity)
        self.tokens, self.places, self.starts = (
            torch.zeros(slots, dtype=torch.long, device=self.device) for _ in range(3)
        )
        self.reach = torch.arange(capacity, device=self.device)
        self.step = CapturedStep(self.grow, (self.tokens, self.places), graph_refusal)
        self.keep = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
        self.steps = 0
        self.sharded = is_sharded(model)

    def _chosen(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the most likely tokens, `(rows,)`."""
        tokens = logits.argmax(-1).to(self.device)
        return as_in_first(tokens) if self.sharded else tokens

    @torch.no_grad()
    def read(self, slots: Sequence[int], prompts: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
        """Reads prompts into slots and returns the logits of their next tokens, `(prompts, vocabulary)`."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=self.device)
        chosen = torch.tensor(slots, device=self.device)
        self.cache.read_prompts(chosen)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            **self.keep,
        ).logits[:, -1]
        self.tokens[chosen] = self._chosen(logits)
        self.places[chosen] = longest
        self.starts[chosen] = longest - mask.sum(1)
        return logits

    @torch.no_grad()
    def grow(self, rows: int, length: int) -> torch.Tensor:
        """Adds a token to each of the first slots, which see `length` places; returns the logits, `(rows, vocabulary)`."""
        places, starts, reach = self.places[:rows], self.starts[:rows], self.reach[:length]
        seen = (reach >= starts[:, None]) & (reach <= places[:, None])
        mask = torch.zeros(rows, length, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill_(~seen, torch.finfo(self.dtype).min)[:, None, None]
        self.cache.take_step(places, length)
        logits = self.model(
            input_ids=self.tokens[:rows, None],
            attention_mask=mask,
            position_ids=(places - starts)[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self.tokens[:rows] = self._chosen(logits)
        self.places[:rows] = (places + 1).clamp(
            max=self.capacity - 1
        )  # a slot whose answer has ended may go on for a few steps
        return logits

    def answer(
        self,
        questions: Questions,
        *,
        progress: Callable[[int], None],
        given: Callable[[int, list[int]], None] = lambda index, tokens: None,
    ) -> list[list[int]]:
        """Returns the new tokens of each prompt, in the order given; an answer that ended keeps its end-of-text token.

        Args:
            questions: the prompts.
            progress: called with how many prompts are answered by now.
            given: called with a prompt's place and its answer, as soon as that has ended.
        """
        prompts = questions.prompts
        waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))
        answers: list[list[int]] = [[] for _ in prompts]
        held: dict[int, int] = {}  # slot -> prompt
        ends: dict[int, int] = {}  # slot -> place of its next token
        while waiting or held:
            free = [slot for slot in range(self.slots) if slot not in held]
            if waiting and (not held or len(free) >= min(max(1, self.slots // 4), len(waiting))):
                for slots, group in self._groups(free, waiting, prompts):
                    self.read(slots, [prompts[index] for index in group], questions.pad)
                    held |= dict(zip(slots, group, strict=True))
                    ends |= dict.fromkeys(slots, len(prompts[group[0]]))
                    self._take([self.tokens.tolist()], slots, held, answers)
            else:
                rows = self._rows(held, ends, refill=bool(waiting))
                steps = min(self._between_looks(), max(questions.most - len(answers[index]) for index in held.values()))
                found = self._steps(rows, steps, max(ends[slot] for slot in held) + steps)
                for slot in held:
                    ends[slot] += steps
                self._take(found, list(held), held, answers)
            done = [slot for slot, index in held.items() if questions.trim(answers[index])]
            for slot in done:
                index = held.pop(slot)
                given(index, answers[index])
            progress(len(prompts) - len(waiting) - len(held))
        return answers

    def release(self) -> None:
        """Frees cache and graphs at once: the captured step refers back to this object, so they would wait for the collector."""
        self.step.release()
        self.cache.keys.clear()
        self.cache.values.clear()

    def _groups(
        self, free: list[int], waiting: deque[int], prompts: Sequence[Sequence[int]]
    ) -> list[tuple[list[int], list[int]]]:
        """Takes waiting prompts for the free slots, in groups that are each read in one pass."""
        limit = PROMPT_TOKENS if self.keep else PROMPT_TOKENS // 8
        groups = []
        while free and waiting:
            together = max(1, limit // max(1, len(prompts[waiting[0]])))
            count = min(together, len(free), len(waiting))
            groups.append((free[:count], [waiting.popleft() for _ in range(count)]))
            free = free[count:]
        return groups

    def _between_looks(self) -> int:
        return STEPS_BETWEEN_LOOKS if self.device.type == "cuda" else 1

    def _rows(self, held: dict[int, int], ends: dict[int, int], *, refill: bool) -> int:
        """Returns how many of the first slots take the next step; higher slots move down where that makes the step smaller."""
        rows = len(held)
        if self.step.refusal is None:
            rows = self.slots
            while rows // 2 >= max(FEWEST_ROWS, len(held)) and not refill:
                rows //= 2
        sources = [slot for slot in held if slot >= rows]
        if refill and self.step.refusal is None or not sources:
            return max(rows, max(held) + 1)
        targets = [slot for slot in range(rows) if slot not in held][: len(sources)]
        self.cache.move(sources, targets)
        for tensor in (self.tokens, self.places, self.starts):
            tensor[targets] = tensor[sources]
        for source, target in zip(sources, targets, strict=True):
            held[target], ends[target] = held.pop(source), ends.pop(source)
        return rows

    def _steps(self, rows: int, steps: int, length: int) -> list[list[int]]:
        """Takes steps and returns the tokens of each, `[steps][rows]`."""
        if self.step.refusal is None:
            length = -(-length // LENGTH_STEP) * LENGTH_STEP
        found = torch.empty(steps, rows, dtype=torch.long, device=self.device)
        for index in range(steps):
            self.step(rows, min(length, self.capacity))
            found[index] = self.tokens[:rows]
        self.steps += steps
        return found.tolist()

    def _take(
        self, found: list[list[int]], slots: Sequence[int], held: dict[int, int], answers: list[list[int]]
    ) -> None:
        for tokens in found:
            for slot in slots:
                answers[held[slot]].append(tokens[slot])
