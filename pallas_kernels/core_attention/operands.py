"""What core attention takes of its queries."""

from typing import NamedTuple

from jaxtyping import Array, Float, Float32, Int32


class Queries(NamedTuple):
    """A block of c queries and what decides their view; every field is [B, c, ...]."""

    q: Float[Array, "B c H Dh"]  # rotated
    position: Int32[Array, "B c"]  # tokens from the start of the segment
    lo: Int32[Array, "B c"] | None  # entries lo <= s < hi are of the query's segment and complete
    hi: Int32[Array, "B c"] | None
    index_q: Float[Array, "B c Hi Di"] | None  # of CSA: the indexer's queries
    index_weights: Float32[Array, "B c Hi"] | None  # and the weights of its heads
