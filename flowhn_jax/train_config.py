"""The keys of `train`: steps, optimizer, learning rate, and what a run logs and keeps."""

import dataclasses
import re

from flowhn_jax.storage import check_scheme
from flowhn_jax.utils.checks import nearest_multiples, require, require_positive

REMATS = ("none", "dots", "full")
MOMENT_DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
_CHECKPOINT = re.compile(r"(^|/)checkpoints/\d+/?$")
WRITERS = ("jsonl", "tensorboard", "wandb", "trackio")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; optimizer and rates default to the paper's at 135M.

    Attributes:
      steps: updates of the run.
      batch_size: sequences per step, over all devices.
      accumulate: micro-batches per step; the update is that of one large batch.
      learning_rate: peak of the schedule, reached after the warm-up.
      schedule: what follows the warm-up: 'cosine' and 'linear' fall to the final rate at the last
        step; 'wsd' (warm-up, stable, decay; arXiv 2404.06395) stays at the peak and falls linearly
        in the cooldown; 'constant' stays at the peak.
      final_learning_rate: learning rate at the end, as a share of the peak; 'constant' has none.
      warmup: share of the steps in which the learning rate rises linearly.
      cooldown: share of the steps, the last ones, in which the rate of schedule 'wsd' falls.
      optimizer: 'adamw', or 'muon' (arXiv 2502.16982), which trains the matrices between embedding
        and head by orthogonalized means of gradients (decay rate 0.95, Nesterov), and all other
        parameters by AdamW. Each step subtracts learning_rate * (update + weight_decay * matrix),
        as AdamW's does, and Muon's updates are scaled by 0.2 * sqrt(max(inputs, outputs)) to the
        size of AdamW's, so that a learning rate of AdamW is one to start from.
      beta1: AdamW's decay rate of the mean of gradients.
      beta2: AdamW's decay rate of the mean of squared gradients.
      epsilon: AdamW's epsilon.
      moment_dtype: type in which the optimizer's mean of gradients is stored: 'float32', or
        'bfloat16' for 2 bytes per parameter less memory and 4 less traffic per step. Arithmetic is
        float32.
      weight_decay: decoupled weight decay, on matrices only.
      ema: decay per step of the weights in an average of the parameters, e.g. 0.999, which is
        validated and saved next to them; 0 for none. It takes 4 bytes per parameter.
      clip_norm: largest global gradient norm; 0 for no clipping.
      z_loss: weight of the squared log-normalizer (arXiv 2204.02311, section 5).
      remat: what the backward pass keeps: 'none' keeps all activations, 'dots' the results of
        matrix products and of fused kernels, 'full' only the blocks' inputs.
      seed: seed of the initial parameters.
      init_from: run (workdir) or folder with safetensors and a Hugging Face config, local, gs:// or
        hf://, whose parameters a new run starts from; '' for random ones.
      branch_from: a checkpoint WORKDIR/checkpoints/STEP at which a workdir without checkpoints
        begins: parameters, optimizer, position in the data and rows are those of that run. A
        resume does not read it again; '' for none.
      profile: START:COUNT, the steps of which a profile is written for TensorBoard, e.g. 100:5 for
        the steps 100 to 104; '' for none.
      log_every: steps between logged rows.
      writers: where the rows go, names separated by commas: 'jsonl' (metrics.jsonl, required, since
        a resumed run continues its rows), 'tensorboard', 'wandb' and 'trackio'.
      eval_every: steps between validations.
      eval_windows: validation windows; 0 for the whole validation set.
      checkpoint_every: steps between checkpoints.
      keep_checkpoints: newest checkpoints to keep; the best by validation loss is kept as well.
      best_by: set whose validation loss decides which checkpoint is the best: a name in data.path,
        if that is a mixture, or in data.validation; '' for validation_loss.
      keep_every: checkpoints at multiples of this many steps are never deleted; 0 for none.
      max_skipped: consecutive steps without finite gradients after which the run stops or rewinds.
      rewinds: how often the run may return to the last good checkpoint and skip the data after it.
      debug_nans: stop at the operation that makes the first NaN; slow.
      hang_minutes: minutes without a finished step after which all stacks are printed.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    final_learning_rate: float = 0.1
    warmup: float = 0.1
    cooldown: float = 0.2
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    moment_dtype: str = "float32"
    weight_decay: float = 0.1
    ema: float = 0.0
    clip_norm: float = 1.0
    z_loss: float = 0.0
    remat: str = "none"
    seed: int = 0
    init_from: str = ""
    branch_from: str = ""
    profile: str = ""
    log_every: int = 10
    writers: str = "jsonl,tensorboard"
    eval_every: int = 100
    eval_windows: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    best_by: str = ""
    keep_every: int = 0
    max_skipped: int = 10
    rewinds: int = 0
    debug_nans: bool = False
    hang_minutes: float = 30.0

    def __post_init__(self):
        positive = ("steps", "batch_size", "accumulate", "learning_rate", "epsilon")
        cadence = ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints")
        cadence += ("max_skipped", "hang_minutes")
        require_positive(self, "train", *positive, *cadence)
        for name in ("final_learning_rate", "warmup", "cooldown"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"train.{name}", "0 to 1", value)
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}", "0 or more and below 1", value)
        least_zero = ("weight_decay", "clip_norm", "z_loss", "eval_windows", "seed")
        for name in (*least_zero, "keep_every", "rewinds"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", "0 or more", value)
        require(
            self.batch_size % self.accumulate == 0,
            "train.batch_size",
            f"a multiple of train.accumulate ({self.accumulate}), "
            + nearest_multiples(self.batch_size, self.accumulate),
            self.batch_size,
        )
        for name, others in (("init_from", ("hf",)), ("branch_from", ())):
            try:
                check_scheme(getattr(self, name), others)
            except ValueError as error:
                raise ValueError(f"train.{name}: {error}") from error
        branch = "train.branch_from"
        is_step = not self.branch_from or _CHECKPOINT.search(self.branch_from) is not None
        require(is_step, branch, "a checkpoint WORKDIR/checkpoints/STEP", self.branch_from)
        is_one = not (self.branch_from and self.init_from)
        require(is_one, branch, "'' with train.init_from", self.branch_from)
        steps = self.profiled_steps
        require(
            not self.profile or (len(steps) > 0 and 1 <= steps[0] <= steps[-1] <= self.steps),
            "train.profile",
            f"START:COUNT, e.g. 5:3 for the steps 5 to 7, from 1 to train.steps ({self.steps})",
            self.profile,
        )
        choices = {
            "remat": REMATS,
            "moment_dtype": MOMENT_DTYPES,
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"train.{name}", f"one of {', '.join(allowed)}", value)
        require(
            self.schedule != "wsd" or self.warmup + self.cooldown <= 1,
            "train.cooldown",
            f"at most 1 - train.warmup ({1 - self.warmup:g}) for train.schedule 'wsd'",
            self.cooldown,
        )
        names = self.writers.split(",")
        require(
            "jsonl" in names and set(names) <= set(WRITERS) and len(names) == len(set(names)),
            "train.writers",
            "jsonl, whose rows a resumed run continues, and any of "
            f"{', '.join(WRITERS[1:])}, each once and separated by commas",
            self.writers,
        )

    @property
    def profiled_steps(self) -> range:
        """The steps that `profile` names; none if it is '' or not of its form."""
        found = re.fullmatch(r"(\d{1,18}):(\d{1,18})", self.profile)
        if found is None:
            return range(0)
        start, count = int(found[1]), int(found[2])
        return range(start, start + count)
