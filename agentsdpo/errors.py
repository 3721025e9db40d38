"""One hierarchy of errors. Each says what happened, the values that disagree, and the fix.

Every class also inherits the standard exception that fits, so a caller who knows nothing of this package
can still write ``except ValueError``. The command line prints the message alone and exits with ``exit_code``.

>>> error = ConfigError("learn.cap is 0.5", fix="set it to 1 or more: a cap below one floors every ratio")
>>> str(error)
'learn.cap is 0.5; set it to 1 or more: a cap below one floors every ratio'
>>> isinstance(error, ValueError), error.exit_code
(True, 2)
"""


class AgentSdpoError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: what happened, with the values that disagree.
        fix: what the user can do about it; appended to the message.
    """

    exit_code = 1

    def __init__(self, what: str, *, fix: str = "") -> None:
        self.what, self.fix = what, fix
        super().__init__(f"{what}; {fix}" if fix else what)


class ConfigError(AgentSdpoError, ValueError):
    """A configuration that is unknown, mistyped, out of range, or makes no sense together."""

    exit_code = 2


class ModelError(AgentSdpoError, OSError):
    """A model folder that is missing, incomplete, or lacks what an agent needs (a chat template)."""

    exit_code = 2


class TokenizerMismatch(AgentSdpoError, ValueError):
    """Tokenizer, template or vocabulary differ between the data and the model that is to learn from it."""


class StoreError(AgentSdpoError, OSError):
    """The replay store cannot be opened, read or written."""


class StoreNotFound(StoreError):
    """No store at this place, or nothing in it under this name."""

    exit_code = 4


class CorruptionError(StoreError):
    """Stored bytes are not the bytes that were written; names the file and the branch."""


class RowError(StoreError, ValueError):
    """A branch that breaks a row rule of the store (mismatched lengths, NaN or positive log-prob, ...)."""


class RegistryError(AgentSdpoError, OSError):
    """The policy registry lacks a version, or its folder cannot be read or written."""


class PushError(AgentSdpoError, RuntimeError):
    """A policy version could not be brought onto an inference server, or a server's answer to a probe is wrong."""


class FormatError(AgentSdpoError, ValueError):
    """A file to import that is not in the format it should be in, or that would lose something on the way."""


class TrainForbidden(AgentSdpoError, PermissionError):
    """Data of a task whose licence forbids training was about to reach the learner."""


class EnvError(AgentSdpoError, RuntimeError):
    """Infrastructure fault of an environment: the attempt is unscored and may be retried, never a zero."""


class EngineError(AgentSdpoError, RuntimeError):
    """The engine failed or answered with something that cannot be recorded exactly."""


class TruncatedSampling(EngineError, ValueError):
    """Truncated sampling (top-p, top-k) without a kept set: the ratio would be biased, so training refuses."""


class HintError(AgentSdpoError, ValueError):
    """A hint that cannot be rendered without touching the scored tokens."""


class LearnError(AgentSdpoError, RuntimeError):
    """The learner met a batch or a loss it must not train on (all masked, too stale, not finite)."""


class NothingToLearn(LearnError):
    """Nothing of one batch can be trained on (too stale, refused, masked, gated); the next batch may be another matter.

    Args:
        reason: ``refused`` (rows, before any forward), ``alike`` (most of them for grades that are all alike),
            ``gated`` (every loss token, masked or gated) or ``no_gradient`` (exactly 0: loss tokens without weight, a
            teacher who says what the student says).
    """

    def __init__(self, what: str, *, reason: str = "refused", fix: str = "") -> None:
        super().__init__(what, fix=fix)
        self.reason = reason


class NotFinite(LearnError):
    """Loss or gradient of a step is infinite or no number; nothing was updated."""


class RunError(AgentSdpoError, ValueError):
    """A run folder or its numbers cannot be read: a missing file, a broken line, more passes than attempts."""


class RunOver(RunError):
    """A run that the tripwire has ended: to go on with it would only go wrong again."""

    exit_code = 2


class OutputError(AgentSdpoError, OSError):
    """A file that a user asked for cannot be written where it was asked for."""
