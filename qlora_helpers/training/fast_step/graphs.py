"""A forward and a backward pass recorded as CUDA graphs, and played again for every batch of that shape.

A decoder layer starts some two hundred kernels in a forward and backward pass, each by a call from Python: with small models and
small batches the GPU waits for them. Packed blocks have one shape, the fast step never waits for the GPU, and no random number is
drawn: so all kernels of a pass can be recorded once and started together (`cuda_graphs`). The values are those of the pass that was
recorded, on the batch at hand.

The passes of the first optimizer step and one more are run as they are: they compile, choose kernels, and leave the optimizer's
states and gradients that add up where they will be. The recorded passes have memory of their own; activations and gradients lie in
it, the gradients until the next forward pass. Where the model is asked for anything else, as in an evaluation, that memory is given
back first, and the passes are recorded again after it, unless too few of them come between two of those.
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
from qlora_helpers.planning.memory import CAPTURE_ROOM_GIB

PASSES_WORTH = 10  # that a recording, which takes about a second, must be played
log = logging.getLogger(__name__)
Play = Callable[[], None]
Kwargs = dict[str, Any]


class CudaRecorder:
    """Records on a stream of its own."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    def __call__(self, *works: Callable[[], object]) -> list[Play]:
        """Records each of the works, in their order, in memory that they share; returns what plays them."""
        self.forget()  # what the passes before held: the recorded ones have memory of their own
        self._stream.wait_stream(torch.cuda.current_stream())
        pool = cuda_graphs.new_pool()
        graphs = [cuda_graphs.recorded(work, pool=pool, stream=self._stream) for work in works]
        torch.cuda.current_stream().wait_stream(self._stream)
        return [graph.replay for graph in graphs]

    @staticmethod
    def refusal() -> str | None:
        """Why there is no room: a recording allocates anew what a pass needs, and holes come on top of a pass's peak."""
        free, total = torch.cuda.mem_get_info()
        most = min(free + torch.cuda.memory_reserved(), torch.cuda.get_per_process_memory_fraction() * total)
        peak = torch.cuda.max_memory_allocated()
        if most - peak >= CAPTURE_ROOM_GIB * BYTES_IN_GIB:
            return None
        held = f"{gib(peak):.1f} of {gib(most):.1f} GiB"
        return f"no CUDA graph: passes as they are hold {held}, and {CAPTURE_ROOM_GIB} must be free"

    def forget(self) -> None:
        """After the last reference to a recording is gone: its memory goes back to the GPU, workspaces of products included."""
        torch.cuda.synchronize()  # it was played on another stream than the one that its memory belongs to
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # PyTorch keeps one for each stream and thread that ever made a product
        torch.cuda.empty_cache()


class CapturedPasses:
    """Calls a model that returns a loss, by a recording where there is one for the shapes at hand.

    Args:
        forward: the model's own.
        trained: weights that get gradients.
        passes_before: how many of one shape are run as they are first.
        prepare: what must be done with a batch that can't be recorded; keyword arguments in and out.
        record: see `CudaRecorder`; another one in tests.

    Attributes:
        refusal: why nothing is recorded any more, or None.
        replayed: forward passes that were played.
        capture_s: how long the last recording took, seconds; 0 where there was none.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        trained: list[torch.nn.Parameter],
        *,
        passes_before: int,
        prepare: Callable[[Kwargs], Kwargs] | None,
        record: Any,
    ) -> None:
        self._forward, self._trained, self._passes_before = forward, trained, passes_before
        self._prepare, self._record = prepare or dict, record
        self.refusal: str | None = None
        self.replayed, self.capture_s = 0, 0.0
        self._shape: tuple[Any, ...] | None = None
        self._seen = 0  # passes of this shape
        self._since_release, self._between_releases = 0, PASSES_WORTH
        self._inputs: dict[str, torch.Tensor] = {}
        self._others: Kwargs = {}
        self._loss: Any = None
        self._gradients: tuple[torch.Tensor | None, ...] = ()
        device = trained[0].device
        self._upstream = torch.ones((), device=device)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._plays: list[Play] = []

    def __call__(self, kwargs: Kwargs) -> Any:
        """What the model returns, or `{"loss": loss}` where the pass was played."""
        if self.refusal is None:
            inputs, others = _parted(self._prepare(kwargs))
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
        """Gives the recording's memory back; the next passes of the same shape are recorded again."""
        if self._since_release:
            self._between_releases, self._since_release = self._since_release, 0
        if not (self._plays or self._inputs):
            return
        try:
            self._keep_gradients()
        finally:
            self._plays, self._gradients, self._loss, self._inputs, self._others = [], (), None, {}, {}
            self._record.forget()

    def _ready(self, inputs: dict[str, torch.Tensor], others: Kwargs) -> bool:
        """Puts the batch where the recorded passes look for it, and records them where that was not done."""
        if not self._plays:
            if self._between_releases < PASSES_WORTH:
                return False
            self.refusal = self._record.refusal()
            if self.refusal:
                log.warning("passes are run as they are: %s", self.refusal)
                return False
        if not self._inputs:
            self._inputs = {name: torch.empty_like(each, device=self._upstream.device) for name, each in inputs.items()}
        for name, each in inputs.items():
            self._inputs[name].copy_(each, non_blocking=True)
        if self._plays:
            return True
        self._others, started = others, time.monotonic()
        try:
            self._plays = self._record(self._run_forward, self._run_backward)
            self.capture_s = time.monotonic() - started
        except Exception as error:
            self.refusal = cuda_graphs.refusal_of(error)
        if self.refusal:  # out here the error and its frames are gone, and with them what they held
            log.warning("passes are run as they are: %s", self.refusal)
            self.release()
        return self.refusal is None

    def _run_forward(self) -> None:
        self._loss = self._forward(**self._inputs, **self._others)["loss"]

    def _run_backward(self) -> None:
        self._gradients = torch.autograd.grad(
            self._loss, self._trained, self._upstream.to(self._loss.dtype), allow_unused=True
        )
        self._loss = self._loss.detach()  # and with it the graph that autograd kept

    def _play_forward(self) -> torch.Tensor:
        self._keep_gradients()
        self._plays[0]()
        self.replayed += 1
        return self._loss.clone()

    def _play_backward(self, upstream: torch.Tensor) -> None:
        self._upstream.copy_(upstream)
        self._plays[1]()
        for weight, gradient in zip(self._trained, self._gradients, strict=True):
            if gradient is None:
                continue
            if weight.grad is None:
                weight.grad = gradient
            else:
                weight.grad.add_(gradient)

    def _keep_gradients(self) -> None:
        """Gradients that later passes add to leave the memory that the next pass writes over."""
        for weight, gradient in zip(self._trained, self._gradients, strict=False):
            if weight.grad is not None and gradient is not None and weight.grad.data_ptr() == gradient.data_ptr():
                weight.grad = gradient.clone()


class _Replayed(torch.autograd.Function):
    """The loss of a played forward pass; its backward pass plays the other recording."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, passes: CapturedPasses) -> torch.Tensor:
        ctx.passes = passes
        loss = passes._play_forward()
        ctx.number = passes.replayed
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[None, None]:
        if ctx.number != ctx.passes.replayed:
            raise RuntimeError("a played forward pass takes its backward pass before the next forward pass")
        ctx.passes._play_backward(upstream)
        return None, None


def _parted(kwargs: Kwargs) -> tuple[dict[str, torch.Tensor], Kwargs]:
    """Tensors, and what is none."""
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in kwargs.items() if name not in tensors}


@contextmanager
def passes_captured(
    model: torch.nn.Module, *, passes_before: int, prepare: Callable[[Kwargs], Kwargs] | None = None, record: Any = None
) -> Iterator[CapturedPasses]:
    """While open, passes of a model in training that is given labels are recorded and played.

    Args:
        model: the outermost one that is called; `graph_refusal` gives None for it.
        passes_before: how many are run as they are first.
        prepare: what must be done with a batch that can't be recorded.
        record: None records CUDA graphs.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    own = model.forward
    passes = CapturedPasses(own, trained, passes_before=passes_before, prepare=prepare, record=record or CudaRecorder())

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
    """Why a model's passes can't be recorded, or None where they may be tried.

    Args:
        model: with its adapters.
        packed: whether all batches have one shape.
        dropout: whether a pass draws random numbers.
        listed: whether batches list their trained tokens, in lists of one length.
    """
    weights = list(model.parameters())
    places = {weight.device for weight in weights}
    if any(place.type != "cuda" for place in places):
        return "passes are recorded on CUDA GPUs alone"
    if places != {torch.device("cuda", torch.cuda.current_device())}:
        return "passes are recorded on one GPU, the current one"
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return "several processes average their gradients: no pass is recorded"
    if not packed:
        return "padded rows differ in length: no pass is recorded"
    if dropout:
        return "dropout draws new masks at every pass: none is recorded"
    if not listed:
        return "the trained tokens of batches differ in number: no pass is recorded"
    if any(weight.dtype == torch.float16 for weight in weights):
        return "float16 trains under autocast, with a loss that is scaled: no pass is recorded"
    return None
