"""stub"""
import dataclasses

@dataclasses.dataclass(frozen=True, slots=True)
class BlockPlan:
    rows: int
    streamed: bool
    upcast: bool = True
