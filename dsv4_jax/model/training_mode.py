"""How a forward pass differs from inference while a model is trained: static, the same for all layers."""

from typing import NamedTuple


class TrainingMode(NamedTuple):
    """A part of what a compiled program is keyed by; the default is what inference does.

    Attributes:
        dense: CSA layers attend to every visible entry; indexers are not asked.
        index_loss: the layers report the indexers' loss: of all visible entries if dense, else of the chosen.
    """

    dense: bool = False
    index_loss: bool = False


INFERENCE = TrainingMode()
