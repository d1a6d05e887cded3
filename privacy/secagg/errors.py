"""What secure aggregation refuses, each by a type of its own, named after the attack or the fault.

A refusal is one line: what was expected, what was got. None of it depends on records.
"""

from ...config import FedveilError


class SecAggError(FedveilError):
    """A message, a number or a state that the protocol does not allow."""


class MalformedMessageError(SecAggError):
    """Bytes that are no message, or a value that has no place in one."""


class UnsafeNumbersError(SecAggError):
    """Numbers n, t, n_min, t_collude or blocks under which the sum would not be safe."""


class LoweredThresholdError(UnsafeNumbersError):
    """A threshold with which two sets of honest sites could be made to sign two sets."""


class TooManyColludersError(UnsafeNumbersError):
    """More colluding sites than these numbers are safe against."""


class BelowFloorError(SecAggError):
    """A federation that is smaller, or safe against fewer, than the site's owner allows."""


class UnknownSiteError(SecAggError):
    """A site that is not on the roster, or not among the members."""


class SwappedIdentityError(SecAggError):
    """A site's name under another identity than the pinned one."""


class SwappedKeysError(SecAggError):
    """Round keys that the site whose they should be did not sign."""


class WeakKeyError(SecAggError):
    """A public key with which everyone agrees on the same secret."""


class ReusedKeyError(SecAggError):
    """The same bytes as a key in two places: a mask key serves one attempt at one round."""


class DifferentSetupError(SecAggError):
    """Another set-up than this site's: other numbers, another roster, run or epoch."""


class DifferentRosterError(SecAggError):
    """Different rosters shown to different sites."""


class DifferentModelError(SecAggError):
    """Another model than the one whose hash is signed."""


class DifferentContextError(SecAggError):
    """A message of another round, or of this one on other terms: model, blocks, members."""


class WrongPhaseError(SecAggError):
    """A message that has no place at this point of the protocol."""


class WrongRoundError(SecAggError):
    """A round that is over, burnt, beyond the epoch or not the current one."""


class StaleEpochError(SecAggError):
    """An epoch that is over, or older than one that is over."""


class LostStateError(SecAggError):
    """State that is gone or cannot be read: a new epoch is needed."""


class StateInUseError(SecAggError):
    """State that another process, thread or object holds, or has changed."""


class TwoVectorsError(SecAggError):
    """A second vector under the masks of one (epoch, round): a two-time pad."""


class NotKeptError(TwoVectorsError):
    """A vector that was sent before a restart: the site has it no more, and makes no second one."""


class SplitViewError(SecAggError):
    """Two sets of uploaders for one round, shown to different sites or to one."""


class SecondUnmaskError(SecAggError):
    """A second answer to the unmasking of one round."""


class AliveAndDeadError(SecAggError):
    """A site listed both as an uploader and as dropped, or as neither."""


class TooFewSitesError(SecAggError):
    """Fewer sites than the numbers ask for."""


class TooFewConfirmationsError(SecAggError):
    """Fewer than t signatures on the set of uploaders."""


class ForgedSignatureError(SecAggError):
    """A signature that the site whose it should be did not make."""


class MisdirectedShareError(SecAggError):
    """A sealed share of another kind, or for or from another site."""


class TamperedCiphertextError(SecAggError):
    """A ciphertext that its key does not open: altered, or of another context."""


class WrongShareError(SecAggError):
    """Shares from which the secret that was committed to does not come out."""


class DuplicateMessageError(SecAggError):
    """A second message of a site in one phase."""


class RolledBackLedgerError(SecAggError):
    """A ledger that has no more entries than the site has signed before: nothing was debited."""
