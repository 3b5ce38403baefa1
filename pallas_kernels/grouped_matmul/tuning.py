"""stub"""
import dataclasses

@dataclasses.dataclass(frozen=True, slots=True)
class BlockPlan:
    rows: int
    streamed: bool
    upcast: bool = True


def choose_rows(num_pairs: int, num_experts: int) -> int:
    """Rows of a block: near the mean number of tokens an expert gets, between 8 and 128."""
    mean = num_pairs / num_experts
    for rows in (128, 64, 32, 16):
        if mean >= rows:
            return rows
    return 8
