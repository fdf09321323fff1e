"""The op table: what each op means. A model is written once against it, and an implementation is an object that has
all of these methods; a backend brings it together with memory of its own layout.

Ops are the only thing that touches activations: a model neither slices, adds nor reshapes what an op returned, and what
it gets may be a mere name for something that is computed later. So an implementation can run the ops as they are
called (`reference`), or record the calls of a step once as a plan and replay it (`cpu`).

Letters in shapes: T tokens of the step, H hidden size, Q query heads, K key/value heads (Q is a multiple of K;
query head h reads key/value head h // (Q / K)), D head size, F width of the MLP, V vocabulary, R rows.
"Activations" are of one floating dtype, that of the weights, or more precise. Sums of products and the softmax
accumulate in float32 whatever that dtype is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine.checkpoints.weights import Place
from engine.kernels.batch import RaggedBatch
from engine.kernels.kv_cache import KvCache
from engine.parallel.group import Group

Longs = NDArray[np.int64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Rows = Longs
Integers = NDArray[np.int32]

Activation = Literal["identity", "silu", "gelu", "gelu_tanh", "relu", "tanh"]
"""A function of each entry: gelu is x * Phi(x) by the error function, gelu_tanh its approximation by tanh."""

Pooling = Literal["row", "first", "mean", "max"]
"""What a program makes of a sequence before its head: the row asked for, or, over all rows of the sequence that ends
with that row, the first, the mean or the largest of each channel."""


@dataclass(frozen=True, eq=False)
class RotaryFrequencies:
    """inverse: float32 [rotary_dim / 2], on the model's device. factor: multiplies cos and sin."""

    inverse: torch.Tensor
    factor: float


class Matrix(Protocol):
    """Weights [outputs, inputs] and perhaps a bias [outputs], in whatever layout the implementation likes."""

    @property
    def nbytes(self) -> int: ...

    def rows(self, start: int, stop: int) -> Place:
        """The place of weight rows [start, stop)."""
        ...

    def bias(self, start: int, stop: int) -> Place:
        """The place of the bias of these rows. Raises ValueError for a matrix without one."""
        ...


class SharedExpert(NamedTuple):
    """An MLP that every token passes: gate_up, gated [2 S, H]; down [H, S]. gate [1, H]: the sigmoid of its product is
    what the MLP's output is multiplied by."""

    gate_up: Any
    down: Any
    gate: Any


class MoeWeights(NamedTuple):
    """A mixture of E experts: router [E, H]; of each expert gate_ups, gated [2 F, H], and downs [H, F].

    top_k: experts of a token, from 1 to E. normalise: their shares sum to 1.
    """

    router: Any
    gate_ups: tuple[Any, ...]
    downs: tuple[Any, ...]
    top_k: int
    normalise: bool
    shared: SharedExpert | None


class Logprobs(NamedTuple):
    """Log-probabilities of N rows, float32; what is of many per row lies end to end.

    tokens: [N]. top_ids, tops: the most likely ids and theirs, most likely first, the lower id first among equals.
    ids: of the ids asked for.
    """

    tokens: Floats
    top_ids: Longs
    tops: Floats
    ids: Floats


class Program(Protocol):
    """A model's step with its KV pool, ready to run."""

    def run(self, batch: RaggedBatch, rows: Rows, keep: Longs | None = None) -> torch.Tensor:
        """Compute a step: writes the new tokens' K and V into the pool.

        keep: [R], of each row how many of its largest logits are wanted, -1 for all (None: all of all rows). The
        others may be minus infinity.

        Returns what the head makes of `rows` (indices into the batch's tokens), logits for instance: float32 [R, V] on
        the host or the device. The tensor may be overwritten in place, and is valid until the program's next call.
        With another pooling than "row" each row must be the last of a sequence that lies wholly in this step.
        """
        ...

    def logits(self, rows: Rows, keep: Longs | None = None) -> torch.Tensor:
        """The same for other rows of the last step."""
        ...

    def pooled(self) -> torch.Tensor:
        """What the head was last given: float32 [R, H], valid until the program's next call."""
        ...

    def routing(self) -> list[Integers]:
        """The experts that each token of the last step took: of each mixture of experts, in the order of the layers,
        int32 [T, top_k], best first. Empty for a model without any."""
        ...

    def set_profiling(self, on: bool) -> None:
        """Measure from now on how long each kind of op takes, or no more."""
        ...

    def take_profile(self) -> dict[str, float]:
        """Microseconds by kind of op since it was last asked for; empty where ops are not measured."""
        ...


class Ops(Protocol):
    """One implementation of the table. A step object is its own affair: a model only passes it on."""

    def begin_step(
        self,
        batch: RaggedBatch,
        rotaries: tuple[RotaryFrequencies, ...],
        kv_heads: int,
        windows: tuple[int | None, ...],
        *,
        causal: bool = True,
    ) -> Any:
        """What all layers of a step share: rotary angles, and the layout of attention for each of `windows`.

        rotaries: one for each base that layers rotate with; none where positions are told otherwise.
        kv_heads: K, the same in all layers.
        windows: the distinct values of `window` that `attention` will be called with in this step.
        causal: False: every token sees its whole sequence, all of which must then be new; without windows.
        """
        ...

    def embedding(self, token_ids: torch.Tensor, weight: Any, scale: float = 1.0, first: int = 0) -> torch.Tensor:
        """Rows of the matrix `weight` [V, H] for int64 token ids [T], times `scale` → activations [T, H].

        first: the id that row 0 is of; tokens whose row is not in `weight` get zeros."""
        ...

    def embedding_sum(
        self,
        batch: RaggedBatch,
        tokens: Any,
        positions: Any | None,
        types: Any | None,
        first_position: int,
        first: int = 0,
    ) -> torch.Tensor:
        """The sum of three rows for each token → activations [T, H]: of `tokens` [V, H] as in `embedding`, of
        `positions` [P, H] by its position + first_position, and of `types` [S, H] by its type id (None: no such
        part)."""
        ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of what each has computed, x [T, H] → [T, H]; see `engine.parallel.group`."""
        ...

    def linear(self, x: torch.Tensor, weight: Any, activation: Activation = "identity") -> torch.Tensor:
        """x [T, in] times the transpose of the matrix [out, in], plus its bias, `activation` of that → [T, out]."""
        ...

    def gated_linear(self, x: torch.Tensor, weight: Any, activation: Activation = "silu") -> torch.Tensor:
        """activation(gate) * up, the halves of x [T, in] through a gated matrix [2 F, in] → [T, F]."""
        ...

    def moe(self, x: torch.Tensor, weights: MoeWeights) -> torch.Tensor:
        """The sum of a token's experts, and of the shared one → [T, H]: down(silu(gate(x)) * up(x)) times its share.

        A token takes the top_k experts with the largest router logits, the lower one among equals. Their shares are
        the softmax of the logits over all experts, divided by the sum of the shares with `normalise`. Logits and
        shares are float32. A token's experts are added one by one, the one with the largest share first.
        """
        ...

    def rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + residual) normalised by its root mean square and scaled by weight [H]; and x + residual itself.

        x, residual: [T, H]; no residual counts as zeros. Returns (normed, new residual), both [T, H].
        """
        ...

    def layer_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """(x + residual) less its mean, divided by its standard deviation (of variance + eps), times weight [H] plus
        bias [H] → [T, H], which may be the next residual."""
        ...

    def rotary_store(
        self,
        qkv: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        keys: torch.Tensor,
        values: torch.Tensor,
        rotary: int | None,
        step: Any,
    ) -> torch.Tensor:
        """Split fused projections, rotate queries and keys, and write keys and values into the pool.

        qkv: [T, (Q + 2 K) D]: all query heads, then all key heads, then all value heads.
        q_norm, k_norm: [D] or both None: scale of an RMS norm of each head, applied before the rotation.
        keys, values: [K, slots, D], one layer's pool, written at the batch's `slots`.
        rotary: which of the step's rotaries; None: nothing is rotated.
        Of each head the first rotary_dim channels are rotated, channel i with channel i + rotary_dim / 2, by the
        angle position * inverse[i]; the others pass through. Returns the queries, [T, Q, D].
        """
        ...

    def attention(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        window: int | None,
        step: Any,
    ) -> torch.Tensor:
        """Attention of the new tokens over their sequences' contexts in the pool, causal if the step is.

        queries: [T, Q, D]; keys, values: [K, slots, D]. scale multiplies the scores before the softmax.
        window: a token sees itself and at most the window - 1 tokens before it; None: all before it.
        Returns [T, Q D], heads in order.
        """
        ...

    def logits(self, rows: torch.Tensor, weight: Any) -> torch.Tensor:
        """rows [R, H] times the transpose of the matrix [V, H], plus its bias → float32 [R, V], not rounded to the
        weights' dtype."""
        ...

    def vectors(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [R, H] as float32: what a head without a matrix returns."""
        ...


class Backend(Protocol):
    """One implementation with its own memory layouts: allocates weights, and makes programs of models."""

    @property
    def name(self) -> str: ...

    @property
    def prefill_chunk(self) -> int:
        """Prompt tokens of a step by default: so many that products cost far more than reading the weights for them,
        and no more, since streams beside a prefill wait for its step."""
        ...

    @property
    def group(self) -> Group:
        """The ranks that compute a model together; this one's share of it is what is allocated here."""
        ...

    def matrix(
        self, outputs: int, inputs: int, dtype: torch.dtype, *, bias: bool = False, gated: bool = False
    ) -> Matrix:
        """Allocate weights, unfilled. gated: for `gated_linear`; the first half of the outputs are the gates."""
        ...

    def vector(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate the scale of a norm, unfilled: [size] is to be filled, what may come behind it is not."""
        ...

    def compile(
        self,
        step: Callable[[Ops, RaggedBatch, KvCache], Any],
        head: Callable[[Ops, Any], Any],
        cache: KvCache,
        dtype: torch.dtype,
        pooling: Pooling = "row",
    ) -> Program:
        """Make a program of a model's two functions: a step → hidden [T, H], and pooled rows of it [R, H] → logits.

        Both consist of calls of ops. They may be called once, now, or at each step. dtype: of the model's weights.
        """
        ...

    def best(self, logits: torch.Tensor) -> tuple[Longs, Floats]:
        """The largest of each row of logits and its id: int64 [R], float32 [R].

        logits, here and below: float32 [R, V], rows perhaps further apart than V. Among equals the lower id is best;
        a row with a NaN in it has a NaN and id 0. A row's results never depend on the rows beside it.
        """
        ...

    def draw(
        self,
        logits: torch.Tensor,
        rows: Longs,
        temperatures: Doubles,
        top_ks: Longs,
        top_ps: Doubles,
        min_ps: Doubles,
        uniforms: Doubles,
    ) -> Longs:
        """Draw an id from each of N rows: int64 [N]. The other arguments are columns [N].

        With weights w = exp((z - max z) / temperature), float32 (0 where that underflows or z - max z overflows), and
        sums of them in float64 and a fixed order: top_k (at least 1; -1 for all) keeps that many of the largest z, the
        lower id first among equals; top_p in (0, 1] keeps, of those in that order, the ones with no more than top_p of
        the sum of all w before them; min_p in [0, 1] keeps those with w at least min_p. The id is the one in which
        `uniform` in [0, 1) of the sum of what is kept falls, counted by ascending id where top_k and top_p cannot cut
        (top_k -1 or at least V, top_p 1), else in the order of ranks. An id of weight 0 is never drawn. Temperatures
        are above 0; those beyond float32 are as its largest. A row whose largest is not finite gives the id of `best`.
        """
        ...

    def logprobs(
        self,
        logits: torch.Tensor,
        rows: Longs,
        temperatures: Doubles,
        tokens: Longs,
        tops: Longs,
        id_counts: Longs,
        ids: Longs,
    ) -> Logprobs:
        """The log of the softmax of z / temperature for some ids of each of N rows.

        tokens [N]: an id of each row. tops [N]: how many of the most likely ids, at most V. ids: further ids of all
        rows, end to end, id_counts [N] for each. Sums of exponentials are in float64 and a fixed order. A row whose
        largest is not finite has NaN throughout, and 0, 1, ... as its most likely ids.
        """
        ...
