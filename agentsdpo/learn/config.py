"""Settings of the learner: the objective of ``learn/sdpo.py``, the teacher, the optimiser. Imports nothing heavy."""

from typing import Literal, Self

from pydantic import Field, model_validator

from agentsdpo.errors import ConfigError
from agentsdpo.learn.conflicts import conflicts
from agentsdpo.settings import Settings


class AdapterConfig(Settings):
    """A low-rank adapter instead of full weights: ``learn/adapters.py``.

    >>> AdapterConfig().rank
    0
    """

    rank: int = Field(default=0, ge=0, le=1024, description="rank of the adapter; 0 trains the full weights")
    alpha: int = Field(default=32, ge=1, le=4096, description="scale: the product is multiplied by alpha / rank")
    targets: tuple[str, ...] = Field(default=("all-linear",), min_length=1, description=(
        "ends of the names of the layers adapted, as in 'q_proj'; 'all-linear' is every linear layer of the body"))


class ParallelConfig(Settings):
    """Several processes, one learner: ``learn/parallel.py``.

    >>> ParallelConfig().ranks
    1
    """

    ranks: int = Field(default=1, ge=1, le=65_536, description=(
        "processes the learner is launched with; another number is an error"))
    shard: bool = Field(default=False, description=(
        "each process keeps its part of weights, gradients and optimiser state (FSDP2)"))
    sequence: bool = Field(default=False, description=(
        "processes share every row, some attention heads each (Ulysses); otherwise rows are dealt out"))


class LearnConfig(Settings):
    """One objective, one teacher, one optimiser. Presets are in ``learn/presets.py``.

    Raises:
        ConfigError: (inside pydantic's ValidationError; :func:`~agentsdpo.learn.presets.resolve` unwraps it) fields
            that make no sense together, with the reason.

    >>> LearnConfig().form, LearnConfig().ratio, LearnConfig().control_every
    ('divergence', 'none', 50)
    """

    # ---- what is compared: learn/divergence.py
    form: Literal["divergence", "sampled"] = Field(
        default="divergence", description="divergence over the vocabulary, or the gap on the sampled token alone")
    beta: float = Field(default=0.0, ge=0.0, le=1.0, description="0 forward KL(teacher||student), 1 reverse KL, "
                                                                 "between: generalised JSD (no unit)")
    jsd_scale: Literal["raw", "unit"] = Field(
        default="unit", description="unit divides the JSD by beta(1-beta), so that it meets both KLs at its ends")
    support: Literal["full", "student", "teacher", "union"] = Field(
        default="union", description="ids the divergence is taken over; all but full add one tail bucket")
    top_k: int = Field(default=64, ge=1, le=1024, description="ids per side of a support that is not full")

    # ---- how far the data is: learn/ratio.py, learn/clipper.py, learn/gates.py
    ratio: Literal["none", "is", "tis", "topr", "tis_topr", "ppo", "clamp", "cispo", "icepop", "mis", "dppo",
                   "decoupled", "m2po", "minpro", "turn_geo", "gspo", "seq_tis", "seq_mis"] = Field(
        default="none", description="correction of the importance ratio by name; equations in learn/ratio.py")
    eps_lo: float = Field(default=0.2, gt=0.0, lt=1.0, description=(
        "lower bound 1 - eps_lo of the ratio (ppo, clamp, icepop, decoupled, gspo), or of p - mu (dppo)"))
    eps_hi: float = Field(default=0.2, gt=0.0, le=10.0, description=(
        "upper bound 1 + eps_hi of the ratio (also cispo), or of p - mu (dppo)"))
    cap: float = Field(default=2.0, ge=1.0, le=1000.0, description="largest ratio (no unit); there is no smallest")
    m2_budget: float = Field(default=0.04, gt=0.0, le=10.0, description=(
        "m2po: largest mean (log r)^2 of harmful tokens, nats squared; costs one more scoring of every step"))
    adv_clip: float | None = Field(default=None, gt=0.0, le=100.0,
                                   description="clip |gap| at this many running means; None is off")
    adv_decay: float = Field(default=0.99, ge=0.0, lt=1.0, description="decay of that running mean, per step")
    gate: Literal["off", "k3", "geo"] = Field(
        default="off", description="drop units whose mean K3 exceeds c3, or whose geometric mean ratio is off 1 by geo")
    gate_unit: Literal["turn", "branch"] = Field(default="turn", description="what a gate or a veto drops as a whole")
    c3: float = Field(default=0.1, gt=0.0, le=10.0, description="largest mean K3 of a turn, in nats")
    geo: float = Field(default=0.1, gt=0.0, lt=1.0, description="largest distance of the geometric mean ratio from 1")
    veto: float | None = Field(default=None, gt=0.0, lt=1.0,
                               description="drop a turn that holds a ratio below this; None is off")
    max_staleness: int | None = Field(default=8, ge=0, le=1_000_000,
                                      description="policy versions; older rows are evicted; None is unlimited")
    staleness_decay: float = Field(default=1.0, gt=0.0, le=1.0, description=(
        "factor per policy version of each token's own staleness; 1 is off"))

    # ---- what each token weighs: learn/prior.py, learn/weights.py
    normaliser: Literal["token", "turn", "branch", "episode", "constant"] = Field(
        default="episode", description="what weighs the same as its like; counted before gates")
    loss_tokens: int | None = Field(default=None, ge=1, le=1_000_000_000, description=(
        "normaliser constant: loss tokens of a full step; none elsewhere"))
    token_weight: Literal["off", "sod", "sdar"] = Field(default="off", description=(
        "sod: turns on which the gap is larger than on the first count less; sdar: sigmoid(sdar_slope * gap)"))
    sdar_slope: float = Field(default=1.0, gt=0.0, le=100.0, description="slope of the sdar gate, per nat")
    tool_weight: float = Field(default=1.0, ge=0.0, le=100.0, description="factor of the tokens of tool calls")
    skip_first: int = Field(default=0, ge=0, le=100_000, description="loss tokens of each turn that carry no loss")

    # ---- beside the teacher: learn/mix.py
    mix: Literal["pure", "blend", "add", "credit", "grade"] = Field(default="pure", description=(
        "the objective alone; (1-w) policy gradient + w objective; policy gradient + w objective; policy gradient "
        "whose credit the gap reshapes; policy gradient alone, without a teacher"))
    mix_weight: float = Field(default=0.5, gt=0.0, le=100.0, description="w of blend (below 1) and add")
    advantage: Literal["grpo", "reinforce"] = Field(default="grpo", description=(
        "of an episode's grade: standardised in its group, or less the mean of the step"))
    tau: float = Field(default=0.0, ge=0.0, le=1.0, description="weight of the penalty (log r)^2; 0 is off")
    beta_kl: float = Field(default=0.0, ge=0.0, le=1.0, description=(
        "weight of the K3 penalty to the initial weights, one more forward; 0 is off"))

    # ---- the teacher: learn/teacher.py
    teacher: Literal["live", "ema", "frozen", "snapshot", "gated", "trust_region"] = Field(
        default="frozen", description="whose weights read the hint")
    ema_rate: float = Field(default=0.05, gt=0.0, le=1.0, description="EMA teacher: share of the student per step")
    refresh_every: int = Field(default=100, ge=1, le=1_000_000, description=(
        "optimiser steps: snapshot copies the student every so many, gated at most every so many"))
    trust: float = Field(default=0.05, ge=0.0, le=1.0, description=(
        "trust region: share of the student's logits in the teacher's"))
    allow_live_lr: bool = Field(default=False, description="accept a live teacher above a learning rate of 1e-6")

    # ---- what is trained: learn/adapters.py
    adapter: AdapterConfig = AdapterConfig()
    parallel: ParallelConfig = ParallelConfig()

    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description=(
        "of the model's weights, and with it of what is computed from them; loss, trained weights (their masters), "
        "gradients and moments are float32 either way"))

    # ---- the optimiser
    lr: float = Field(default=1e-6, gt=0.0, le=1.0, description="AdamW learning rate")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW moment decays, each in [0, 1)")
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, description="AdamW decoupled decay, per step times lr")
    grad_clip: float = Field(default=1.0, gt=0.0, le=1e6, description="largest norm of the whole gradient")
    batch: int = Field(default=32, ge=1, le=65_536, description="units of replay.unit, episodes unless told otherwise, "
                                                                "drawn per optimiser step")
    forward_tokens: int = Field(default=8192, ge=1, le=100_000_000, description=(
        "packed tokens per forward, hints included; a longer branch is refused and counted, never cut"))
    recompute: Literal["off", "layers", "offload"] = Field(default="off", description=(
        "layers: a layer's inside is computed again in the backward, about 25 % more time; offload: what is kept of it "
        "waits in the host's memory"))
    mlp_tokens: int | None = Field(default=None, ge=16, le=100_000_000, description=(
        "tokens whose MLP insides exist at a time; none: all of a forward"))
    control_every: int = Field(default=50, ge=0, le=1_000_000, description=(
        "optimiser steps between two looks at what no hint and a wrong hint would have done; 0 is never"))
    parity: bool = Field(default=False, description=(
        "accept what is known to be wrong (a floored ratio, a ratio on a divergence), to compare with who does it"))

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for wrong, what, fix in conflicts(self):
            if wrong:
                raise ConfigError(what, fix=fix)
        return self
