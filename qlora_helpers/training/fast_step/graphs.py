"""Captures forward and backward passes as CUDA graphs and replays them for every batch of the same shape.

A decoder layer starts some two hundred kernels in a forward and backward pass, each by a call from Python: with small models and
small batches the GPU waits for Python. Packed sequences have one shape, the fast step never waits for the GPU, and no random number
is drawn. So all kernels of a pass can be captured once and launched together (`cuda_graphs`). A replay does to the batch at hand
what the captured pass does.

The passes of the first optimizer step and one more run uncaptured: they compile, choose kernels, and put the optimizer's states and
accumulated gradients where they will stay. Captured passes have memory of their own, which holds activations, and gradients until
the next forward pass. Where the model is called for anything else, such as an evaluation, that memory is freed first. The passes
are captured again afterwards, unless too few of them run between two such calls.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from qlora_helpers.base.units import BYTES_IN_GIB, gib
from qlora_helpers.model import cuda_graphs
from qlora_helpers.model.patching import replace_forward
from qlora_helpers.model.sharding import is_sharded
from qlora_helpers.planning.memory import CAPTURE_ROOM_GIB

MIN_REPLAYS = 10  # the least that pay for a capture, which takes about a second
log = logging.getLogger(__name__)
Replay = Callable[[], None]
Kwargs = dict[str, Any]


class CudaCapture:
    """Captures on a stream of its own."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def __call__(self, *works: Callable[[], object]) -> list[Replay]:
        """Captures each of the works in order, in memory that they share; returns what replays each."""
        self.free()  # what the uncaptured passes held: captured ones have memory of their own
        self._stream.wait_stream(torch.cuda.current_stream())
        pool = cuda_graphs.new_pool()
        graphs = [cuda_graphs.capture(work, pool=pool, stream=self._stream) for work in works]
        torch.cuda.current_stream().wait_stream(self._stream)
        return [graph.replay for graph in graphs]

    @staticmethod
    def refusal() -> str | None:
        """Says why there is no room: a capture allocates anew what a pass needs, and fragmentation comes on top of its peak."""
        free, total = torch.cuda.mem_get_info()
        most = min(free + torch.cuda.memory_reserved(), torch.cuda.get_per_process_memory_fraction() * total)
        peak = torch.cuda.max_memory_allocated()
        if most - peak >= CAPTURE_ROOM_GIB * BYTES_IN_GIB:
            return None
        held = f"{gib(peak):.1f} of {gib(most):.1f} GiB"
        return f"no CUDA graph: uncaptured passes hold {held}, and {CAPTURE_ROOM_GIB} must be free"

    def free(self) -> None:
        """Frees the memory and the cuBLAS workspaces of captured passes, once the last reference to a graph is gone."""
        torch.cuda.synchronize()  # replays ran on another stream than the one that owns the memory
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # PyTorch keeps one for each stream and thread that ever multiplied matrices
        torch.cuda.empty_cache()


class CapturedPasses:
    """Calls a model that returns a loss, by replaying a graph where one was captured for the shapes at hand.

    Args:
        forward: the model's own.
        trained: weights that get gradients.
        passes_before: how many passes of one shape run uncaptured first.
        prepare: does to a batch what can't be captured; keyword arguments in and out.
        capture: see `CudaCapture`; another one in tests.

    Attributes:
        refusal: why nothing is captured any more, or None.
        replayed: how many forward passes were replayed.
        capture_s: seconds that the last capture took; 0 where there was none.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        trained: list[torch.nn.Parameter],
        *,
        passes_before: int,
        prepare: Callable[[Kwargs], Kwargs] | None,
        capture: Any,
    ) -> None:
        self._forward, self._trained, self._passes_before = forward, trained, passes_before
        self._prepare, self._capture = prepare or dict, capture
        self.refusal: str | None = None
        self.replayed, self.capture_s = 0, 0.0
        self._shape: tuple[Any, ...] | None = None
        self._seen = 0  # passes of this shape
        self._since_release, self._between_releases = 0, MIN_REPLAYS
        self._inputs: dict[str, torch.Tensor] = {}
        self._others: Kwargs = {}
        self._loss: Any = None
        self._gradients: tuple[torch.Tensor | None, ...] = ()
        device = trained[0].device
        self._upstream = torch.ones((), device=device)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._replays: list[Replay] = []

    def __call__(self, kwargs: Kwargs) -> Any:
        """Returns what the model returns, or `{"loss": loss}` where the pass was replayed."""
        if self.refusal is None:
            inputs, others = _split_tensors(self._prepare(kwargs))
            shape = (tuple((name, each.shape, each.dtype) for name, each in sorted(inputs.items())), repr(others))
            if shape != self._shape:
                self.release()
                self._shape, self._seen = shape, 0
            self._seen += 1
            self._since_release += 1
            if self._seen > self._passes_before and self._ready(inputs, others):
                return {"loss": _Replayed.apply(self._anchor, self)}
        return self._forward(**kwargs)

    def release(self) -> None:
        """Frees the captured passes; the next passes of the same shape are captured again."""
        if self._since_release:
            self._between_releases, self._since_release = self._since_release, 0
        if not (self._replays or self._inputs):
            return
        try:
            self._keep_gradients()
        finally:
            self._replays, self._gradients, self._loss, self._inputs, self._others = [], (), None, {}, {}
            self._capture.free()

    def _ready(self, inputs: dict[str, torch.Tensor], others: Kwargs) -> bool:
        """Copies the batch to where the captured passes read it, and captures them where that was not done yet."""
        if not self._replays:
            if self._between_releases < MIN_REPLAYS:
                return False
            self.refusal = self._capture.refusal()
            if self.refusal:
                log.warning("passes run uncaptured: %s", self.refusal)
                return False
        if not self._inputs:
            self._inputs = {name: torch.empty_like(each, device=self._upstream.device) for name, each in inputs.items()}
        for name, each in inputs.items():
            self._inputs[name].copy_(each, non_blocking=True)
        if self._replays:
            return True
        self._others, started = others, time.monotonic()
        try:
            self._replays = self._capture(self._run_forward, self._run_backward)
            self.capture_s = time.monotonic() - started
        except Exception as error:
            self.refusal = cuda_graphs.capture_refusal(error)
        if self.refusal:  # outside of the handler: the error is gone, and with its frames what they held
            log.warning("passes run uncaptured: %s", self.refusal)
            self.release()
        return self.refusal is None

    def _run_forward(self) -> None:
        self._loss = self._forward(**self._inputs, **self._others)["loss"]

    def _run_backward(self) -> None:
        self._gradients = torch.autograd.grad(
            self._loss, self._trained, self._upstream.to(self._loss.dtype), allow_unused=True
        )
        self._loss = self._loss.detach()  # and with it the graph that autograd kept

    def _replay_forward(self) -> torch.Tensor:
        self._keep_gradients()
        self._replays[0]()
        self.replayed += 1
        return self._loss.clone()

    def _replay_backward(self, upstream: torch.Tensor) -> None:
        self._upstream.copy_(upstream)
        self._replays[1]()
        for weight, gradient in zip(self._trained, self._gradients, strict=True):
            if gradient is None:
                continue
            if weight.grad is None:
                weight.grad = gradient
            else:
                weight.grad.add_(gradient)

    def _keep_gradients(self) -> None:
        """Copies gradients that later passes add to out of the memory that the next replay overwrites."""
        for weight, gradient in zip(self._trained, self._gradients, strict=False):
            if weight.grad is not None and gradient is not None and weight.grad.data_ptr() == gradient.data_ptr():
                weight.grad = gradient.clone()


class _Replayed(torch.autograd.Function):
    """The loss of a replayed forward pass; its backward pass replays the other graph."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, passes: CapturedPasses) -> torch.Tensor:
        ctx.passes = passes
        loss = passes._replay_forward()
        ctx.number = passes.replayed
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[None, None]:
        if ctx.number != ctx.passes.replayed:
            raise RuntimeError("a replayed forward pass needs its backward pass before the next forward pass")
        ctx.passes._replay_backward(upstream)
        return None, None


def _split_tensors(kwargs: Kwargs) -> tuple[dict[str, torch.Tensor], Kwargs]:
    """Separates the tensors from the other arguments."""
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in kwargs.items() if name not in tensors}


@contextmanager
def passes_captured(
    model: torch.nn.Module,
    *,
    passes_before: int,
    prepare: Callable[[Kwargs], Kwargs] | None = None,
    capture: Any = None,
) -> Iterator[CapturedPasses]:
    """While open, passes of a model in training that is given labels are captured and replayed.

    Args:
        model: the outermost model that is called; `graph_refusal` gives None for it.
        passes_before: how many run uncaptured first.
        prepare: does to a batch what can't be captured.
        capture: None captures CUDA graphs.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    own = model.forward
    passes = CapturedPasses(
        own, trained, passes_before=passes_before, prepare=prepare, capture=capture or CudaCapture()
    )

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("labels") is None or not (model.training and torch.is_grad_enabled()):
            passes.release()
            return own(*args, **kwargs)
        return passes(kwargs)

    with ExitStack() as undo:
        undo.callback(passes.release)
        replace_forward(model, forward, undo)
        yield passes


def graph_refusal(model: torch.nn.Module, *, packed: bool, dropout: bool, listed: bool) -> str | None:
    """Says why a model's passes can't be captured, or None where it may be tried.

    Args:
        model: with its adapters.
        packed: whether all batches have one shape.
        dropout: whether a pass draws random numbers.
        listed: whether batches list their trained tokens, all in lists of the same length.
    """
    weights = list(model.parameters())
    places = {weight.device for weight in weights}
    if any(place.type != "cuda" for place in places):
        return "passes are captured on CUDA GPUs only"
    if places != {torch.device("cuda", torch.cuda.current_device())}:
        return "passes are captured on one GPU, the current one"
    if is_sharded(model):
        return "layers are gathered from several processes: no pass is captured"
    if not packed:
        return "padded rows differ in length: no pass is captured"
    if dropout:
        return "dropout draws new masks at every pass: none is captured"
    if not listed:
        return "the trained tokens of batches differ in number: no pass is captured"
    if any(weight.dtype == torch.float16 for weight in weights):
        return "float16 trains under autocast, with a scaled loss: no pass is captured"
    return None
